"""``navagent train`` and ``imitate``: homes, environment, policy, learning, evaluation, the run's folder."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger

from envs.expert import half_circle
from envs.sb3 import SB3VecEnv
from envs.vector_env import PointNavVectorEnv
from navagent.build import (
    Split,
    cameras,
    check_perception,
    check_simulator,
    load_split,
    make_training_envs,
    make_vector_env,
    policy_settings,
    share_of_scenes,
    simulator_gpus,
    training_device,
)
from navagent.config import ConfigError, TrainConfig, started_run, to_yaml
from navagent.distributed import Launch, RankLostError, Ranks, joined
from navagent.learning.auxiliary import AuxiliaryConfig
from navagent.learning.demonstrated import (
    DemonstratedVectorEnv,
    check_unseen,
    demonstrated_env,
    demonstrations_of,
    store_features,
)
from navagent.learning.fast_paths import CompileMode, FastPaths
from navagent.learning.imitation import ImitationConfig, MixingSchedule
from navagent.learning.imitator import Imitator
from navagent.learning.nonfinite import NonFinite
from navagent.learning.ppo import PPO
from navagent.learning.schedules import (
    Decay,
    DecaySchedule,
    LearningRate,
    PathLengthCurriculum,
    square_root_scale,
)
from navagent.learning.updates import SequenceLearner
from navagent.memory_estimate import MemoryPlan, check_scenes, feature_storage, plan_memory
from navagent.preemption import URGENT, Stopped, StopSignals
from navagent.progress import TrainingProgress, duration
from navagent.runs import CheckpointError, Origin, Packed, Run, RunError, pack, read_checkpoint

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from navagent.evaluation.results import EpisodeResult

GEODESIC_STEP = 0.25
"""The curriculum moves in steps of this length [m]."""

KEPT_FROM_SECONDS = 2.0
"""From this duration of a rollout and its update on, what they began with is kept in memory, so that a signal
need not wait for their end."""

UNSAVED_MINUTES = 60.0
"""Training goes on for so long while no checkpoint can be written."""


def train(config: TrainConfig, console: Console | None = None) -> Run:
    """Trains an agent as the settings say and leaves a run's folder; with ``resume``, goes on with one.

    Ctrl-C, SIGTERM or SIGUSR1 ends the training with a checkpoint to resume from: after the update in
    progress, or, where a signal cannot wait so long, as of before it. A second Ctrl-C stops at once.

    Args:
        config: The settings.
        console: Where progress is shown; standard output if None.

    Raises:
        KeyboardInterrupt: after Ctrl-C, when everything is saved: who called should stop too.
        SystemExit: likewise after SIGTERM, with the status that shells expect of it, 143, and after SIGUSR1
            with :data:`~navagent.preemption.REQUEUE_STATUS`.
    """
    with contextlib.ExitStack() as stack:
        # The first process speaks for all.
        launch = Launch.read()
        if launch is not None and launch.rank > 0:
            console = Console(quiet=True, force_terminal=False)
        console = console or Console()
        stop = stack.enter_context(StopSignals(console.print))
        ranks = stack.enter_context(joined(lambda: training_device(config.device)))
        try:
            return _train(config, console, stop, stack, ranks)
        except RankLostError:
            if stop.number is None:
                raise
            # The other has taken the signal sooner.
            raise stop.error() from None


def _train(
    config: TrainConfig, console: Console, stop: StopSignals, stack: contextlib.ExitStack, ranks: Ranks
) -> Run:
    check_simulator(config)
    state: dict[str, Any] | None = None
    if config.resume is not None:
        run = Run(Path(config.resume).expanduser())
        if ranks.first:
            stack.enter_context(run.claimed())
        # Who finds the folder claimed ends, before any other process reads it.
        ranks.barrier()
        # A run that was killed while its homes were loading has neither, and begins.
        if run.checkpoints() or run.read_metrics():
            state = run.load_checkpoint("latest")
    elif config.start_from is None:
        check_perception(config)
    with ranks.one_before_others():
        # What is made and kept, such as generated homes, is made once.
        train_split = load_split(config, config.scenes.train_split)
        val_split = load_split(config, config.scenes.val_split)
        if config.imitation.name == "behaviour_cloning":
            # Where none are given, the expert records them now.
            console.print(f"demonstrations  {demonstrations_of(config)}", soft_wrap=True)
    own_split = share_of_scenes(config, train_split, ranks)
    if config.simulator.name == "raycast":
        check_scenes(own_split.scenes.values())
    # Where all weights are in a checkpoint, the files they started from may be gone.
    restored = state is not None or config.start_from is not None
    model = make_model(config, own_split, ranks, restored)
    assert model.env is not None
    stack.callback(model.env.close)
    world = model.env.vector_envs[0]  # type: ignore[attr-defined]
    if isinstance(world, DemonstratedVectorEnv):
        check_unseen(world, train_split, val_split)
    origin: Origin | None = None
    if state is None and config.start_from is not None:
        origin = begin_as(model, config)
    # habitat-sim's workers hold their scenes themselves.
    held_here = val_split.scenes.values() if config.simulator.name == "raycast" else ()
    memory = plan_memory(config, model, held_here)
    memory.check()
    # Not before everything is built: what fails by then should leave no folder behind.
    if config.resume is None:
        path = ""
        if ranks.first:
            run = Run.create(_run_dir(config), to_yaml(config), origin)
            stack.enter_context(run.claimed())
            path = str(run.path)
        run = Run(ranks.broadcast(path))
    trainer = Trainer(config, run, model, val_split, console, stop)
    if state is not None:
        trainer.load(state)
        if ranks.first:
            # A resumed run may have other settings, such as a longer budget, and its folder says so.
            run.write_config(to_yaml(dataclasses.replace(config, resume=None)))
    if config.imitation.store_features and isinstance(world, DemonstratedVectorEnv):
        size = store_features(world, config, model.policy, ranks)
        told = (
            f"{size / 1e6:,.0f} MB on the disk"
            if size
            else "nothing, for the agent has none that never change"
        )
        console.print(f"stored features  {told}")
    for message in wished_fast_paths(config).available(model.device)[1]:
        console.print(f"speed.{message}")
    console.print(plan(config, run, model, train_split, val_split, memory))
    trainer.train()
    if stop.number is None:
        _conclude(config, run, console, ranks)
        return run
    if ranks.first:
        from navagent.evaluation.report import write_report

        console.print(
            f"stopped after {trainer.saved_frames:,} frames; go on with\n"
            f"  navagent {verb(config)} resume={run.path}",
            soft_wrap=True,
        )
        write_report(run)
    if not trainer.given_up:
        # A launcher ends all when one has ended: the one who draws the report should be done before.
        ranks.barrier()
    raise stop.error()


def learning_rate(config: TrainConfig, processes: int = 1) -> LearningRate:
    """The learning rate of the settings, for as many processes that learn together."""
    algorithm = config.algorithm
    scale = 1.0
    if algorithm.scale_learning_rate:
        everyone = algorithm.num_envs * processes
        parts = algorithm.num_minibatches
        if algorithm.name == "imitation":
            parts = min(config.imitation.minibatches, everyone)
        scale = square_root_scale(max(1, algorithm.num_steps * everyone // parts))
    return LearningRate(
        scale * algorithm.learning_rate,
        cast(DecaySchedule, algorithm.learning_rate_schedule),
        # What is left is the same for every size of minibatch.
        algorithm.learning_rate_final / scale,
        algorithm.learning_rate_warmup,
    )


def verb(config: TrainConfig) -> str:
    """The command that trains so."""
    return "imitate" if config.algorithm.name == "imitation" else "train"


def begin_as(model: SequenceLearner, config: TrainConfig) -> Origin:
    """Gives the model's policy the weights of the agent that ``start_from`` names, and tells what it was.

    Raises:
        CheckpointError: there is no such checkpoint, or it is of another agent.
    """
    given = Path(cast(str, config.start_from)).expanduser()
    run = Run(started_run(config))
    file = given if given.is_file() else run.checkpoint("best")
    state = read_checkpoint(file)
    try:
        model.policy.load_state_dict(state["policy"])
        # Which of a run's checkpoints is the best is known when all of it was trained.
        frames = int(state["frames"]) if given.is_file() else run.trained_frames
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{file}: does not fit the settings of {run.config_path}: {error}") from None
    before = run.origin.frames if run.origin is not None else 0
    return Origin(str(run.path.resolve()), file.name, before + frames)


def make_model(
    config: TrainConfig, split: Split, ranks: Ranks | None = None, restored: bool = False
) -> SequenceLearner:
    """The algorithm with its environment over a split's episodes, and its policy.

    Each of several ``ranks`` makes its own, and they learn together. The weights of a model that is
    ``restored`` are still to be loaded.
    """
    from policies.actor_critic import NavigationPolicy

    algorithm = config.algorithm
    ranks = ranks or Ranks()
    device = training_device(config.device)
    fast_paths, _ = wished_fast_paths(config).available(device)
    # The environment's seed differs from the policy's by name only: each has a generator of its own.
    cloning = config.imitation.name == "behaviour_cloning"
    envs: Sequence[Any] = (
        [demonstrated_env(config, ranks)]
        if cloning
        else make_training_envs(config, split.episodes, split.scenes, ranks)
    )
    learner, settings = learning_settings(config)
    return learner(
        NavigationPolicy,
        SB3VecEnv(*envs),
        learning_rate=learning_rate(config, ranks.size),
        n_steps=algorithm.num_steps,
        n_epochs=algorithm.epochs,
        gamma=algorithm.gamma,
        gae_lambda=algorithm.gae_lambda,
        normalize_returns=algorithm.normalize_returns,
        # Demonstrations do not tell what they were worth.
        vf_coef=0.0 if cloning else algorithm.vf_coef,
        max_grad_norm=algorithm.max_grad_norm,
        replay_epochs=algorithm.replay_epochs,
        replay_steps=algorithm.replay_steps,
        auxiliary=AuxiliaryConfig(
            algorithm.cpc_coef,
            algorithm.inverse_dynamics_coef,
            config.imitation.heading_coef,
            half_circle(config.env.turn_angle_deg),
        ),
        nonfinite=cast(NonFinite, algorithm.nonfinite),
        feature_dtype=getattr(torch, algorithm.feature_dtype),
        imitation=teaching(config, ranks.size),
        ranks=ranks,
        sync_frac=config.distributed.sync_frac,
        fast_paths=fast_paths,
        policy_kwargs=policy_settings(config, restored),
        seed=config.seed,
        device=device,
        **settings,
    )


def wished_fast_paths(config: TrainConfig) -> FastPaths:
    """How the settings want the policy computed, whether or not the device can."""
    speed = config.speed
    return FastPaths(
        precision=getattr(torch, speed.precision),
        channels_last=speed.channels_last,
        compile=cast(CompileMode, speed.compile),
        tf32=speed.tf32,
    )


def learning_settings(config: TrainConfig) -> tuple[type[SequenceLearner], dict[str, Any]]:
    """The algorithm, and those of its settings that others do not have."""
    algorithm = config.algorithm
    if algorithm.name == "imitation":
        # Labels are learned in parts of their own, see :func:`teaching`.
        return Imitator, {"n_minibatches": 1}
    clipping = cast(DecaySchedule, algorithm.clip_range_schedule)
    clip_range_vf = algorithm.clip_range_vf
    return PPO, {
        "n_minibatches": algorithm.num_minibatches,
        "clip_range": Decay(algorithm.clip_range, clipping),
        "clip_range_vf": None if clip_range_vf is None else Decay(clip_range_vf, clipping),
        "clip_value_loss": algorithm.clip_value_loss,
        "normalize_advantage": algorithm.normalize_advantage,
        "ent_coef": algorithm.ent_coef,
        "target_kl": algorithm.target_kl,
    }


def teaching(config: TrainConfig, processes: int = 1) -> ImitationConfig:
    """The expert's part, for as many processes that learn together."""
    algorithm, imitation = config.algorithm, config.imitation
    everyone = algorithm.num_envs * processes
    return ImitationConfig(
        frames=algorithm.total_frames if algorithm.name == "imitation" else imitation.frames,
        schedule=cast(MixingSchedule, imitation.schedule),
        initial_share=imitation.share,
        mixing_fraction=imitation.mixing,
        decay=imitation.decay,
        iteration_frames=everyone * algorithm.num_steps,
        final_share=imitation.final_share,
        alone_fraction=imitation.alone,
        segment_steps=imitation.segment_steps,
        inflection_weight=imitation.inflection_weight,
        # A minibatch is made of whole sequences: at most one for each environment.
        num_minibatches=min(imitation.minibatches, everyone),
        critic_warmup_frames=algorithm.critic_warmup_frames,
        anchor_coef=algorithm.anchor_coef,
        anchor_frames=algorithm.anchor_frames,
    )


