import gzip
import json
import math
import shutil

import numpy as np
import pytest
import torch

from envs.scenes.gltf import load_scene
from envs.simulators.base import SensorSpec
from envs.simulators.raycast.renderer import Renderer
from navagent.reference import Row, check_reference, run


@pytest.fixture(scope="module")
def studio(reference_dir, tmp_path_factory):
    """A folder with one of the recorded scenes only."""
    folder = tmp_path_factory.mktemp("recordings")
    for path in reference_dir.glob("studio*"):
        shutil.copy(path, folder)
    shutil.copytree(reference_dir / "pointnav", folder / "pointnav")
    with gzip.open(reference_dir / "pointnav_traces.json.gz") as file:
        traces = json.load(file)
    with gzip.open(folder / "pointnav_traces.json.gz", "wt") as file:
        json.dump({"studio": traces["studio"][:4]}, file)
    return folder


@pytest.fixture
def copy(studio, tmp_path):
    return shutil.copytree(studio, tmp_path / "copy", copy_function=lambda a, b: shutil.copy(a, b))


def edit(folder, change):
    path = folder / "studio.reference.npz"
    with np.load(path) as file:
        answers = dict(file)
    change(answers)
    path.chmod(0o644)
    np.savez_compressed(path, **answers)


def test_every_recorded_scene_reaches_every_bar(reference_dir):
    rows = check_reference(reference_dir)
    assert {row.scene for row in rows} == {"apartment", "loft", "studio"}
    missed = [row for row in rows if row.passed is not True]
    assert not missed


def test_table_names_each_figure_and_exit_status_is_0(studio, capsys):
    assert run(studio) == 0
    printed = capsys.readouterr().out
    for what in ("depth64x96: median error", "rgb128: PSNR", "mesh from geometry", "task: SoftSPL"):
        assert what in printed


def test_a_missed_bar_gives_status_1_and_says_which(copy, capsys):
    def spoil(answers):
        answers["geodesic_distance"] = answers["geodesic_distance"] * 1.1

    edit(copy, spoil)
    assert run(copy, as_json=True) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["passed"] is False
    failed = {row["what"] for row in printed["rows"] if row["passed"] is False}
    assert failed == {"geodesic: median relative error", "geodesic: 99th percentile relative error"}


def test_wrong_task_answers_are_found(copy):
    path = copy / "pointnav_traces.json.gz"
    with gzip.open(path) as file:
        traces = json.load(file)
    traces["studio"][0]["reward"][3] += 0.01
    traces["studio"][1]["metrics"]["collisions"] += 1
    with gzip.open(path, "wt") as file:
        json.dump(traces, file)
    failed = {row.what for row in check_reference(copy) if row.passed is False}
    assert failed == {"task: reward, largest error", "task: collisions, largest error"}


def test_infinite_distances_agree_with_infinite_ones_and_with_nothing_else(copy, capsys):
    path = copy / "pointnav_traces.json.gz"
    traces = json.loads(gzip.decompress(path.read_bytes()))
    trace = traces["studio"][0]
    trace["distance_to_goal"] = [math.inf] * len(trace["distance_to_goal"])
    path.write_bytes(gzip.compress(json.dumps(traces).encode()))
    rows = {row.what: row for row in check_reference(copy)}
    assert rows["task: distance to goal, largest error"].passed
    trace["metrics"]["soft_spl"] = math.nan
    path.write_bytes(gzip.compress(json.dumps(traces).encode()))
    assert run(copy, as_json=True) == 1
    assert "NaN" not in capsys.readouterr().out


def test_other_cameras_are_found_by_their_names(copy):
    description = json.loads((copy / "studio.json").read_text())
    (camera,) = [sensor for sensor in description["sensors"] if sensor["name"] == "depth64x96"]
    description["sensors"] = [camera | {"name": "small"}]
    (copy / "studio.json").chmod(0o644)
    (copy / "studio.json").write_text(json.dumps(description))
    edit(copy, lambda answers: answers.update(view_small=answers.pop("view_depth64x96")))
    views = [row for row in check_reference(copy) if "error" in row.what and row.what.startswith("small")]
    assert len(views) == 2 and all(row.passed for row in views)


def test_what_was_not_recorded_neither_passes_nor_fails(copy):
    (copy / "pointnav_traces.json.gz").unlink()
    edit(copy, lambda answers: answers.pop("obstacle_distance"))
    missing = {row.what for row in check_reference(copy) if row.passed is None}
    assert "distance to obstacle: within 0.03 m" in missing and "task: SPL, largest error" in missing
    assert run(copy) == 0


def test_missing_questions_leave_their_answers_out(copy):
    def thin(answers):
        for name in ("view_position", "geodesic_end", "step_target", "query_point", "rollout_stop_position"):
            answers.pop(name)

    edit(copy, thin)
    measured = {row.what for row in check_reference(copy) if row.passed is not None}
    assert {what for what in measured if not what.startswith("task")} == {
        "distance to obstacle: within 0.03 m",
        "one action, sliding: within 0.01 m",
        "one action, sliding: collided agrees",
    }


def test_recordings_in_double_precision_are_as_good(copy):
    def widen(answers):
        for name, values in answers.items():
            answers[name] = values.astype(np.float64) if values.dtype == np.float32 else values

    edit(copy, widen)
    assert all(row.passed for row in check_reference(copy))


