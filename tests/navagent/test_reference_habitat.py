"""Recordings of real Habitat, made where it is installed; skipped where it is not."""

import json
import shutil

import numpy as np
import pytest

from envs.simulators.base import AgentSpec
from navagent.cli import main
from navagent.habitat_recorder.record import RecordOptions, record
from navagent.habitat_recorder.same import compare_recordings
from navagent.real_habitat import import_habitat
from navagent.recordings import RecordingError, read_episodes, read_traces
from navagent.reference import check_reference

pytest.importorskip("habitat_sim", reason="habitat-sim is not installed", exc_type=ImportError)
pytest.importorskip("habitat", reason="habitat-lab is not installed", exc_type=ImportError)

# Three scenes that Habitat renders in software, on a machine that may be busy.
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    import_habitat()


@pytest.fixture(scope="module")
def again(reference_dir, tmp_path_factory):
    """The shared recordings, made again."""
    return record(reference_dir, tmp_path_factory.mktemp("again") / "out", again=True)


def test_recorded_again_every_answer_is_the_same(reference_dir, again):
    rows = compare_recordings(reference_dir, again)
    assert {row.scene for row in rows} == {"apartment", "loft", "studio"}
    assert not [row for row in rows if not row.passed]


def test_recorded_again_the_descriptions_say_the_same(reference_dir, again):
    for name in ("apartment", "loft", "studio"):
        before, after = (
            json.loads((folder / f"{name}.json").read_text()) for folder in (reference_dir, again)
        )
        assert before.keys() == after.keys()
        assert after["navmesh"] == before["navmesh"]
        np.testing.assert_allclose(after["bounds"], before["bounds"], atol=1e-4)


def figures(folder):
    """How near the built-in simulator comes, but for moves that builds of habitat-sim disagree about."""
    return [row for row in check_reference(folder) if "not sliding" not in row.what]


def test_recorded_again_the_figures_of_the_built_in_simulator_are_the_same(reference_dir, again):
    before, after = figures(reference_dir), figures(again)
    assert [(row.scene, row.what) for row in before] == [(row.scene, row.what) for row in after]
    for old, new in zip(before, after, strict=True):
        assert new.passed, new
        assert new.value == pytest.approx(old.value, rel=0.05, abs=0.05 * old.bar), (old, new)


def test_a_new_recording_is_accepted_and_its_seed_gives_the_same_again(reference_dir, tmp_path, capsys):
    scene = tmp_path / "scenes" / "studio.glb"
    scene.parent.mkdir()
    for suffix in (".glb", ".stage_config.json"):
        shutil.copyfile(reference_dir / f"studio{suffix}", scene.with_suffix(suffix))
    outs = [tmp_path / "first", tmp_path / "second"]
    for out in outs:
        assert main(["reference", "record", str(scene), str(out), "--episodes", "4", "--seed", "5"]) == 0
    assert f"navagent reference {outs[0]}" in capsys.readouterr().out
    rows = figures(outs[0])
    assert all(row.passed for row in rows), [row for row in rows if not row.passed]
    traces = read_traces(outs[0])["studio"]
    assert [trace["policy"] for trace in traces] == ["expert", "noisy"] * 2
    assert [trace["metrics"]["success"] for trace in traces[::2]] == [1.0, 1.0]
    assert len(read_episodes(outs[0])) == 4
    first, second = (dict(np.load(out / "studio.reference.npz")) for out in outs)
    assert first.keys() == second.keys()
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name], err_msg=name)
    assert traces == read_traces(outs[1])["studio"]


def test_a_scene_without_a_floor_for_the_agent_is_named_and_leaves_nothing(reference_dir, tmp_path):
    # Wider than the room. A tall one would stand on the roof.
    wide = RecordOptions(agent=AgentSpec(radius=5.0), episodes=0)
    with pytest.raises(RecordingError, match=r"nowhere to stand for an agent of radius 5 m"):
        record(reference_dir / "studio.glb", tmp_path / "out", wide)
    assert list(tmp_path.iterdir()) == []
