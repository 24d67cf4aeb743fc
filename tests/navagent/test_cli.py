import dataclasses
import os
import subprocess
import sys
import warnings
from pathlib import Path

import cv2
import pytest

from navagent.cli import PRETRAIN_OPTIONS, VERBS, main
from navagent.learning.pretrain import PretrainConfig

ROOT = Path(__file__).resolve().parents[2]


def navagent(*arguments, cwd, **environment):
    """Runs the command in a process of its own, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "navagent", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NAVAGENT_DEBUG": "0", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_teaches_and_imports_nothing_heavy(tmp_path):
    code = (
        "import sys; from navagent.cli import main; status = main(['--help']);"
        "print([name for name in ('torch', 'warp', 'numpy', 'hydra') if name in sys.modules]);"
        "sys.exit(status)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.endswith("[]\n")
    assert "navagent train experiment=quick" in answer.stdout
    for verb in VERBS:
        assert f"\n  {verb} " in answer.stdout


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_help_with_an_example(verb, tmp_path):
    answer = navagent(verb, "--help", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert f"navagent {verb}" in answer.stdout
    assert "example" in answer.stdout


def test_version_is_the_distributions(tmp_path):
    answer = navagent("--version", cwd=tmp_path)
    assert answer.returncode == 0
    assert answer.stdout.startswith("navagent ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "there is no verb 'trian'; did you mean 'train'?"),
        (["train", "adaptation=finetun"], "did you mean 'finetune'?"),
        (["train", "algorithm.total_frames=many"], "algorithm.total_frames=many does not fit"),
        (["train", "--algorithm.gamma=0.9"], "settings are written without dashes: algorithm.gamma=0.9"),
        (["train", "--show-confg"], "did you mean '--show-config'?"),
        (["evaluate"], "required: RUN"),
        (["evaluate", "no-such-run"], "no-such-run"),
        (["evaluate", "x", "--episode", "3"], "did you mean --episodes?"),
        (["evaluate", "x", "--episodes", "three"], "invalid int value: 'three'"),
        (["scenes", "genrate"], "did you mean 'generate'?"),
        (["scenes", "generate"], "required: OUT"),
        (["scenes", "generate", "--num", "1", "out"], "at least 2 homes"),
        (["scenes", "show", "no.glb"], "no.glb"),
        (["reference", "no-folder"], "no-folder"),
        (["pretrain", "out", "--task", "normal"], "task 'normal': expected one of"),
        (["pretrain"], "required: OUT"),
        (["pretrain", "out", "--device", "gpu"], "device 'gpu' is not one of auto, cpu, cuda, cuda:N"),
    ],
)
def test_bad_input_is_one_message_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NAVAGENT_DEBUG", "0")
    assert main(arguments) == 2
    out, told = capsys.readouterr()
    assert message in told
    assert told.startswith("navagent")
    assert out == ""
    assert not list(tmp_path.iterdir())


def test_bad_input_is_the_process_s_status_too(tmp_path):
    answer = navagent("train", "adaptation=finetun", cwd=tmp_path)
    assert answer.returncode == 2
    assert answer.stderr.startswith("navagent") and "did you mean 'finetune'?" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert answer.stdout == ""


def test_debug_shows_where_an_error_came_from(tmp_path):
    answer = navagent("train", "adaptation=finetun", cwd=tmp_path, NAVAGENT_DEBUG="1")
    assert "Traceback" in answer.stderr


def test_show_config_prints_the_settings_asked_for_and_stops(tmp_path):
    answer = navagent("train", "algorithm.total_frames=2e6", "--show-config", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "total_frames: 2000000\n" in answer.stdout
    assert not list(tmp_path.iterdir())


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    command = f"'{sys.executable}' -m navagent train --help | head -n 1"
    answer = subprocess.run(
        command,
        shell=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert answer.stdout.startswith("usage: navagent train")
    assert answer.stderr == ""


@pytest.mark.parametrize("name", ["envs", "policies", "configs"])
@pytest.mark.parametrize("file", ["{}/__init__.py", "{}.py"])
def test_a_users_own_package_of_our_name_is_named(name, file, tmp_path):
    path = tmp_path / file.format(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text("raise RuntimeError('imported')")
    answer = navagent("train", "--show-config", cwd=tmp_path)
    assert answer.returncode == 2
    assert "Traceback" not in answer.stderr
    assert f"hides navagent's own package {name!r}" in answer.stderr
    assert str(tmp_path / name) in answer.stderr
    script = subprocess.run(
        [sys.executable, "-c", "import navagent.config"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert f"ShadowedPackageError: {path if file == '{}.py' else path.parent} hides" in script.stderr


def test_a_users_plain_folders_of_our_names_do_no_harm(tmp_path):
    """A folder without ``__init__.py`` only stands in for a package that is found nowhere else."""
    for name in ("envs", "policies", "configs"):
        (tmp_path / name).mkdir()
    answer = navagent("train", "--show-config", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr


def test_interrupt_is_status_130(monkeypatch, capsys):
    from navagent import cli

    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "train", (interrupted, ""))
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_a_training_that_breaks_down_is_status_1_and_one_message(monkeypatch, capsys):
    from navagent import cli

    def broken(arguments):
        raise FloatingPointError("the loss is not finite")

    monkeypatch.setenv("NAVAGENT_DEBUG", "0")
    monkeypatch.setitem(cli.VERBS, "train", (broken, ""))
    assert cli.main(["train"]) == 1
    assert capsys.readouterr().err == "navagent: the loss is not finite\n"


def test_options_of_pretrain_are_its_settings_with_their_defaults():
    fields = {field.name: field.default for field in dataclasses.fields(PretrainConfig)}
    del fields["dataset"], fields["out"]
    assert {name: default for name, _, default, _ in PRETRAIN_OPTIONS} == fields


def test_scenes_are_generated_and_shown(tmp_path):
    small = ["--num", "2", "--train-episodes", "2", "--val-episodes", "2"]
    answer = navagent("scenes", "generate", *small, "homes", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    (scene,) = (tmp_path / "homes" / "scenes" / "home_000").glob("*.glb")
    answer = navagent("scenes", "show", str(scene), "--views", "2", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == "home_000.png\n"
    assert cv2.imread(str(tmp_path / "home_000.png")).std() > 5


def test_a_warning_is_one_line_and_told_once(capsys, monkeypatch):
    from navagent import cli

    def warned(arguments):
        for _ in range(3):
            warnings.warn("the mesh is old", stacklevel=1)
        return 0

    monkeypatch.setitem(cli.VERBS, "train", (warned, ""))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["train"]) == 0
    assert capsys.readouterr().err == "navagent: warning: the mesh is old\n"
