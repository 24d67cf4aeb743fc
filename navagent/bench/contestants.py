"""The learners that are compared, each a training that goes on from rollout to rollout while it is told to.

All of them build the environment and the network from the same settings. Whoever measures them hands in
``turn``, which a training asks before each rollout, and gets the seconds of each stage back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from envs.sb3 import SB3VecEnv
from envs.vector_env import PointNavVectorEnv
from navagent.build import Split, make_vector_env, policy_settings, set_threads, training_device
from navagent.config import TrainConfig

if TYPE_CHECKING:
    from navagent.learning.updates import SequenceLearner

STAGES = ("simulate", "expert", "policy", "update")
"""What the time of an update is split into; what is left is the rest."""


class CannotTakePartError(ValueError):
    """A learner that has nothing like the network asked for, or that is not installed."""


class Clock:
    """Seconds by stage."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts what runs within it; work queued on a GPU is waited for."""
        self._sync()
        start = time.perf_counter()
        yield
        self._sync()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def _sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


Turn = Callable[[dict[str, float], int], bool]
"""Called before each rollout with the seconds by stage since the last call, and the number of parameters that
learn. Answers, perhaps after a while, whether to go on."""


class _Turns(BaseCallback):
    """Asks for a turn before each rollout, and ends the training where there is none."""

    def __init__(self, ask: Callable[[], bool]) -> None:
        super().__init__()
        self.ask = ask
        self.going_on = True
        self.rollout_ended = 0.0

    def _on_rollout_start(self) -> None:
        self.going_on = self.ask()

    def _on_rollout_end(self) -> None:
        self.rollout_ended = time.perf_counter()

    def _on_step(self) -> bool:
        return self.going_on


def navagent(config: TrainConfig, split: Split, turn: Turn) -> None:
    """This package's PPO."""
    from navagent.train import make_model

    _navagent(make_model(config, split), turn)


def uncached(config: TrainConfig, split: Split, turn: Turn) -> None:
    """This package's PPO without stored features."""
    _navagent(make_uncached(config, split), turn)


def make_uncached(config: TrainConfig, split: Split) -> SequenceLearner:
    """A model that computes what a frozen encoder gives anew in every epoch, instead of storing it."""
    from navagent.train import make_model

    model = make_model(config, split)
    policy: Any = model.policy
    policy.frozen_features = lambda obs: {}
    return model


def _navagent(model: SequenceLearner, turn: Turn) -> None:
    def ask() -> bool:
        seconds = dict(model.stage_seconds)
        model.stage_seconds.clear()
        return turn(seconds, _learning(model.policy))

    try:
        model.learn(_ENDLESS, callback=_Turns(ask), log_interval=0)
    finally:
        assert model.env is not None
        model.env.close()


class _TimedVecEnv(VecEnvWrapper):
    """Measures the time of steps."""

    def __init__(self, env: VecEnv, clock: Clock) -> None:
        super().__init__(env)
        self.clock = clock

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        with self.clock.stage("simulate"):
            return self.venv.step_wait()


