"""Settings: typed, validated, composed by Hydra from the groups in ``configs/``.

A value is looked up in three places, the later winning: the option chosen of each group
(``adaptation=finetune``), the experiment (``experiment=quick``), and what the command line sets by name
(``algorithm.total_frames=2e6``). The dataclasses below say which settings exist, of what type and range, and
in one line what each is for; whatever does not fit is refused by name before anything expensive starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import itertools
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from envs.files import atomic_write

GROUPS = (
    "scenes",
    "simulator",
    "env",
    "sensors",
    "encoder",
    "adaptation",
    "memory",
    "algorithm",
    "imitation",
    "speed",
    "experiment",
)
"""The groups of ``configs/``, one option of each in force."""

SEE_ALL = "`navagent train --help` lists every setting, `navagent train --show-config` shows their values"

Command = Literal["train", "imitate"]
"""The verbs that train."""

SIMULATORS = ("raycast", "habitat")
"""The built-in simulator, and habitat-sim."""

STARTS_WITH: dict[Command, dict[str, str]] = {"train": {}, "imitate": {"algorithm": "imitation"}}
"""Options that a verb has by default where ``configs/train.yaml`` has others."""

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that does not exist or does not fit; the message names it and what would."""


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | Callable[[], Sequence[str]] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with the line that ``--help`` shows and the range that its value must lie in.

    Choices that would take seconds to import are given as a function.
    """
    limits = {"at_least": at_least, "at_most": at_most, "above": above, "below": below}
    return field(default=default, metadata={"help": help, "choices": choices, **limits})


def _encoders() -> tuple[str, ...]:
    from policies.encoders import ENCODERS

    return tuple(ENCODERS)


def _methods() -> tuple[str, ...]:
    from policies.adaptation import ADAPTATIONS

    return tuple(ADAPTATIONS)


def _choices(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    choices = metadata["choices"]
    return tuple(choices() if callable(choices) else choices)


@dataclass
class ScenesConfig:
    """Where the homes and the episodes come from."""

    dataset: str = setting("generated", "folder of a data set with scenes/ and episodes/, or 'generated'")
    num: int = setting(40, "how many homes to generate", at_least=2)
    seed: int = setting(0, "seed of the generated homes", at_least=0)
    scenes_dir: str | None = setting(None, "folder of the scenes, where it is not the data set's own")
    train_split: str = setting("train", "split to train on")
    val_split: str = setting("val", "split to evaluate on; it should share no scene with the train split")


@dataclass
class SimulatorConfig:
    """What simulates the world; all settings but the name are habitat-sim's."""

    name: str = setting("raycast", "the simulator", choices=SIMULATORS)
    workers: int = setting(
        0, "processes that share the agents, in each process that trains; 0 is one for each core", at_least=0
    )
    gpu_ids: str = setting(
        "auto",
        "GPUs that the workers draw on, as 0,1 by CUDA's numbers; -1 is software; auto is the GPU that "
        "trains, or software",
    )
    resident_scenes: int = setting(
        0,
        "scenes that are played in at a time, of which every 10,000 steps one is exchanged; 0 is all while "
        "their files are small, and fewer beyond 256 MiB",
        at_least=0,
    )
    scene_dataset_config: str | None = setting(
        None, "Habitat's *.scene_dataset_config.json that the scenes belong to, where they need one"
    )
    python: str | None = setting(None, "Python that has habitat-sim, where it is another than this one")
    max_restarts: int = setting(
        10, "workers that died and are started again, before one is an error", at_least=0
    )


@dataclass
class EnvConfig:
    """The PointNav task and the agent's body."""

    name: str = setting("habitat-2019", "name of this variant of the task, for reports")
    max_steps: int = setting(500, "actions after which an episode ends", at_least=1)
    success_distance: float = setting(0.2, "an episode succeeds nearer to the goal than this [m]", above=0)
    slack_reward: float = setting(-0.01, "reward of every step")
    progress_reward: float = setting(1.0, "reward per metre of geodesic distance won", at_least=0)
    success_reward: float = setting(2.5, "reward of success", at_least=0)
    success_bonus: str = setting(
        "constant", "success reward as it is, or times SPL", choices=("constant", "spl")
    )
    stop: str = setting(
        "called", "stop is an action, or called for the agent at the goal", choices=("called", "automatic")
    )
    forward_step: float = setting(0.25, "length of a forward move [m]", above=0, at_most=5)
    turn_angle_deg: float = setting(10.0, "angle of a turn [deg]", above=0, at_most=180)
    allow_sliding: bool = setting(True, "a blocked move slides along the wall")
    agent_radius: float = setting(0.1, "radius of the agent [m]", above=0, at_most=5)
    agent_height: float = setting(1.5, "height of the agent [m]", above=0, at_most=10)
    max_climb: float = setting(0.2, "highest step the agent climbs [m]", at_least=0, at_most=5)
    max_slope_deg: float = setting(45.0, "steepest floor the agent walks [deg]", above=0, below=90)
    rgb_noise: float = setting(
        0.0, "standard deviation of Gaussian colour noise, of 1", at_least=0, at_most=1
    )
    depth_noise: float = setting(0.0, "strength of the Redwood depth noise; 1 is the real sensor", at_least=0)
    actuation_noise: float = setting(0.0, "strength of the LoCoBot motion noise; 1 is the robot", at_least=0)


