"""Simulators whose scenes live in worker processes: what crashes there is started again.

The processes hold no state. They draw agents at poses that they are told into memory that all share, and
answer questions about where one can walk; what an agent is doing is known here alone. So all that was asked
of a worker that dies is answered by the one in its place. Whose worker died is told
(:meth:`envs.simulators.base.Simulator.take_deaths`), so that their episodes can begin again.
"""
