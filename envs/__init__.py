"""The world: scenes, simulators, the PointNav task and its environments.

Importing this package registers ``navagent/PointNav-v0`` with Gymnasium, so that
``gymnasium.make("envs:navagent/PointNav-v0")`` works without an import of one's own.
"""

from envs.registration import register_envs

register_envs()