@dataclass
class SensorsConfig:
    """What the agent sees and is told."""

    rgb: bool = setting(True, "a colour camera")
    depth: bool = setting(False, "a depth camera")
    height: int = setting(64, "image rows", at_least=8, at_most=4096)
    width: int = setting(64, "image columns", at_least=8, at_most=4096)
    hfov_deg: float = setting(90.0, "horizontal field of view [deg]", above=0, below=180)
    sensor_height: float = setting(1.25, "height of the cameras above the feet [m]", above=0, at_most=10)
    min_depth: float = setting(0.0, "depth that the policy is given as 0 [m]", at_least=0)
    max_depth: float = setting(10.0, "depth that the policy is given as 1 [m]", above=0)
    pitch_deg: float = setting(
        0.0, "tilt of the cameras [deg]; negative looks down", at_least=-90, at_most=90
    )
    goal: str = setting(
        "pointgoal_with_gps_compass",
        "goal relative to where the agent is, or to where it started",
        choices=("pointgoal_with_gps_compass", "pointgoal"),
    )
    gps: bool = setting(False, "position relative to the start")
    compass: bool = setting(False, "heading relative to the start")


@dataclass
class EncoderConfig:
    """The perception network, before it is adapted."""

    name: str = setting(
        "fcn5_small",
        "perception network, by its name in policies/encoders",
        choices=_encoders,
    )
    weights: str = setting(
        "default",
        "pre-trained weights: 'default', 'random', a name that `navagent weights list` shows, or a file",
    )
    image_features: int = setting(256, "length of the vector that an image becomes", at_least=1, at_most=8192)