class Trainer(BaseCallback):
    """What happens around the updates: curriculum, evaluation, checkpoints, logs, and stopping."""

    def __init__(
        self,
        config: TrainConfig,
        run: Run,
        model: SequenceLearner,
        val_split: Split,
        console: Console,
        stop: StopSignals | None = None,
    ) -> None:
        """``val_split`` holds the episodes to evaluate on; ``stop`` tells of signals, None of none."""
        super().__init__()
        self.config, self.run, self.console = config, run, console
        self.model: SequenceLearner = model
        self.ranks = model.ranks
        model.guard.folder = run.path
        algorithm = config.algorithm
        self.vector_envs: tuple[Any, ...] = model.env.vector_envs  # type: ignore[union-attr]
        self.curriculum: PathLengthCurriculum | None = None
        if algorithm.curriculum != "none":
            self.curriculum = PathLengthCurriculum(
                algorithm.curriculum_start,
                max(algorithm.curriculum_start, algorithm.curriculum_end),
                round(algorithm.curriculum_fraction * algorithm.total_frames),
                "linear" if algorithm.curriculum == "linear" else "success",
            )
            stated = [episode.geodesic_distance for episode in self.vector_envs[0].sampler.episodes]
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
        self.stop = stop or StopSignals(console.print)
        self.resumed = False
        """Whether this goes on from a checkpoint."""
        self.given_up = False
        """Whether the training was stopped in the middle of an update."""
        self._saved_at = self._clock = self._begun_at = time.monotonic()
        self._unsaved_since: float | None = None
        # What the update in progress began with: frames, and a copy where it may take long.
        self._begun_frames = -1
        self._begun: Packed | None = None
        self._update_seconds = math.inf

    def train(self) -> None:
        """Trains to the end, or until a signal or a limit stops it."""
        total = self.config.algorithm.total_frames
        start = self.model.num_timesteps
        writer = RunWriter(self.run if self.ranks.first else None, start if self.resumed else None)
        self.model.set_logger(Logger(None, [writer]))
        self.progress = TrainingProgress(self.console, total, start)
        self.writer = writer
        self._clock = self._saved_at = time.monotonic()
        stopping = self.model.policy.optimizer.register_step_post_hook(lambda *_: self._stop_if_pressed())
        self.stop.last_resort = self._save_begun
        with self.stop.deferred(), self.progress:
            # A run may have been stopped just when an evaluation was due.
            if self._evaluation_is_due():
                self.evaluate()
            if start < total and not self._agreed_to_stop() and not self._out_of_time():
                try:
                    self.model.learn(total - start, callback=self, reset_num_timesteps=not self.resumed)
                except Stopped:
                    self.given_up = True
                except RankLostError:
                    if self.stop.number is None:
                        raise
                    # Another process has given up sooner.
                    self.given_up = True
            measured = self.evaluated_frames == self.model.num_timesteps
            wanted = self.config.evaluation.every_frames and not measured and not self.given_up
            if wanted and not self._agreed_to_stop():
                self.evaluate()
            if self._val_env is not None:
                self._val_env.close()
            if self.given_up:
                try:
                    with self.stop.saving:
                        self._save_begun()
                except OSError as error:
                    self._not_saved(self._begun_frames, error, last=True)
            elif self.model.num_timesteps != self.saved_frames:
                self.save(last=True)
            self.stop.last_resort = None
        stopping.remove()
        writer.close()

    def _agreed_to_stop(self) -> bool:
        """Whether a signal has come to any process; all ask at once, and get the same answer."""
        (number,) = self.ranks.largest([self.stop.number or 0])
        if number:
            self.stop.ask(int(number))
        return number > 0

    def _evaluation_is_due(self) -> bool:
        """Whether a multiple of ``evaluation.every_frames`` was passed since the newest evaluation."""
        every = self.config.evaluation.every_frames
        return every > 0 and self.model.num_timesteps // every > self.evaluated_frames // every

    def _out_of_time(self) -> bool:
        limit = self.config.algorithm.max_minutes
        return limit > 0 and self.trained_seconds >= 60 * limit

    def _on_rollout_start(self) -> None:
        if self.saved_frames < 0:
            # A run that cannot save should fail now, and one that is killed needs nothing but this to go on.
            self.save(last=True)
        self._measure_beginning()
        self._begun_at = time.monotonic()
        self._begun_frames = self.model.num_timesteps
        # All ranks know the same time: they decide alike, since each has a part of the state.
        kept = self._update_seconds >= KEPT_FROM_SECONDS and self._begun_frames != self.saved_frames
        self._begun = pack(self._state()) if kept else None

    def _measure_beginning(self) -> None:
        """Evaluates an agent that begins as another, once: what it learns should not be less than that."""
        begins = self.model.num_timesteps == 0 and self.best_spl < 0
        if begins and self.config.start_from is not None and self.config.evaluation.every_frames:
            self.evaluate()
            self._clock = time.monotonic()

    def _on_step(self) -> bool:
        self._stop_if_pressed()
        return True

    def _stop_if_pressed(self) -> None:
        """Gives up the rollout or update in progress, where a signal cannot wait for its end."""
        if self.stop.number in URGENT:
            self.ranks.hand_on(self.stop.number)
        if self.stop.pressing and (self._begun is not None or self._begun_frames == self.saved_frames):
            raise Stopped(self.stop.status)

    def _save_begun(self) -> bool:
        """Saves what the update in progress began with; False where that was not kept.

        Whoever calls holds ``stop.saving``.
        """
        if self.saved_frames >= self._begun_frames or not self.ranks.first:
            return True
        if self._begun is None:
            return False
        self.writer.flush()
        self.run.save_checkpoint(self._begun_frames, self._begun, self.config.checkpoint.keep)
        self.saved_frames = self._begun_frames
        return True

    def _on_rollout_end(self) -> None:
        self.logger.record("time/trained_seconds", self.trained_seconds + time.monotonic() - self._clock)
        if self.config.simulator.name != "raycast":
            envs = simulated([*self.vector_envs, self._val_env])
            self.logger.record("time/simulator_restarts", sum(env.simulator.restarts for env in envs))
            self.logger.record("time/episodes_begun_again", sum(env.interruptions for env in envs))
        if self.curriculum is not None:
            self.logger.record("rollout/max_geodesic", self.vector_envs[0].sampler.max_geodesic)

    def on_update_end(self) -> bool:
        """Called by the algorithm after each update; False ends the training."""
        frames = self.model.num_timesteps
        now = time.monotonic()
        saving_is_due = now - self._saved_at >= 60 * self.config.checkpoint.every_minutes
        # By one clock for all.
        self.trained_seconds, self._update_seconds, due = self.ranks.largest(
            [self.trained_seconds + now - self._clock, now - self._begun_at, saving_is_due]
        )
        if self.curriculum is not None:
            successes = [episode["success"] for episode in self.model.episodes_of_rollout]
            self.curriculum.update(frames, successes)
            self._apply_curriculum()
        left = self.config.algorithm.total_frames - frames
        rate = self.writer.newest.get("time/frames_per_second", 0.0)
        self.progress.update(
            self.model.phase, frames, self.writer.newest, left / rate if rate > 0 else math.inf
        )
        if self._evaluation_is_due() and not self._agreed_to_stop():
            self.evaluate()
        elif due:
            self.save()
        out_of_time = self._out_of_time()
        if out_of_time:
            self.progress.say(f"{duration(self.trained_seconds)} of training are over")
        self._clock = time.monotonic()
        return not self._agreed_to_stop() and not out_of_time

    def _apply_curriculum(self) -> None:
        assert self.curriculum is not None
        steps = math.floor(self.curriculum.max_geodesic / GEODESIC_STEP + 1e-6)
        wanted = max(self._shortest, steps * GEODESIC_STEP)
        if wanted != self.vector_envs[0].sampler.max_geodesic:
            for vector_env in self.vector_envs:
                vector_env.set_max_geodesic(wanted)

    def evaluate(self) -> None:
        """Measures the agent on unseen homes, and marks the checkpoint if it is the best so far.

        The checkpoint comes first, so that a signal can end the evaluation; it is then done again when the
        run is resumed.
        """
        from navagent.evaluation.evaluate import gathered
        from navagent.evaluation.metrics import scalars, summarise

        frames = self.model.num_timesteps
        if frames != self.saved_frames:
            self.save()
        self.progress.waiting("evaluation")
        started = time.monotonic()
        results: list[EpisodeResult] = []
        with contextlib.suppress(Stopped, KeyboardInterrupt), self.stop.at_once():
            results = self._measure()
        if self.stop.number in URGENT:
            # Else they would evaluate to the end, and this process wait for them.
            self.ranks.hand_on(self.stop.number)
        if self._agreed_to_stop():
            return
        results = gathered(results, self.ranks)
        self.evaluated_frames = frames
        if not self.ranks.first:
            return
        summary = summarise(results)
        success, spl = summary["success"], summary["spl"]
        best = spl.mean > self.best_spl
        self.best_spl = max(self.best_spl, spl.mean)
        if best and frames == self.saved_frames:
            # Before the line that says so: whoever is killed in between evaluates again.
            self.run.mark_best(self.run.checkpoint(frames))
        self.writer.write_now(frames, {**scalars(summary), "eval/episodes": len(results)})
        self.progress.say(
            f"{frames:,} frames: in unseen homes ({len(results)} episodes) success {success.mean:.2f} "
            f"({success.low:.2f}-{success.high:.2f}), SPL {spl.mean:.2f} ({spl.low:.2f}-{spl.high:.2f}), "
            f"in {duration(time.monotonic() - started)}" + (", the best so far" if best else "")
        )

    def _measure(self) -> list[EpisodeResult]:
        """Results of this process's share of the evaluation's episodes."""
        from gymnasium.vector import AutoresetMode

        from navagent.evaluation.agents import PolicyAgent
        from navagent.evaluation.evaluate import evaluate_agent, spread

        settings = self.config.evaluation
        episodes = self.ranks.share(spread(self.val_split.episodes, settings.num_episodes))
        if not episodes:
            return []
        if self._val_env is None:
            self._val_env = make_vector_env(
                self.config,
                episodes,
                {episode.scene_id: self.val_split.scenes[episode.scene_id] for episode in episodes},
                min(settings.num_envs, len(episodes)),
                mode="once",
                autoreset_mode=AutoresetMode.NEXT_STEP,
            )
        agent = PolicyAgent(
            self.model.policy, deterministic=settings.deterministic, turn_back=settings.turn_back
        )
        return evaluate_agent(self._val_env, agent, settings.seed, lambda *_: self.ranks.check())

    def _state(self) -> dict[str, Any]:
        """Everything that decides how the training goes on."""
        return self.model.training_state() | {
            "trainer": {
                "curriculum": self.curriculum.state_dict() if self.curriculum else None,
                "trained_seconds": self.trained_seconds,
            }
        }

    def save(self, last: bool = False) -> None:
        """Writes a checkpoint from which the training goes on exactly.

        Where the disk does not take it, training goes on and tries again when the next one is due: stopping
        would lose as much. After :data:`UNSAVED_MINUTES` of that, or where it is the ``last`` one, it fails.

        Raises:
            RunError: it cannot be written, and waiting longer would not help.
        """
        frames = self.model.num_timesteps
        self._saved_at = time.monotonic()
        state = self._state()
        problem: OSError | None = None
        if self.ranks.first:
            try:
                with self.stop.saving:
                    self.writer.flush()
                    self.run.save_checkpoint(frames, state, self.config.checkpoint.keep)
                    self.saved_frames = frames
            except OSError as error:
                problem = error
        if self.ranks.largest([problem is not None])[0]:
            if problem is not None:
                self._not_saved(frames, problem, last)
        else:
            self.saved_frames = frames
            self._unsaved_since = None

    def _not_saved(self, frames: int, error: OSError, last: bool) -> None:
        """Reports that the disk did not take a checkpoint; ends the training if that goes on for long."""
        newest = [f"the newest one is of {int(file.stem):,} frames" for file in self.run.checkpoints()[-1:]]
        with contextlib.suppress(OSError):
            newest += [f"{shutil.disk_usage(self.run.path).free / 2**20:,.0f} MB are free there"]
        report = (
            f"{self.run.path}: the checkpoint of {frames:,} frames cannot be written: "
            f"{error.strerror or error} ({'; '.join(newest)})"
        )
        now = time.monotonic()
        self._unsaved_since = now if self._unsaved_since is None else self._unsaved_since
        if last or now - self._unsaved_since >= 60 * UNSAVED_MINUTES:
            raise RunError(
                f"{report}. Make room, then go on with `navagent {verb(self.config)} resume={self.run.path}`"
            )
        self.progress.say(
            f"{report}. Training goes on; the next try is in "
            f"{duration(60 * self.config.checkpoint.every_minutes)}, and without room it ends after "
            f"{duration(60 * UNSAVED_MINUTES)}"
        )

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`save` wrote; takes back the metrics written after it."""
        file = self.run.checkpoint("latest")
        try:
            trainer = state["trainer"]
            self.model.load_training_state(state)
            if self.curriculum is not None:
                self.curriculum.load_state_dict(trainer["curriculum"])
            self.trained_seconds = float(trainer["trained_seconds"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"{file}: does not fit the settings of {self.run.path}: {error}") from error
        self.saved_frames = self.model.num_timesteps
        self.resumed = True
        evaluations: list[dict[str, Any]] = []
        if self.ranks.first:
            self.run.truncate_metrics(self.model.num_timesteps)
            evaluations = [record for record in self.run.read_metrics() if "eval/spl" in record]
        self.evaluated_frames = self.ranks.broadcast(
            max((record["frames"] for record in evaluations), default=0)
        )
        self.best_spl = max((record["eval/spl"] or 0.0 for record in evaluations), default=-1.0)


class RunWriter(KVWriter):
    """Sends the logger's numbers to the run's metrics and to TensorBoard."""

    def __init__(self, run: Run | None, frames: int | None) -> None:
        """``frames`` were trained before by a run that goes on; TensorBoard hides what came since.

        Without a run, as in all processes but the first, nothing is written.
        """
        self.run = run
        self.newest: dict[str, Any] = {}
        """The newest record."""
        self._frames = frames
        self._board: SummaryWriter | None = None
        # What the disk has not taken yet, for the metrics and for TensorBoard.
        self._unwritten: list[tuple[int, dict[str, Any]]] = []
        self._unshown: list[tuple[int, dict[str, Any]]] = []
        if run is not None and frames is not None:
            # An evaluation of the last frames may have reached the metrics and not TensorBoard.
            newest = [record for record in run.read_metrics() if record["frames"] == frames]
            self._unshown = [(frames, {k: v for k, v in each.items() if k != "frames"}) for each in newest]

    def write(
        self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0
    ) -> None:
        """Called by the logger once an update."""
        record = {key: value for key, value in key_values.items() if isinstance(value, (int, float, str))}
        self.newest = record
        self.write_now(step, record)

    def write_now(self, frames: int, record: dict[str, Any]) -> None:
        """Writes one record of numbers and text; what a full disk does not take waits for :meth:`flush`."""
        if self.run is None:
            return
        self._unwritten.append((frames, record))
        self._unshown.append((frames, record))
        with contextlib.suppress(OSError):
            self.flush()

    def flush(self) -> None:
        """Writes what was not written yet.

        Raises:
            OSError: the disk does not take it.
        """
        if self.run is None:
            return
        while self._unwritten:
            frames, record = self._unwritten[0]
            self.run.append_metrics({"frames": frames, **record})
            del self._unwritten[0]
        self._show(self.run)

    def _show(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            if self._board is None:
                self._board = SummaryWriter(str(run.tensorboard_dir), purge_step=self._frames)
            for frames, record in self._unshown:
                for key, value in record.items():
                    if isinstance(value, (int, float)):
                        self._board.add_scalar(key, value, frames)
            self._board.flush()
            self._unshown.clear()
        except OSError:
            # Its thread has died of the error; another one begins another file.
            self._board = None
            raise

    def close(self) -> None:
        """Closes TensorBoard's file."""
        if self._board is not None:
            self._board.close()


