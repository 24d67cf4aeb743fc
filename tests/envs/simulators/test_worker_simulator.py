"""Simulators in worker processes: equal to those in this one, and answering whatever dies."""

import contextlib
import dataclasses
import gc
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

from envs.scenes.navmesh_build import navmesh_for
from envs.scenes.navmesh_file import write_navmesh
from envs.scenes.scene import SceneError
from envs.simulators.base import Action, AgentSpec, SensorSpec, SimulatorError
from envs.simulators.raycast import RaycastSimulator
from envs.simulators.workers import child
from envs.simulators.workers.pool import Body, WorkerDiedWarning, ending, last_words
from envs.simulators.workers.simulator import WorkerSimulator

BODIES = Path(__file__).with_name("worker_bodies.py")
DEPTH = SensorSpec("depth", "depth", height=4, width=6)
RGB = SensorSpec("rgb", "rgb", height=4, width=6)


def flat_body(workers=2, **settings):
    return Body("flat", BODIES, "FlatBody", [settings] * workers)


@pytest.fixture(scope="module")
def one_room_scene(tmp_path_factory):
    """A room of 4 x 4 m with walls of several colours, and its navigation mesh."""
    folder = tmp_path_factory.mktemp("room")
    box = trimesh.creation.box((4, 4, 3))
    box.invert()
    box.visual.vertex_colors = np.random.default_rng(0).integers(0, 255, (8, 4), np.uint8) | 128
    box.apply_translation((0, 0, 1.5))
    trimesh.Scene(box).export(folder / "room.glb")
    navmesh = navmesh_for(folder / "room.glb", AgentSpec(), cache_dir=folder / "cache")
    write_navmesh(navmesh, folder / "room.navmesh")
    return folder / "room.glb"


@pytest.fixture
def rooms(tmp_path):
    """Makes scene files that say which accident happens in them."""

    def make(*texts):
        files = []
        for index, text in enumerate(texts):
            file = tmp_path / f"room{index}.flat"
            fuse = tmp_path / f"fuse{index}"
            fuse.touch()
            file.write_text(text if text in ("", "broken") else f"{text} {fuse}")
            files.append(file)
        return files

    return make


@pytest.fixture
def flat(rooms):
    """Makes simulators of flat rooms, and closes them."""
    made = []

    def make(*texts, num_agents=4, sensors=(DEPTH, RGB), workers=2, **options):
        simulator = WorkerSimulator(rooms(*texts), num_agents, sensors, flat_body(workers), **options)
        made.append(simulator)
        return simulator

    yield make
    for simulator in made:
        simulator.close()


def place(simulator, x, scene=None):
    """Puts all agents at different heights of x, in scene 0 if no other is given."""
    everyone = torch.arange(simulator.num_agents)
    position = torch.zeros(simulator.num_agents, 3)
    position[:, 0] = x + everyone
    position[:, 2] = everyone
    scene = torch.zeros_like(everyone) if scene is None else torch.tensor(scene)
    simulator.reset(everyone, scene, position, torch.zeros(simulator.num_agents))


