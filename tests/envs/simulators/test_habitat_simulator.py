"""Real habitat-sim through worker processes: it answers what was recorded of it, and what it says itself.

Runs where habitat_sim imports, or where HABITAT_PYTHON names a Python in which it does.
"""

import importlib.util
import os
import signal
import warnings

import numpy as np
import pytest
import torch

from envs.make import load_split, make_vector_env
from envs.sampler import EpisodeSampler
from envs.simulators.base import SensorSpec, SimulatorError
from envs.simulators.habitat import HabitatSimulator, check_habitat
from envs.simulators.raycast import RaycastSimulator
from envs.simulators.workers.pool import WorkerDiedWarning
from envs.task import PointNavConfig
from envs.vector_env import PointNavVectorEnv
from navagent.recordings import agent_of, cameras_of, read_answers, read_description
from navagent.reference import check_reference

PYTHON = os.environ.get("HABITAT_PYTHON")
SCENES = ("apartment", "studio", "loft")


@pytest.fixture(scope="module", autouse=True)
def _installed():
    if PYTHON is None and importlib.util.find_spec("habitat_sim") is None:
        pytest.skip("habitat_sim is not installed here, and HABITAT_PYTHON names no Python that has it")


@pytest.fixture
def habitat():
    """Makes simulators and closes them."""
    made = []

    def make(scenes, num_agents, sensors, agent=None, **options):
        made.append(HabitatSimulator(scenes, num_agents, sensors, agent, python=PYTHON, **options))
        return made[-1]

    yield make
    for simulator in made:
        simulator.close()


def test_habitat_answers_as_recorded(reference_dir, habitat, monkeypatch):
    """`navagent reference` with habitat-sim in the built-in simulator's place: its figures, and better."""

    def in_its_place(scenes, num_agents, sensors, agent=None, device="cpu", num_threads=1):
        return habitat(scenes, num_agents, sensors, agent)

    monkeypatch.setattr("envs.simulators.raycast.simulator.RaycastSimulator", in_its_place)
    rows = {(row.scene, row.what): row for row in check_reference(reference_dir)}
    # Moves that do not slide stop elsewhere in release 0.3.3 than in the sources of 2026 that were recorded.
    missed = [row for row in rows.values() if row.passed is False and "not sliding" not in row.what]
    assert not missed, missed
    for scene in SCENES:
        assert rows[scene, "geodesic: 99th percentile relative error"].value < 1e-3
        for what in ("one move, sliding: within 0.01 m", "navigable or not: agrees"):
            assert rows[scene, what].value == 100.0


@pytest.mark.parametrize("scene", SCENES)
def test_depth_is_as_recorded_to_the_last_bit_or_nearly(reference_dir, habitat, scene):
    description = read_description(reference_dir / f"{scene}.json")
    cameras = [camera for camera in cameras_of(description) if camera.kind == "depth"]
    answers = read_answers(reference_dir / f"{scene}.reference.npz", tuple(cameras))
    count = len(answers["view_yaw"])
    agent = agent_of(description, True)
    simulator = habitat([reference_dir / f"{scene}.glb"], count, cameras, agent, num_workers=2)
    position, yaw = (torch.from_numpy(answers[name]) for name in ("view_position", "view_yaw"))
    simulator.reset(torch.arange(count), torch.zeros(count, dtype=torch.int64), position, yaw)
    for name, image in simulator.render().items():
        error = np.abs(image.numpy().astype(np.float64) - answers[f"view_{name}"])
        # Of the same build all are equal; other versions of Mesa round silhouettes otherwise.
        assert np.median(error) < 1e-6 and np.mean(error > 1e-3) < 1e-3


def rollouts(reference_dir, simulators, steps=40):
    """Lets simulators walk the same random steps, each from where the first one is; yields after each."""
    count = simulators[0].num_agents
    generator = torch.Generator().manual_seed(0)
    scene = torch.arange(count) % len(simulators[0].scenes)
    start = simulators[0].paths.sample(scene, generator)
    yaw = torch.linspace(-3, 3, count)
    for _ in range(steps):
        for simulator in simulators:
            simulator.reset(torch.arange(count), scene, start, yaw)
        actions = torch.multinomial(torch.tensor([0.0, 0.6, 0.2, 0.2]), count, True, generator=generator)
        for simulator in simulators:
            simulator.step(actions)
        yield actions
        start, yaw = simulators[0].position, simulators[0].yaw


