"""What a learner reads: replayed and stored streams, stored features, and Minari's data sets."""

import dataclasses
import json
from collections import Counter

import numpy as np
import one_room
import pytest
import torch
from demonstrations_world import record_expert, settings
from one_room import write_one_room

from envs.simulators.raycast.simulator import RaycastSimulator
from navagent.build import policy_settings
from navagent.demonstrations import features as features_module
from navagent.demonstrations.features import encoder_key, stored_features
from navagent.demonstrations.minari_exchange import export_minari, import_minari
from navagent.demonstrations.open import open_features, open_stream, start_replay
from navagent.demonstrations.recorded import DemonstrationError, read_demonstrations
from navagent.distributed import Ranks
from navagent.runs import pack, unpack
from policies.actor_critic import NavigationPolicy

COUNT = 9
GOAL = "pointgoal_with_gps_compass"


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return write_one_room(tmp_path_factory.mktemp("room"), num_train=20, num_val=4)


@pytest.fixture(scope="module")
def config(room):
    return settings(room)


@pytest.fixture(scope="module")
def file(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("demos") / "expert.demos"
    record_expert(path, config, number=COUNT)
    return path


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("NAVAGENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))


@pytest.fixture
def dataset(config, file):
    """A Minari data set of the file."""
    replay = start_replay(config, read_demonstrations(file), 4)
    export_minari(replay, "navagent/room-v0")
    replay.close()
    return "navagent/room-v0"


@pytest.fixture(params=["replayed", "stored"])
def path(request, file, tmp_path):
    """Demonstrations of both kinds."""
    if request.param == "replayed":
        return file
    return import_minari(request.getfixturevalue("dataset"), tmp_path / "sequences")


def same(one, other):
    """Whether two steps or blocks are the same in every bit."""
    return (
        one.observations.keys() == other.observations.keys()
        and all(torch.equal(one.observations[name], other.observations[name]) for name in one.observations)
        and torch.equal(one.actions, other.actions)
        and torch.equal(one.episode_starts, other.episode_starts)
        and torch.equal(one.demonstrations, other.demonstrations)
        and torch.equal(one.steps, other.steps)
    )


# Streams -------------------------------------------------------------------------------------------------


def test_one_agent_sees_every_step_of_every_demonstration_once_a_pass(config, file, path):
    stream = open_stream(config, path, 1)
    assert stream.steps_per_pass == read_demonstrations(file).steps.sum()
    seen = Counter()
    while stream.passes < 2:
        step = next(stream)
        seen[int(step.demonstrations), int(step.steps)] += 1
    stream.close()
    assert len(seen) == stream.steps_per_pass and set(seen.values()) == {2}
    assert stream.steps_taken == 2 * stream.steps_per_pass


def test_each_agent_goes_through_a_demonstration_from_its_first_step_to_its_last(config, path):
    stream = open_stream(config, path, 3)
    block = stream.block(80)
    stream.close()
    assert block.episode_starts[0].all() and len(block.demonstrations[0].unique()) == 3
    assert torch.equal(block.episode_starts, block.steps == 0)
    going_on = ~block.episode_starts[1:]
    assert torch.equal(block.steps[1:][going_on], block.steps[:-1][going_on] + 1)
    assert torch.equal(block.demonstrations[1:][going_on], block.demonstrations[:-1][going_on])
    # The expert's demonstrations end with stop, 0, and nothing else does.
    assert torch.equal(block.actions[:-1] == 0, block.episode_starts[1:])


def test_actions_are_those_of_the_file_and_fit_what_is_seen(config, file):
    demonstrations = read_demonstrations(file)
    stream = open_stream(config, file, 2)
    before = torch.zeros(2, dtype=torch.int64)
    for step in (next(stream) for _ in range(80)):
        for agent in range(2):
            actions = demonstrations.actions(int(step.demonstrations[agent]))
            assert step.actions[agent] == actions[int(step.steps[agent])]
        previous = step.observations["previous_action"]
        assert torch.equal(previous, torch.where(step.episode_starts, 0, before + 1))
        # Where the expert stops, it stands at its goal.
        stops = step.actions == 0
        assert (step.observations[GOAL][stops, 0] < 0.25).all()
        before = step.actions
    stream.close()


def test_replayed_and_stored_streams_are_the_same(config, file, dataset, tmp_path):
    stored = open_stream(config, import_minari(dataset, tmp_path / "sequences"), 4, seed=5)
    # Minari holds demonstrations in the order of their ends: known again by their first observation.
    seen = {
        kind: {
            (step.observations["rgb"][agent].numpy().tobytes(), int(step.actions[agent]))
            for step in (next(stream) for _ in range(3 * stream.steps_per_pass // 4))
            for agent in range(4)
        }
        for kind, stream in (("replayed", open_stream(config, file, 4, seed=5)), ("stored", stored))
    }
    assert seen["replayed"] == seen["stored"]


def test_a_block_is_the_next_steps(config, path):
    stream, steps = (open_stream(config, path, 2) for _ in range(2))
    block = stream.block(7)
    assert block.observations["rgb"].shape == (7, 2, 16, 16, 3)
    for number in range(7):
        step = next(steps)
        assert torch.equal(block.actions[number], step.actions)
        assert torch.equal(block.observations["rgb"][number], step.observations["rgb"])
        assert torch.equal(block.episode_starts[number], step.episode_starts)
    with pytest.raises(ValueError, match="0 steps"):
        stream.block(0)
    stream.close()
    steps.close()


def test_a_saved_stream_goes_on_exactly(config, path):
    stream = open_stream(config, path, 3, seed=2)
    for taken in (0, 1, 37):
        for _ in range(taken):
            next(stream)
        # Through what a checkpoint holds.
        packed = pack(stream.state_dict())
        state = unpack(packed.tensors, json.loads(json.dumps(packed.structure)))
        expected = [next(stream) for _ in range(40)]
        other = open_stream(config, path, 3, seed=99)
        other.block(3)
        other.load_state_dict(state)
        assert all(same(next(other), step) for step in expected)
        assert other.steps_taken == stream.steps_taken
        other.close()
    stream.close()


def test_noisy_cameras_and_motion_go_on_exactly_too(room, tmp_path):
    config = settings(room, "env.actuation_noise=0.5", "env.rgb_noise=0.1")
    record_expert(tmp_path / "noisy.demos", config, number=4)
    stream, other = (open_stream(config, tmp_path / "noisy.demos", 2, seed=seed) for seed in (3, 4))
    stream.block(20)
    other.load_state_dict(stream.state_dict())
    assert same(stream.block(60), other.block(60))
    stream.close()
    other.close()


def test_seeds_give_orders(config, path):
    blocks = []
    for seed in (0, 0, 1):
        stream = open_stream(config, path, 2, seed=seed)
        blocks.append(stream.block(60))
        stream.close()
    assert same(blocks[0], blocks[1]) and not same(blocks[0], blocks[2])


class Two(Ranks):
    size = 2

    def __init__(self, rank):
        self.rank = rank


def test_processes_share_the_stream_of_one(config, path):
    whole = open_stream(config, path, 4, seed=1)
    parts = [open_stream(config, path, 2, seed=1, ranks=Two(rank)) for rank in (0, 1)]
    expected, found = whole.block(30), [part.block(30) for part in parts]
    assert torch.equal(torch.cat([block.demonstrations for block in found], 1), expected.demonstrations)
    images = torch.cat([block.observations["rgb"] for block in found], 1)
    assert torch.equal(images, expected.observations["rgb"])
    assert parts[0].steps_taken == whole.steps_taken
    for stream in (whole, *parts):
        stream.close()


def test_fewer_demonstrations_are_among_more(config, path):
    few, more = (open_stream(config, path, 2, count=count) for count in (3, 6))
    assert (few.num_demonstrations, more.num_demonstrations) == (3, 6)
    seen = [
        set(stream.block(stream.steps_per_pass).demonstrations.unique().tolist()) for stream in (few, more)
    ]
    assert seen == [{0, 1, 2}, {0, 1, 2, 3, 4, 5}]
    few.close()
    more.close()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"num_envs": COUNT + 1}, "10 agents side by side for 9 demonstrations"),
        ({"num_envs": 2, "count": COUNT + 1}, "10 .*were asked for and there are 9"),
    ],
)
def test_too_few_demonstrations_are_refused(config, path, options, fault):
    with pytest.raises(ValueError, match=fault):
        open_stream(config, path, **options)


