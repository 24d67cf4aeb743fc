"""A person as the agent: sees what the robot sees, in a terminal or a window, and presses keys."""

from __future__ import annotations

import os
import select
import shutil
import sys
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from envs.sensors import point_goal
from envs.simulators.base import Action
from envs.vector_env import PointNavVectorEnv
from navagent.demonstrations.record import LeaveError, StartOverError
from navagent.demonstrations.recorded import DemonstrationError
from navagent.evaluation.agents import Agent

KEYS: dict[str, Action] = {
    "w": Action.MOVE_FORWARD,
    "up": Action.MOVE_FORWARD,
    "a": Action.TURN_LEFT,
    "left": Action.TURN_LEFT,
    "d": Action.TURN_RIGHT,
    "right": Action.TURN_RIGHT,
    " ": Action.STOP,
    "enter": Action.STOP,
}
"""What keys do."""
START_OVER, LEAVE = "r", ("q", "escape", "")
HELP = "w a d or arrows   space stop   r start over   q leave"

_ARROWS = {"A": "up", "B": "down", "C": "right", "D": "left"}
_NAMES = {"\r": "enter", "\n": "enter", "\x1b": "escape", "\x03": "q", "\x04": "q"}


class Display(Protocol):
    """Where a person looks and presses keys."""

    size: tuple[int, int]
    """Rows and columns of the pictures that it shows."""

    def show(self, image: NDArray[np.uint8], text: str) -> None:
        """Shows a picture (height, width, 3) in colours and a line of text."""

    def key(self) -> str:
        """Waits for a key and returns its name, such as ``w`` or ``up``; empty where there is no more."""

    def close(self) -> None:
        """Leaves the screen as it was."""


