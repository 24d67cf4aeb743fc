"""Drives with `navagent export RUN --out DIR`; numpy and onnxruntime alone: python drive_onnx.py DIR."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


class Robot:
    """A stand-in that sees noise and drives on an endless floor: put your cameras and wheels here."""

    def __init__(self, card):
        self.inputs, self.noise, self.goal = card["inputs"], np.random.default_rng(0), 4 + 2j

    def sense(self):
        """An array for each sensor of the card; the goal's angle is positive to the left."""
        cameras = {k: self.noise.random(v["shape"]) for k, v in self.inputs.items() if "camera" in v}
        seen = {k: v * 255 if self.inputs[k]["dtype"] == "uint8" else v for k, v in cameras.items()}
        return seen | {"pointgoal_with_gps_compass": [[abs(self.goal), np.angle(self.goal)]]}

    def move(self, name):
        """Carries out an action: the goal as the robot sees it afterwards."""
        turn = {"turn_left": 1, "turn_right": -1}.get(name, 0) * np.radians(10)
        self.goal = self.goal * np.exp(-1j * turn) - 0.25 * (name == "move_forward")


def drive(folder, robot_class=Robot, max_steps=50):
    """The names of the most probable actions, one after another."""
    card = json.loads(Path(folder, "policy.json").read_text())
    session = onnxruntime.InferenceSession(str(Path(folder, card["model"])))
    robot, state, taken = robot_class(card), {k: np.zeros(v["shape"]) for k, v in card["inputs"].items()}, []
    while len(taken) < max_steps and "stop" not in taken:
        now = state | robot.sense() | {"episode_start": [not taken]}
        fed = {k: np.asarray(now[k]).astype(v["dtype"]) for k, v in card["inputs"].items()}
        found = dict(zip([out.name for out in session.get_outputs()], session.run(None, fed), strict=True))
        action = card["actions"][found["logits"].argmax()]
        state |= {"memory": found.get("next_memory"), "previous_action": [action["index"] + 1]}
        taken.append(action["name"])
        robot.move(action["name"])
    return taken


if __name__ == "__main__":
    print(*drive(sys.argv[1]), sep="\n")
