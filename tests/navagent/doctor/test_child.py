"""Questions put to a process of its own, which may crash, hang or exit."""

from navagent.doctor.child import ask


def package(folder, name, code):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)


def test_a_crash_is_told_in_its_own_words_and_the_rest_is_still_answered(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    fall = "import ctypes, sys; print('now I fall', file=sys.stderr, flush=True); ctypes.string_at(0)"
    package(tmp_path, "falling", fall)
    package(tmp_path, "leaving", "import sys; sys.exit('I do not like this machine')")
    package(tmp_path, "killed", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    package(tmp_path, "sound", "__version__ = '1.2.3'; print('noise on standard output')")
    answers = ask("import:falling", "import:leaving", "import:killed", "import:missing", "import:sound")
    assert "SIGSEGV: now I fall | Fatal Python error: Segmentation fault" in answers["import:falling"].error
    assert "I do not like this machine" in answers["import:leaving"].error
    assert "SIGKILL" in answers["import:killed"].error
    assert answers["import:missing"].error == "ModuleNotFoundError: No module named 'missing'"
    assert answers["import:sound"].error == ""
    assert answers["import:sound"].facts == {
        "version": "1.2.3",
        "file": str(tmp_path / "sound" / "__init__.py"),
    }


def test_a_package_that_hangs_is_given_up(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package(tmp_path, "hanging", "import time; print('waiting for a licence', flush=True); time.sleep(600)")
    (answer,) = ask("import:hanging", patience=2.0).values()
    assert answer.error == "no answer in 2 s: waiting for a licence"


def test_a_python_that_does_not_start_is_an_answer(monkeypatch):
    monkeypatch.setattr("navagent.doctor.child.PROBE", "/no/such/probe.py")
    (answer,) = ask("egl").values()
    assert "status 2" in answer.error
    assert "/no/such/probe.py" in answer.error