def test_it_walks_and_sees_as_the_built_in_simulator_does(reference_dir, habitat):
    scenes = [reference_dir / f"{name}.glb" for name in SCENES[:2]]
    cameras = [SensorSpec("depth", "depth", 32, 48), SensorSpec("rgb", "rgb", 32, 48, pitch_deg=-20)]
    there = habitat(scenes, 6, cameras)
    here = RaycastSimulator(scenes, 6, cameras, num_threads=1)
    near, depths, colours = [], [], []
    for _ in rollouts(reference_dir, [there, here]):
        near.append((there.position - here.position).norm(dim=1) < 1e-3)
        assert torch.equal(there.yaw, here.yaw)
        theirs, ours = there.render(), here.render()
        same = near[-1]
        depths.append((theirs["depth"] - ours["depth"])[same].abs())
        colours.append((theirs["rgb"].float() - ours["rgb"].float())[same].abs())
    here.close()
    assert torch.cat(near).float().mean() > 0.99
    depth, colour = torch.cat(depths), torch.cat(colours)
    assert depth.median() < 1e-4 and (depth > 0.05).float().mean() < 2e-3
    assert colour.mean() < 8


def test_the_task_gives_the_same_numbers_in_both_simulators(reference_dir, habitat):
    episodes, scenes = load_split(reference_dir / "pointnav" / "val" / "val.json.gz", "val", reference_dir)
    episodes = [episode for episode in episodes if "loft" not in episode.scene_id][:24]
    scenes = {episode.scene_id: scenes[episode.scene_id] for episode in episodes}
    found = []
    for kind in ("there", "here"):
        sampler = EpisodeSampler(episodes, 6, scenes, mode="once")
        cameras = [SensorSpec("depth", "depth", 16, 16)]
        if kind == "there":
            simulator = habitat(sampler.resident_scenes, 6, cameras, num_workers=2)
        else:
            simulator = RaycastSimulator(sampler.resident_scenes, 6, cameras, num_threads=1)
        env = PointNavVectorEnv(simulator, PointNavConfig(max_steps=200), sampler, ["depth", "pointgoal"])
        env.reset(seed=0)
        measured = {}
        while env.active.any():
            current = env.current_episodes()
            *_, infos = env.step(env.expert_actions())
            for agent in np.flatnonzero(infos.get("_episode", np.zeros(6, bool))):
                measures = {name: float(value[agent]) for name, value in infos["episode"].items()}
                measured[current[agent]] = measures
        env.close()
        found.append(measured)
    there, here = found
    assert len(there) == len(here) == len(episodes)
    for name, tolerance in (("success", 1e-6), ("spl", 0.02), ("distance_to_goal", 0.05)):
        difference = [there[index][name] - here[index][name] for index in there]
        assert abs(np.mean(difference)) <= tolerance, (name, difference)
    assert np.mean([measures["success"] for measures in there.values()]) > 0.95


def test_an_environment_is_made_on_habitat_sim_by_one_argument(reference_dir):
    env = make_vector_env(
        3,
        reference_dir / "pointnav" / "val" / "val.json.gz",
        "val",
        reference_dir,
        observations=["depth", "pointgoal_with_gps_compass"],
        max_resident_scenes=2,
        habitat={"num_workers": 2, "python": PYTHON},
    )
    assert isinstance(env.simulator, HabitatSimulator)
    observations, _ = env.reset(seed=0)
    assert 0 < observations["depth"].mean() < 1
    for _ in range(5):
        observations, *_ = env.step(np.array([1, 2, 3]))
    assert env.observation_space.contains(observations)
    env.close()


def test_a_killed_worker_changes_no_pixel(reference_dir, habitat):
    scenes = [reference_dir / f"{name}.glb" for name in SCENES]
    cameras = [SensorSpec("depth", "depth", 16, 16), SensorSpec("rgb", "rgb", 16, 16)]
    calm = habitat(scenes, 4, cameras, num_workers=1)
    unlucky = habitat(scenes, 4, cameras, num_workers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WorkerDiedWarning)
        for turn, _ in enumerate(rollouts(reference_dir, [calm, unlucky], 12)):
            if turn in (3, 4, 9):
                signals = (signal.SIGKILL, signal.SIGSEGV)
                os.kill(unlucky.process_ids[turn % 2], signals[turn % 2])
            assert torch.equal(calm.position, unlucky.position)
            for name, image in calm.render().items():
                assert torch.equal(image, unlucky.render()[name])
    assert unlucky.restarts == 3 and calm.restarts == 0
    assert unlucky.take_deaths().all() and not calm.take_deaths().any()


