"""What `navagent reference record` does where no Habitat is; test_reference_habitat.py has the rest."""

import json
import shutil
import sys

import numpy as np
import pytest

from navagent.cli import main
from navagent.habitat_recorder.questions import QUESTIONS, ROLLOUTS, Counts, draw_questions
from navagent.habitat_recorder.record import find_glbs, plan_again
from navagent.habitat_recorder.same import compare_recordings
from navagent.recordings import RecordingError, cameras_of, read_answers, read_description

FEW = Counts(views=3, geodesics=5, steps=400, points=20, obstacles=4, rollouts=2, rollout_steps=300)
BOUNDS = np.array([[0, 0, 0], [4, 3, 2]], np.float32)


@pytest.fixture
def studio(reference_dir, tmp_path):
    """A folder with one of the recorded scenes only."""
    folder = tmp_path / "studio"
    folder.mkdir()
    for path in reference_dir.glob("studio*"):
        shutil.copyfile(path, folder / path.name)
    return folder


@pytest.fixture
def without_habitat(monkeypatch):
    """An installation without Habitat, wherever this runs."""
    monkeypatch.setitem(sys.modules, "habitat_sim", None)
    monkeypatch.setitem(sys.modules, "habitat", None)


def sampler(seed=0):
    numbers = np.random.default_rng(seed)

    def sample(count):
        return numbers.uniform(BOUNDS[0], BOUNDS[1], (count, 3)).astype(np.float32)

    return sample