def stable_baselines3(config: TrainConfig, split: Split, turn: Turn) -> None:
    """``sb3_contrib.RecurrentPPO`` with an LSTM, ``stable_baselines3.PPO`` without memory, as they are.

    With an LSTM, the policy gets the same network through their own settings: the features extractor, one
    LSTM that actor and critic share, and no further layers. The environment is an SB3 VecEnv.
    """
    from stable_baselines3 import PPO as TheirPPO  # noqa: N811

    from policies.actor_critic import NavigationPolicy
    from policies.extractor import AdaptedExtractor

    options, memory = config.algorithm, config.memory
    algorithm: type[OnPolicyAlgorithm]
    if memory.name not in ("lstm", "none"):
        raise CannotTakePartError(f"Stable-Baselines3 has no policy with the memory {memory.name!r}")
    settings = policy_settings(config)
    policy: Any
    if memory.name == "lstm":
        try:
            from sb3_contrib import RecurrentPPO
        except ImportError:
            raise CannotTakePartError("sb3_contrib is not installed: `pip install sb3-contrib`") from None
        extractor = ("encoder", "weights", "adaptation", "adaptation_options", "image_features")
        algorithm, policy = RecurrentPPO, "MultiInputLstmPolicy"
        kwargs = {
            "features_extractor_class": AdaptedExtractor,
            "features_extractor_kwargs": {name: settings[name] for name in extractor},
            "net_arch": [],
            "lstm_hidden_size": memory.hidden_size,
            "n_lstm_layers": memory.num_layers,
            "shared_lstm": True,
            "enable_critic_lstm": False,
            "optimizer_class": settings["optimizer_class"],
            "optimizer_kwargs": settings["optimizer_kwargs"],
        }
    else:
        algorithm, policy, kwargs = TheirPPO, NavigationPolicy, settings
    device = training_device(config.device)
    clock = Clock(device)
    env = _TimedVecEnv(SB3VecEnv(_environment(config, split)), clock)
    frames = options.num_envs * options.num_steps
    model: Any = algorithm(
        policy,
        env,
        learning_rate=options.learning_rate,
        n_steps=options.num_steps,
        batch_size=frames // options.num_minibatches,
        n_epochs=options.epochs,
        gamma=options.gamma,
        gae_lambda=options.gae_lambda,
        clip_range=options.clip_range,
        ent_coef=options.ent_coef,
        vf_coef=options.vf_coef,
        max_grad_norm=options.max_grad_norm,
        policy_kwargs=kwargs,
        seed=config.seed,
        device=device,
    )
    started = 0.0

    def ask() -> bool:
        nonlocal started
        seconds = dict(clock.seconds)
        clock.seconds.clear()
        if started:
            collected = callback.rollout_ended - started
            seconds["policy"] = collected - seconds.get("simulate", 0.0)
            seconds["update"] = time.perf_counter() - callback.rollout_ended
        answer = turn(seconds, _learning(model.policy))
        started = time.perf_counter()
        return answer

    callback = _Turns(ask)
    try:
        model.learn(_ENDLESS, callback=callback)
    finally:
        env.close()


def plain_loop(config: TrainConfig, split: Split, turn: Turn) -> None:
    """A plain script of CleanRL's kind, see :mod:`navagent.bench.plain_loop`."""
    from navagent.bench.plain_loop import PlainAgent
    from policies.actor_critic import NavigationPolicy

    if config.memory.name == "frame_stack":
        raise CannotTakePartError("the plain loop has no memory 'frame_stack'")
    device = training_device(config.device)
    torch.manual_seed(config.seed)
    env = _environment(config, split)
    env.output = "numpy"
    policy = NavigationPolicy(
        env.single_observation_space,
        env.single_action_space,
        lambda _: config.algorithm.learning_rate,
        **policy_settings(config),
    ).to(device)
    clock = Clock(device)

    def ask() -> bool:
        seconds = dict(clock.seconds)
        clock.seconds.clear()
        return turn(seconds, _learning(policy))

    try:
        PlainAgent(policy, config.algorithm).train(env, ask, clock.stage)
    finally:
        env.close()


@dataclass(frozen=True)
class Contestant:
    """A learner."""

    title: str
    """What it is, in a few words."""
    train: Callable[[TrainConfig, Split, Turn], None]
    """Trains as the settings say, as long as it gets turns.

    Raises CannotTakePartError where it has no such network.
    """
    frozen_only: bool = False
    """Whether it differs from others only where a part of the network is frozen."""


CONTESTANTS: dict[str, Contestant] = {
    "navagent": Contestant("navagent.learning.PPO", navagent),
    "uncached": Contestant("navagent.learning.PPO without stored features", uncached, frozen_only=True),
    "sb3": Contestant("stable_baselines3.PPO, sb3_contrib.RecurrentPPO", stable_baselines3),
    "plain": Contestant("a plain loop of CleanRL's kind", plain_loop),
}
"""Learners by the name that selects them."""

_ENDLESS = 10**15
"""More frames than any training has."""


def _environment(config: TrainConfig, split: Split) -> PointNavVectorEnv:
    set_threads(config.num_threads)
    return make_vector_env(config, split.episodes, split.scenes, config.algorithm.num_envs, seed=config.seed)


def _learning(policy: torch.nn.Module) -> int:
    """How many parameters learn."""
    return sum(p.numel() for p in policy.parameters() if p.requires_grad)
