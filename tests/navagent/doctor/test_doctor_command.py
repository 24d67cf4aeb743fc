"""``navagent doctor`` as users call it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from navagent.cli import main
from navagent.doctor.child import Answer
from navagent.doctor.findings import Finding, examine, worst

ROOT = Path(__file__).resolve().parents[3]


def doctor(*arguments, cwd, path=(), **environment):
    return subprocess.run(
        [sys.executable, "-m", "navagent", "doctor", *arguments],
        cwd=cwd,
        env={
            **os.environ,
            "NAVAGENT_CACHE": str(cwd / "cache"),
            "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_sound_installation_gives_status_0_and_a_table(tmp_path):
    answer = doctor(cwd=tmp_path, OMP_NUM_THREADS="1")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stderr == ""
    assert "PROBLEM" not in answer.stdout
    for name in ("Python", "navagent", "libraries", "PyTorch", "Warp", "habitat-sim", "EGL", "cache", "runs"):
        assert f"\n{name} " in f"\n{answer.stdout}"
    assert "navagent works here" in answer.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_broken_installation_gives_status_1_and_every_problem(tmp_path):
    fakes = tmp_path / "fakes"
    (fakes / "peft").mkdir(parents=True)
    (fakes / "peft" / "__init__.py").write_text("import ctypes; ctypes.string_at(0)")
    (fakes / "torch").mkdir()
    (fakes / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open')")
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "__init__.py").write_text("")
    answer = doctor("--json", cwd=tmp_path, path=(fakes,))
    assert answer.returncode == 1, answer.stdout + answer.stderr
    told = json.loads(answer.stdout)
    assert told["status"] == "problem"
    found = {each["name"]: each for each in told["checks"]}
    assert "SIGSEGV" in found["peft"]["found"]
    assert "libcudart.so.13: cannot open" in found["torch"]["found"]
    assert "libcudart.so.13: cannot open" in found["PyTorch"]["found"]
    assert f"{tmp_path / 'envs'} hides" in found["navagent"]["found"]
    assert "ShadowedPackageError" in found["data"]["found"]
    assert found["Warp"]["level"] == "ok"
    for name in ("peft", "torch", "PyTorch", "navagent", "data"):
        assert found[name]["level"] == "problem"
        assert found[name]["mend"]


def test_settings_that_do_not_exist_give_status_2(monkeypatch, capsys):
    refused = Answer(error="ConfigError: scenes.datset is no setting")
    monkeypatch.setattr("navagent.doctor.command.ask", lambda task: {task: refused})
    monkeypatch.setattr("navagent.doctor.command.examine", lambda checks: [])
    monkeypatch.setenv("NAVAGENT_DEBUG", "0")
    assert main(["doctor", "scenes.datset=homes"]) == 2
    assert capsys.readouterr().err == "navagent: scenes.datset is no setting\n"


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on():
    def broken():
        yield Finding("half", "ok", "fine so far")
        raise RuntimeError("no such file")

    found = examine({"breaks": broken, "sound": lambda: [Finding("sound", "warning", "little")]})
    assert [each.name for each in found] == ["breaks", "sound"]
    assert found[0].level == "problem"
    assert "the check itself broke: RuntimeError: no such file" in found[0].found
    assert worst(found) == "problem"
    assert worst(found[1:]) == "warning"
    assert worst([]) == "ok"
