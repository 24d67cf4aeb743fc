import gzip
import json
import shutil

import numpy as np
import pytest

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
