"""The built-in simulator, on Warp: the same kernels on the CPU and on CUDA."""

from envs.simulators.raycast.simulator import RaycastSimulator

__all__ = ["RaycastSimulator"]