def plan(
    config: TrainConfig,
    run: Run,
    model: SequenceLearner,
    train_split: Split,
    val_split: Split,
    memory: MemoryPlan,
) -> Table:
    """What is about to be trained, for the person who has to wait for it."""
    policy: Any = model.policy
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    held = sum(p.numel() for p in policy.parameters()) + sum(b.numel() for b in policy.buffers()) - trained
    eyes = " and ".join(f"{c.kind} {c.height}x{c.width}" for c in cameras(config))
    weights = "random" if config.adaptation.name == "scratch" else config.encoder.weights
    weights = "pre-trained" if weights == "default" else weights
    network = f"; {config.encoder.name} ({weights} weights) with {config.adaptation.name}" if eyes else ""
    algorithm, ranks = config.algorithm, model.ranks
    processes = f" in each of {ranks.size} processes" if ranks.size > 1 else ""
    world = model.env.vector_envs[0]  # type: ignore[union-attr]
    shard = ""
    if hasattr(world, "sampler") and len(world.sampler.scene_ids) < len(train_split.scenes):
        shard = f", {len(world.sampler.scene_ids)} in this process"
    imitation = config.imitation
    taught = "taught by an expert that knows the shortest path"
    lesson = f"{imitation.frames:,} {taught}, then PPO" if imitation.frames else "PPO"
    if algorithm.name == "imitation":
        lesson = f"all {taught}, by DAgger"
    if isinstance(world, DemonstratedVectorEnv):
        passes = algorithm.total_frames / world.stream.steps_per_pass
        # Whoever gave them: the expert, another agent or a person.
        lesson = (
            f"all by behaviour cloning from {world.stream.num_demonstrations:,} demonstrations, "
            f"{passes:.3g} times each"
        )
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    rows = {
        "agent": f"sees {eyes or 'nothing'}{network}; {config.memory.name} of {config.memory.hidden_size}",
        "parameters": f"{trained:,} learned, {held:,} frozen",
        "homes": f"{len(train_split.scenes)} to train in ({len(train_split.episodes):,} episodes){shard}, "
        f"{len(val_split.scenes)} unseen ones to evaluate in ({len(val_split.episodes):,})",
        "training": f"{algorithm.total_frames:,} frames ({lesson}), {algorithm.num_envs} agents x "
        f"{algorithm.num_steps} steps a rollout{processes}",
        "memory": memory.describe(),
        "features": "; ".join(f"{image}: {how}" for image, how in feature_storage(policy).items()) or "none",
        "simulator": simulator_line(config, model),
        "device": f"{model.device}, {torch.get_num_threads()} threads, seed {config.seed}",
        "run": f"{run.path}" + (f", going on after {model.num_timesteps:,} frames" if config.resume else ""),
    }
    noises = policy.features_extractor.noises()
    if noises:
        told = "; ".join(f"{image}: {', '.join(found)}" for image, found in noises.items())
        rows["notice"] = (
            f"the network that learns is not the one that acted ({told}); see docs/methods.md, In "
            "reinforcement learning"
        )
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def simulated(envs: Iterable[Any]) -> list[PointNavVectorEnv]:
    """Those of some environments that have a simulator, and those that replay demonstrations for others."""
    worlds = [env.stream.simulated if isinstance(env, DemonstratedVectorEnv) else env for env in envs]
    return [world for world in worlds if isinstance(world, PointNavVectorEnv)]