def test_equal_pictures_give_a_finite_figure(copy, capsys):
    edit(copy, lambda answers: answers.update(view_rgb128=render(copy, answers)))
    run(copy, as_json=True)

    def refuse(constant):
        raise ValueError(constant)

    rows = json.loads(capsys.readouterr().out, parse_constant=refuse)["rows"]
    assert next(row["value"] for row in rows if row["what"] == "rgb128: PSNR") > 100


def render(folder, answers):
    sensor = SensorSpec("rgb128", "rgb", 128, 128, hfov_deg=90.0, sensor_height=1.5)
    renderer = Renderer([sensor])
    renderer.load_scenes([load_scene(folder / "studio.glb")])
    poses = [torch.from_numpy(answers[name]) for name in ("view_position", "view_yaw")]
    return renderer.render(torch.zeros(len(poses[1]), dtype=torch.int64), *poses)["rgb128"].numpy()


@pytest.mark.parametrize(("name", "change", "fault"), [
    ("geodesic_distance", lambda a: a[:-1], "shape"), ("view_depth128", lambda a: a[:, :64], "shape"),
    ("query_point", lambda a: a[:, :2], "shape"), ("view_yaw", lambda a: np.float32(0), "shape"),
    ("rollout_slide_position", lambda a: a[:, 1:], "shape"),
    ("rollout_stop_actions", lambda a: a + 1, "0 to 2"),
    ("step_slide", lambda a: a.astype(str), "expected numbers"),
    ("view_position", lambda a: a * np.nan, "finite"),
    ("obstacle_distance", lambda a: a.astype(object), "allow_pickle=False"),
])  # fmt: skip
def test_arrays_that_cannot_be_compared_give_status_2_and_their_name(copy, capsys, name, change, fault):
    edit(copy, lambda answers: answers.update({name: change(answers[name])}))
    assert run(copy) == 2
    printed = capsys.readouterr().err
    assert "studio.reference.npz" in printed and fault in printed
    assert name in printed or fault == "allow_pickle=False"


@pytest.mark.parametrize(("change", "fault"), [
    (lambda d: d.update(sensors="all"), "sensors"), (lambda d: d.pop("forward_step"), "forward_step"),
    (lambda d: d["navmesh"].update(agent_radius=float("nan")), "agent_radius"),
    (lambda d: d["sensors"][0].update(height="tall"), "height of sensor 0"),
    (lambda d: d.update(navmesh=[]), "navmesh"),
])  # fmt: skip
def test_a_wrong_description_gives_status_2_and_the_fault(copy, capsys, change, fault):
    path = copy / "studio.json"
    description = json.loads(path.read_text())
    change(description)
    path.chmod(0o644)
    path.write_text(json.dumps(description))
    assert run(copy) == 2
    printed = capsys.readouterr().err
    assert "studio.json" in printed and fault in printed


@pytest.mark.parametrize(("change", "fault"), [
    (lambda traces: traces.update(studio=7), "list of traces"),
    (lambda traces: traces["studio"][0]["reward"].pop(), "reward has shape"),
    (lambda traces: traces["studio"][1].update(actions=[]), "no actions"),
    (lambda traces: traces["studio"][1]["actions"].__setitem__(0, 4), "must be 0, 1, 2 or 3"),
    (lambda traces: [goal.append(0.0) for goal in traces["studio"][0]["pointgoal"]], "pointgoal has shape"),
    (lambda traces: traces["studio"][0]["position"][3].pop(), "position does not hold numbers alone"),
    (lambda traces: traces["studio"][0]["reward"].__setitem__(0, "much"), "reward does not hold numbers"),
    (lambda traces: traces["studio"][1].pop("metrics"), "'metrics'"),
    (lambda traces: traces["studio"][1].update(episode_id="none"), "no episode none"),
])  # fmt: skip
def test_wrong_traces_give_status_2_and_the_fault(copy, capsys, change, fault):
    path = copy / "pointnav_traces.json.gz"
    traces = json.loads(gzip.decompress(path.read_bytes()))
    change(traces)
    path.write_bytes(gzip.compress(json.dumps(traces).encode()))
    assert run(copy) == 2
    assert fault in capsys.readouterr().err


def test_a_folder_with_no_answers_at_all_gives_status_2(copy, capsys):
    (copy / "pointnav_traces.json.gz").unlink()
    edit(copy, lambda answers: answers.clear())
    assert run(copy) == 2
    assert "nothing that Habitat answered" in capsys.readouterr().err


def test_recordings_without_their_scene_give_status_2(copy, capsys):
    (copy / "studio.glb").unlink()
    assert run(copy) == 2
    assert "studio.glb" in capsys.readouterr().err


def truncate(path):
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "name",
    ["studio.json", "studio.glb", "studio.navmesh", "studio.reference.npz", "pointnav_traces.json.gz"],
)
def test_a_truncated_file_gives_status_2_and_its_name(copy, capsys, name):
    truncate(copy / name)
    assert run(copy) == 2
    assert name in capsys.readouterr().err


def test_missing_recordings_give_status_2(copy, tmp_path, capsys):
    (copy / "studio.reference.npz").unlink()
    assert run(copy) == 2
    assert "studio.reference.npz" in capsys.readouterr().err
    assert run(tmp_path / "nowhere") == 2
    assert "nowhere" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty") == 2
    assert "no scene with recordings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "direction", "passed"),
    [(1.0, "<=", True), (1.1, "<=", False), (1.0, ">=", True), (0.9, ">=", False), (None, ">=", None)],
)
def test_a_row_passes_up_to_its_bar(value, direction, passed):
    assert Row("scene", "what", value, 1.0, direction, "m").passed is passed