@dataclass
class AdaptationConfig:
    """How the frozen encoder is adapted: the method, and the settings that this method has."""

    name: str = setting("sidetune", "the method", choices=_methods)
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the method that differ from its defaults, by name."""


@dataclass
class MemoryConfig:
    """What the agent remembers."""

    name: str = setting("gru", "the memory", choices=("gru", "lstm", "frame_stack", "none"))
    hidden_size: int = setting(
        256, "size of the memory and of the policy's features", at_least=1, at_most=8192
    )
    num_layers: int = setting(1, "layers (gru, lstm)", at_least=1, at_most=8)
    num_frames: int = setting(4, "frames that are stacked (frame_stack)", at_least=2, at_most=64)


@dataclass
class AlgorithmConfig:
    """How the agent learns."""

    name: str = setting(
        "ppo", "by reward, perhaps after an expert; or from an expert alone", choices=("ppo", "imitation")
    )
    total_frames: int = setting(1_000_000, "frames to train for, over all agents", at_least=1)
    max_minutes: float = setting(
        0.0, "stop after this long, evaluation aside [min]; 0 is no limit", at_least=0
    )
    num_envs: int = setting(32, "agents that act side by side, in each process", at_least=1, at_most=65536)
    num_steps: int = setting(64, "steps of every agent in one rollout", at_least=1, at_most=65536)
    num_minibatches: int = setting(8, "parts that a rollout is learned in", at_least=1)
    feature_dtype: str = setting(
        "float32",
        "how a rollout stores frozen features; 16 bits halve their memory, and round them",
        choices=("float32", "float16", "bfloat16"),
    )
    epochs: int = setting(
        2,
        "passes over the newest rollout in each update; 0 learns labels from all rollouts alike "
        "(algorithm=imitation with replay_epochs)",
        at_least=0,
        at_most=1000,
    )
    replay_epochs: int = setting(
        0,
        "passes over past rollouts in each update, beside those over the newest; algorithm=imitation "
        "aggregates labels so",
        at_least=0,
        at_most=1000,
    )
    replay_steps: int = setting(0, "steps of every agent that are kept for them; 0 without", at_least=0)
    optimizer: str = setting(
        "adam",
        "adam, adam as AMSGrad, or lamb, which scales the step of each layer for large minibatches",
        choices=("adam", "amsgrad", "lamb"),
    )
    learning_rate: float = setting(7e-4, "the optimiser's step size", above=0, at_most=1)
    learning_rate_schedule: str = setting(
        "linear", "how the learning rate falls", choices=("constant", "linear", "cosine")
    )
    learning_rate_final: float = setting(
        0.0, "share of the learning rate that is left at the end of its fall", at_least=0, at_most=1
    )
    learning_rate_warmup: float = setting(
        0.0, "share of the training in which the learning rate climbs from its half", at_least=0, below=1
    )
    scale_learning_rate: bool = setting(
        False, "the learning rate is for minibatches of 256 frames, and grows with the root of larger ones"
    )
    weight_decay: float = setting(0.0, "weight decay; alpha never has any", at_least=0, at_most=1)
    gamma: float = setting(0.99, "discount of the reward", at_least=0, at_most=1)
    gae_lambda: float = setting(0.95, "lambda of the generalised advantage estimate", at_least=0, at_most=1)
    clip_range: float = setting(0.2, "how far the policy may move in an update", above=0)
    clip_range_schedule: str = setting(
        "constant", "how both clip ranges fall to 0", choices=("constant", "linear", "cosine")
    )
    clip_range_vf: float | None = setting(
        None, "how far the critic may move in an update; null does not clip it", above=0
    )
    clip_value_loss: bool = setting(
        False, "clip the critic as PPO2 does, by clip_range where clip_range_vf is null"
    )
    normalize_advantage: bool = setting(True, "advantages of a minibatch get mean 0 and deviation 1")
    normalize_returns: bool = setting(False, "rewards are divided by the running deviation of returns")
    ent_coef: float = setting(0.01, "weight of the entropy bonus", at_least=0)
    vf_coef: float = setting(0.5, "weight of the value loss", at_least=0)
    max_grad_norm: float = setting(0.5, "gradients are clipped to this norm", above=0)
    target_kl: float | None = setting(None, "an update stops early beyond 1.5 times this divergence", above=0)
    cpc_coef: float = setting(
        0.0, "weight of CPC|A, which predicts images from memory and actions; Habitat's is 0.1", at_least=0
    )
    inverse_dynamics_coef: float = setting(
        0.0, "weight of guessing the action between two images", at_least=0
    )
    nonfinite: str = setting(
        "stop",
        "at a loss, gradient or observation that is not finite, stop and keep it, or skip and count it",
        choices=("stop", "skip"),
    )
    critic_warmup_frames: int = setting(
        0, "frames at the beginning of PPO in which the critic alone learns, and the policy stays", at_least=0
    )
    anchor_coef: float = setting(0.0, "PPO's pull towards the policy it began from, at first", at_least=0)
    anchor_frames: int = setting(0, "frames of PPO over which that pull falls to 0", at_least=0)
    curriculum: str = setting("none", "how the longest path grows", choices=("none", "linear", "success"))
    curriculum_start: float = setting(3.0, "longest path at first [m]", above=0)
    curriculum_end: float = setting(30.0, "longest path at last [m]", above=0)
    curriculum_fraction: float = setting(
        0.5, "share of the training over which it grows (linear)", above=0, at_most=1
    )


@dataclass
class ImitationConfig:
    """How an expert that knows the shortest path teaches, before PPO or to the end."""

    name: str = setting(
        "dagger",
        "labels wherever the agent goes itself, or a fixed set of demonstrations",
        choices=("dagger", "behaviour_cloning"),
    )
    frames: int = setting(
        400_000, "frames in which the expert teaches before PPO; 0 is none (algorithm=ppo)", at_least=0
    )
    schedule: str = setting(
        "linear",
        "how the expert's share of the acting falls; exponential is by the same factor every rollout, as of "
        "Ross et al. (dagger)",
        choices=("linear", "exponential", "constant"),
    )
    share: float = setting(1.0, "the expert's share of the acting at first (dagger)", at_least=0, at_most=1)
    mixing: float = setting(
        0.5, "share of the teaching over which it falls (dagger, linear)", at_least=0, at_most=1
    )
    decay: float = setting(
        0.99,
        "factor by which it falls from one rollout to the next (dagger, exponential)",
        at_least=0,
        below=1,
    )
    final_share: float = setting(
        0.25, "share of the acting that stays the expert's after that (dagger)", at_least=0, at_most=1
    )
    alone: float = setting(
        0.2,
        "last part of the teaching in which the agent acts alone all the same (dagger)",
        at_least=0,
        at_most=1,
    )
    segment_steps: float = setting(
        16.0, "steps, on average, after which who acts is drawn anew; 1 is each (dagger)", at_least=1
    )
    minibatches: int = setting(16, "parts that a rollout is learned in while the expert teaches", at_least=1)
    inflection_weight: float = setting(
        1.0, "weight of steps at which the expert changes its action; others weigh 1", above=0
    )
    heading_coef: float = setting(
        0.0,
        "weight of a loss that foretells the direction of the expert's next move from the memory (dagger)",
        at_least=0,
    )
    demos: str | None = setting(
        None, "demonstrations to learn from; they are recorded if null (behaviour_cloning)"
    )
    num_demos: int | None = setting(
        None,
        "how many of them to learn from: all if null, or 1000 where they are recorded (behaviour_cloning)",
        at_least=1,
    )
    store_features: bool = setting(
        False,
        "features of the frozen encoder are computed once for all demonstrations, and kept in the cache "
        "(behaviour_cloning)",
    )


@dataclass
class EvaluationConfig:
    """Evaluation while and after training."""

    every_frames: int = setting(200_000, "frames between evaluations; 0 is none", at_least=0)
    num_episodes: int = setting(64, "episodes of an evaluation while training", at_least=1)
    final_episodes: int = setting(
        300, "episodes of the evaluation at the end, as far as the split has them; 0 is none", at_least=0
    )
    num_envs: int = setting(32, "agents that are evaluated side by side", at_least=1)
    deterministic: bool = setting(False, "the most probable action instead of a sampled one")
    turn_back: float = setting(
        0.0,
        "probability below which an agent does not turn back right after a turn; 0 leaves it free, 0.6 keeps "
        "imitators from turning to and fro",
        at_least=0,
        at_most=1,
    )
    baselines: str = setting("random,expert", "agents beside the run's in the final table, with commas")
    maps: int = setting(8, "maps with the agent's path in the final evaluation", at_least=0)
    videos: int = setting(2, "videos in the final evaluation", at_least=0)
    seed: int = setting(0, "seed of the evaluation's sampled actions and intervals", at_least=0)


@dataclass
class CheckpointConfig:
    """Saving the run."""

    every_minutes: float = setting(5.0, "minutes between checkpoints", above=0)
    keep: int = setting(3, "how many of the newest checkpoints stay; the best one always does", at_least=1)


@dataclass
class DistributedConfig:
    """Training in several processes, as torchrun starts them."""

    sync_frac: float = setting(
        0.6,
        "share of the processes whose finished rollouts end those of the others, which have at least a "
        "quarter; 1 waits for all",
        above=0,
        at_most=1,
    )
    scenes: str = setting(
        "auto",
        "every process plays in all scenes (shared) or in a part of its own (sharded); auto shards more than "
        "1 GiB",
        choices=("auto", "shared", "sharded"),
    )


@dataclass
class SpeedConfig:
    """Faster ways to the same; what a device lacks is said and left out."""

    overlap: bool = setting(
        False, "agents act in two halves: one is simulated while the policy looks at the other"
    )
    precision: str = setting(
        "float32",
        "precision of convolutions and matrix products; bfloat16 rounds them to 8 bits",
        choices=("float32", "bfloat16"),
    )
    channels_last: bool = setting(False, "lay images out in memory as fast convolutions want them")
    compile: str = setting(
        "none",
        "torch.compile's mode for the features extractor; reduce-overhead replays CUDA graphs",
        choices=("none", "default", "reduce-overhead", "max-autotune"),
    )
    tf32: bool = setting(False, "let CUDA devices round the factors of float32 products to 10 bits")


@dataclass
class TrainConfig:
    """Every setting of a training run."""

    seed: int = setting(0, "seed of everything that is drawn at random", at_least=0)
    device: str = setting("auto", "cpu, cuda, cuda:N, or auto: CUDA where there is one")
    num_threads: int = setting(
        0, "threads of the simulator and of torch on the CPU; 0 is OMP_NUM_THREADS, or all cores", at_least=0
    )
    run_dir: str | None = setting(None, "folder of the run; runs/<date-time>-<adaptation>-<sensors> if null")
    resume: str | None = setting(None, "folder of a run to go on with")
    start_from: str | None = setting(
        None,
        "run, or checkpoint of one, whose agent this one begins as; `train` then does experiment=reinforce",
    )
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    simulator: SimulatorConfig = field(default_factory=SimulatorConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    sensors: SensorsConfig = field(default_factory=SensorsConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    adaptation: AdaptationConfig = field(default_factory=AdaptationConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    imitation: ImitationConfig = field(default_factory=ImitationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)


@dataclass(frozen=True)
class Setting:
    """One leaf of the tree of settings."""

    name: str
    """Dotted name, as the command line takes it."""
    type: Any
    """int, float, bool or str, or one of them ``| None``."""
    default: Any
    help: str
    choices: tuple[str, ...]


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def settings(cls: type = TrainConfig, prefix: str = "") -> Iterator[Setting]:
    """Every setting under ``cls``, in the order of the dataclasses."""
    for item in dataclasses.fields(cls):
        kind = _hints(cls)[item.name]
        name = prefix + item.name
        if dataclasses.is_dataclass(kind):
            yield from settings(typing.cast(type, kind), name + ".")
        elif name == "adaptation.options":
            yield from _method_settings()
        else:
            yield Setting(name, kind, item.default, item.metadata["help"], _choices(item.metadata))


@functools.cache
def _method_settings() -> tuple[Setting, ...]:
    """What the methods can be told, each setting once; methods that share one follow each other."""
    from policies.adaptation.options import method_options

    found: dict[str, list[tuple[str, Any]]] = {}
    for method in _methods():
        for option in method_options(method):
            found.setdefault(option.name, []).append((method, option))
    listed = []
    for name, owners in found.items():
        first = owners[0][1]
        text = "; ".join(f"{method}: {option.help}" for method, option in owners)
        choices = tuple(dict.fromkeys(word for _, option in owners for word in option.choices))
        listed.append(Setting(f"adaptation.{name}", first.type, first.default, text, choices))
    return tuple(listed)


@functools.cache
def options(group: str) -> tuple[str, ...]:
    """The options of a group, from the files in ``configs/``, sorted."""
    files = (resources.files("configs") / group).iterdir()
    return tuple(sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")))


@functools.cache
def default_options(command: Command = "train") -> dict[str, str]:
    """The option of each group that is in force where the command line names none."""
    listed = yaml.safe_load((resources.files("configs") / "train.yaml").read_text("utf-8"))["defaults"]
    found = {group: option for item in listed if item != "_self_" for group, option in item.items()}
    return found | STARTS_WITH[command]


def option_help(group: str, option: str) -> str:
    """What an option of a group is, in the words that its file begins with."""
    text = (resources.files("configs") / group / f"{option}.yaml").read_text("utf-8")
    comment = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.lstrip("# ") for line in comment if "@package" not in line)


def nearest(name: str, known: Sequence[str]) -> str:
    """``"; did you mean 'x'?"`` for the known name most like ``name``, empty where none is like it."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        # `total_frames` and `algoritm.total_frames` both mean `algorithm.total_frames`.
        leaf = name.rsplit(".", 1)[-1]
        leaves = {full.rsplit(".", 1)[-1]: full for full in reversed(known)}
        close = [leaves[match] for match in difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.6)]
    return f"; did you mean {close[0]!r}?" if close else ""


