"""The commands of docs/imitation.md, as they stand there."""

import re
import shlex
from pathlib import Path

import pytest

from navagent.cli import main

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "imitation.md"


def commands(kind):
    """Every command of the blocks of a kind, without the program's name."""
    blocks = re.findall(rf"^```{kind}\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    words = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert all(program == "navagent" for program, *_ in words)
    return [rest for _, *rest in words]


@pytest.mark.timeout(900)
def test_every_command_of_the_guide_works_and_leaves_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NAVAGENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NAVAGENT_DEBUG", "1")
    tried = commands("bash")
    assert len(tried) == 6
    for command in tried:
        assert main(command) == 0, shlex.join(command)
    told = capsys.readouterr().out
    assert "both | 4,096 (2,048 of them before)" in told
    assert "both began with an SPL of" in told
    for left in ("runs/dagger/report.html", "runs/cloned/report.html", "runs/comparison/plot.png"):
        assert (tmp_path / left).stat().st_size > 0, left
    # Those that take long are asked what they would do.
    shown = [words for words in commands("bash no-test") if words[0] in ("imitate", "train")]
    assert len(shown) == 15
    for verb, *settings in shown:
        named = [word.replace("runs/half", "runs/dagger") for word in settings]
        assert main([verb, *named, "--show-config"]) == 0, shlex.join([verb, *settings])