def gone(process_id, seconds=5.0):
    """Whether a process ends within some time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            stat = Path(f"/proc/{process_id}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True
        if stat.rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


def test_every_agent_sees_its_own_pixels_and_steps_as_asked(flat):
    simulator = flat("")
    place(simulator, -2.0)
    images = simulator.render()
    assert images["depth"].shape == (4, 4, 6) and images["depth"].dtype == torch.float32
    assert images["rgb"].shape == (4, 4, 6, 3) and images["rgb"].dtype == torch.uint8
    assert images["depth"][:, 0, 0].tolist() == [-2, -1, 0, 1]
    assert images["rgb"][:, 3, 5, 2].tolist() == [0, 1, 2, 3]
    assert simulator.render(torch.tensor([3, 1]))["depth"][:, 1, 1].tolist() == [1, -1]

    simulator.step(torch.tensor([Action.MOVE_FORWARD, Action.TURN_LEFT, Action.TURN_RIGHT, Action.STOP]))
    assert simulator.position[:, 2].tolist() == [-0.25, 1, 2, 3]
    assert simulator.yaw.tolist() == pytest.approx([0, np.pi / 18, -np.pi / 18, 0])
    assert not simulator.collided.any()
    assert images["depth"][:, 0, 0].tolist() == [-2, -1, 0, 1]  # a picture once taken stays


def test_what_was_drawn_ahead_gives_way_to_a_reset(flat):
    simulator = flat("")
    place(simulator, -2.0)
    forward = torch.full((4,), int(Action.MOVE_FORWARD))
    for turn in range(3):
        simulator.step(forward)
        # Some start anew after the move was drawn, and before anybody looks.
        some = torch.tensor([1, 3])
        simulator.reset(
            some, torch.zeros(2, dtype=torch.int64), torch.full((2, 3), 3.0 + turn), torch.zeros(2)
        )
        seen = simulator.render()["depth"][:, 0, 0]
        assert seen.tolist() == simulator.position[:, 0].tolist() == [-2, 3 + turn, 0, 3 + turn]


def test_blocked_moves_collide(flat):
    simulator = flat("", num_agents=2)
    simulator.reset(
        torch.arange(2),
        torch.zeros(2, dtype=torch.int64),
        torch.tensor([[0, 0, -4.9], [0, 0, 0]]),
        torch.zeros(2),
    )
    simulator.step(torch.full((2,), int(Action.MOVE_FORWARD)))
    assert simulator.collided.tolist() == [True, False]
    assert simulator.position[:, 2].tolist() == [-5.0, -0.25]


def test_long_questions_are_asked_in_parts(flat):
    simulator = flat("", "", num_agents=2)
    count = 20_000
    scene = torch.arange(count) % 2
    start, goal = torch.randn(2, count, 3)
    distance = simulator.paths.geodesic_distance(scene, start, goal)
    torch.testing.assert_close(distance, (start - goal).norm(dim=1))
    points, corners = simulator.paths.path(scene[:2000], start[:2000], goal[:2000], max_points=128)
    assert (
        (corners == 2).all()
        and torch.equal(points[:, 0], start[:2000])
        and torch.equal(points[:, 1], goal[:2000])
    )


def test_scenes_are_exchanged_and_agents_follow_theirs(flat, tmp_path):
    simulator = flat("", "", "")
    _, second, third = simulator.scenes
    place(simulator, 0.0, [0, 1, 2, 1])
    simulator.load_scenes([third, second])
    assert simulator.scene.tolist() == [0, 1, 0, 1]  # the first one's scene is gone
    assert simulator.render()["depth"][:, 0, 0].tolist() == [0, 1, 2, 3]
    with pytest.raises(SceneError, match="nowhere"):
        simulator.load_scenes([tmp_path / "nowhere.flat"])
    assert simulator.scenes == (third, second)


def test_a_broken_scene_is_refused_with_its_name_and_nobody_dies(flat):
    simulator = flat("", "broken")
    place(simulator, 0.0, [0, 0, 0, 1])
    with pytest.raises(SimulatorError, match=r"room1\.flat: ValueError: not a scene at all"):
        simulator.render()
    with pytest.raises(SimulatorError, match="not a scene at all"):
        simulator.paths.geodesic_distance(torch.tensor([1]), torch.zeros(1, 3), torch.zeros(1, 3))
    place(simulator, 0.0)
    assert simulator.render()["depth"][:, 0, 0].tolist() == [0, 1, 2, 3]
    assert simulator.restarts == 0


@pytest.mark.parametrize(
    ("accident", "told"),
    [
        ("kill@draw", "killed by SIGKILL, as happens where memory runs out: the lamp went out"),
        (
            "segv@draw",
            r"SIGSEGV, a segmentation fault: the lamp went out \| Fatal Python error: .* \| in _happen, ",
        ),
        ("kill@ask", "killed by SIGKILL"),
        ("raise@ask", "ended with status 1: RuntimeError: no more light"),
        ("memory@draw", "ended with status 1: MemoryError: 4 GB too few"),
    ],
)
def test_a_worker_that_dies_is_reported_in_its_words_and_answers_all_the_same(flat, accident, told):
    simulator = flat("", accident)
    before = simulator.process_ids
    place(simulator, -2.0, [0, 0, 0, 1])
    assert not simulator.take_deaths().any()
    again = "Started again .1 of at most 10 times.; its agents' episodes begin again"
    with pytest.warns(WorkerDiedWarning, match=f"flat worker 1 .*{told}.*{again}"):
        simulator.render()
        simulator.step(torch.full((4,), int(Action.MOVE_FORWARD)))
        seen = simulator.render()
    assert seen["depth"][:, 0, 0].tolist() == [-2, -1, 0, 1]
    assert simulator.position[:, 2].tolist() == [-0.25, 0.75, 1.75, 2.75]
    assert simulator.restarts == 1
    assert simulator.take_deaths().tolist() == [False, False, True, True]
    assert not simulator.take_deaths().any()  # that was told
    after = simulator.process_ids
    assert after[0] == before[0] and after[1] != before[1] and gone(before[1])


def test_a_worker_killed_from_outside_between_two_steps_comes_back(flat):
    simulator = flat("")
    place(simulator, 0.0)
    simulator.render()
    for killed in (0, 1, 1):
        os.kill(simulator.process_ids[killed], signal.SIGKILL)
        with pytest.warns(WorkerDiedWarning):
            simulator.step(torch.full((4,), int(Action.MOVE_FORWARD)))
            assert simulator.render()["rgb"].shape == (4, 4, 6, 3)
    assert simulator.position[0].tolist() == [0, 0, -0.75]
    assert simulator.restarts == 3


def test_the_limit_of_restarts_is_an_error_that_leaves_nothing_behind(flat):
    simulator = flat("", max_restarts=1)
    place(simulator, 0.0)
    simulator.render()
    os.kill(simulator.process_ids[0], signal.SIGKILL)
    with pytest.warns(WorkerDiedWarning, match="1 of at most 1"):
        place(simulator, 1.0)
        simulator.render()
    processes = simulator.process_ids
    os.kill(processes[0], signal.SIGKILL)
    place(simulator, 2.0)
    with pytest.raises(
        SimulatorError, match=r"SIGKILL.* not started again: that was done 1 times, as often as is allowed"
    ):
        simulator.render()
    assert all(gone(each) for each in processes)
    with pytest.raises(SimulatorError, match="have been closed"):
        simulator.render()


def test_a_request_that_always_kills_is_given_up(flat):
    simulator = flat("always-kill@draw")
    place(simulator, 0.0)
    with (
        pytest.warns(WorkerDiedWarning),
        pytest.raises(SimulatorError, match="3 times in a row without an answer"),
    ):
        simulator.render()


def test_a_worker_that_does_not_answer_is_ended(flat, monkeypatch):
    monkeypatch.setattr("envs.simulators.workers.pool.PATIENCE", 0.3)
    simulator = flat("sleep@ask", num_agents=1, workers=1)
    with pytest.warns(WorkerDiedWarning, match=r"\) gave no answer for 0\.3 s and was ended"):
        simulator.paths.snap(torch.tensor([0]), torch.zeros(1, 3))


def test_workers_that_cannot_start_are_an_error_at_once(rooms):
    with pytest.raises(
        SimulatorError, match=r"flat worker 0 .*ModuleNotFoundError: No module named 'a_simulator"
    ) as caught:
        WorkerSimulator(rooms(""), 2, [DEPTH], flat_body(absent=True))
    assert "Traceback" not in str(caught.value)
    with pytest.raises(SimulatorError, match="ended with status 3, without a word"):
        WorkerSimulator(rooms(""), 2, [DEPTH], flat_body(mute=True))
    with pytest.raises(SimulatorError, match="/no/python does not start: No such file"):
        WorkerSimulator(rooms(""), 1, [DEPTH], Body("flat", BODIES, "FlatBody", [{}], python="/no/python"))


def test_who_is_interrupted_while_waiting_can_go_on(flat):
    simulator = flat("", "sleep@ask", num_agents=2)
    place(simulator, 0.0)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            simulator.paths.snap(torch.tensor([0, 1]), torch.zeros(2, 3))
    finally:
        signal.signal(signal.SIGALRM, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        points = torch.tensor([[1.0, 0, 0], [2.0, 0, 0]])
        assert simulator.paths.snap(torch.tensor([0, 1]), points)[:, 0].tolist() == [1, 2]
        assert simulator.render()["depth"][:, 0, 0].tolist() == [0, 1]
    assert simulator.restarts == 0


def test_signals_to_the_whole_group_do_not_end_workers(flat):
    simulator = flat("")
    for process_id in simulator.process_ids:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(process_id, number)
    place(simulator, 0.0)
    assert simulator.render()["depth"][:, 0, 0].tolist() == [0, 1, 2, 3]
    assert simulator.restarts == 0


def test_closing_or_forgetting_leaves_no_process_and_no_open_file(flat, rooms):
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    simulator = WorkerSimulator(rooms(""), 2, [DEPTH], flat_body())
    processes = simulator.process_ids
    simulator.close()
    simulator.close()
    assert all(gone(each) for each in processes)
    simulator = WorkerSimulator(rooms(""), 2, [DEPTH], flat_body())
    processes = simulator.process_ids
    del simulator
    gc.collect()
    assert all(gone(each) for each in processes)
    assert set(os.listdir("/proc/self/fd")) <= before


def test_a_killed_parent_takes_its_workers_and_the_shared_memory_along(rooms):
    program = f"""
        import sys, time
        from pathlib import Path
        from envs.simulators.base import SensorSpec
        from envs.simulators.workers.pool import Body, WorkerPool
        body = Body("flat", Path({str(BODIES)!r}), "FlatBody", [{{}}] * 2)
        pool = WorkerPool(body, [SensorSpec("depth", "depth")], 2)
        print(*pool.process_ids, flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    )
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert len(workers) == 2
    # Only what these have: other tests may be running.
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in (parent.pid, *workers))
    shared = set(re.findall(r"/dev/shm/\S+", maps))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert all(gone(each) for each in workers)
    assert not any(Path(file).exists() for file in shared)


