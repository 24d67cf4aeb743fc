"""How fast training is end to end, and where its time goes.

    python benchmarks/training.py                                       # the main journey's settings
    python benchmarks/training.py sensors=depth algorithm.num_envs=64   # any settings of `navagent train`
    python benchmarks/training.py --updates 20 --json training.json

Trains by the settings, without evaluation and checkpoints, first in the imitation phase and then in PPO.
After a warm-up, medians over updates of each phase are shown: frames per second, and the share of simulation,
expert, policy (collecting) and update (learning).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from envs.files import atomic_write
from navagent.build import load_split
from navagent.config import load_config
from navagent.learning.ppo import PPO
from navagent.runs import versions
from navagent.train import make_model

STAGES = ("simulate", "expert", "policy", "update")
WARM_UP = 2


class Stopwatch(BaseCallback):
    """Keeps the seconds that each stage of every update took."""

    def __init__(self) -> None:
        super().__init__()
        self.updates: list[dict[str, float]] = []

    def _on_rollout_start(self) -> None:
        self.model.stage_seconds.clear()

    def _on_step(self) -> bool:
        return True

    def on_update_end(self) -> bool:
        """Called by the algorithm after each update."""
        self.updates.append({stage: self.model.stage_seconds.get(stage, 0.0) for stage in STAGES})
        return True


def measure(model: PPO, updates: int) -> dict[str, float]:
    """Median frames per second and shares over ``updates`` updates of the phase that the model is in."""
    watch = Stopwatch()
    frames = model.n_steps * model.n_envs
    model.learn((WARM_UP + updates) * frames, callback=watch, log_interval=0, reset_num_timesteps=False)
    kept = watch.updates[WARM_UP:]
    result = {"frames_per_second": statistics.median(frames / sum(update.values()) for update in kept)}
    for stage in STAGES:
        result[stage] = statistics.median(update[stage] / sum(update.values()) for update in kept)
    return result


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="as for `navagent train`")
    parser.add_argument("--updates", type=int, default=8, help="updates measured in each phase")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    arguments = parser.parse_args()

    config = load_config(arguments.settings)
    algorithm = config.algorithm
    frames = (WARM_UP + arguments.updates) * algorithm.num_envs * algorithm.num_steps
    # Exactly as many updates of each phase as are measured.
    config = dataclasses.replace(config, imitation=dataclasses.replace(config.imitation, frames=frames))
    model = make_model(config, load_split(config, config.scenes.train_split))
    model.set_logger(Logger(None, []))
    results = {phase: measure(model, arguments.updates) for phase in ("imitation", "ppo")}
    assert model.env is not None
    model.env.close()

    table = Table(
        title=f"training, {algorithm.num_envs} agents x {algorithm.num_steps} steps, {model.device}"
    )
    for column in ("phase", "frames/s", *STAGES):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase, result in results.items():
        table.add_row(
            phase,
            f"{result['frames_per_second']:,.0f}",
            *(f"{100 * result[stage]:.0f} %" for stage in STAGES),
        )
    Console().print(table)
    if arguments.json:
        record = {"settings": arguments.settings, "versions": versions(), "phases": results}
        with atomic_write(arguments.json) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
