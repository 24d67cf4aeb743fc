"""What is said of libraries and accelerators."""

import pytest
from packaging.requirements import Requirement

from navagent.doctor import software
from navagent.doctor.child import Answer, ask
from navagent.doctor.software import judge_accelerator, judge_libraries, judge_warp, required


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """Installs packages that are not what they should be."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name, version, code="", requires=()):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {r}" for r in requires)]) + "\n")
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)

    return install


def judged(*requirements):
    wanted = [Requirement(text) for text in requirements]
    return {
        finding.name: finding
        for finding in judge_libraries(wanted, ask(*(f"import:{each.name}" for each in wanted)))
    }


def test_each_broken_library_is_named_with_the_command_that_mends_it(distribution):
    distribution("tooold", "1.0")
    distribution("broken", "2.0", "from collections import NoSuchThing")
    distribution("sound", "2.0")
    found = judged("tooold>=1.5", "broken>=1", "sound>=1", "absent>=3")
    assert set(found) == {"tooold", "broken", "absent"}
    assert {finding.level for finding in found.values()} == {"problem"}
    assert found["tooold"].found == "tooold 1.0 is installed, needs tooold>=1.5"
    assert found["tooold"].mend == 'python -m pip install "tooold>=1.5"'
    assert found["absent"].found == "absent is not installed, needs absent>=3"
    assert "cannot import name 'NoSuchThing'" in found["broken"].found
    assert "--force-reinstall" in found["broken"].mend


def test_sound_libraries_are_one_line(distribution):
    distribution("sound", "2.0")
    (finding,) = judged("sound>=1").values()
    assert (finding.name, finding.level) == ("libraries", "ok")


def test_requirements_are_those_of_this_machine_and_of_the_extra_alone(distribution):
    markers = [
        "always>=1",
        'never; python_version < "3.0"',
        'extra-one; extra == "more"',
        'other; extra == "x"',
    ]
    distribution("somebody", "1.0", requires=markers)
    assert [each.name for each in required("somebody")] == ["always"]
    assert [each.name for each in required("somebody", "more")] == ["extra-one"]


def test_an_old_python_is_refused(monkeypatch):
    monkeypatch.setattr(software, "OLDEST_PYTHON", (9, 9))
    (finding,) = software.python()
    assert finding.level == "problem"
    assert "needs 9.9" in finding.found


BUILD = {"version": "2.13.0", "cuda": "13.0", "available": False, "said": [], "devices": []}
GPU = {"name": "H100", "capability": [9, 0], "memory": 80 << 30, "free": 70 << 30, "sum": 16.0}
USED = {**BUILD, "available": True, "architectures": ["sm_80", "sm_90"]}


@pytest.mark.parametrize(
    ("facts", "driver", "gpus", "level", "words"),
    [
        ({**BUILD, "cuda": None}, None, 0, "ok", "for the CPU alone; no NVIDIA GPU here"),
        (BUILD, None, 0, "ok", "for CUDA 13.0; no NVIDIA GPU here"),
        ({**BUILD, "cuda": None}, [13, 0], 2, "warning", "2 NVIDIA GPUs here, none used"),
        (
            BUILD,
            [12, 4],
            1,
            "problem",
            "runs CUDA up to 12.4; 1 NVIDIA GPU here, none used: the driver is older",
        ),
        (BUILD, None, 1, "problem", "libcuda.so.1 does not load"),
        ({**BUILD, "said": ["CUDA unknown error"]}, [13, 1], 1, "warning", "CUDA unknown error"),
        ({**USED, "devices": [GPU]}, [13, 0], 1, "ok", "cuda:0 H100, 70 of 80 GB free"),
        (
            {**USED, "devices": [GPU, {**GPU, "capability": [7, 0], "error": "no kernel image"}]},
            [13, 0],
            2,
            "problem",
            "cuda:1 H100 fails: no kernel image",
        ),
    ],
)
def test_the_driver_the_build_and_the_gpus_are_held_against_each_other(facts, driver, gpus, level, words):
    finding = judge_accelerator(Answer(facts), driver, gpus)
    assert finding.level == level
    assert words in finding.found
    assert bool(finding.mend) == (level != "ok")


def test_this_machines_pytorch_and_warp_compute(tmp_path):
    answers = ask("torch", "driver", "warp", environment={"WARP_CACHE_PATH": str(tmp_path / "kernels")})
    assert judge_accelerator(answers["torch"], answers["driver"].facts.get("cuda"), 0).level == "ok"
    finding = judge_warp(answers["warp"])
    assert (finding.level, finding.mend) == ("ok", "")
    assert str(tmp_path / "kernels") in finding.found


def test_a_kernel_folder_that_cannot_be_written_is_told_with_the_variable_that_names_another():
    (answer,) = ask("warp", environment={"WARP_CACHE_PATH": "/proc/kernels"}).values()
    finding = judge_warp(answer)
    assert finding.level == "problem"
    assert "/proc/kernels" in finding.found
    assert "WARP_CACHE_PATH" in finding.mend