def test_images_of_different_sensors_share_no_byte():
    sensors = [
        asdict(SensorSpec(kind, kind, height=3, width=5)) for kind in ("rgb", "depth", "normals", "instance")
    ]
    places, length = child.layout(sensors, 7)
    ends = 0
    for offset, shape, kind in places.values():
        assert offset >= ends and offset % 64 == 0 and shape[:3] == (7, 3, 5)
        ends = offset + int(np.prod(shape)) * np.dtype(kind).itemsize
    assert ends <= length


def test_lines_that_mean_nothing_are_no_last_words(tmp_path):
    (tmp_path / "said").write_text("loading\nno such lamp.hdr\ncannot open lamp.hdr\nFatal error: dark\n")
    with (tmp_path / "said").open() as said:
        assert last_words(said.fileno(), ["lamp.hdr"]) == "loading | Fatal error: dark"


@pytest.mark.parametrize("when", ["drawing", "starting"])
def test_what_to_do_is_said_where_workers_die_too_often(rooms, when):
    scene = rooms("always-kill@draw" if when == "drawing" else "")
    body = dataclasses.replace(flat_body(1), advice="Buy a lamp")
    with contextlib.closing(WorkerSimulator(scene, 1, [DEPTH], body)) as simulator:
        place(simulator, 0.0)
        if when == "starting":
            simulator.render()
            os.kill(simulator.process_ids[0], signal.SIGKILL)
            # From now on none starts.
            simulator._pool.body = dataclasses.replace(body, settings=[{"mute": True}])
            place(simulator, 1.0)
        how = "SIGKILL" if when == "drawing" else "ended with status 3, without a word"
        told = rf"{how}.* 3 times in a row without an answer\. Buy a lamp"
        with pytest.warns(WorkerDiedWarning), pytest.raises(SimulatorError, match=told):
            simulator.render()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "ended with status 0"),
        (-6, "was killed by SIGABRT"),
        (-9, "SIGKILL"),
        (-64, "was killed by SIGRTMAX"),
    ],
)
def test_how_a_process_ended_is_told(status, words):
    assert words in ending(status)


