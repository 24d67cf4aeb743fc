import math

import pytest
import torch

from envs.simulators.base import Action
from envs.task import Measures, PointNavConfig, PointNavTask

FORWARD, LEFT, STOP = int(Action.MOVE_FORWARD), int(Action.TURN_LEFT), int(Action.STOP)


def start(task, position=(0.0, 0.0, 0.0), yaw=0.0, goal=(0.0, 0.0, -2.0)):
    n = task.simulator.num_agents
    task.reset(
        torch.arange(n),
        torch.zeros(n, dtype=torch.int64),
        torch.tensor(position).expand(n, 3),
        torch.full((n,), yaw),
        torch.tensor(goal).expand(n, 3),
    )
    return task


def play(task, *actions):
    for action in actions:
        step = task.step(torch.full((task.simulator.num_agents,), action))
    return step


@pytest.fixture
def task(flat_simulator):
    return lambda n=1, **config: start(PointNavTask(flat_simulator(n), PointNavConfig(**config)))


def test_straight_path_with_stop_at_the_goal_succeeds_with_full_spl(task):
    task = task()
    step = play(task, *[FORWARD] * 8, STOP)
    measures = task.measures()
    assert step.terminated.item() and not step.truncated.item()
    assert measures["success"].item() == 1
    assert measures["spl"].item() == pytest.approx(1.0)
    assert measures["soft_spl"].item() == pytest.approx(1.0, abs=1e-5)
    assert measures["path_length"].item() == pytest.approx(2.0)
    assert measures["steps"].item() == 9
    assert measures["reward_sum"].item() == pytest.approx(9 * -0.01 + 2.0 + 2.5, abs=1e-5)


def test_a_detour_lowers_spl_by_the_ratio_of_lengths(task):
    # One step back and one forth again: 2.5 m walked where 2 m would have done.
    turn_round = [LEFT] * 18
    task = task()
    play(task, *turn_round, FORWARD, *turn_round, *[FORWARD] * 9, STOP)
    assert task.measures()["spl"].item() == pytest.approx(2.0 / 2.5, abs=1e-4)


def test_stopping_exactly_at_the_success_distance_fails(task):
    task = task(success_distance=0.5)
    play(task, *[FORWARD] * 6, STOP)  # 0.5 m are left
    assert task.measures()["distance_to_goal"].item() == pytest.approx(0.5)
    assert task.measures()["success"].item() == 0
    assert task.measures()["soft_spl"].item() == pytest.approx(0.75)


def test_being_at_the_goal_without_stop_is_no_success(task):
    task = task()
    step = play(task, *[FORWARD] * 8)
    assert not step.terminated.any()
    assert task.measures()["success"].item() == 0


def test_automatic_stop_ends_the_episode_at_the_goal(task):
    task = task(stop="automatic", success_reward=10.0)
    steps = 0
    done = False
    while not done:
        step = play(task, 0)  # without a stop action, 0 is forward
        done = step.terminated.item()
        steps += 1
    assert steps == 8
    assert task.measures()["success"].item() == 1
    assert step.reward.item() == pytest.approx(-0.01 + 0.25 + 10.0, abs=1e-5)


def test_success_bonus_times_spl(task):
    turn_round = [LEFT] * 18
    task = task(success_bonus="spl")
    step = play(task, *turn_round, FORWARD, *turn_round, *[FORWARD] * 9, STOP)
    assert step.reward.item() == pytest.approx(-0.01 + 2.5 * 0.8, abs=1e-4)


def test_step_limit_truncates(task):
    task = task(max_steps=3)
    assert not play(task, LEFT, LEFT).truncated.any()
    step = play(task, LEFT)
    assert step.truncated.all() and not step.terminated.any()
    assert not task.active.any()


def test_ended_agents_stand_still_and_earn_nothing(task):
    task = task()
    play(task, STOP)
    before = task.measures()
    step = play(task, FORWARD)
    assert step.reward.item() == 0 and not step.terminated.any()
    assert task.simulator.position.eq(0).all()
    assert task.measures()["steps"].equal(before["steps"])