def simulator_line(config: TrainConfig, model: SequenceLearner) -> str:
    """What simulates the world, in words."""
    if config.simulator.name == "raycast":
        return "built in"
    worlds = model.env.vector_envs  # type: ignore[union-attr]
    workers = sum(len(world.simulator.process_ids) for world in simulated(worlds))
    gpus = simulator_gpus(config, max(1, workers))
    where = "in software" if set(gpus) == {-1} else f"on GPUs {', '.join(map(str, sorted(set(gpus))))}"
    return f"habitat-sim in {workers} worker processes, drawing {where}"


def _run_dir(config: TrainConfig) -> Path:
    if config.run_dir is not None:
        return Path(config.run_dir).expanduser()
    seen = "".join(camera.kind[0] for camera in cameras(config)).replace("r", "rgb") or "blind"
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{stamp}-{config.adaptation.name}-{seen}"


def _conclude(config: TrainConfig, run: Run, console: Console, ranks: Ranks) -> None:
    """The final evaluation beside other agents, with pictures and the report."""
    from navagent.evaluation.command import EvaluateOptions, evaluate_run
    from navagent.evaluation.report import write_report

    settings = config.evaluation
    if settings.final_episodes == 0:
        if ranks.first:
            console.print(f"report   {write_report(run)}", soft_wrap=True)
        return
    agents = ["run", *filter(None, (name.strip() for name in settings.baselines.split(",")))]
    evaluate_run(
        EvaluateOptions(
            run=str(run.path),
            episodes=settings.final_episodes,
            agents=",".join(agents),
            deterministic=settings.deterministic,
            turn_back=settings.turn_back,
            seed=settings.seed,
            maps=settings.maps,
            videos=settings.videos,
            device=config.device,
        ),
        console,
        ranks,
    )