class TerminalDisplay:
    """Draws with coloured half blocks, two pixels a character, in a terminal of 24-bit colours."""

    def __init__(self) -> None:
        import termios
        import tty

        columns, lines = shutil.get_terminal_size()
        # A character is about twice as high as wide, so that half of one is a square pixel.
        width = max(32, min(columns, 160, (lines - 2) * 8 // 3))
        self.size = (width * 3 // 4 // 2 * 2, width)
        self._columns = columns
        self._input = sys.stdin.fileno()
        self._before = termios.tcgetattr(self._input)
        tty.setcbreak(self._input)
        # Another screen, without a cursor.
        self._write("\x1b[?1049h\x1b[?25l\x1b[2J")

    def show(self, image: NDArray[np.uint8], text: str) -> None:
        """See :class:`Display`."""
        # A line that the terminal breaks would push the picture up.
        below = (line[: self._columns - 1] for line in (text, HELP))
        self._write("\x1b[H" + half_blocks(image) + "\x1b[0m" + "\x1b[K\r\n".join(below) + "\x1b[K")

    def key(self) -> str:
        """See :class:`Display`."""
        letter = os.read(self._input, 1).decode(errors="replace")
        # The terminal writes an arrow as three letters at once.
        if letter == "\x1b" and select.select([self._input], [], [], 0.05)[0]:
            return _ARROWS.get(os.read(self._input, 2).decode(errors="replace")[-1:], "other")
        return _NAMES.get(letter, letter.lower())

    def close(self) -> None:
        """See :class:`Display`."""
        import termios

        self._write("\x1b[0m\x1b[?25h\x1b[?1049l")
        termios.tcsetattr(self._input, termios.TCSADRAIN, self._before)

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def half_blocks(image: NDArray[np.uint8]) -> str:
    """A picture (2 R, W, 3) as R lines of W characters, upper half in front of lower half."""
    lines = []
    for upper, lower in zip(image[0::2], image[1::2], strict=False):
        cells = [
            f"\x1b[38;2;{u[0]};{u[1]};{u[2]};48;2;{b[0]};{b[1]};{b[2]}m\N{UPPER HALF BLOCK}"
            for u, b in zip(upper.tolist(), lower.tolist(), strict=True)
        ]
        lines.append("".join(cells) + "\x1b[0m\r\n")
    return "".join(lines)


class WindowDisplay:
    """An OpenCV window."""

    size = (480, 640)
    _NAME = "navagent demos record"
    _CODES: ClassVar[dict[int, str]] = {
        81: "left",
        82: "up",
        83: "right",
        84: "down",
        13: "enter",
        10: "enter",
        27: "escape",
    }

    def __init__(self) -> None:
        import cv2

        self._cv2: Any = cv2
        cv2.namedWindow(self._NAME)

    def show(self, image: NDArray[np.uint8], text: str) -> None:
        """See :class:`Display`."""
        cv2 = self._cv2
        frame = np.ascontiguousarray(image[..., ::-1])
        for row, line in enumerate((text, HELP)):
            place = (8, 20 + 20 * row)
            for colour, width in (((0, 0, 0), 3), ((255, 255, 255), 1)):
                cv2.putText(frame, line, place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, width, cv2.LINE_AA)
        cv2.imshow(self._NAME, frame)

    def key(self) -> str:
        """See :class:`Display`."""
        while True:
            code = self._cv2.waitKey(100) & 0xFF
            if code != 0xFF:
                return self._CODES.get(code, chr(code).lower())
            if self._cv2.getWindowProperty(self._NAME, self._cv2.WND_PROP_VISIBLE) < 1:
                return ""

    def close(self) -> None:
        """See :class:`Display`."""
        self._cv2.destroyAllWindows()


def windows_work() -> bool:
    """Whether OpenCV can open a window here."""
    import cv2

    built = next((line for line in cv2.getBuildInformation().splitlines() if "GUI:" in line), "GUI: NONE")
    screen = sys.platform != "linux" or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    return "NONE" not in built and screen


def open_display(kind: Literal["auto", "terminal", "window"] = "auto") -> Display:
    """A display for a person, a window where there can be one.

    Raises:
        DemonstrationError: nobody could see it, or press a key.
    """
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if kind in ("auto", "window") and windows_work():
        return WindowDisplay()
    if kind in ("auto", "terminal") and terminal:
        return TerminalDisplay()
    lacks = {
        "window": "OpenCV cannot open a window here: it needs a screen and a build with windows (package "
        "opencv-python in place of opencv-python-headless)",
        "terminal": "standard input and output are no terminal",
    }
    faults = lacks.values() if kind == "auto" else [lacks[kind]]
    raise DemonstrationError(
        f"--agent keyboard needs a person at a screen, and {'; and '.join(faults)}. Run it in a terminal "
        "(over ssh: ssh -t), or record from --agent expert"
    )


class KeyboardAgent(Agent):
    """One agent whose actions are keys that a person presses."""

    name = "keyboard"

    def __init__(self, display: Display, camera: str = "rgb", told: Callable[[], str] = lambda: "") -> None:
        """``camera`` is the observation that is shown; ``told`` is a text that stands before the goal's."""
        self.display = display
        self._camera, self._told = camera, told

    def begin(self, env: PointNavVectorEnv, seed: int) -> None:
        """Gets ready; a person plays one episode at a time."""
        if env.num_envs != 1:
            raise ValueError(f"a person plays one agent, not {env.num_envs}")
        super().begin(env, seed)

    def act(self, observations: dict[str, Any], episode_starts: Tensor) -> Tensor:
        """Shows what the agent sees and waits for a key that means an action.

        Raises:
            StartOverError: the person wants to begin the episode anew.
            LeaveError: the person has had enough.
        """
        env = self.env
        image = observations[self._camera][0].cpu().numpy()
        goal = point_goal(env.task.goal, env.simulator.position, env.simulator.yaw)[0].tolist()
        side = "left" if goal[1] > 0 else "right"
        self.display.show(
            image,
            f"{self._told()}goal {goal[0]:.1f} m away, {abs(np.degrees(goal[1])):.0f} degrees to the {side}; "
            f"step {int(env.task.measured.steps[0])} of {env.config.max_steps}",
        )
        while True:
            key = self.display.key()
            if key in LEAVE:
                raise LeaveError
            if key == START_OVER:
                raise StartOverError
            action = KEYS.get(key)
            if action is None or (action == Action.STOP and env.config.stop == "automatic"):
                continue
            return env.task.policy_actions(torch.tensor([int(action)], device=env.simulator.device))
