"""The file of demonstrations, its recording, and replays held against it."""

import dataclasses
import json
import shutil
import struct

import numpy as np
import pytest
import torch
from demonstrations_world import record_expert, settings
from one_room import write_one_room

from envs.episodes import read_dataset
from envs.simulators.base import Action
from envs.simulators.raycast.simulator import RaycastSimulator
from navagent.build import load_split, scenes_dir
from navagent.demonstrations.motion import uniform
from navagent.demonstrations.open import open_stream, start_replay
from navagent.demonstrations.record import in_turn
from navagent.demonstrations.recorded import (
    BLOCK,
    DemonstrationError,
    DemonstrationSet,
    StateHash,
    read_demonstrations,
)
from navagent.demonstrations.replay import replay_once
from navagent.evaluation.agents import ExpertAgent


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return write_one_room(tmp_path_factory.mktemp("room"), size=8.0, num_train=40, num_val=4)


@pytest.fixture(scope="module")
def config(room):
    return settings(room)


@pytest.fixture(scope="module")
def noisy(room):
    return settings(room, "env.actuation_noise=0.5", "env.allow_sliding=false", "env.max_steps=120")


@pytest.fixture(scope="module")
def file(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("demos") / "expert.demos"
    record_expert(path, config)
    return path


@pytest.fixture(scope="module")
def noisy_file(noisy, tmp_path_factory):
    path = tmp_path_factory.mktemp("demos") / "noisy.demos"
    record_expert(path, noisy)
    return path


def states_of(config, file, num_envs):
    """Every state of a replay by demonstration and step, with what was seen there."""
    replay = start_replay(config, read_demonstrations(file), num_envs)
    found = {}
    running = replay_once(replay)
    simulator = replay.env.simulator
    before = None
    for step in running:
        if before is not None:
            keys, poses = before
            found |= dict(zip(keys, poses, strict=True))
        keys = list(zip(step.rows.tolist(), (step.steps + 1).tolist(), strict=True))
        poses = torch.cat([simulator.position, simulator.yaw[:, None]], 1).numpy().copy()
        going_on = ~(step.terminated | step.truncated).numpy() & (step.rows >= 0)
        before = (
            [key for key, on in zip(keys, going_on, strict=True) if on],
            [pose.tobytes() for pose, on in zip(poses, going_on, strict=True) if on],
        )
    replay.close()
    return found


# The file ------------------------------------------------------------------------------------------------


def test_a_file_says_what_was_recorded(file, config, room):
    demonstrations = read_demonstrations(file)
    episodes = {e.episode_id: e for e in read_dataset(room / "episodes/train/train.json.gz")}
    assert len(demonstrations) == 20
    for index in range(20):
        one = demonstrations[index]
        assert one.episode == episodes[one.episode.episode_id]
        assert one.actions[-1] == Action.STOP and (one.actions[:-1] != Action.STOP).all()
        assert one.success and one.spl > 0.8
        assert len(one.hashes) == len(one.states) == -(-len(one.actions) // BLOCK)
    assert demonstrations.steps.max() > BLOCK


def test_the_same_recording_gives_the_same_bytes(file, config, tmp_path):
    record_expert(tmp_path / "again.demos", config)
    assert (tmp_path / "again.demos").read_bytes() == file.read_bytes()


def test_a_step_takes_about_a_byte(file):
    demonstrations = read_demonstrations(file)
    blocks = -(-demonstrations.steps // BLOCK)
    header = struct.unpack("<Q", file.read_bytes()[:8])[0]
    contents = file.stat().st_size - 8 - header
    # A demonstration's own numbers take 133 bytes.
    assert contents <= demonstrations.steps.sum() + 24 * blocks.sum() + 136 * len(demonstrations)


@pytest.mark.parametrize("share", [0.3, 0.97, 0.9999])
def test_a_truncated_file_is_refused_by_name(file, tmp_path, share):
    data = file.read_bytes()
    short = tmp_path / "short.demos"
    short.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DemonstrationError, match=r"short\.demos: truncated.*copy it again"):
        read_demonstrations(short)


def changed_header(file, path, **changes):
    """A copy whose header says other things, of the same length as the library wants it."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with safe_open(file, framework="numpy") as archive:
        header = json.loads(archive.metadata()["navagent-demonstrations"])
        arrays = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
    save_file(arrays, path, {"navagent-demonstrations": json.dumps(header | changes)})
    return path


def test_another_version_is_refused_by_name(file, tmp_path):
    newer = changed_header(file, tmp_path / "newer.demos", version=2)
    with pytest.raises(
        DemonstrationError, match=r"newer\.demos: demonstrations of version 2.*reads version 1"
    ):
        read_demonstrations(newer)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"rules": {}}, "does not describe demonstrations"),
        ({"episode_ids": ["0"]}, "rows for 1 demonstrations"),
        ({"sha256": "0" * 64}, "damaged"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(file, tmp_path, changes, fault):
    with pytest.raises(DemonstrationError, match=rf"odd\.demos.*{fault}"):
        read_demonstrations(changed_header(file, tmp_path / "odd.demos", **changes))


def test_a_flipped_bit_is_noticed(file, tmp_path):
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    (tmp_path / "flipped.demos").write_bytes(data)
    with pytest.raises(DemonstrationError, match=r"flipped\.demos: damaged"):
        read_demonstrations(tmp_path / "flipped.demos")


def test_other_files_are_refused_by_name(tmp_path):
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(3)}, tmp_path / "weights.safetensors")
    (tmp_path / "text.demos").write_text("hello")
    with pytest.raises(DemonstrationError, match="not of demonstrations"):
        read_demonstrations(tmp_path / "weights.safetensors")
    with pytest.raises(DemonstrationError, match=r"text\.demos"):
        read_demonstrations(tmp_path / "text.demos")
    with pytest.raises(DemonstrationError, match=r"navagent demos record .*none\.demos"):
        read_demonstrations(tmp_path / "none.demos")


def test_the_hash_is_fnv_1a_of_the_states_words():
    states = np.random.default_rng(0).normal(size=(5, 2, 4)).astype(np.float32)
    hashes = StateHash(2, torch.device("cpu"))
    starts = torch.tensor([True, True])
    for step in states:
        value = hashes.add(torch.from_numpy(step), starts)
        starts = torch.tensor([False, False])
    for agent in range(2):
        expected = 0xCBF29CE484222325
        for word in states[:, agent].reshape(-1).view(np.uint32).tolist():
            expected = (expected ^ word) * 0x100000001B3 % 2**64
        assert int(value[agent]) % 2**64 == expected


# Recording -----------------------------------------------------------------------------------------------


class InterruptedAgent(ExpertAgent):
    """Is interrupted after some steps, as by Ctrl-C."""

    steps = 60

    def act(self, observations, episode_starts):
        self.steps -= 1
        if self.steps < 0:
            raise KeyboardInterrupt
        return super().act(observations, episode_starts)


def test_an_interrupted_recording_is_usable_and_goes_on_to_the_same_file(config, file, tmp_path):
    path = tmp_path / "expert.demos"
    with pytest.raises(KeyboardInterrupt):
        record_expert(path, config, make_agent=lambda env: InterruptedAgent())
    part = read_demonstrations(path)
    assert 0 < len(part) < part.header.wanted == 20
    replay = start_replay(config, part, 3)
    assert sum(int((step.rows >= 0).sum()) for step in replay_once(replay)) == part.steps.sum()
    replay.close()
    record_expert(path, config)
    assert path.read_bytes() == file.read_bytes()


def test_a_larger_number_adds_to_the_file(config, file, tmp_path):
    path = tmp_path / "expert.demos"
    record_expert(path, config, number=5)
    assert len(read_demonstrations(path)) == 5
    record_expert(path, config, number=20)
    assert path.read_bytes() == file.read_bytes()
    assert len(record_expert(path, config, number=3)) == 20  # nothing is taken away


def test_how_many_play_side_by_side_does_not_matter(noisy, noisy_file, tmp_path):
    alone = record_expert(tmp_path / "alone.demos", noisy, number=4, num_envs=1)
    beside = read_demonstrations(noisy_file)
    for index in range(4):
        assert (alone[index].actions == beside[index].actions).all()
        assert (alone[index].hashes == beside[index].hashes).all()


def test_another_source_is_not_mixed_in(config, file, tmp_path):
    path = shutil.copy(file, tmp_path / "expert.demos")
    with pytest.raises(DemonstrationError, match=r"seed 0, not 7"):
        record_expert(path, config, number=30, seed=7)
    turning = dataclasses.replace(config, env=dataclasses.replace(config.env, turn_angle_deg=30.0))
    with pytest.raises(DemonstrationError, match=r"env\.turn_angle_deg 10\.0, not 30\.0"):
        record_expert(path, turning, number=30)
    assert (tmp_path / "expert.demos").read_bytes() == file.read_bytes()


def test_more_demonstrations_than_episodes_are_refused(config, tmp_path):
    with pytest.raises(DemonstrationError, match=r"41 demonstrations.*40 episodes"):
        record_expert(tmp_path / "many.demos", config, number=41)


def test_failures_are_recorded_and_left_out_of_what_is_learned(config, tmp_path):
    lost = dataclasses.replace(config, env=dataclasses.replace(config.env, max_steps=25))
    found = record_expert(tmp_path / "lost.demos", lost)
    assert 0 < found.success.sum() < 20
    kept = found.chosen(successful=True)
    assert kept.success.all() and len(kept) == found.success.sum()
    replay = start_replay(lost, found, 6)
    for _ in replay_once(replay):
        pass
    replay.close()


def test_the_first_demonstrations_are_spread_over_the_scenes(room):
    episode = read_dataset(room / "episodes/train/train.json.gz")[0]
    many = [
        dataclasses.replace(episode, scene_id=f"{number % 5}", episode_id=str(number)) for number in range(50)
    ]
    order = in_turn(many, seed=3)
    assert sorted(order) == list(range(50))
    for begin in range(0, 50, 5):
        assert len({many[index].scene_id for index in order[begin : begin + 5]}) == 5
    assert order != in_turn(many, seed=4)


def test_motion_noise_comes_from_the_seed_alone():
    first, again = uniform(123, 3000), uniform(123, 3000)
    assert (first == again).all() and (uniform(123, 30) == first[:30]).all()
    assert first.min() >= 0 and first.max() < 1
    assert first.mean() == pytest.approx(0.5, abs=0.02) and first.var() == pytest.approx(1 / 12, rel=0.05)
    assert (uniform(124, 30) != first[:30]).any()


# Replaying -----------------------------------------------------------------------------------------------


def test_replay_is_bit_equal_with_any_number_of_agents_and_any_picture(noisy, noisy_file, room):
    small = states_of(noisy, noisy_file, 5)
    large = settings(room, "sensors=rgbd", "sensors.height=24", "sensors.width=40", "sensors.hfov_deg=60")
    large = dataclasses.replace(large, env=noisy.env)
    assert len(small) == read_demonstrations(noisy_file).steps.sum() - 20
    assert states_of(large, noisy_file, 7) == small


def test_noise_of_motion_matters(noisy, noisy_file):
    still = read_demonstrations(noisy_file)
    still.header.rules["actuation_noise"] = 0.0
    replay = start_replay(noisy, still, 4)
    with pytest.raises(DemonstrationError, match="is not replayed as it was recorded"):
        list(replay_once(replay))
    replay.close()


def tampered(file, row, step, action):
    """The demonstrations with one other action."""
    demonstrations = read_demonstrations(file)
    demonstrations.actions(row)[step] = action
    return demonstrations


def test_a_replay_that_goes_elsewhere_names_demonstration_and_steps(config, file):
    demonstrations = read_demonstrations(file)
    row = int(demonstrations.steps.argmax())
    assert demonstrations.steps[row] > BLOCK + 2
    other = Action.TURN_LEFT if demonstrations.actions(row)[BLOCK] != Action.TURN_LEFT else Action.TURN_RIGHT
    replay = start_replay(config, tampered(file, row, BLOCK, other), 4)
    last = int(demonstrations.steps[row]) - 1
    replay.demonstrations.header.recorded_on["simulator"] = "habitat"
    expected = f"demonstration {row} .*in steps {BLOCK} to {last} the states differ.*"
    with pytest.raises(DemonstrationError, match=f"{expected}: simulator habitat then and raycast now"):
        list(replay_once(replay))
    replay.close()


def test_a_replay_that_ends_early_is_refused(config, file):
    replay = start_replay(config, tampered(file, 2, 3, Action.STOP), 4)
    with pytest.raises(DemonstrationError, match=r"demonstration 2 .*ends early at step 3"):
        list(replay_once(replay))
    replay.close()


def test_a_tolerance_allows_small_differences_only(config, file):
    demonstrations = read_demonstrations(file)
    demonstrations._arrays["block.hash"] += 1
    for tolerance, fine in ((0.0, False), (1e-3, True)):
        replay = start_replay(config, demonstrations, 4, tolerance=tolerance)
        if fine:
            list(replay_once(replay))
        else:
            with pytest.raises(DemonstrationError, match="states differ, 0 m"):
                list(replay_once(replay))
        replay.close()
    demonstrations._arrays["block.state"][:, 0] += 0.01
    replay = start_replay(config, demonstrations, 4, tolerance=1e-3)
    with pytest.raises(DemonstrationError, match=r"0\.01 m or rad off"):
        list(replay_once(replay))
    replay.close()


def test_an_automatic_stop_is_replayed_too(room, tmp_path):
    config = settings(room, "env.stop=automatic")
    found = record_expert(tmp_path / "automatic.demos", config, number=6)
    assert found.success.all() and all((found.actions(i) != Action.STOP).all() for i in range(6))
    replay = start_replay(config, found, 2)
    for step in replay_once(replay):
        assert (step.actions >= 0).all() and (step.actions < 3).all()
    replay.close()


def test_another_scene_is_refused_by_name(config, file, room, tmp_path):
    other = shutil.copytree(room, tmp_path / "room")
    scene = other / "scenes/room/room.glb"
    scene.write_bytes(scene.read_bytes() + b"\0\0\0\0")
    elsewhere = settings(other)
    with pytest.raises(DemonstrationError, match=r"room\.glb: another scene than.*SHA-256"):
        open_stream(elsewhere, file, 2)
    scene.unlink()
    with pytest.raises(DemonstrationError, match=r"a scene of the demonstrations is not here.*room\.glb"):
        open_stream(elsewhere, file, 2)


def test_another_navigation_mesh_is_another_scene(file, room, tmp_path):
    other = shutil.copytree(room, tmp_path / "room")
    (other / "scenes/room/room.navmesh").unlink()
    with pytest.raises(DemonstrationError, match=r"another scene than"):
        start_replay(settings(other), read_demonstrations(file), 2)


def test_settings_that_lead_elsewhere_are_refused_by_name(file, room):
    config = settings(room, "env.turn_angle_deg=30", "env.actuation_noise=0.5")
    with pytest.raises(DemonstrationError) as refused:
        open_stream(config, file, 2)
    for text in ("expert.demos", "env.turn_angle_deg=10.0 (not 30.0)", "env.actuation_noise=0.0 (not 0.5)"):
        assert text in str(refused.value)


def test_recorded_states_are_those_of_the_simulator_alone(config, file):
    """An oracle without environment, task or noise: the simulator itself, driven by the actions."""
    demonstrations = read_demonstrations(file)
    scenes = load_split(config, "train").scenes
    one = demonstrations[int(demonstrations.steps.argmax())]
    simulator = RaycastSimulator(list(scenes.values()), 1, [])
    start = torch.tensor([one.episode.start_position])
    zero = torch.zeros(1, dtype=torch.int64)
    simulator.reset(zero, zero, start, torch.tensor([one.episode.start_yaw]))
    for step, action in enumerate(one.actions.tolist()):
        if (step + 1) % BLOCK == 0:
            state = torch.cat([simulator.position[0], simulator.yaw]).numpy()
            assert state.tobytes() == one.states[step // BLOCK].tobytes()
        simulator.step(torch.tensor([action]))
    simulator.close()
    assert scenes_dir(config).is_dir()


def test_a_selection_keeps_its_demonstrations(file):
    demonstrations = read_demonstrations(file)
    some = demonstrations.select(np.array([7, 3]))
    assert [e.episode_id for e in some.episodes] == [
        demonstrations.episodes[7].episode_id,
        demonstrations.episodes[3].episode_id,
    ]
    assert (some[1].actions == demonstrations[3].actions).all()
    assert (some.first_steps == demonstrations.first_steps[[7, 3]]).all()
    assert isinstance(some, DemonstrationSet)
    with pytest.raises(ValueError, match="21 demonstrations were asked for and there are 20"):
        demonstrations.chosen(21)