def test_collisions_are_counted(task):
    task = task()
    play(task, *[FORWARD] * 22)  # the wall is 5 m ahead
    assert task.measures()["collisions"].item() == 2


def test_distance_is_kept_until_the_agent_moved_beyond_the_tolerance():
    measures = Measures(1, PointNavConfig())
    one, zero = torch.tensor([0]), torch.zeros(1, dtype=torch.bool)
    measures.reset(one, torch.zeros(1, 3), torch.tensor([5.0]))
    creep = torch.tensor([[0.00006, 0.0, 0.0]])
    reward = measures.update(creep, torch.tensor([4.9]), zero, zero)
    assert measures.distance.item() == 5.0 and reward.item() == pytest.approx(-0.01)
    # The tolerance counts from where the distance was measured, not from the last step.
    reward = measures.update(2 * creep, torch.tensor([4.9]), zero, zero)
    assert measures.distance.item() == pytest.approx(4.9)
    assert reward.item() == pytest.approx(-0.01 + 0.1, abs=1e-6)


def test_infinite_distance_gives_finite_rewards_and_measures():
    measures = Measures(1, PointNavConfig())
    one, zero = torch.tensor([0]), torch.zeros(1, dtype=torch.bool)
    measures.reset(one, torch.zeros(1, 3), torch.tensor([math.inf]))
    for distance in (math.inf, 3.0, math.inf):
        position = measures.position + 1.0
        assert measures.update(position, torch.tensor([distance]), zero, zero).isfinite().all()
    assert all(v.isfinite().all() for k, v in measures.as_dict().items() if k != "distance_to_goal")


def test_where_no_path_led_to_the_goal_nothing_is_efficient():
    measures = Measures(1, PointNavConfig())
    one = torch.tensor([0])
    measures.reset(one, torch.zeros(1, 3), torch.tensor([math.inf]))
    measures.update(torch.ones(1, 3), torch.tensor([0.1]), torch.ones(1, dtype=torch.bool), one.bool())
    assert measures.success.all() and measures.spl.item() == 0 and measures.soft_spl.item() == 0


def test_stopping_where_one_starts_on_the_goal_is_the_best_path():
    measures = Measures(1, PointNavConfig())
    one = torch.tensor([0])
    measures.reset(one, torch.zeros(1, 3), torch.zeros(1))
    measures.update(torch.zeros(1, 3), torch.zeros(1), torch.ones(1, dtype=torch.bool), one.bool())
    assert measures.spl.item() == 1


def test_agents_do_not_influence_each_other(task):
    together = task(3)
    alone = task(1)
    scripts = [[FORWARD] * 8 + [STOP], [LEFT] * 9, [FORWARD, LEFT] * 4 + [STOP]]
    for actions in zip(*scripts, strict=True):
        together.step(torch.tensor(actions))
    for agent, script in enumerate(scripts):
        start(alone)
        play(alone, *script)
        for name, value in alone.measures().items():
            assert together.measures()[name][agent] == value[0], name


def test_saved_state_goes_on_the_same(task, flat_simulator):
    first = task(2)
    play(first, LEFT, FORWARD)
    second = PointNavTask(flat_simulator(2), first.config)
    second.load_state_dict(first.state_dict())
    for action in (FORWARD, LEFT, FORWARD, STOP):
        a, b = play(first, action), play(second, action)
        assert all(x.equal(y) for x, y in zip(a, b, strict=True))
    for name, value in first.measures().items():
        assert second.measures()[name].equal(value), name


def test_state_of_another_number_of_agents_is_refused(task):
    with pytest.raises(ValueError, match="2 agents"):
        task(1).load_state_dict(task(2).state_dict())


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_steps", 0), ("success_distance", 0.0), ("success_bonus", "often"), ("stop", "never")],
)
def test_wrong_settings_are_refused_by_name(setting, value):
    with pytest.raises(ValueError, match=f"{setting} .*{value}"):
        PointNavConfig(**{setting: value})