def _convert(name: str, kind: Any, value: Any) -> Any:
    """``value`` as ``kind``, or a ConfigError that says what was expected."""
    optional = isinstance(kind, types.UnionType)
    if optional:
        if value is None:
            return None
        kind = next(arm for arm in typing.get_args(kind) if arm is not types.NoneType)
    expected = {
        int: "a whole number, like 2000000 or 2e6",
        float: "a number",
        bool: "true or false",
        str: "text",
    }[kind] + (" or null" if optional else "")
    wrong = ConfigError(f"{name}={value} does not fit: expected {expected}")
    if kind is str:
        if not isinstance(value, str) or not value:
            raise wrong
        return value
    if kind is bool:
        # The command line gives text.
        if isinstance(value, str):
            value = {"true": True, "false": False}.get(value.lower())
        if not isinstance(value, bool):
            raise wrong
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise wrong
    number: float = math.nan
    for reader in (int, float):
        # Text also comes from YAML 1.1 readers, which take 1e-4 for it. Whole numbers stay exact.
        with contextlib.suppress(ValueError):
            number = value if not isinstance(value, str) else reader(value)
            break
    if not math.isfinite(number) or (kind is int and number != int(number)):
        raise wrong
    return kind(number)


def _check_range(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    if value is None:
        return
    choices = _choices(limits)
    if choices and value not in choices:
        raise ConfigError(f"{name}={value} is not one of {', '.join(choices)}" + nearest(str(value), choices))
    for word, holds in (
        ("at_least", lambda limit: value >= limit),
        ("at_most", lambda limit: value <= limit),
        ("above", lambda limit: value > limit),
        ("below", lambda limit: value < limit),
    ):
        if limits[word] is not None and not holds(limits[word]):
            raise ConfigError(
                f"{name}={value} is out of range: expected {word.replace('_', ' ')} {limits[word]}"
            )


def _build(cls: type[T], values: Any, prefix: str = "") -> T:
    """The dataclass filled from a nested mapping; every key known, every value of its type and range."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.') or 'settings'}={values!r} does not fit: expected a mapping")
    known = {item.name: item for item in dataclasses.fields(typing.cast(Any, cls))}
    for key in values:
        if key not in known:
            names = [prefix + name for name in known]
            raise ConfigError(
                f"there is no setting {prefix}{key}{nearest(f'{prefix}{key}', names)} ({SEE_ALL})"
            )
    built: dict[str, Any] = {}
    for key, value in values.items():
        kind, name = _hints(typing.cast(Any, cls))[key], f"{prefix}{key}"
        if kind is AdaptationConfig:
            built[key] = _build_adaptation(value)
        elif dataclasses.is_dataclass(kind):
            built[key] = _build(typing.cast(type, kind), value, name + ".")
        else:
            built[key] = _convert(name, kind, value)
            _check_range(name, built[key], known[key].metadata)
    return cls(**built)


def _build_adaptation(values: Any) -> AdaptationConfig:
    """The method and its options, from a mapping that holds both side by side."""
    from policies.adaptation.options import method_options

    if not isinstance(values, Mapping):
        raise ConfigError(f"adaptation={values!r} does not fit: expected a mapping")
    config = _build(AdaptationConfig, {k: v for k, v in values.items() if k == "name"}, "adaptation.")
    known = {option.name: option for option in method_options(config.name)}
    for key, value in values.items():
        name = f"adaptation.{key}"
        if key == "name":
            continue
        if key not in known:
            owners = [m for m in _methods() if key in {option.name for option in method_options(m)}]
            hint = f"; it is one of {', '.join(owners)}" if owners else nearest(name, [*known])
            raise ConfigError(f"{name} is no setting of the method {config.name!r}{hint} ({SEE_ALL})")
        option = known[key]
        converted = _convert(name, option.type, value)
        _check_range(name, converted, dict.fromkeys(LIMITS) | {"choices": option.choices})
        if converted != option.default:
            config.options[key] = converted
    return config


LIMITS = ("at_least", "at_most", "above", "below")
"""Bounds that a setting's value may have."""


def _check_together(config: TrainConfig) -> None:
    """What no single setting can see: combinations, and files that must be there."""
    algorithm = config.algorithm
    if algorithm.name == "ppo" and algorithm.num_minibatches > algorithm.num_envs:
        raise ConfigError(
            f"algorithm.num_minibatches={algorithm.num_minibatches} is more than algorithm.num_envs="
            f"{algorithm.num_envs}: a minibatch is made of whole agents' rollouts, so use at most as many"
        )
    if bool(algorithm.replay_epochs) != bool(algorithm.replay_steps):
        raise ConfigError(
            f"algorithm.replay_epochs={algorithm.replay_epochs} and algorithm.replay_steps="
            f"{algorithm.replay_steps}: past rollouts need both, how often and how many; or 0 for both"
        )
    if algorithm.replay_steps and algorithm.replay_steps < algorithm.num_steps + 2:
        raise ConfigError(
            f"algorithm.replay_steps={algorithm.replay_steps} holds no past beside the newest rollout: "
            f"expected at least {algorithm.num_steps + 2}, two more than algorithm.num_steps"
        )
    if algorithm.epochs == 0 and not (algorithm.name == "imitation" and algorithm.replay_epochs):
        raise ConfigError(
            "algorithm.epochs=0 learns nothing from the newest rollout: expected at least 1, or "
            "algorithm=imitation with algorithm.replay_epochs, whose labels come from all rollouts"
        )
    _check_imitation(config)
    for name in ("cpc_coef", "inverse_dynamics_coef"):
        if getattr(algorithm, name) and not (config.sensors.rgb or config.sensors.depth):
            raise ConfigError(
                f"algorithm.{name}={getattr(algorithm, name)} is about images, and the agent sees none: use "
                "0, or a camera"
            )
        if getattr(algorithm, name) and algorithm.num_steps < 2:
            raise ConfigError(
                f"algorithm.{name} looks at two steps at least: use algorithm.num_steps=2 or more"
            )
    if config.speed.overlap and algorithm.num_envs < 2:
        raise ConfigError(
            "speed.overlap=true needs two halves of agents: expected algorithm.num_envs=2 or more, not 1"
        )
    words: tuple[str, ...]
    device = config.device
    if device not in ("auto", "cpu", "cuda") and not (device.startswith("cuda:") and device[5:].isdigit()):
        raise ConfigError(f"device={device!r} is not one of auto, cpu, cuda, cuda:N")
    for name, value, words in (
        ("scenes.dataset", config.scenes.dataset, ("generated",)),
        ("scenes.scenes_dir", config.scenes.scenes_dir, ()),
    ):
        if value is not None and value not in words and not Path(value).expanduser().is_dir():
            raise ConfigError(
                f"{name}={value} is not a folder"
                + (f"{nearest(value, words)} (or leave it 'generated')" if words else "")
            )
    _check_simulator(config.simulator)
    if config.sensors.max_depth <= config.sensors.min_depth:
        raise ConfigError(
            f"sensors.max_depth={config.sensors.max_depth} must be more than sensors.min_depth="
            f"{config.sensors.min_depth}"
        )
    # A checkpoint holds all weights: who goes on from one needs none of the files that they started from.
    if config.resume is None and config.start_from is None:
        _check_weights("encoder.weights", config.encoder.weights, ("default", "random"))
    _check_adaptation(config)
    if algorithm.curriculum_end < algorithm.curriculum_start:
        raise ConfigError(
            f"algorithm.curriculum_end={algorithm.curriculum_end} is less than algorithm.curriculum_start="
            f"{algorithm.curriculum_start}"
        )


def _check_simulator(simulator: SimulatorConfig) -> None:
    """What habitat-sim's settings name must be there, and say something."""
    gpu_numbers(simulator.gpu_ids)
    for name, value in (
        ("simulator.scene_dataset_config", simulator.scene_dataset_config),
        ("simulator.python", simulator.python),
    ):
        if value is not None and not Path(value).expanduser().is_file():
            raise ConfigError(f"{name}={value} is not a file")
    if simulator.resident_scenes == 1:
        raise ConfigError(
            "simulator.resident_scenes=1 is too few: agents still move in the scene that leaves while others "
            "start in the next; use 2 or more, or 0"
        )


def gpu_numbers(text: str) -> list[int] | None:
    """The GPUs that ``simulator.gpu_ids`` names, -1 for software; None where it leaves the choice.

    Raises:
        ConfigError: it names none.
    """
    if text == "auto":
        return None
    words = [word.strip() for word in text.strip().removeprefix("[").removesuffix("]").split(",")]
    if not all(re.fullmatch(r"-1|\d+", word) for word in words):
        raise ConfigError(f"simulator.gpu_ids={text} does not fit: expected numbers like 0,1, or -1, or auto")
    return [int(word) for word in words]


def _check_imitation(config: TrainConfig) -> None:
    """What the settings of a teacher must have in common with the others."""
    if config.imitation.name != "behaviour_cloning":
        return
    if config.algorithm.name != "imitation":
        raise ConfigError(
            "imitation=behaviour_cloning does not come before PPO in one run: clone with `navagent imitate "
            "imitation=behaviour_cloning`, then `navagent train start_from=RUN`"
        )
    if config.algorithm.curriculum != "none":
        raise ConfigError(
            f"algorithm.curriculum={config.algorithm.curriculum} chooses episodes to play, and "
            "imitation=behaviour_cloning plays none: use algorithm.curriculum=none"
        )
    demos = config.imitation.demos
    if demos is not None and config.resume is None and not Path(demos).expanduser().exists():
        raise ConfigError(
            f"imitation.demos={demos} is not there: record demonstrations with `navagent demos record`, or "
            "leave it out to have the expert record them"
        )
    stored = config.imitation.store_features
    if stored and (config.env.rgb_noise or config.env.depth_noise):
        raise ConfigError(
            "imitation.store_features=true with noisy cameras: no picture comes twice; use false, or "
            "env.rgb_noise=0 and env.depth_noise=0"
        )
    if stored and demos is not None and Path(demos).expanduser().is_dir():
        raise ConfigError(
            f"imitation.store_features=true is for recorded demonstrations, and imitation.demos={demos} is a "
            "folder of stored sequences; use false"
        )


def _check_adaptation(config: TrainConfig) -> None:
    """Lets the method look at its settings together, and looks for the files that they name."""
    from policies.adaptation import ADAPTATIONS

    method, options = config.adaptation.name, config.adaptation.options
    weights: dict[str, Any] = (
        {} if config.encoder.weights == "default" else {"weights": config.encoder.weights}
    )
    try:
        ADAPTATIONS[method].config_class(encoder=config.encoder.name, **weights, **options)
    except ValueError as error:
        raise ConfigError(f"adaptation={method}: {error}") from None
    for name, value in options.items():
        fresh = config.resume is None and config.start_from is None
        if fresh and name.endswith("_weights") and value is not None:
            _check_weights(f"adaptation.{name}", value, ())


def _check_weights(name: str, value: str, words: tuple[str, ...]) -> None:
    """Refuses weights that are no file, no name in the catalogue, and none of the words."""
    from policies.catalogue import catalogue

    known = (*words, *catalogue())
    if value not in known and not Path(value).expanduser().is_file():
        also = "".join(f", nor '{word}'" for word in words)
        raise ConfigError(
            f"{name}={value} is not a file{also}, nor a name that `navagent weights list` shows"
            f"{nearest(value, known)}"
        )


def _checked_override(override: str) -> str:
    """A command-line override in Hydra's grammar, its name known; raises otherwise.

    Values are quoted for Hydra, so that a path may hold blanks, commas and equals signs, and so that it is
    :func:`_convert` that says what is wrong with a number.
    """
    name, equals, value = override.partition("=")
    name = name.strip()
    if not equals or not name:
        raise ConfigError(f"{override!r} is not of the form NAME=VALUE ({SEE_ALL})")
    if name[0] in "+~":
        raise ConfigError(
            f"{override!r}: settings are set, not added or removed; write it without {name[0]!r}"
        )
    leaves = {leaf.name: leaf for leaf in settings()}
    if name in GROUPS:
        if value not in options(name):
            raise ConfigError(
                f"{name}={value} is not one of {name}'s options {', '.join(options(name))}"
                f"{nearest(value, options(name))}"
            )
        return override
    if name not in leaves:
        raise ConfigError(f"there is no setting {name}{nearest(name, [*GROUPS, *leaves])} ({SEE_ALL})")
    if value == "null" and isinstance(leaves[name].type, types.UnionType):
        return f"++{name}=null"
    # Hydra's grammar: a backslash means itself, except in front of a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + (match[2] and "\\'"), value)
    return f"++{name}='{escaped}'"


def _compose(overrides: Sequence[str]) -> dict[str, Any]:
    """Hydra's composition of ``configs/train.yaml`` with overrides that are known by name."""
    # Hydra costs as much to import as the rest of the command line together.
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_module("configs", version_base="1.3"):
            composed = OmegaConf.to_container(compose("train", list(overrides)), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{' '.join(overrides)}: {error} ({SEE_ALL})") from None
    assert isinstance(composed, dict)
    return typing.cast(dict[str, Any], composed)


def load_config(overrides: Sequence[str] = (), command: Command = "train") -> TrainConfig:
    """The settings that a command line asks for.

    With ``resume=RUN``, the run's own settings take the place of the defaults, and only settings that do not
    change what the run learns may differ from them. With ``start_from=RUN``, the agent is that run's.

    Args:
        overrides: ``GROUP=OPTION`` and ``NAME=VALUE``, as typed.
        command: The verb, which decides what the settings start from.

    Raises:
        ConfigError: on an unknown name (with the nearest right one), a wrong type or range, a missing file.
    """
    named = _named(overrides)
    if command == "imitate" and "ppo" in (named.get("algorithm"), named.get("algorithm.name")):
        raise ConfigError(
            "algorithm=ppo learns by reward, and `navagent imitate` from an expert alone: leave it out, or "
            "use `navagent train`, whose first imitation.frames are the expert's"
        )
    checked = [f"{group}={option}" for group, option in STARTS_WITH[command].items() if group not in named]
    checked += [_checked_override(override) for override in overrides]
    if command == "train" and named.get("start_from", "null") != "null" and "experiment" not in named:
        checked.append("experiment=reinforce")
    config = _build(TrainConfig, _compose(checked))
    if config.resume is not None:
        config = _resumed(config, overrides)
    elif config.start_from is not None:
        config = _started(config, overrides)
    _check_together(config)
    _check_meant(config, named)
    return config


def _named(overrides: Sequence[str]) -> dict[str, str]:
    """What a command line sets, by name."""
    return {name.strip(): value for name, _, value in (override.partition("=") for override in overrides)}


MAY_CHANGE_ON_RESUME = (
    "device",
    "num_threads",
    "algorithm.total_frames",
    "algorithm.max_minutes",
    "simulator.workers",
    "simulator.gpu_ids",
    "simulator.python",
    "simulator.max_restarts",
)
"""Settings that a resumed run may have otherwise, with everything under evaluation and checkpoint."""


def _resumed(asked: TrainConfig, overrides: Sequence[str]) -> TrainConfig:
    """The saved settings of the run ``asked.resume``, with what the command line sets by name on top."""
    folder = Path(typing.cast(str, asked.resume)).expanduser()
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"resume={asked.resume!r} is not the folder of a run: it has no config.yaml")
    saved = read_config(folder / "config.yaml")
    names = _named(overrides)
    if asked.run_dir is not None and Path(asked.run_dir).expanduser().resolve() != folder.resolve():
        raise ConfigError(
            f"run_dir={asked.run_dir} is another folder than resume={asked.resume}, where the run goes on; "
            "leave it out"
        )
    old, new = flatten(saved), flatten(asked)
    for name, value in new.items():
        # An experiment speaks for every setting: the command is then the whole of what was asked for.
        named = name in names or name.partition(".")[0] in names or "experiment" in names
        if not named or value == old[name] or name in ("run_dir", "resume"):
            continue
        if name not in MAY_CHANGE_ON_RESUME and name.partition(".")[0] not in ("evaluation", "checkpoint"):
            raise ConfigError(
                f"{name}={value} differs from the resumed run's {old[name]}: the rest of the run would be "
                f"another experiment; leave it out, or start a new run without resume"
            )
        old[name] = value
    old["run_dir"], old["resume"] = str(folder), str(folder)
    return _build(TrainConfig, _nested(old))


AGENT = ("sensors", "encoder", "adaptation", "memory")
"""Groups that say what an agent is: its senses and its networks."""


def _started(asked: TrainConfig, overrides: Sequence[str]) -> TrainConfig:
    """The settings ``asked`` with the agent of ``asked.start_from``, and its task and homes if not named."""
    saved = read_config(started_run(asked) / "config.yaml")
    names = _named(overrides)
    old, new = flatten(saved), flatten(asked)
    for name in names:
        group = name.partition(".")[0]
        fixed = [each for each in {**old, **new} if each == name or each.startswith(f"{name}.")]
        for each in fixed:
            if (group in AGENT or each == "env.stop") and new.get(each) != old.get(each):
                raise ConfigError(
                    f"{each}={as_typed(new.get(each))} differs from {as_typed(old.get(each))}, which the "
                    f"agent of start_from={asked.start_from} has; leave it out, or train a new agent without "
                    "start_from"
                )
    for name, value in old.items():
        group = name.partition(".")[0]
        if group in AGENT or (group in ("scenes", "env") and not {name, group} & names.keys()):
            new[name] = value
    # Settings of another method than the agent's are no settings of its.
    kept = {name: value for name, value in new.items() if name in old or not name.startswith("adaptation.")}
    return _build(TrainConfig, _nested(kept))


def started_run(config: TrainConfig) -> Path:
    """The folder of the run that ``start_from`` names, by itself or by one of its checkpoints.

    Raises:
        ConfigError: there is no such run.
    """
    given = Path(typing.cast(str, config.start_from)).expanduser()
    folder = given.parent.parent if given.is_file() and given.parent.name == "checkpoints" else given
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"start_from={config.start_from} is neither the folder of a run nor one of its "
            "checkpoints/*.safetensors"
        )
    return folder


