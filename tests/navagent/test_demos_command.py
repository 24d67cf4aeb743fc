"""``navagent demos`` as it is typed, and a person at the keyboard."""

import contextlib
import io
import json
import os
import pty
import signal
import termios
import threading
import time

import numpy as np
import pytest
from demonstrations_world import SENSORS
from one_room import TINY, write_one_room

from envs.simulators.base import Action
from navagent.cli import main
from navagent.demonstrations import command, keyboard
from navagent.demonstrations.keyboard import HELP, half_blocks, open_display
from navagent.demonstrations.recorded import DemonstrationError, read_demonstrations
from navagent.demonstrations.recording import RecordOptions, record_demonstrations


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return write_one_room(tmp_path_factory.mktemp("room"), num_train=12, num_val=4)


@pytest.fixture(scope="module")
def file(room, tmp_path_factory):
    path = tmp_path_factory.mktemp("demos") / "expert.demos"
    assert main(["demos", "record", str(path), "--number", "6", *world(room)]) == 0
    return path


def world(room):
    return [f"scenes.dataset={room}", "device=cpu", "num_threads=1"]


def test_recording_says_what_it_left(room, tmp_path, capsys):
    path = tmp_path / "a.demos"
    arguments = ["demos", "record", str(path), "--number", "all", "--split", "val", "--num-envs", "3"]
    assert main([*arguments, *world(room)]) == 0
    assert capsys.readouterr().out == f"{path}: 4 demonstrations\n"
    header = read_demonstrations(path).header
    assert header.source.split == "val" and header.source.dataset == str(room)