def said(capsys, *arguments):
    """Exit status, and what was said to whoever typed this."""
    status = main(["reference", "record", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def test_help_of_reference_points_to_record_and_record_teaches(capsys):
    for arguments in (["reference", "--help"], ["reference", "record", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        assert "navagent reference record data/" in capsys.readouterr().out


def test_without_habitat_nothing_is_left_and_what_to_do_is_said(without_habitat, studio, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    status, text = said(capsys, studio, tmp_path / "out")
    assert status == 2
    assert "habitat-sim is needed" in text and "navagent doctor" in text and "docs/habitat.md" in text
    assert sorted(tmp_path.iterdir()) == before


def test_scenes_that_are_not_there_are_named(tmp_path, capsys):
    status, text = said(capsys, tmp_path / "nowhere", tmp_path / "out")
    assert status == 2 and f"{tmp_path / 'nowhere'} does not exist" in text
    (tmp_path / "empty").mkdir()
    status, text = said(capsys, tmp_path / "empty", tmp_path / "out")
    assert status == 2 and "holds no scene" in text and ".glb" in text


def test_an_occupied_out_is_refused_and_left_as_it_is(studio, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    status, text = said(capsys, studio, out)
    assert status == 2 and f"{out} exists already" in text
    assert (out / "mine.txt").read_text() == "mine"


def test_wrong_options_say_what_is_expected(studio, tmp_path, capsys):
    for option, value, expected in (
        ("--episodes", "-1", "at least 0"),
        ("--gpu", "cuda", "at least -1"),
        ("--radius", "0", "greater than 0"),
        ("--epsiodes", "3", "did you mean --episodes"),
    ):
        status, text = said(capsys, studio, tmp_path / "out", option, value)
        assert status == 2 and expected in text, option


def test_again_takes_its_questions_from_the_recordings_alone(studio, tmp_path, capsys):
    status, text = said(capsys, studio, tmp_path / "out", "--again", "--seed", "3")
    assert status == 2 and "--again asks what was asked before, so --seed cannot be given" in text
    (studio / "studio.reference.npz").unlink()
    status, text = said(capsys, studio, tmp_path / "out", "--again")
    assert status == 2 and "no recordings to make again" in text


def test_again_needs_every_question(studio):
    with np.load(studio / "studio.reference.npz") as file:
        answers = dict(file)
    del answers["step_target"], answers["obstacle_point"]
    np.savez(studio / "studio.reference.npz", **answers)
    with pytest.raises(RecordingError, match="lacks obstacle_point, step_start, step_target"):
        plan_again(studio)


def test_again_asks_with_the_same_agent_cameras_and_questions(reference_dir):
    plans = plan_again(reference_dir)
    assert set(plans) == {"apartment", "loft", "studio"}
    for name, plan in plans.items():
        description = json.loads((reference_dir / f"{name}.json").read_text())
        assert plan.source == reference_dir / f"{name}.glb"
        assert plan.agent.height == pytest.approx(description["agent_height"])
        assert [camera.name for camera in plan.cameras] == ["depth128", "rgb128", "depth64x96"]
        assert len(plan.episodes) == len(plan.traces) == 20
        with np.load(reference_dir / f"{name}.reference.npz") as recorded:
            for key in QUESTIONS:
                np.testing.assert_array_equal(plan.questions[key], recorded[key])
            for kind in ROLLOUTS:
                key = f"rollout_{kind}_position"
                np.testing.assert_array_equal(plan.questions[key], recorded[key][:, :1])


def test_scenes_are_found_in_folders_and_named_as_their_episodes_name_them(tmp_path):
    for path in ("hm3d/00800-TEE/TEE.basis.glb", "gibson/Cantwell.glb"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    assert list(find_glbs(tmp_path)) == ["Cantwell", "TEE"]
    assert list(find_glbs(tmp_path / "gibson" / "Cantwell.glb")) == ["Cantwell"]
    (tmp_path / "Cantwell.glb").touch()
    with pytest.raises(RecordingError, match="both named Cantwell"):
        find_glbs(tmp_path)


def test_the_same_seed_asks_the_same_and_another_asks_something_else():
    first, second = (draw_questions(sampler(), BOUNDS, 1, FEW) for _ in range(2))
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name])
    other = draw_questions(sampler(), BOUNDS, 2, FEW)
    assert (other["view_yaw"] != first["view_yaw"]).all()


def test_questions_are_of_the_kinds_and_shapes_that_recordings_have():
    questions = draw_questions(sampler(), BOUNDS, 0, FEW)
    assert set(QUESTIONS) < set(questions)
    moves = questions["step_target"] - questions["step_start"]
    length = np.linalg.norm(moves, axis=1)
    assert (moves[:, 1] == 0).all() and length.max() < 0.76
    assert 0.5 < np.mean(np.abs(length - 0.25) < 1e-5) < 0.8
    for kind in ROLLOUTS:
        actions = questions[f"rollout_{kind}_actions"]
        assert actions.shape == (2, 300) and set(np.unique(actions)) == {0, 1, 2}
        assert questions[f"rollout_{kind}_position"].shape == (2, 1, 3)
        turned = questions[f"rollout_{kind}_rotation_xyzw"]
        np.testing.assert_allclose(np.linalg.norm(turned, axis=2), 1, rtol=1e-6)


def test_recordings_are_the_same_as_themselves(studio):
    rows = compare_recordings(studio, studio)
    assert all(row.passed for row in rows)
    assert {"depth128: pixels within 0.0001 m", "query_island_radius: within 0.0001 m"} <= {
        r.what for r in rows
    }


def test_answers_that_differ_are_found(studio, tmp_path):
    other = shutil.copytree(studio, tmp_path / "other")
    with np.load(studio / "studio.reference.npz") as file:
        answers = dict(file)
    answers["geodesic_distance"][answers["geodesic_distance"] == np.inf] = 0
    answers["view_depth64x96"][:, :2] += 0.001
    answers["rollout_stop_collided"][:4] ^= True
    answers["query_snapped"][:21, 1] += 0.001  # of 4000
    np.savez(other / "studio.reference.npz", **answers)
    description = json.loads((studio / "studio.json").read_text())
    (other / "studio.json").write_text(json.dumps(description | {"navigable_area": 80.0}))
    failed = {row.what for row in compare_recordings(studio, other) if not row.passed}
    assert failed == {
        "navigable area",
        "geodesic_distance: within 0.0001 m",
        "depth64x96: pixels within 0.0001 m",
        "rollout_stop: collides or not, the same",
        "query_snapped: within 0.0001 m",
    }


def test_a_walk_that_goes_elsewhere_after_one_contact_counts_as_one_action(studio, tmp_path):
    other = shutil.copytree(studio, tmp_path / "other")
    with np.load(studio / "studio.reference.npz") as file:
        answers = dict(file)
    answers["rollout_stop_position"][:8, 76:] += 0.5
    answers["rollout_stop_collided"][:8, 76:] ^= True
    np.savez(other / "studio.reference.npz", **answers)
    rows = {row.what: row for row in compare_recordings(studio, other)}
    ends = rows["rollout_stop: action ends within 0.0001 m"]
    assert ends.value == pytest.approx(100 * (1 - 8 / (8 * 150 + 8 * 76))) and ends.passed
    assert rows["rollout_stop: collides or not, the same"].value == 100


def test_answers_that_one_of_two_lacks_are_named(studio, tmp_path):
    other = shutil.copytree(studio, tmp_path / "other")
    with np.load(studio / "studio.reference.npz") as file:
        answers = dict(file)
    del answers["query_snapped"]
    np.savez(other / "studio.reference.npz", **answers)
    with pytest.raises(RecordingError, match="lacks query_snapped"):
        compare_recordings(studio, other)
    cameras = cameras_of(read_description(other / "studio.json"))
    assert "query_snapped" not in read_answers(other / "studio.reference.npz", cameras)
