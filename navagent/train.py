"""``navagent train``: homes, environment, policy, imitation and PPO, evaluation, the run's folder."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger

from envs.sb3 import SB3VecEnv
from envs.vector_env import PointNavVectorEnv
from navagent.build import (
    Split,
    cameras,
    load_split,
    make_vector_env,
    policy_settings,
    training_device,
)
from navagent.config import ConfigError, TrainConfig, to_yaml
from navagent.learning.imitation import ImitationConfig
from navagent.learning.ppo import PPO
from navagent.learning.schedules import DecaySchedule, LearningRate, PathLengthCurriculum
from navagent.progress import TrainingProgress, duration
from navagent.runs import CheckpointError, Run

GEODESIC_STEP = 0.25
"""The curriculum moves in steps of this length [m]."""


def train(config: TrainConfig, console: Console | None = None) -> Run:
    """Trains an agent as the settings say and leaves a run's folder; with ``resume``, goes on with one.

    Ctrl-C or SIGTERM ends the training after the update in progress, with a checkpoint to resume from. A
    second Ctrl-C stops at once.

    Args:
        config: The settings.
        console: Where progress is shown; standard output if None.

    Raises:
        KeyboardInterrupt: after Ctrl-C, when everything is saved: who called should stop too.
        SystemExit: likewise after SIGTERM, with the status that shells expect of it.
    """
    console = console or Console()
    state: dict[str, Any] | None = None
    if config.resume is not None:
        run = Run(Path(config.resume).expanduser())
        state = run.load_checkpoint("latest")
    train_split = load_split(config, config.scenes.train_split)
    val_split = load_split(config, config.scenes.val_split)
    model = make_model(config, train_split)
    try:
        # Not before everything is built: what fails by then should leave no folder behind.
        if config.resume is None:
            run = Run.create(_run_dir(config), to_yaml(config))
        trainer = Trainer(config, run, model, val_split, console)
        if state is not None:
            trainer.load(state)
            # A resumed run may have other settings, such as a longer budget, and its folder says so.
            run.write_config(to_yaml(dataclasses.replace(config, resume=None)))
        console.print(plan(config, run, model, train_split, val_split))
        trainer.train()
    finally:
        assert model.env is not None
        model.env.close()
    if trainer.stop_signal is None:
        _conclude(config, run, console)
        return run
    from navagent.evaluation.report import write_report

    write_report(run)
    console.print(
        f"stopped after {model.num_timesteps:,} frames; go on with\n  navagent train resume={run.path}",
        soft_wrap=True,
    )
    if trainer.stop_signal == signal.SIGTERM:
        raise SystemExit(128 + signal.SIGTERM)
    raise KeyboardInterrupt


def make_model(config: TrainConfig, split: Split) -> PPO:
    """The algorithm with its environment over a split's episodes, and its policy."""
    from policies.actor_critic import NavigationPolicy

    algorithm = config.algorithm
    # The environment's seed differs from the policy's by name only: each has a generator of its own.
    env = make_vector_env(config, split.episodes, split.scenes, algorithm.num_envs, seed=config.seed)
    return PPO(
        NavigationPolicy,
        SB3VecEnv(env),
        learning_rate=LearningRate(
            algorithm.learning_rate, cast(DecaySchedule, algorithm.learning_rate_schedule)
        ),
        n_steps=algorithm.num_steps,
        n_minibatches=algorithm.num_minibatches,
        n_epochs=algorithm.epochs,
        gamma=algorithm.gamma,
        gae_lambda=algorithm.gae_lambda,
        clip_range=algorithm.clip_range,
        ent_coef=algorithm.ent_coef,
        vf_coef=algorithm.vf_coef,
        max_grad_norm=algorithm.max_grad_norm,
        target_kl=algorithm.target_kl,
        imitation=ImitationConfig(
            frames=algorithm.imitation_frames,
            mixing_fraction=algorithm.imitation_mixing,
            inflection_weight=algorithm.inflection_weight,
            # A minibatch is made of whole sequences: at most one for each environment.
            num_minibatches=min(algorithm.imitation_minibatches, algorithm.num_envs),
            anchor_coef=algorithm.anchor_coef,
            anchor_frames=algorithm.anchor_frames,
        ),
        policy_kwargs=policy_settings(config),
        seed=config.seed,
        device=training_device(config.device),
    )