def test_info_tells_a_person_and_a_program(file, capsys):
    assert main(["demos", "info", str(file)]) == 0
    text = capsys.readouterr().out
    assert "demonstrations   6\n" in text and "agent            expert\n" in text
    assert main(["demos", "info", str(file), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    demonstrations = read_demonstrations(file)
    assert summary["steps"] == demonstrations.steps.sum() == sum(summary["actions"].values())
    assert summary["complete"] and summary["success"] == 1.0 and summary["rules"]["turn_angle_deg"] == 10.0
    assert summary["actions"]["stop"] == 6


def test_replay_finds_the_data_set_and_says_that_all_is_equal(file, capsys, tmp_path, room):
    assert main(["demos", "replay", str(file), "device=cpu"]) == 0
    steps = read_demonstrations(file).steps.sum()
    assert f"6 demonstrations, {steps} steps: all states bit-equal" in capsys.readouterr().out
    pictures = [*SENSORS, "sensors=rgb", "device=cpu", "--num-envs", "2", "--tolerance", "0.001"]
    assert main(["demos", "replay", str(file), "--dataset", str(room), *pictures]) == 0
    assert "all states within 0.001 m and rad" in capsys.readouterr().out
    assert main(["demos", "replay", str(file), "--dataset", str(tmp_path)]) == 2
    assert "a scene of the demonstrations is not here" in capsys.readouterr().err


def test_exported_and_imported(file, tmp_path, capsys, monkeypatch):
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    assert main(["demos", "export", str(file), "navagent/room-v0", *SENSORS, "device=cpu"]) == 0
    assert "minari.load_dataset('navagent/room-v0')" in capsys.readouterr().out
    assert main(["demos", "import", "navagent/room-v0", str(tmp_path / "here")]) == 0
    assert (tmp_path / "here/about.json").is_file()


def test_a_trained_agent_is_recorded_in_its_own_world(room, tmp_path, capsys):
    run = tmp_path / "run"
    settings = [
        *world(room),
        *TINY,
        f"run_dir={run}",
        "env.max_steps=12",
        "algorithm.num_envs=2",
        "algorithm.num_steps=8",
        "algorithm.num_minibatches=1",
        "algorithm.total_frames=16",
    ]
    make_run(run, settings)
    arguments = ["demos", "record", str(tmp_path / "run.demos"), "--agent", str(run), "--num-envs", "2"]
    assert main([*arguments, "--number", "4", "num_threads=1"]) == 0
    found = read_demonstrations(tmp_path / "run.demos")
    assert found.header.rules["max_steps"] == 12 and found.header.source.agent == "run"
    assert len(found.header.source.checkpoint) == 64 and found.steps.max() <= 12
    assert main(["demos", "replay", str(tmp_path / "run.demos"), "device=cpu"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--number", "4", "env.max_steps=20"]) == 2
    assert "a trained agent keeps its senses, body and task" in capsys.readouterr().err
    # Only what is named of the scenes is another: the data set stays the run's.
    other = ["demos", "record", str(tmp_path / "val.demos"), "--agent", str(run), "--number", "2"]
    assert main([*other, "scenes.train_split=val"]) == 0
    source = read_demonstrations(tmp_path / "val.demos").header.source
    assert (source.split, source.dataset) == ("val", str(room))


def make_run(folder, settings):
    """A run whose agent has learned nothing yet."""
    from navagent.build import load_split, make_vector_env, policy_settings
    from navagent.config import load_config, to_yaml
    from navagent.runs import Run
    from policies.actor_critic import NavigationPolicy

    config = load_config(settings)
    split = load_split(config, "train")
    env = make_vector_env(config, split.episodes, split.scenes, 1)
    policy = NavigationPolicy(
        env.single_observation_space, env.single_action_space, lambda _: 0.0, **policy_settings(config)
    )
    env.close()
    Run.create(folder, to_yaml(config)).save_checkpoint(16, {"policy": policy.state_dict()})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demos", "recrod"], "no action 'recrod'; did you mean 'record'?"),
        (["demos", "record", "x.demos", "--number", "0"], "--number 0 is neither"),
        (["demos", "record", "x.demos", "--num-envs", "0"], "--num-envs 0 must be at least 1"),
        (["demos", "record", "x.demos", "--agent", "exprt"], "did you mean 'expert'?"),
        (["demos", "record", "x.demos", "env.turn_angel_deg=30"], "did you mean 'env.turn_angle_deg'?"),
        (["demos", "record", "x.demos", "sensors=depth"], "the expert does not depend on it"),
        (["demos", "record", "x.demos", "seed=1"], "--seed is of order"),
        (["demos", "record", "x.demos", "--agent", "keyboard", "seed=1"], "a person does not depend on it"),
        (
            ["demos", "record", "x.demos", "--deterministic"],
            "are for a trained agent, not for --agent expert",
        ),
        (["demos", "record", "x.demos", "--checkpoint", "latest"], "or give the folder of a run"),
        (["demos", "record", "x.demos", "--display", "window"], "--display window is for --agent keyboard"),
        (["demos", "info", "none.demos"], "navagent demos record none.demos"),
        (["demos", "info", "."], "a folder; expected a file that `navagent demos record` made"),
        (["demos", "replay", "x.demos", "env.turn_angle_deg=30"], "the rules and the body of the recording"),
        (["demos", "replay", "x.demos", "scenes.num=3"], "unless --dataset or --scenes says where"),
        (["demos", "export", "x.demos", "a-v0", "algorithm.num_envs=3"], "sensors, env.rgb_noise,"),
        (["demos", "replay", "none.demos", "--tolerence", "1"], "did you mean --tolerance?"),
    ],
)
def test_wrong_arguments_end_with_2_and_say_what_to_do(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_help_shows_examples_for_every_action(capsys):
    assert main(["demos", "--help"]) == 0
    text = capsys.readouterr().out
    for action in command.ACTIONS:
        assert f"navagent demos {action}" in text
        with pytest.raises(SystemExit):
            main(["demos", action, "--help"])
        assert "examples:" in capsys.readouterr().out
    assert main(["demos"]) == 2


# The keyboard --------------------------------------------------------------------------------------------


class Typist:
    """A display on which keys are pressed by a list, and then by what the expert would press."""

    size = (24, 32)

    def __init__(self, keys=()):
        self.keys = list(keys)
        self.shown = []
        self.closed = False

    def show(self, image, text):
        self.shown.append((image, text))

    def key(self):
        return self.keys.pop(0) if self.keys else ""

    def close(self):
        self.closed = True


def record_typed(room, path, keys, number=3):
    typist = Typist(keys)
    options = RecordOptions(str(path), tuple(world(room)), agent="keyboard", number=number)
    return typist, record_demonstrations(options, make_display=lambda kind: typist)


def test_keys_become_actions(room, tmp_path):
    typist, (_, wanted, held) = record_typed(
        room,
        tmp_path / "mine.demos",
        ["w", "x", "up", "left", "d", "a", "right", " ", "W".lower(), "enter", "q"],
    )
    assert (wanted, held) == (3, 2) and typist.closed
    found = read_demonstrations(tmp_path / "mine.demos")
    forward, left, right, stop = Action.MOVE_FORWARD, Action.TURN_LEFT, Action.TURN_RIGHT, Action.STOP
    assert found.actions(0).tolist() == [forward, forward, left, right, left, right, stop]
    assert found.actions(1).tolist() == [forward, stop]
    image, text = typist.shown[0]
    assert image.shape == (24, 32, 3) and image.std() > 5
    assert text.startswith("1 of 3: goal ") and "step 0 of 500" in text
    assert typist.shown[7][1].startswith("2 of 3: ")
    assert main(["demos", "replay", str(tmp_path / "mine.demos"), "device=cpu"]) == 0


def test_an_episode_can_be_begun_anew_and_the_rest_another_day(room, tmp_path):
    path = tmp_path / "mine.demos"
    record_typed(room, path, ["w", "w", "r", "a", " ", "w", "q"])
    found = read_demonstrations(path)
    assert len(found) == 1 and found.actions(0).tolist() == [Action.TURN_LEFT, Action.STOP]
    record_typed(room, path, ["d", " ", " "])
    found = read_demonstrations(path)
    assert [found.actions(row).tolist() for row in range(3)] == [[2, 0], [3, 0], [0]]
    # The same keys without interruption give the same file.
    record_typed(room, tmp_path / "whole.demos", ["a", " ", "d", " ", " "])
    assert (tmp_path / "whole.demos").read_bytes() == path.read_bytes()


def test_who_leaves_at_once_leaves_nothing(room, tmp_path):
    _, (_, _, held) = record_typed(room, tmp_path / "mine.demos", ["w"])
    assert held == 0 and not (tmp_path / "mine.demos").exists()


class Terminal:
    """A terminal as standard input, output and error, on which a person types."""

    def __init__(self, monkeypatch, keys):
        self._outside, inside = pty.openpty()
        self._inside = os.fdopen(inside, "r+b", buffering=0)
        self.written = b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        writer = io.TextIOWrapper(self._inside, write_through=True)
        for name in ("stdin", "stdout", "stderr"):
            monkeypatch.setattr(f"sys.{name}", writer)
        monkeypatch.setenv("TERM", "xterm")
        threading.Thread(target=self._type, args=(keys.encode(),), daemon=True).start()

    def _type(self, keys):
        # What is typed before a program takes single keys is dropped.
        self.wait_for(b"goal")
        os.write(self._outside, keys)

    def settings(self):
        return termios.tcgetattr(self._inside.fileno())

    def wait_for(self, text):
        until = time.monotonic() + 60
        while text not in self.written and time.monotonic() < until:
            time.sleep(0.01)

    def _read(self):
        with contextlib.suppress(OSError):
            while data := os.read(self._outside, 1 << 16):
                self.written += data

    def close(self):
        self._inside.close()
        self._thread.join()
        os.close(self._outside)


def test_in_a_terminal_nothing_is_drawn_over_what_a_person_sees(room, tmp_path, monkeypatch):
    path = tmp_path / "mine.demos"
    monkeypatch.setattr(keyboard, "windows_work", lambda: False)
    monkeypatch.setenv("COLUMNS", "40")
    with monkeypatch.context() as patch:
        terminal = Terminal(patch, "w d q")
        before = terminal.settings()
        assert main(["demos", "record", str(path), "--agent", "keyboard", "--number", "5", *world(room)]) == 0
        assert terminal.settings() == before
        terminal.wait_for(b"goes on")
        terminal.close()
    said = terminal.written.decode().replace("\r", "")
    screen, left = said.split("\x1b[?1049h")[1].split("\x1b[?1049l")
    frames = screen.split("\x1b[H")[1:]
    # Per key one frame of as many lines, each as long as the terminal is wide at most, and nothing else.
    rows = {frame.count("\n") for frame in frames}
    assert len(frames) == 5 and len(rows) == 1
    below = [line for frame in frames for line in frame.split("\n")[-2:]]
    assert all(len(line.replace("\x1b[0m", "").partition("\x1b[K")[0]) < 40 for line in below)
    assert "recording" not in said
    assert left == f"{path}: 2 demonstrations of 5; the same command goes on\n"


def test_what_a_person_has_done_survives_a_signal_and_the_terminal_too(room, tmp_path, monkeypatch):
    path = tmp_path / "mine.demos"
    monkeypatch.setattr(keyboard, "windows_work", lambda: False)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        terminal = Terminal(patch, "w w")
        before = terminal.settings()

        def end():
            terminal.wait_for(b"2 of 5: ")
            # It is there before anything ends.
            assert len(read_demonstrations(path)) == 1
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=end, daemon=True).start()
        main(["demos", "record", str(path), "--agent", "keyboard", "--number", "5", *world(room)])
    assert caught.value.code == 128 + signal.SIGTERM
    assert terminal.settings() == before
    terminal.wait_for(b"goes on")
    terminal.close()
    assert "1 demonstrations of 5; the same command goes on" in terminal.written.decode()
    assert terminal.written.count(b"\x1b[?1049l") == 1
    assert read_demonstrations(path).actions(0).tolist() == [Action.MOVE_FORWARD, Action.STOP]


def test_an_interrupted_recording_says_what_it_kept(room, tmp_path, capsys, monkeypatch):
    from navagent.evaluation.agents import ExpertAgent

    path, acted = tmp_path / "a.demos", []
    original = ExpertAgent.act

    def act(self, *arguments):
        acted.append(0)
        if len(acted) == 60:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    arguments = ["demos", "record", str(path), "--number", "12", "--num-envs", "2", *world(room)]
    with monkeypatch.context() as patch:
        patch.setattr(ExpertAgent, "act", act)
        assert main(arguments) == 130
    held = len(read_demonstrations(path))
    assert 0 < held < 12
    assert f"{path}: {held} demonstrations of 12; the same command goes on\n" in capsys.readouterr().err
    assert main(arguments) == 0
    whole = tmp_path / "whole.demos"
    assert main(["demos", "record", str(whole), *arguments[3:]]) == 0
    assert whole.read_bytes() == path.read_bytes()


def test_a_machine_without_screen_is_told_so(room, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr(keyboard, "windows_work", lambda: False)
    assert main(["demos", "record", str(tmp_path / "x"), "--agent", "keyboard", *world(room)]) == 2
    said = capsys.readouterr().err
    assert "needs a person at a screen" in said and "opencv-python" in said and "--agent expert" in said
    for kind, lacking in (("window", "OpenCV cannot"), ("terminal", "no terminal")):
        with pytest.raises(DemonstrationError, match=lacking):
            open_display(kind)


def test_a_picture_becomes_half_blocks():
    image = np.zeros((4, 2, 3), np.uint8)
    image[0, 1] = (255, 10, 0)
    image[3, 0] = (1, 2, 3)
    first, second, last = half_blocks(image).split("\r\n")
    assert first.count("▀") == second.count("▀") == 2 and last == ""
    assert "38;2;255;10;0;48;2;0;0;0m▀" in first and "38;2;0;0;0;48;2;1;2;3m▀" in second
    assert "space" in HELP


def test_a_terminal_hands_over_keys_and_is_left_as_it_was(monkeypatch):
    outside, inside = pty.openpty()
    terminal = os.fdopen(inside, "r+b", buffering=0)
    before = termios.tcgetattr(inside)
    written = io.StringIO()
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setattr("sys.stdout", written)
    display = keyboard.TerminalDisplay()
    os.write(outside, b"W\x1b[A\x1b[D \r\x1b")
    assert [display.key() for _ in range(6)] == ["w", "up", "left", " ", "enter", "escape"]
    display.show(np.zeros((*display.size, 3), np.uint8), "goal ahead")
    display.close()
    assert "goal ahead" in written.getvalue() and "\x1b[?1049l" in written.getvalue()
    assert termios.tcgetattr(inside) == before
    terminal.close()
    os.close(outside)
