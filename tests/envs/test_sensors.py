import math

import pytest
import torch

from envs.sensors import TASK_SENSORS, point_goal
from envs.simulators.base import Action
from envs.task import PointNavTask


def polar(goal, yaw=0.0):
    return point_goal(torch.tensor([goal]), torch.zeros(1, 3), torch.tensor([yaw]))[0].tolist()


@pytest.mark.parametrize(
    ("goal", "yaw", "expected"),
    [
        ((0.0, 0.0, -2.0), 0.0, (2.0, 0.0)),  # ahead
        ((-1.0, 0.0, 0.0), 0.0, (1.0, math.pi / 2)),  # to the left
        ((1.0, 0.0, 0.0), 0.0, (1.0, -math.pi / 2)),  # to the right
        ((-1.0, 0.0, 0.0), math.pi / 2, (1.0, 0.0)),  # turned left, towards it
        ((0.0, 3.0, -2.0), 0.0, (2.0, 0.0)),  # height does not count
    ],
)
def test_point_goal_is_distance_and_angle_to_the_left(goal, yaw, expected):
    assert polar(goal, yaw) == pytest.approx(expected, abs=1e-6)


@pytest.fixture
def task(flat_simulator):
    task = PointNavTask(flat_simulator(1))
    one = torch.zeros(1, dtype=torch.int64)
    start, goal = torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, -1.0]])
    task.reset(one, one, start, torch.tensor([math.pi / 2]), goal)
    return task


def read(task, name):
    return TASK_SENSORS[name][1](task)[0].tolist()


def test_episodic_sensors_start_at_zero(task):
    assert read(task, "gps") == pytest.approx([0.0, 0.0])
    assert read(task, "compass") == pytest.approx([0.0])
    assert read(task, "heading") == pytest.approx([math.pi / 2])


def test_gps_and_compass_count_in_the_frame_of_the_start(task):
    for action in [Action.MOVE_FORWARD] * 4 + [Action.TURN_RIGHT] * 9 + [Action.MOVE_FORWARD] * 2:
        task.step(torch.tensor([int(action)]))
    assert read(task, "gps") == pytest.approx([1.0, 0.5], abs=1e-5)  # ahead of the start, to its right
    assert read(task, "compass") == pytest.approx([-math.pi / 2], abs=1e-5)
    assert read(task, "heading") == pytest.approx([0.0], abs=1e-5)


def test_static_goal_stays_while_the_other_follows(task):
    at_start = read(task, "pointgoal")
    assert read(task, "pointgoal_with_gps_compass") == at_start
    for action in (Action.MOVE_FORWARD, Action.TURN_LEFT, Action.MOVE_FORWARD):
        task.step(torch.tensor([int(action)]))
    assert read(task, "pointgoal") == at_start
    assert read(task, "pointgoal_with_gps_compass") != at_start


def test_angles_wrap_into_their_space(task):
    for _ in range(40):
        task.step(torch.tensor([int(Action.TURN_LEFT)]))
        for name, (space, read_sensor) in TASK_SENSORS.items():
            assert space.contains(read_sensor(task)[0].numpy()), name


def in_plane(goal, heading=0.0):
    distance, angle = goal
    return distance * math.cos(angle + heading), distance * math.sin(angle + heading)


def test_gps_and_compass_follow_from_the_goal_sensor_and_the_agents_own_turns(task):
    ahead, left = in_plane(read(task, "pointgoal_with_gps_compass"))
    heading = 0.0
    generator = torch.Generator().manual_seed(0)
    for action in torch.randint(1, 4, (40,), generator=generator):
        task.step(action[None])
        heading += math.radians({Action.TURN_LEFT: 10, Action.TURN_RIGHT: -10}.get(int(action), 0))
        now_ahead, now_left = in_plane(read(task, "pointgoal_with_gps_compass"), heading)
        assert read(task, "gps") == pytest.approx([ahead - now_ahead, now_left - left], abs=1e-4)
        assert math.cos(read(task, "compass")[0] - heading) == pytest.approx(1.0, abs=1e-6)