class Trainer(BaseCallback):
    """What happens around the updates: curriculum, evaluation, checkpoints, logs, and stopping."""

    def __init__(self, config: TrainConfig, run: Run, model: PPO, val_split: Split, console: Console) -> None:
        """``val_split`` holds the episodes to evaluate on."""
        super().__init__()
        self.config, self.run, self.console = config, run, console
        self.model: PPO = model
        algorithm = config.algorithm
        self.vector_env: PointNavVectorEnv = model.env.vector_env  # type: ignore[union-attr]
        self.curriculum: PathLengthCurriculum | None = None
        if algorithm.curriculum != "none":
            self.curriculum = PathLengthCurriculum(
                algorithm.curriculum_start,
                max(algorithm.curriculum_start, algorithm.curriculum_end),
                round(algorithm.curriculum_fraction * algorithm.total_frames),
                "linear" if algorithm.curriculum == "linear" else "success",
            )
            stated = [episode.geodesic_distance for episode in self.vector_env.sampler.episodes]
            stated = [distance for distance in stated if math.isfinite(distance)]
            if not stated:
                raise ConfigError(
                    f"algorithm.curriculum={algorithm.curriculum}: none of the episodes to train on states "
                    "its geodesic_distance; use algorithm.curriculum=none"
                )
            # A curriculum must leave at least one episode.
            self._shortest = GEODESIC_STEP * math.ceil(min(stated) / GEODESIC_STEP)
            self._apply_curriculum()
        self.val_split = val_split
        self._val_env: PointNavVectorEnv | None = None
        self.best_spl = -1.0
        self.trained_seconds = 0.0
        self.saved_frames = -1
        self.evaluated_frames = 0
        self.stop_signal: int | None = None
        """The signal that asked to stop; None while none has."""
        self._saved_at = time.monotonic()
        self._clock = time.monotonic()

    def train(self) -> None:
        """Trains to the end, or until a signal or a limit stops it."""
        total = self.config.algorithm.total_frames
        start = self.model.num_timesteps
        writer = RunWriter(self.run, start)
        self.model.set_logger(Logger(None, [writer]))
        self.progress = TrainingProgress(self.console, total, start)
        self.writer = writer
        self._clock = self._saved_at = time.monotonic()
        with self._stop_on_signals(), self.progress:
            # A run may have been stopped just when an evaluation was due.
            if self._evaluation_is_due():
                self.evaluate()
            if start < total and self.stop_signal is None and not self._out_of_time():
                self.model.learn(total - start, callback=self, reset_num_timesteps=start == 0)
            measured = self.evaluated_frames == self.model.num_timesteps
            if self.config.evaluation.every_frames and not measured and self.stop_signal is None:
                self.evaluate()
            if self._val_env is not None:
                self._val_env.close()
            if self.model.num_timesteps != self.saved_frames:
                self.save()
        writer.close()

    def _evaluation_is_due(self) -> bool:
        """Whether a multiple of ``evaluation.every_frames`` was passed since the newest evaluation."""
        every = self.config.evaluation.every_frames
        return every > 0 and self.model.num_timesteps // every > self.evaluated_frames // every

    def _out_of_time(self) -> bool:
        limit = self.config.algorithm.max_minutes
        return limit > 0 and self.trained_seconds >= 60 * limit

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.logger.record("time/trained_seconds", self.trained_seconds + time.monotonic() - self._clock)
        if self.curriculum is not None:
            self.logger.record("rollout/max_geodesic", self.vector_env.sampler.max_geodesic)

    def on_update_end(self) -> bool:
        """Called by the algorithm after each update; False ends the training."""
        frames = self.model.num_timesteps
        self.trained_seconds += time.monotonic() - self._clock
        if self.curriculum is not None:
            successes = [episode["success"] for episode in self.model.episodes_of_rollout]
            self.curriculum.update(frames, successes)
            self._apply_curriculum()
        left = self.config.algorithm.total_frames - frames
        rate = self.writer.newest.get("time/frames_per_second", 0.0)
        self.progress.update(
            self.model.phase, frames, self.writer.newest, left / rate if rate > 0 else math.inf
        )
        if self._evaluation_is_due() and self.stop_signal is None:
            self.evaluate()
        elif time.monotonic() - self._saved_at >= 60 * self.config.checkpoint.every_minutes:
            self.save()
        out_of_time = self._out_of_time()
        if out_of_time:
            self.progress.say(f"{duration(self.trained_seconds)} of training are over")
        self._clock = time.monotonic()
        return self.stop_signal is None and not out_of_time

    def _apply_curriculum(self) -> None:
        assert self.curriculum is not None
        steps = math.floor(self.curriculum.max_geodesic / GEODESIC_STEP + 1e-6)
        wanted = max(self._shortest, steps * GEODESIC_STEP)
        if wanted != self.vector_env.sampler.max_geodesic:
            self.vector_env.set_max_geodesic(wanted)

    def evaluate(self) -> None:
        """Measures the agent on unseen homes, keeps a checkpoint, and marks it if it is the best so far."""
        from gymnasium.vector import AutoresetMode

        from navagent.evaluation.agents import PolicyAgent
        from navagent.evaluation.evaluate import evaluate_agent, spread
        from navagent.evaluation.metrics import scalars, summarise

        settings = self.config.evaluation
        self.progress.waiting("evaluation")
        episodes = spread(self.val_split.episodes, settings.num_episodes)
        if self._val_env is None:
            self._val_env = make_vector_env(
                self.config,
                episodes,
                {episode.scene_id: self.val_split.scenes[episode.scene_id] for episode in episodes},
                min(settings.num_envs, len(episodes)),
                mode="once",
                autoreset_mode=AutoresetMode.NEXT_STEP,
            )
        started = time.monotonic()
        agent = PolicyAgent(self.model.policy, deterministic=settings.deterministic)
        summary = summarise(evaluate_agent(self._val_env, agent, settings.seed))
        frames = self.model.num_timesteps
        success, spl = summary["success"], summary["spl"]
        self.writer.write_now(frames, {**scalars(summary), "eval/episodes": len(episodes)})
        self.evaluated_frames = frames
        best = spl.mean > self.best_spl
        self.best_spl = max(self.best_spl, spl.mean)
        self.progress.say(
            f"{frames:,} frames: in unseen homes ({len(episodes)} episodes) success {success.mean:.2f} "
            f"({success.low:.2f}-{success.high:.2f}), SPL {spl.mean:.2f} ({spl.low:.2f}-{spl.high:.2f}), "
            f"in {duration(time.monotonic() - started)}" + (", the best so far" if best else "")
        )
        checkpoint = self.save()
        if best:
            self.run.mark_best(checkpoint)

    def save(self) -> Path:
        """Writes a checkpoint from which the training goes on exactly."""
        frames = self.model.num_timesteps
        state = self.model.training_state() | {
            "trainer": {
                "curriculum": self.curriculum.state_dict() if self.curriculum else None,
                "best_spl": self.best_spl,
                "trained_seconds": self.trained_seconds,
            }
        }
        self._saved_at = time.monotonic()
        self.saved_frames = frames
        return self.run.save_checkpoint(frames, state, self.config.checkpoint.keep)

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`save` wrote; takes back the metrics written after it."""
        file = self.run.checkpoint("latest")
        try:
            trainer = state["trainer"]
            self.model.load_training_state(state)
            if self.curriculum is not None:
                self.curriculum.load_state_dict(trainer["curriculum"])
            self.best_spl = float(trainer["best_spl"])
            self.trained_seconds = float(trainer["trained_seconds"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"{file}: does not fit the settings of {self.run.path}: {error}") from error
        self.saved_frames = self.model.num_timesteps
        self.run.truncate_metrics(self.model.num_timesteps)
        evaluations = [record["frames"] for record in self.run.read_metrics() if "eval/spl" in record]
        self.evaluated_frames = max(evaluations, default=0)

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """Turns Ctrl-C and SIGTERM into the wish to stop after the present update."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self.stop_signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_signal = number
            self.progress.say("stopping after this update, then saving; Ctrl-C again stops at once")

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class RunWriter(KVWriter):
    """Sends the logger's numbers to the run's metrics and to TensorBoard."""

    def __init__(self, run: Run, frames: int) -> None:
        """``frames`` were trained before: what TensorBoard shows after them is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self.run = run
        self.newest: dict[str, Any] = {}
        """The newest record."""
        self._board = SummaryWriter(str(run.tensorboard_dir), purge_step=frames + 1 if frames else None)

    def write(
        self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0
    ) -> None:
        """Called by the logger once an update."""
        record = {key: value for key, value in key_values.items() if isinstance(value, (int, float, str))}
        self.newest = record
        self.write_now(step, record)

    def write_now(self, frames: int, record: dict[str, Any]) -> None:
        """Writes one record of numbers and text."""
        self.run.append_metrics({"frames": frames, **record})
        for key, value in record.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(key, value, frames)
        self._board.flush()

    def close(self) -> None:
        """Closes TensorBoard's file."""
        self._board.close()


