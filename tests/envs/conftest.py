import math
from pathlib import Path

import pytest
import torch

from envs.episodes import Episode
from envs.simulators.base import Action, AgentSpec, SensorSpec, Simulator


class FlatPaths:
    """Queries on empty square rooms, where every shortest path is a straight line."""

    def __init__(self, half_size):
        self.device = torch.device("cpu")
        self.half_size = half_size

    def inside(self, points):
        limit = torch.tensor([self.half_size, math.inf, self.half_size])
        return points.clamp(-limit, limit)

    def is_navigable(self, scene, points, max_y_delta=0.5):
        return (self.inside(points) == points).all(1)

    def snap(self, scene, points):
        return self.inside(points)

    def island_radius(self, scene, points):
        return torch.full((len(points),), self.half_size)

    def distance_to_obstacle(self, scene, points, max_distance=2.0):
        return (self.half_size - points[:, [0, 2]].abs()).amin(1).clamp(0.0, max_distance)

    def geodesic_distance(self, scene, start, goal):
        return (start - goal).norm(dim=1)

    def path(self, scene, start, goal, max_points=128):
        points = torch.zeros(len(start), max_points, 3)
        points[:, 0], points[:, 1] = start, goal
        return points, torch.full((len(start),), 2)

    def try_step(self, scene, start, target, allow_sliding):
        end = self.inside(target)
        return end if allow_sliding else torch.where((end == target).all(1)[:, None], end, start)

    def sample(self, scene, generator):
        points = (torch.rand(len(scene), 3, generator=generator) * 2 - 1) * self.half_size
        points[:, 1] = 0
        return points


class FlatSimulator(Simulator):
    """Empty square rooms. A pixel's value tells scene and pose, so that mix-ups show."""

    def __init__(self, num_agents, sensors=(), agent=None, half_size=5.0, scenes=("room.glb",)):
        self.num_agents = num_agents
        self.device = torch.device("cpu")
        self.sensors = tuple(sensors)
        self.agent = agent or AgentSpec()
        self.paths = FlatPaths(half_size)
        self.loads = []
        self.closed = 0
        self.load_scenes([Path(scene) for scene in scenes])
        self.scene = torch.zeros(num_agents, dtype=torch.int64)
        self.position = torch.zeros(num_agents, 3)
        self.yaw = torch.zeros(num_agents)
        self.collided = torch.zeros(num_agents, dtype=torch.bool)

    def load_scenes(self, scenes):
        self.scenes = tuple(scenes)
        self.loads.append(self.scenes)

    def reset(self, agents, scene, position, yaw):
        assert (scene < len(self.scenes)).all()
        self.scene[agents] = scene
        self.position = self.position.index_copy(0, agents, position)
        self.yaw = self.yaw.index_copy(0, agents, yaw)
        self.collided = self.collided.index_fill(0, agents, False)

    def step(self, actions):
        turn = math.radians(self.agent.turn_angle_deg)
        forward = actions == Action.MOVE_FORWARD
        ahead = torch.stack([-torch.sin(self.yaw), torch.zeros_like(self.yaw), -torch.cos(self.yaw)], 1)
        target = self.position + self.agent.forward_step * forward[:, None] * ahead
        end = self.paths.try_step(self.scene, self.position, target, self.agent.allow_sliding)
        self.collided = (end - self.position).norm(dim=1) + 1e-5 < (target - self.position).norm(dim=1)
        self.position = end
        left, right = actions == Action.TURN_LEFT, actions == Action.TURN_RIGHT
        self.yaw = self.yaw + turn * (left.float() - right.float())

    def render(self, agents=None):
        agents = torch.arange(self.num_agents) if agents is None else agents
        images = {}
        for sensor in self.sensors:
            shape = (len(agents), sensor.height, sensor.width)
            depth = (self.position[agents, 0] + self.half_size)[:, None, None].expand(shape).clone()
            images[sensor.name] = depth if sensor.kind == "depth" else self._colour(agents, shape)
        return images

    def _colour(self, agents, shape):
        image = torch.zeros(*shape, 3, dtype=torch.uint8)
        image[..., 0] = self.scene[agents].to(torch.uint8)[:, None, None]
        image[..., 1] = ((self.position[agents, 2] + self.half_size) * 20).to(torch.uint8)[:, None, None]
        image[..., 2] = torch.remainder(self.yaw[agents] * 40, 256).to(torch.uint8)[:, None, None]
        return image

    @property
    def half_size(self):
        return self.paths.half_size

    def close(self):
        self.closed += 1


def make_episode(number, scene="room.glb", start=(0.0, 0.0, 0.0), yaw=0.0, goal=(0.0, 0.0, -2.0)):
    rotation = (0.0, math.sin(yaw / 2), 0.0, math.cos(yaw / 2))
    return Episode(str(number), scene, start, rotation, goal, None, math.dist(start, goal))


@pytest.fixture
def flat_simulator():
    """Makes simulators of empty rooms."""
    return FlatSimulator


@pytest.fixture
def episode():
    """Makes episodes in empty rooms; by default the goal lies 2 m straight ahead."""
    return make_episode


@pytest.fixture
def rgb():
    return SensorSpec("rgb", "rgb", height=36, width=36)


@pytest.fixture
def depth():
    return SensorSpec("depth", "depth", height=8, width=8)