def test_a_state_of_other_demonstrations_is_refused(config, file, tmp_path):
    stream = open_stream(config, file, 2)
    state = stream.state_dict()
    state["replay"]["demonstrations"] = "0" * 64
    with pytest.raises(ValueError, match="other demonstrations"):
        stream.load_state_dict(state)
    stream.close()


def test_a_state_of_other_sequences_is_refused(config, file, dataset, tmp_path):
    state = open_stream(config, import_minari(dataset, tmp_path / "one"), 2).state_dict()
    open_stream(config, import_minari(dataset, tmp_path / "same"), 2).load_state_dict(state)
    replay = start_replay(config, read_demonstrations(file).chosen(COUNT - 1), 4)
    export_minari(replay, "navagent/other-v0")
    replay.close()
    other = open_stream(config, import_minari("navagent/other-v0", tmp_path / "other"), 2)
    with pytest.raises(ValueError, match=r"of other sequences than .*other has; go on with the same folder"):
        other.load_state_dict(state)


# Features ------------------------------------------------------------------------------------------------


def policy_of(config, seed=0, **adaptation):
    """A policy for the room, with a random encoder."""
    config = dataclasses.replace(
        config, encoder=dataclasses.replace(config.encoder, weights="random", image_features=16)
    )
    stream_space = start_space(config)
    settings = policy_settings(config) | {"adaptation": "features", **adaptation}
    torch.manual_seed(seed)
    return NavigationPolicy(*stream_space, lambda _: 0.0, **settings)


