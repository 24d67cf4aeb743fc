import math
from pathlib import Path

import pytest
import torch

from envs.episodes import generate_episodes
from envs.expert import NO_MOVE, ShortestPathFollower
from envs.sampler import EpisodeSampler
from envs.scenes.navmesh_file import read_navmesh
from envs.scenes.pathfinder import PathFinder
from envs.simulators.base import Action, AgentSpec
from envs.task import PointNavConfig
from envs.vector_env import PointNavVectorEnv

BODY = {"apartment": (0.18, 0.88), "loft": (0.18, 0.88), "studio": (0.1, 1.5)}


@pytest.fixture
def follow(flat_simulator, reference_dir):
    """Lets the expert walk generated episodes of a recorded scene; returns the measures."""

    def run(scene, num=48, task=None, **agent):
        radius, height = BODY[scene]
        spec = AgentSpec(radius=radius, height=height, **agent)
        paths = PathFinder([read_navmesh(reference_dir / f"{scene}.navmesh")], num_threads=1)
        simulator = flat_simulator(16, agent=spec)
        simulator.paths = paths
        episodes = generate_episodes(paths, 0, "room.glb", num, seed=0)
        sampler = EpisodeSampler(episodes, 16, {"room.glb": Path("room.glb")}, mode="once")
        env = PointNavVectorEnv(simulator, task or PointNavConfig(), sampler, ["pointgoal"])
        env.reset()
        success, spl = [], []
        while env.active.any():
            infos = env.step(env.expert_actions())[4]
            if "_episode" in infos:
                success += infos["episode"]["success"][infos["_episode"]].tolist()
                spl += infos["episode"]["spl"][infos["_episode"]].tolist()
        assert len(success) == num
        return sum(success) / num, sum(spl) / num

    return run


@pytest.mark.parametrize("scene", sorted(BODY))
def test_expert_succeeds_along_nearly_shortest_paths(follow, scene):
    success, spl = follow(scene)
    assert success >= 0.98
    assert spl >= 0.95


def test_wide_turns(follow):
    success, spl = follow("apartment", task=PointNavConfig(success_distance=0.36), turn_angle_deg=30.0)
    assert success >= 0.95
    assert spl >= 0.9


def test_without_sliding_it_keeps_off_the_walls(follow):
    success, spl = follow("studio", num=24, allow_sliding=False)
    assert success >= 0.98
    assert spl >= 0.9


def test_automatic_stop(follow):
    success, _ = follow("studio", task=PointNavConfig(stop="automatic"))
    assert success >= 0.98


@pytest.fixture
def decide(flat_simulator):
    def action(yaw=0.0, goal=(0.0, 0.0, -2.0), **agent):
        simulator = flat_simulator(1)
        follower = ShortestPathFollower(simulator.paths, AgentSpec(**agent))
        scene, position = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 3)
        advice = follower.advice(scene, position, torch.tensor([yaw]), torch.tensor([goal]))
        return [part.item() for part in advice]

    return action


def test_stops_strictly_within_the_goal_radius(decide):
    assert decide(goal=(0.0, 0.0, -0.19)) == [Action.STOP, NO_MOVE]
    assert decide(goal=(0.0, 0.0, -0.2)) == [Action.MOVE_FORWARD, 0]


@pytest.mark.parametrize("turn", [7.0, 10.0, 30.0, 45.0])
def test_turns_the_short_way_until_within_half_a_turn(decide, turn):
    for degrees in range(-170, 171, 10):
        expected = Action.MOVE_FORWARD
        if abs(degrees) > 0.5 * turn + 1:
            # Facing left of the goal, it lies to the right.
            expected = Action.TURN_RIGHT if degrees > 0 else Action.TURN_LEFT
        elif abs(degrees) >= 0.5 * turn - 1:
            continue
        action, turns = decide(yaw=math.radians(degrees), turn_angle_deg=turn)
        assert action == expected, degrees
        # After the turns that are told, the goal lies ahead; a last small one may not be worth its time.
        assert abs(degrees + turns * turn) < 0.5 * turn + 6, degrees


def test_agents_without_a_path_or_an_episode_stop(flat_simulator):
    simulator = flat_simulator(2)
    follower = ShortestPathFollower(simulator.paths, simulator.agent)
    scene, zeros = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3)
    goal = torch.tensor([[0.0, 0.0, math.inf], [0.0, 0.0, -2.0]])
    active = torch.tensor([True, False])
    advice = follower.advice(scene, zeros, torch.zeros(2), goal, active)
    assert advice.actions.tolist() == [Action.STOP, Action.STOP]
    assert advice.turns.tolist() == [NO_MOVE, NO_MOVE]