PPO_ALONE = (
    "algorithm.num_minibatches",
    "algorithm.clip_range",
    "algorithm.clip_range_schedule",
    "algorithm.clip_range_vf",
    "algorithm.clip_value_loss",
    "algorithm.normalize_advantage",
    "algorithm.ent_coef",
    "algorithm.target_kl",
    "algorithm.critic_warmup_frames",
    "algorithm.anchor_coef",
    "algorithm.anchor_frames",
    "imitation.frames",
)
"""Settings that only learning by reward has."""

MIXTURE = tuple(
    f"imitation.{name}"
    for name in ("schedule", "share", "mixing", "decay", "final_share", "alone", "segment_steps")
)
DAGGER_ALONE = (
    *MIXTURE,
    "imitation.heading_coef",
    # What a demonstration was worth is not part of it, so that there is nothing for a critic to learn.
    *(f"algorithm.{name}" for name in ("vf_coef", "gamma", "gae_lambda", "normalize_returns")),
)
CLONING_ALONE = ("imitation.demos", "imitation.num_demos", "imitation.store_features")
OF_OTHER_SCHEDULES = {
    "linear": ("imitation.decay",),
    "exponential": ("imitation.mixing",),
    "constant": ("imitation.mixing", "imitation.decay", "imitation.final_share"),
}
"""By ``imitation.schedule``: settings that it does not look at."""


