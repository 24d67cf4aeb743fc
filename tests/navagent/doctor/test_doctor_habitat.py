"""What is said of Habitat's packages and of the devices that they render on."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from navagent.config import load_config
from navagent.doctor.child import Answer
from navagent.doctor.habitat import KNOWN, drawing, explain, habitat, judge_egl

# As Habitat, the loader and the libraries say it.
SAID = (
    "ImportError: libEGL.so.1: cannot open shared object file: No such file or directory",
    "ImportError: /lib/libstdc++.so.6: version `GLIBCXX_3.4.30' not found (required by habitat_sim)",
    "A module that was compiled using NumPy 1.x cannot be run in\nNumPy 2.3.5 as it may crash.",
    "AttributeError: module 'cv2' has no attribute 'CV_8U'",
    "ModuleNotFoundError: No module named 'magnum'",
    "ModuleNotFoundError: No module named 'habitat_sim._ext.habitat_sim_bindings'",
    "ModuleNotFoundError: No module named 'faster_fifo'",
    "WindowlessEglApplication::tryCreateContext(): cannot create EGL context: EGL_BAD_ALLOC",
    "WindowlessEglApplication::tryCreateContext(): unable to find CUDA device 0 among 2 EGL devices",
    "X11: The DISPLAY environment variable is missing\nCould not initialize GLFW",
)

# What a worker says when it has started, to the socket that its argument names.
READY = (
    "import json, os, struct, sys; os.write(json.loads(sys.argv[1])['socket'], struct.pack('<BQQ', 4, 0, 0))"
)


@pytest.mark.parametrize(("words", "known"), list(zip(SAID, KNOWN, strict=True)))
def test_what_users_are_told_is_explained(words, known):
    assert explain(words) is known


def test_other_errors_are_not_explained_away():
    assert explain("ValueError: no scene") is None


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Installs something in place of Habitat."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(distribution, module, version, code="", requires=()):
        info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {r}" for r in requires)]) + "\n")
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text(code)

    return install


def test_pins_that_contradict_what_is_there_are_named_one_by_one(environment):
    environment("habitat-sim", "habitat_sim", "0.3.4", requires=["numpy>=1"])
    pins = ["numpy==1.26.4", "gym<0.23.1,>=0.22.0", "opencv-python>=3.3.0", 'pickle5; python_version < "3.8"']
    environment("habitat-lab", "habitat", "0.3.3", requires=pins)
    sim, lab = habitat()
    assert (sim.name, sim.level) == ("habitat-sim", "ok")
    assert sim.found.startswith("0.3.4, ")
    assert lab.level == "warning"
    assert lab.found.startswith("0.3.3; pins that are not met: ")
    assert "numpy==1.26.4 (numpy " in lab.found
    assert "gym<0.23.1,>=0.22.0 (gym is not installed)" in lab.found
    assert "pickle5" not in lab.found
    assert "opencv" not in lab.found


def test_habitat_lab_without_its_simulator_is_explained(environment):
    environment("habitat-lab", "habitat", "0.3.3", "import magnum")
    absent, lab = habitat()
    assert (absent.name, absent.level) == ("habitat-sim", "ok")
    assert "not installed, and not needed" in absent.found
    assert lab.level == "problem"
    assert "without habitat-sim" in lab.found
    assert "No module named 'magnum'" in lab.found


def test_a_simulator_that_crashes_on_import_is_told_in_its_own_words(environment):
    code = "import os, sys; print('unable to find CUDA device 0', file=sys.stderr, flush=True); os.abort()"
    environment("habitat-sim", "habitat_sim", "0.3.3", code)
    sim, _ = habitat()
    assert sim.level == "problem"
    assert "SIGABRT: unable to find CUDA device 0" in sim.found
    assert "graphics" in sim.mend


GPU, SOFTWARE = {"cuda": 0, "software": False}, {"cuda": None, "software": True}


@pytest.mark.parametrize(
    ("answer", "gpus", "wanted", "variables", "level", "words"),
    [
        (Answer({"devices": [GPU, SOFTWARE]}), 1, True, {}, "ok", "2 devices: CUDA 0, software"),
        (Answer({"devices": [SOFTWARE]}), 0, True, {}, "ok", "1 device: software"),
        (Answer({"devices": []}), 0, True, {}, "problem", "0 devices: none"),
        (Answer({"devices": []}), 0, False, {}, "ok", "0 devices: none"),
        (Answer(error="OSError: libEGL.so.1: cannot open shared object file"), 0, False, {}, "ok", "none"),
        (
            Answer(error="OSError: libEGL.so.1: cannot open shared object file"),
            0,
            True,
            {},
            "problem",
            "OpenGL",
        ),
        (Answer({"devices": [SOFTWARE]}), 1, True, {}, "problem", "10_nvidia.json"),
        (
            Answer({"devices": [SOFTWARE]}),
            1,
            False,
            {"NVIDIA_DRIVER_CAPABILITIES": "compute,utility"},
            "warning",
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility lacks graphics",
        ),
    ],
)
def test_egl_devices_are_held_against_the_gpus(answer, gpus, wanted, variables, level, words):
    finding = judge_egl(answer, gpus, wanted, variables)
    assert finding.level == level
    assert words in f"{finding.found} {finding.mend}"


@pytest.mark.parametrize(
    ("says", "level", "words"),
    [
        ("echo cannot create EGL context: EGL_BAD_ALLOC; exit 1", "problem", "no memory is left for drawing"),
        ("echo no lamp; exit 1", "problem", "habitat-sim worker 0 (process "),
        (f'shift 3; exec {sys.executable} -c "{READY}" "$@"', "ok", "draws on the processor, by "),
    ],
    ids=["a known error", "another error", "a worker that starts"],
)
def test_a_worker_of_habitat_sim_is_started_where_it_is_chosen(tmp_path, says, level, words):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{says}\n")
    python.chmod(0o755)
    settings = ["simulator=habitat", f"simulator.python={python}", "simulator.gpu_ids=-1", "device=cpu"]
    (finding,) = drawing(load_config(settings))
    assert (finding.name, finding.level) == ("simulator=habitat", level)
    assert words in finding.found
    assert (level == "ok") == (not finding.mend)


@pytest.mark.skipif(find_spec("habitat_sim") is not None, reason="habitat-sim is installed here")
def test_where_habitat_sim_is_neither_installed_nor_chosen_no_worker_is_started():
    assert list(drawing(load_config([]))) == []


def test_the_documentation_explains_every_known_error():
    text = (Path(__file__).parents[3] / "docs" / "habitat.md").read_text()
    for known in KNOWN:
        assert known.meaning in text
        assert any(explain(line) is known for line in text.splitlines())
