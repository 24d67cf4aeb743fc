import json
import math
from collections import Counter
from pathlib import Path

import pytest

from envs.sampler import EpisodeSampler


@pytest.fixture
def make(episode):
    """Samplers over 12 episodes in 4 scenes, of lengths 1 to 12 m."""

    def sampler(num_agents=3, num=12, **settings):
        episodes = [
            episode(number, scene=f"scene{number % 4}", goal=(0.0, 0.0, -1.0 - number))
            for number in range(num)
        ]
        files = {f"scene{index}": Path(f"scene{index}.glb") for index in range(4)}
        return EpisodeSampler(episodes, num_agents, files, **settings)

    return sampler


def stream(sampler, agent, count):
    return [sampler.next([agent])[0] for _ in range(count)]


def test_every_epoch_of_a_stream_holds_every_episode_once(make):
    sampler = make(num_agents=1)
    for _ in range(3):
        assert sorted(stream(sampler, 0, 12)) == list(range(12))


def test_epochs_and_seeds_are_shuffled_differently(make):
    sampler = make(num_agents=1)
    first, second = stream(sampler, 0, 12), stream(sampler, 0, 12)
    assert first != second
    assert first != stream(make(num_agents=1, seed=1), 0, 12)
    assert first == stream(make(num_agents=1), 0, 12)


def test_a_stream_does_not_depend_on_the_other_agents(make):
    busy, quiet = make(), make()
    stream(busy, 0, 7)
    stream(busy, 2, 5)
    assert stream(busy, 1, 30) == stream(quiet, 1, 30)


def test_agents_start_at_different_episodes(make):
    assert len(set(make(num_agents=4).next(range(4)))) == 4


def test_agents_in_several_processes_follow_the_streams_of_one(make):
    whole = make(num_agents=6)
    for first in (0, 2, 4):
        part = make(num_agents=2, first_agent=first, total_agents=6)
        for agent in range(2):
            assert stream(part, agent, 30) == stream(whole, first + agent, 30)
    with pytest.raises(ValueError, match="agents 5 to 6 are not among 6"):
        make(num_agents=2, first_agent=5, total_agents=6)


def test_without_shuffling_the_order_is_that_given(make):
    assert stream(make(num_agents=1, shuffle=False), 0, 14) == [*range(12), 0, 1]


def test_runs_of_a_scene_stay_together(make):
    sampler = make(num_agents=1, episodes_per_scene=3)
    scenes = [index % 4 for index in stream(sampler, 0, 12)]
    assert all(scenes[k] == scenes[k + 1] == scenes[k + 2] for k in (0, 3, 6, 9))


def test_curriculum_leaves_out_long_episodes_until_it_is_raised(make):
    sampler = make(num_agents=1, max_geodesic=3.0)
    assert set(stream(sampler, 0, 12)) == {0, 1, 2}
    sampler.set_max_geodesic(5.0)
    assert set(stream(sampler, 0, 20)) == {0, 1, 2, 3, 4}
    sampler.set_max_geodesic(math.inf)
    assert set(stream(sampler, 0, 12)) == set(range(12))


def test_a_curriculum_without_any_episode_is_refused_with_the_shortest(make):
    with pytest.raises(ValueError, match=r"0\.5 m; the shortest is 1 m"):
        make(max_geodesic=0.5)


def test_once_hands_out_each_episode_once(make):
    sampler = make(mode="once")
    drawn = [index for _ in range(5) for index in sampler.next(range(3))]
    assert sampler.exhausted
    assert Counter(drawn) == Counter([*range(12), -1, -1, -1])
    sampler.restart()
    assert not sampler.exhausted


def test_scenes_rotate_through_all_with_only_so_many_resident(make):
    sampler = make(num_agents=2, max_resident_scenes=2, scene_steps=3)
    seen = set()
    current = sampler.next(range(2))
    for step in range(60):
        assert len(sampler.resident_scenes) == 2
        occupied = {sampler.scene_slot(index) for index in current}
        seen |= set(current)
        before = sampler.resident_scenes
        if sampler.advance(occupied):
            changed = [slot for slot in range(2) if before[slot] != sampler.resident_scenes[slot]]
            assert len(changed) == 1 and changed[0] not in occupied
        agent = step % 2  # agents end their episodes in turn
        current[agent] = sampler.next([agent])[0]
        assert sampler.scene_slot(current[agent]) in (0, 1)
    assert seen == set(range(12))


def test_once_with_rotating_scenes_hands_out_all(make):
    sampler = make(num_agents=2, mode="once", max_resident_scenes=2)
    current, drawn = sampler.next(range(2)), []
    while any(index >= 0 for index in current) or not sampler.exhausted:
        drawn += [index for index in current if index >= 0]
        sampler.advance(set())
        current = sampler.next(range(2))
    assert sorted(drawn) == list(range(12))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_geodesic": 6.0},
        {"mode": "once"},
        {"episodes_per_scene": 2},
        {"max_resident_scenes": 2, "scene_steps": 4},
    ],
)
def test_saved_state_goes_on_the_same_after_json(make, settings):
    first, second = make(**settings), make(**(settings | {"seed": 9}))

    def play(sampler):
        return [
            (sampler.next([step % 3]), sampler.advance(set()), sampler.resident_scenes) for step in range(20)
        ]

    play(first)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert play(first) == play(second)


@pytest.mark.parametrize(("other", "match"), [({"num_agents": 2}, "3 agents"), ({"num": 8}, "12 episodes")])
def test_state_of_another_sampler_is_refused(make, other, match):
    with pytest.raises(ValueError, match=match):
        make(**other).load_state_dict(make().state_dict())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num": 0}, "no episodes"),
        ({"mode": "twice"}, "twice"),
        ({"max_resident_scenes": 1}, "at least 2"),
        ({"episodes_per_scene": 0}, "episodes_per_scene 0"),
    ],
)
def test_wrong_settings_are_refused(make, settings, match):
    with pytest.raises(ValueError, match=match):
        make(**settings)


def test_a_scene_without_a_file_is_named(episode):
    with pytest.raises(ValueError, match=r"attic\.glb"):
        EpisodeSampler([episode(0, scene="attic.glb")], 1, {})