def meaningless(config: TrainConfig) -> dict[str, str]:
    """Settings that change nothing, by name, each with the choice that makes it so."""
    imitation = config.imitation
    dead = dict.fromkeys(
        CLONING_ALONE if imitation.name == "dagger" else DAGGER_ALONE, f"imitation={imitation.name}"
    )
    if imitation.name == "dagger":
        others = OF_OTHER_SCHEDULES[imitation.schedule]
        dead |= dict.fromkeys(others, f"imitation.schedule={imitation.schedule}")
    if config.algorithm.name == "imitation":
        dead |= dict.fromkeys(PPO_ALONE, "algorithm=imitation")
    elif imitation.frames == 0:
        lesson = (
            *MIXTURE,
            *(f"imitation.{name}" for name in ("minibatches", "inflection_weight", "heading_coef")),
        )
        dead |= dict.fromkeys(lesson, "imitation.frames=0")
        if config.start_from is None:
            # There is no imitated policy to be pulled to.
            pull = ("algorithm.anchor_coef", "algorithm.anchor_frames")
            dead |= dict.fromkeys(pull, "imitation.frames=0 and without start_from=RUN")
    if config.simulator.name == "raycast":
        workers = [name for name in flatten(config) if name.startswith("simulator.")]
        dead |= dict.fromkeys((name for name in workers if name != "simulator.name"), "simulator=raycast")
    return dead