def start_space(config):
    from gymnasium import spaces

    shape = (config.sensors.height, config.sensors.width, 3)
    return (
        spaces.Dict(
            {
                "rgb": spaces.Box(0, 255, shape, np.uint8),
                GOAL: spaces.Box(-9.0, 9.0, (2,)),
                "previous_action": spaces.Discrete(5),
            }
        ),
        spaces.Discrete(4),
    )


@pytest.fixture
def no_pictures(monkeypatch):
    def forbidden(*_):
        raise AssertionError("a picture was drawn")

    def forbid():
        monkeypatch.setattr(RaycastSimulator, "render", forbidden)

    return forbid


@pytest.mark.parametrize(("dtype", "close"), [("float32", 0.0), ("float16", 1e-3), ("bfloat16", 1e-2)])
def test_stored_features_are_those_of_the_encoder(config, file, dtype, close):
    algorithm = dataclasses.replace(config.algorithm, feature_dtype=dtype)
    config = dataclasses.replace(config, algorithm=algorithm)
    policy = policy_of(config)
    features = open_features(config, file, policy, num_envs=4)
    stream = open_stream(config, file, 3, features=features)
    block = stream.block(30)
    stream.close()
    assert block.frozen.keys() == {"rgb/base"} and block.frozen["rgb/base"].dtype == torch.float32
    expected = policy.frozen_features({"rgb": block.observations["rgb"].flatten(0, 1)})["rgb/base"]
    found = block.frozen["rgb/base"].flatten(0, 1)
    assert torch.allclose(found, expected, rtol=close, atol=max(close, 1e-6))
    assert expected.std() > 1e-3


