"""What is said of Habitat's packages and of the devices that they render on."""

from pathlib import Path

import pytest

from navagent.doctor.child import Answer
from navagent.doctor.habitat import KNOWN, explain, habitat, judge_egl

# As Habitat, the loader and the libraries say it.
SAID = (
    "ImportError: libEGL.so.1: cannot open shared object file: No such file or directory",
    "ImportError: /lib/libstdc++.so.6: version `GLIBCXX_3.4.30' not found (required by habitat_sim)",
    "A module that was compiled using NumPy 1.x cannot be run in\nNumPy 2.3.5 as it may crash.",
    "AttributeError: module 'cv2' has no attribute 'CV_8U'",
    "ModuleNotFoundError: No module named 'magnum'",
    "ModuleNotFoundError: No module named 'habitat_sim._ext.habitat_sim_bindings'",
    "ModuleNotFoundError: No module named 'faster_fifo'",
    "WindowlessEglApplication::tryCreateContext(): unable to find CUDA device 0 among 2 EGL devices",
    "X11: The DISPLAY environment variable is missing\nCould not initialize GLFW",
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


def test_the_documentation_explains_every_known_error():
    text = (Path(__file__).parents[3] / "docs" / "habitat.md").read_text()
    for known in KNOWN:
        assert known.meaning in text
        assert any(explain(line) is known for line in text.splitlines())