def _check_meant(config: TrainConfig, named: Mapping[str, str]) -> None:
    """Refuses settings that a command line names and that would change nothing."""
    defaults, now = flatten(TrainConfig()), flatten(config)
    for name, choice in meaningless(config).items():
        if name in named and now[name] != defaults[name]:
            raise ConfigError(f"{name}={as_typed(now[name])} means nothing with {choice}; leave it out")


def check_named(overrides: Sequence[str], meant: Sequence[str], because: str) -> None:
    """Refuses settings that a command line names and that its command does not look at.

    Args:
        overrides: as typed; those that are no settings at all are for :func:`load_config` to refuse.
        meant: settings, or whole groups, that mean something.
        because: why the others do not, for the message.

    Raises:
        ConfigError: for the first that means nothing.
    """
    known = {*GROUPS, *(leaf.name for leaf in settings())}
    for override in overrides:
        name = override.partition("=")[0].strip()
        if name in known and not {name, name.partition(".")[0]} & set(meant):
            raise ConfigError(f"{override}: {because}; settings that mean something are {', '.join(meant)}")


def adaptation_settings(config: AdaptationConfig) -> dict[str, Any]:
    """The method's name and all of its settings, defaults included."""
    from policies.adaptation.options import method_options

    defaults = {option.name: option.default for option in method_options(config.name)}
    return {"name": config.name, **defaults, **config.options}


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name to value for every setting of ``config``."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if isinstance(value, AdaptationConfig):
            flat |= {f"adaptation.{name}": each for name, each in adaptation_settings(value).items()}
        elif dataclasses.is_dataclass(value):
            flat.update(flatten(value, f"{prefix}{item.name}."))
        else:
            flat[prefix + item.name] = value
    return flat


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        group, dot, leaf = name.partition(".")
        if dot:
            nested.setdefault(group, {})[leaf] = value
        else:
            nested[name] = value
    return nested


def as_typed(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def to_yaml(config: TrainConfig) -> str:
    """The settings as YAML text that :func:`read_config` reads back."""
    return yaml.safe_dump(_nested(flatten(config)), sort_keys=False, allow_unicode=True)


def write_config(config: TrainConfig, path: str | Path) -> None:
    """Saves the settings as YAML."""
    with atomic_write(path) as temporary:
        temporary.write_text(to_yaml(config), encoding="utf-8")


def read_config(path: str | Path) -> TrainConfig:
    """Reads settings that :func:`write_config` saved; plain YAML, no tags, no interpolation.

    Raises:
        ConfigError: if the file is missing, not YAML, or holds a setting that does not fit.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return _build(TrainConfig, values)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