def test_episodes_of_a_worker_that_crashes_begin_again(reference_dir):
    env = make_vector_env(
        4,
        reference_dir / "pointnav" / "val" / "val.json.gz",
        "val",
        reference_dir,
        observations=["rgb", "depth", "pointgoal_with_gps_compass"],
        height=16,
        width=16,
        max_resident_scenes=2,
        habitat={"num_workers": 2, "python": PYTHON},
    )
    first, _ = env.reset(seed=0)
    before = env.current_episodes()
    for actions in ([1, 2, 3, 1], [1, 1, 2, 3]):
        env.step(np.array(actions))
    os.kill(env.simulator.process_ids[1], signal.SIGSEGV)
    with pytest.warns(WorkerDiedWarning, match="SIGSEGV.*its agents' episodes begin again"):
        observations, _, terminated, truncated, infos = env.step(np.array([1, 1, 2, 2]))
    assert not terminated.any() and truncated.tolist() == infos["interrupted"].tolist() == [0, 0, 1, 1]
    assert "_episode" not in infos and env.current_episodes() == before and env.interruptions == 2
    for name, values in observations.items():
        assert np.array_equal(values[2:], first[name][2:])
        assert not np.array_equal(infos["final_obs"][name][2:], first[name][2:])
    env.close()


def test_a_gpu_that_is_not_there_is_told_in_habitats_words():
    with pytest.raises(
        SimulatorError, match=r"(?is)habitat-sim worker 0 .*(CUDA|EGL|context).*docs/habitat\.md"
    ):
        check_habitat([SensorSpec("depth", "depth")], [97], PYTHON)


def test_without_cameras_it_needs_no_graphics(reference_dir, habitat, monkeypatch):
    # No driver at all.
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_FILENAMES", "/nowhere.json")
    check_habitat([], [0], PYTHON)
    simulator = habitat([reference_dir / "apartment.glb"], 2, [], gpu_ids=[97])
    scene = torch.zeros(2, dtype=torch.int64)
    start = simulator.paths.sample(scene, torch.Generator().manual_seed(0))
    assert simulator.paths.is_navigable(scene, start).all()
    assert simulator.render() == {}


def test_a_file_that_is_no_scene_is_refused_by_its_name(tmp_path, habitat):
    (tmp_path / "nothing.glb").write_bytes(b"glTF of some kind")
    simulator = habitat([tmp_path / "nothing.glb"], 1, [SensorSpec("depth", "depth", 8, 8)])
    with warnings.catch_warnings():
        # It may say so, or end at it.
        warnings.simplefilter("ignore", WorkerDiedWarning)
        with pytest.raises(SimulatorError, match=r"nothing|nowhere to stand"):
            simulator.paths.sample(torch.zeros(1, dtype=torch.int64), torch.Generator())


def test_scenes_that_left_free_their_memory(reference_dir, habitat, tmp_path):
    copies = []
    for index in range(8):
        for suffix in (".glb", ".navmesh"):
            copies.append(tmp_path / f"home{index}{suffix}")
            copies[-1].write_bytes((reference_dir / f"apartment{suffix}").read_bytes())
    scenes = copies[::2]
    simulator = habitat(scenes[:2], 1, [SensorSpec("depth", "depth", 32, 32)])

    def held():
        with open(f"/proc/{simulator.process_ids[0]}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    sizes = []
    for round_ in range(4):
        for index in range(0, 8, 2):
            simulator.load_scenes(scenes[index : index + 2])
            for scene in range(2):
                where = torch.tensor([scene])
                start = simulator.paths.sample(where, torch.Generator().manual_seed(round_))
                simulator.reset(torch.tensor([0]), where, start, torch.zeros(1))
                assert simulator.render()["depth"].max() > 0.1
        sizes.append(held())
    assert sizes[-1] - sizes[0] < 48 << 20, sizes
