"""The tutorial's commands, as they stand there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.timeout(900)
def test_every_command_of_the_tutorial_works_and_leaves_what_it_says(tmp_path):
    environment = os.environ | {"NAVAGENT_CACHE": str(tmp_path / "cache"), "COLUMNS": "100"}

    def run(*command: str) -> None:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"

    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) == 7
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "navagent"
        run(str(Path(sys.executable).with_name("navagent")), *arguments)
    (script,) = blocks("python")
    run(sys.executable, "-c", script)

    for left in (
        "home.png",
        "homes/homes.scene_dataset_config.json",
        "runs/first/report.html",
        "runs/first/evaluation/val/episodes.jsonl",
        "runs/normals/encoder.safetensors",
        "runs/second/config.yaml",
    ):
        assert (tmp_path / left).stat().st_size > 0, left
    assert list((tmp_path / "runs/first/evaluation/val").glob("videos/*")), "no video"