def test_the_built_in_simulator_is_the_same_in_workers(one_room_scene):
    """The oracle of all transport: what another process computes must not differ in a bit."""
    sensors = [
        SensorSpec("depth", "depth", height=16, width=16),
        SensorSpec("rgb", "rgb", height=8, width=12),
    ]
    agent, count = AgentSpec(allow_sliding=False), 5
    here = RaycastSimulator([one_room_scene], count, sensors, agent, num_threads=1)
    settings = {"sensors": [asdict(sensor) for sensor in sensors], "agent": asdict(agent)}
    body = Body("raycast", BODIES, "RaycastBody", [settings])
    there = WorkerSimulator([one_room_scene], count, sensors, body, agent)
    try:
        generator = torch.Generator().manual_seed(0)
        scene = torch.zeros(count, dtype=torch.int64)
        start, goal = here.paths.sample(scene, generator), here.paths.sample(scene, generator)
        yaw = torch.linspace(-3, 3, count)
        for simulator in (here, there):
            simulator.reset(torch.arange(count), scene, start, yaw)
        for _ in range(30):
            actions = torch.randint(0, 4, (count,), generator=generator)
            for simulator in (here, there):
                simulator.step(actions)
            assert torch.equal(here.position, there.position) and torch.equal(here.yaw, there.yaw)
            assert torch.equal(here.collided, there.collided)
            for name, image in here.render().items():
                assert torch.equal(image, there.render()[name])
        asked = (scene, start, goal)
        assert torch.equal(here.paths.geodesic_distance(*asked), there.paths.geodesic_distance(*asked))
        for mine, other in zip(here.paths.path(*asked, 16), there.paths.path(*asked, 16), strict=True):
            assert torch.equal(mine, other)
        outside = start + torch.tensor([0.0, 0.3, 5.0])
        for question in ("is_navigable", "snap", "island_radius", "distance_to_obstacle"):
            mine, other = getattr(here.paths, question), getattr(there.paths, question)
            assert torch.equal(mine(scene, start), other(scene, start)), question
            torch.testing.assert_close(
                mine(scene, outside), other(scene, outside), rtol=0, atol=0, equal_nan=True
            )
        drawn = there.paths.sample(scene, torch.Generator().manual_seed(3))
        assert there.paths.is_navigable(scene, drawn).all()
        assert torch.equal(drawn, there.paths.sample(scene, torch.Generator().manual_seed(3)))
    finally:
        here.close()
        there.close()
