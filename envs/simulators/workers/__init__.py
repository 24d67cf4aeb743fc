"""Simulators whose scenes live in worker processes: what crashes there is started again, and nothing is lost.

The processes hold no state. They draw agents at poses that they are told into memory that all share, and
answer questions about where one can walk; what an agent is doing is known here alone. So a worker that dies
costs the time to load its scenes again.
"""
