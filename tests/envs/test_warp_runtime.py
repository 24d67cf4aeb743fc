import os
import subprocess
import sys

import pytest
import warp as wp

from envs.warp_runtime import start_warp


def test_a_process_starts_warp_without_a_word():
    code = "from envs.warp_runtime import start_warp; start_warp(); start_warp()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr == ""


def test_what_else_is_said_meanwhile_is_passed_on(monkeypatch, capfd):
    def init():
        os.write(2, b"Warp CUDA warning: Could not find or load the NVIDIA CUDA driver. No GPU.\n")
        os.write(2, b"Warp CUDA error: out of memory\n")

    monkeypatch.setattr(wp, "init", init)
    start_warp.__wrapped__()
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "Warp CUDA error: out of memory\nafterwards\n"


def test_an_error_of_the_start_is_raised_with_what_was_said(monkeypatch, capfd):
    def init():
        os.write(2, b"the library is damaged\n")
        raise RuntimeError("no start")

    monkeypatch.setattr(wp, "init", init)
    with pytest.raises(RuntimeError, match="no start"):
        start_warp.__wrapped__()
    assert capfd.readouterr().err == "the library is damaged\n"