def test_features_are_computed_once(config, file, no_pictures):
    first = open_features(config, file, policy_of(config), num_envs=4)
    no_pictures()
    again = open_features(config, file, policy_of(config), num_envs=4)
    rows = np.arange(5)
    device = torch.device("cpu")
    assert torch.equal(first.read(rows, device)["rgb/base"], again.read(rows, device)["rgb/base"])
    # Another method on the same encoder shares them.
    other = policy_of(config, adaptation="sidetune", adaptation_options={"side_encoder": "fcn5_small"})
    other.features_extractor.adaptations["rgb"].base = (
        policy_of(config).features_extractor.adaptations["rgb"].base
    )
    assert open_features(config, file, other).num_bytes == first.num_bytes


def test_another_encoder_camera_or_file_has_other_features(config, file):
    key = encoder_key(policy_of(config), config)
    assert key == encoder_key(policy_of(config), config)
    assert key != encoder_key(policy_of(config, seed=1), config)
    wider = dataclasses.replace(config, sensors=dataclasses.replace(config.sensors, hfov_deg=60.0))
    assert key != encoder_key(policy_of(config), wider)
    assert encoder_key(policy_of(config, adaptation="scratch"), config) == {}
    assert open_features(config, file, policy_of(config, adaptation="scratch")) is None


def test_a_scene_that_was_painted_anew_has_features_of_its_own(config, file, tmp_path, monkeypatch):
    before = open_features(config, file, policy_of(config))
    monkeypatch.setattr(one_room, "WALL_COLOURS", one_room.WALL_COLOURS[::-1])
    painted = settings(write_one_room(tmp_path / "painted", num_train=20, num_val=4))
    same = tmp_path / "same.demos"
    record_expert(same, painted, number=COUNT)
    # Nobody goes another way because of a colour.
    assert read_demonstrations(same).sha256 == read_demonstrations(file).sha256
    after = open_features(painted, same, policy_of(painted))
    rows = np.arange(5)
    one, other = (features.read(rows, torch.device("cpu"))["rgb/base"] for features in (before, after))
    assert not torch.equal(one, other)