def plan(config: TrainConfig, run: Run, model: PPO, train_split: Split, val_split: Split) -> Table:
    """What is about to be trained, for the person who has to wait for it."""
    policy = model.policy
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    held = sum(p.numel() for p in policy.parameters()) + sum(b.numel() for b in policy.buffers()) - trained
    eyes = " and ".join(f"{c.kind} {c.height}x{c.width}" for c in cameras(config))
    weights = "random" if config.adaptation.name == "scratch" else config.encoder.weights
    weights = "pre-trained" if weights == "default" else weights
    network = f"; {config.encoder.name} ({weights} weights) with {config.adaptation.name}" if eyes else ""
    algorithm = config.algorithm
    teaching = (
        f"{algorithm.imitation_frames:,} taught by an expert that knows the shortest path, then PPO"
        if algorithm.imitation_frames
        else "PPO"
    )
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    rows = {
        "agent": f"sees {eyes or 'nothing'}{network}; {config.memory.name} of {config.memory.hidden_size}",
        "parameters": f"{trained:,} learned, {held:,} frozen",
        "homes": f"{len(train_split.scenes)} to train in ({len(train_split.episodes):,} episodes), "
        f"{len(val_split.scenes)} unseen ones to evaluate in ({len(val_split.episodes):,})",
        "training": f"{algorithm.total_frames:,} frames ({teaching}), {algorithm.num_envs} agents x "
        f"{algorithm.num_steps} steps a rollout",
        "memory": f"about {rollout_bytes(model) / 2**20:,.0f} MB for a rollout",
        "device": f"{model.device}, {torch.get_num_threads()} threads, seed {config.seed}",
        "run": f"{run.path}" + (f", going on after {model.num_timesteps:,} frames" if config.resume else ""),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def rollout_bytes(model: PPO) -> int:
    """Size of one rollout's observations and frozen features [bytes]."""
    import numpy as np

    spaces: Any = model.observation_space
    frame = sum(
        int(np.prod(space.shape or (1,))) * np.dtype(space.dtype).itemsize for space in spaces.values()
    )
    with torch.inference_mode():
        example = {
            key: torch.as_tensor(space.sample(), device=model.device)[None] for key, space in spaces.items()
        }
        frozen: dict[str, torch.Tensor] = model.policy.frozen_features(example)  # type: ignore[operator]
    frame += sum(value.numel() * model.feature_dtype.itemsize for value in frozen.values())
    return frame * model.n_steps * model.n_envs


def _run_dir(config: TrainConfig) -> Path:
    if config.run_dir is not None:
        return Path(config.run_dir).expanduser()
    seen = "".join(camera.kind[0] for camera in cameras(config)).replace("r", "rgb") or "blind"
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{stamp}-{config.adaptation.name}-{seen}"


def _conclude(config: TrainConfig, run: Run, console: Console) -> None:
    """The final evaluation beside other agents, with pictures and the report."""
    from navagent.evaluation.command import EvaluateOptions, evaluate_run
    from navagent.evaluation.report import write_report

    settings = config.evaluation
    if settings.final_episodes == 0:
        console.print(f"report   {write_report(run)}", soft_wrap=True)
        return
    agents = ["run", *filter(None, (name.strip() for name in settings.baselines.split(",")))]
    evaluate_run(
        EvaluateOptions(
            run=str(run.path),
            episodes=settings.final_episodes,
            agents=",".join(agents),
            deterministic=settings.deterministic,
            seed=settings.seed,
            maps=settings.maps,
            videos=settings.videos,
            device=config.device,
        ),
        console,
    )