def test_features_of_another_encoder_are_refused(config, file, tmp_path):
    demonstrations = read_demonstrations(file)

    def compute(policy, config=config):
        return stored_features(
            policy,
            config,
            demonstrations,
            lambda: start_replay(config, demonstrations, 4),
            folder=tmp_path / "kept",
        )

    compute(policy_of(config))
    with pytest.raises(DemonstrationError, match=r"kept: features of another encoder; delete"):
        compute(policy_of(config, seed=1))
    wider = dataclasses.replace(config, sensors=dataclasses.replace(config.sensors, hfov_deg=60.0))
    with pytest.raises(DemonstrationError, match=r"other cameras"):
        compute(policy_of(config), wider)
    about = tmp_path / "kept/about.json"
    about.write_text(about.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(DemonstrationError, match="version 2"):
        compute(policy_of(config))


def test_damaged_features_are_refused(config, file, tmp_path):
    open_features(config, file, policy_of(config))
    (array,) = tmp_path.glob("cache/features/*/array-000.npy")
    data = bytearray(array.read_bytes())
    data[-1] ^= 1
    array.write_bytes(data)
    with pytest.raises(DemonstrationError, match=r"array-000\.npy: its contents have changed"):
        open_features(config, file, policy_of(config))
    array.write_bytes(data[:-100])
    with pytest.raises(DemonstrationError, match=r"array-000\.npy: truncated"):
        open_features(config, file, policy_of(config))


def test_interrupted_features_leave_nothing_half_made(config, file, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(features_module, "_compute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_features(config, file, policy_of(config))
    assert not [path for path in (tmp_path / "cache/features").iterdir() if path.suffix != ".lock"]
    assert open_features(config, file, policy_of(config)) is not None


def test_noisy_cameras_have_no_features_to_store(config, file):
    noisy = dataclasses.replace(config, env=dataclasses.replace(config.env, rgb_noise=0.1))
    with pytest.raises(DemonstrationError, match=r"env\.rgb_noise=0\.1"):
        open_features(noisy, file, policy_of(config))


# Minari --------------------------------------------------------------------------------------------------


def test_minari_reads_what_was_exported(config, file, dataset):
    import minari

    demonstrations = read_demonstrations(file)
    found = minari.load_dataset(dataset)
    assert found.total_episodes == COUNT and found.total_steps == demonstrations.steps.sum()
    assert found.action_space.n == 4
    rows = {e.episode_id: row for row, e in enumerate(demonstrations.episodes)}
    replay = start_replay(config, demonstrations, 1)
    first = replay.begin()
    for episode, about in zip(
        found.iterate_episodes(), found.storage.get_episode_metadata(range(COUNT)), strict=True
    ):
        row = rows[about["episode_id"]]
        assert (episode.actions == demonstrations.actions(row)).all()
        assert about["seed"] == demonstrations.seeds[row] and about["success"]
        assert episode.observations["rgb"].shape == (len(episode.actions) + 1, 16, 16, 3)
        assert all(
            found.observation_space.contains({k: v[0] for k, v in episode.observations.items()}) for _ in [0]
        )
        assert episode.terminations.tolist() == [False] * (len(episode) - 1) + [True]
        assert not episode.truncations.any()
        # Reward of success, paid with the stop.
        assert episode.rewards[-1] > 2.0 and episode.observations[GOAL][-1, 0] < 0.25
        if row == replay.rows[0]:
            assert (episode.observations["rgb"][0] == first["rgb"][0].numpy()).all()
    replay.close()


def test_other_sensors_can_be_exported(room, file):
    import minari

    config = settings(room, "sensors=depth", "sensors.height=32", "sensors.width=48", "sensors.gps=true")
    replay = start_replay(config, read_demonstrations(file), 4)
    export_minari(replay, "depth-v3")
    replay.close()
    found = minari.load_dataset("depth-v3")
    assert found[0].observations["depth"].shape[1:] == (32, 48, 1)
    assert found[0].observations["gps"][0].tolist() == [0.0, 0.0]


@pytest.mark.filterwarnings("ignore:.*is (set to )?None")
def test_a_data_set_of_others_gives_sequences(config, tmp_path):
    import minari
    from gymnasium import spaces
    from minari.data_collector.episode_buffer import EpisodeBuffer

    rng = np.random.default_rng(0)
    space = spaces.Dict(
        {"rgb": spaces.Box(0, 255, (16, 16, 3), np.uint8), GOAL: spaces.Box(-9, 9, (2,), np.float32)}
    )
    images = [rng.integers(0, 256, (length + 1, 16, 16, 3), dtype=np.uint8) for length in (5, 8, 6)]
    buffers = [
        EpisodeBuffer(
            observations={"rgb": image, GOAL: rng.normal(size=(len(image), 2)).astype(np.float32)},
            actions=rng.integers(0, 4, len(image) - 1),
            rewards=[0.0] * (len(image) - 1),
            terminations=[False] * (len(image) - 2) + [number != 1],
            truncations=[False] * (len(image) - 2) + [number == 1],
        )
        for number, image in enumerate(images)
    ]
    minari.create_dataset_from_buffers(
        "others/walk-v0",
        buffers,
        observation_space=space,
        action_space=spaces.Discrete(4),
        jpeg_encoding=False,
    )
    folder = import_minari("others/walk-v0", tmp_path / "walk")
    stream = open_stream(config, folder, 2)
    # The one that was cut off did not succeed.
    assert stream.num_demonstrations == 2 and stream.steps_per_pass == 11
    rows = np.array([0, 2])
    for step in (next(stream) for _ in range(30)):
        for agent in range(2):
            row, number = rows[step.demonstrations[agent]], int(step.steps[agent])
            assert (step.observations["rgb"][agent].numpy() == images[row][number]).all()
            assert step.actions[agent] == buffers[row].actions[number]
            before = buffers[row].actions[number - 1] + 1 if number else 0
            assert step.observations["previous_action"][agent] == before
    assert open_stream(config, folder, 2, successful=False).num_demonstrations == 3


def test_sequences_that_the_agent_cannot_see_are_refused_by_name(room, dataset, tmp_path):
    folder = import_minari(dataset, tmp_path / "sequences")
    with pytest.raises(DemonstrationError, match=r"'rgb', uint8 \(32, 16, 3\), which is uint8 \(16, 16, 3\)"):
        open_stream(settings(room, "sensors.height=32"), folder, 2)
    with pytest.raises(DemonstrationError, match=r"'depth'.* is not there"):
        open_stream(settings(room, "sensors=depth"), folder, 2)
    with pytest.raises(DemonstrationError, match="has 4 actions and the agent 3"):
        open_stream(settings(room, "env.stop=automatic"), folder, 2)


def test_sequences_of_another_task_are_refused_by_name(room, dataset, tmp_path):
    folder = import_minari(dataset, tmp_path / "sequences")
    fault = r"sequences: recorded with other settings.*env.turn_angle_deg=10.0 \(not 30.0\)"
    with pytest.raises(DemonstrationError, match=fault):
        open_stream(settings(room, "env.turn_angle_deg=30"), folder, 2)
    # What rewards are does not change what was done.
    open_stream(settings(room, "env.success_reward=5"), folder, 2)


def test_a_damaged_data_set_is_refused_by_name(dataset, tmp_path):
    data = tmp_path / "minari/navagent/room-v0/data"
    metadata, arrays = data / "metadata.json", data / "main_data.hdf5"
    told = metadata.read_text()
    metadata.write_text(json.dumps(json.loads(told) | {"navagent_rules": "no"}))
    with pytest.raises(DemonstrationError, match="room-v0: its navagent_rules cannot be read"):
        import_minari(dataset, tmp_path / "x")
    metadata.write_text(told)
    arrays.write_bytes(arrays.read_bytes()[: arrays.stat().st_size // 2])
    with pytest.raises(DemonstrationError, match=r"room-v0: truncated or damaged .*export it again"):
        import_minari(dataset, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_exports_and_imports_that_cannot_be_are_refused_by_name(config, file, dataset, tmp_path):
    replay = start_replay(config, read_demonstrations(file), 2)
    with pytest.raises(DemonstrationError, match="there is a data set 'navagent/room-v0' already"):
        export_minari(replay, dataset)
    with pytest.raises(DemonstrationError, match="'room' is no name of a Minari data set"):
        export_minari(replay, "room")
    replay.close()
    with pytest.raises(DemonstrationError, match=r"no readable Minari data set.*there are navagent/room-v0"):
        import_minari("navagent/rooms-v0", tmp_path / "x")
    import_minari(dataset, tmp_path / "x")
    with pytest.raises(DemonstrationError, match=r"x: exists already"):
        import_minari(dataset, tmp_path / "x")


@pytest.mark.filterwarnings("ignore:.*is (set to )?None")
def test_a_data_set_of_other_actions_is_refused(tmp_path):
    import minari
    from gymnasium import spaces
    from minari.data_collector.episode_buffer import EpisodeBuffer

    buffer = EpisodeBuffer(
        observations=np.zeros((3, 2), np.float32),
        actions=np.zeros((2, 1), np.float32),
        rewards=[0.0, 0.0],
        terminations=[False, True],
        truncations=[False, False],
    )
    minari.create_dataset_from_buffers(
        "hopper-v0", [buffer], observation_space=spaces.Box(-1, 1, (2,)), action_space=spaces.Box(-1, 1, (1,))
    )
    with pytest.raises(DemonstrationError, match=r"its actions are Box.*expected Discrete\(4\)"):
        import_minari("hopper-v0", tmp_path / "hopper")


def test_no_environment_of_a_data_set_is_made(dataset, tmp_path):
    raw = tmp_path / "minari/navagent/room-v0/data/metadata.json"
    metadata = json.loads(raw.read_text())
    del metadata["observation_space"]
    metadata["env_spec"] = '{"id": "x", "entry_point": "os:getcwd"}'
    raw.write_text(json.dumps(metadata))
    with pytest.raises(DemonstrationError, match="does not say what its spaces are"):
        import_minari(dataset, tmp_path / "x")
