"""From settings to the things they describe: homes, episodes, environments and the policy's settings.

Training and evaluation build through here, so that an agent is evaluated in the world it was trained for.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from envs.cores import usable_cores
from envs.files import cache_dir
from navagent.config import ConfigError, TrainConfig, gpu_numbers
from navagent.distributed import Launch, Ranks

if TYPE_CHECKING:
    from gymnasium.vector import AutoresetMode

    from envs.episodes import Episode
    from envs.noise import NoiseConfig
    from envs.sampler import EpisodeSampler
    from envs.simulators.base import AgentSpec, SensorSpec, Simulator
    from envs.task import PointNavConfig
    from envs.vector_env import PointNavVectorEnv


def training_device(name: str) -> torch.device:
    """The device of setting ``device``; refuses what it does not know, and CUDA where there is none.

    Of several processes on a machine, each gets a CUDA device of its own as far as there are so many.
    """
    launch = Launch.read()
    if name in ("auto", "cuda") and torch.cuda.is_available() and launch is not None:
        return torch.device("cuda", launch.local_rank % torch.cuda.device_count())
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, colon, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and not (kind == "cuda" and number.isdecimal())):
        raise ConfigError(f"device {name!r} is not one of auto, cpu, cuda, cuda:N")
    devices = torch.cuda.device_count() if kind == "cuda" else 1
    if int(number or 0) >= devices:
        raise ConfigError(
            f"device {name!r}: PyTorch finds {devices} CUDA devices here; use one of these, cpu or auto"
        )
    return torch.device(name)


def set_threads(num_threads: int) -> int:
    """Lets torch use ``num_threads`` threads and says how many that is.

    0 means what ``OMP_NUM_THREADS`` says, as clusters and torchrun set it, and all cores where it is not set;
    several processes on a machine share them.
    """
    cores = own_cores()
    wished = os.environ.get("OMP_NUM_THREADS", "")
    threads = num_threads or (int(wished) if wished.isdigit() and int(wished) > 0 else cores)
    torch.set_num_threads(threads)
    return threads


def own_cores() -> int:
    """Processor cores of this process's share: several processes on a machine share them equally."""
    cores = usable_cores()
    launch = Launch.read()
    return cores if launch is None else max(1, cores // launch.local_size)


def dataset_dir(config: TrainConfig) -> Path:
    """The folder of the settings' data set; generates its homes where they are not cached yet."""
    if config.scenes.dataset != "generated":
        return Path(config.scenes.dataset).expanduser()
    from navagent.scenes import generated_dataset

    return generated_dataset(config.scenes.num, config.scenes.seed, cache_dir())


@dataclass(frozen=True)
class Split:
    """Episodes, and the scenes they take place in."""

    name: str
    """The split's name."""
    episodes: tuple[Episode, ...]
    """In the order of their files."""
    scenes: dict[str, Path]
    """File of each scene, by the id that episodes give."""


def read_split(file: Path, scenes_dir: Path, name: str) -> Split:
    """Reads a split's episodes and finds their scenes under ``scenes_dir``."""
    from envs.episodes import find_scenes, read_dataset

    episodes = tuple(read_dataset(file))
    return Split(name, episodes, find_scenes(episodes, scenes_dir))


def scenes_dir(config: TrainConfig) -> Path:
    """The folder that scenes' ids start from; generates the data set's homes where they are not cached."""
    return Path(config.scenes.scenes_dir).expanduser() if config.scenes.scenes_dir else dataset_dir(config)


def load_split(config: TrainConfig, name: str) -> Split:
    """The split ``name`` of the settings' data set."""
    from envs.make import split_file

    return read_split(split_file(dataset_dir(config), name), scenes_dir(config), name)


SHARED_SCENES_BYTES = 1 << 30
"""Scenes whose files are larger than this together are too much for every process to hold."""


def share_of_scenes(config: TrainConfig, split: Split, ranks: Ranks) -> Split:
    """The part of a split that this process's agents play in, as ``distributed.scenes`` says.

    With shared scenes, several processes play the same episodes as one with all of their agents.
    """
    names = list(split.scenes)
    size = sum(path.stat().st_size for path in split.scenes.values())
    wanted = config.distributed.scenes
    sharded = wanted == "sharded" or (wanted == "auto" and size > SHARED_SCENES_BYTES)
    if ranks.size == 1 or not sharded:
        return split
    if len(names) < ranks.size:
        if wanted == "auto":
            return split
        raise ConfigError(
            f"distributed.scenes=sharded: split {split.name!r} has {len(names)} scenes for {ranks.size} "
            "processes; use distributed.scenes=shared, or fewer processes"
        )
    own = {name: split.scenes[name] for name in ranks.share(names)}
    return Split(split.name, tuple(e for e in split.episodes if e.scene_id in own), own)


def agent_spec(config: TrainConfig) -> AgentSpec:
    """The agent's body."""
    from envs.simulators.base import AgentSpec

    env = config.env
    return AgentSpec(
        radius=env.agent_radius,
        height=env.agent_height,
        max_climb=env.max_climb,
        max_slope_deg=env.max_slope_deg,
        forward_step=env.forward_step,
        turn_angle_deg=env.turn_angle_deg,
        allow_sliding=env.allow_sliding,
    )


def cameras(config: TrainConfig) -> list[SensorSpec]:
    """The agent's cameras."""
    from envs.simulators.base import SensorSpec

    sensors = config.sensors
    kinds: list[Literal["rgb", "depth"]] = []
    if sensors.rgb:
        kinds.append("rgb")
    if sensors.depth:
        kinds.append("depth")
    return [
        SensorSpec(
            kind,
            kind,
            sensors.height,
            sensors.width,
            sensors.hfov_deg,
            sensors.sensor_height,
            sensors.pitch_deg,
        )
        for kind in kinds
    ]


def observation_names(config: TrainConfig) -> list[str]:
    """What the policy observes, by name."""
    sensors = config.sensors
    poses = [name for name, wanted in (("gps", sensors.gps), ("compass", sensors.compass)) if wanted]
    return [*(camera.name for camera in cameras(config)), sensors.goal, *poses, "previous_action"]


def task_rules(config: TrainConfig) -> PointNavConfig:
    """The task's rules."""
    from envs.task import PointNavConfig

    env = config.env
    return PointNavConfig(
        max_steps=env.max_steps,
        success_distance=env.success_distance,
        slack_reward=env.slack_reward,
        progress_reward=env.progress_reward,
        success_reward=env.success_reward,
        success_bonus=cast(Literal["constant", "spl"], env.success_bonus),
        stop=cast(Literal["called", "automatic"], env.stop),
    )


def noise(config: TrainConfig) -> NoiseConfig:
    """Noise of cameras and motion."""
    from envs.noise import NoiseConfig

    return NoiseConfig(
        rgb=config.env.rgb_noise, depth=config.env.depth_noise, actuation=config.env.actuation_noise
    )


def make_vector_env(
    config: TrainConfig,
    episodes: Sequence[Episode],
    scenes: dict[str, Path],
    num_envs: int,
    mode: Literal["endless", "once"] = "endless",
    autoreset_mode: AutoresetMode | None = None,
    seed: int = 0,
    extra_cameras: Sequence[SensorSpec] = (),
    first_agent: int = 0,
    total_agents: int | None = None,
    final_observations: Literal["ended", "truncated"] = "ended",
) -> PointNavVectorEnv:
    """The settings' environment over some episodes, with tensors out.

    Args:
        config: The settings.
        episodes: What is played.
        scenes: File of each of their scenes.
        num_envs: Agents side by side.
        mode: Endless streams to train on, or each episode once.
        autoreset_mode: As Gymnasium has it; within the same step if None.
        seed: Of the streams' order and of noise.
        extra_cameras: Cameras that the policy does not get, for videos.
        first_agent: Number of the first agent among ``total_agents``, which share the streams of episodes.
        total_agents: How many there are in all; ``num_envs`` if None.
        final_observations: Whose last observations are told, see :class:`envs.vector_env.PointNavVectorEnv`.
    """
    from envs.sampler import EpisodeSampler

    sampler = EpisodeSampler(
        episodes,
        num_envs,
        scenes,
        seed=seed,
        mode=mode,
        max_resident_scenes=max_resident_scenes(config, scenes.values()),
        first_agent=first_agent,
        total_agents=total_agents,
    )
    return sampled_env(config, sampler, autoreset_mode, extra_cameras, final_observations)


def sampled_env(
    config: TrainConfig,
    sampler: EpisodeSampler,
    autoreset_mode: AutoresetMode | None = None,
    extra_cameras: Sequence[SensorSpec] = (),
    final_observations: Literal["ended", "truncated"] = "ended",
) -> PointNavVectorEnv:
    """The settings' environment over the episodes that ``sampler`` hands out, with tensors out.

    Other arguments are those of :func:`make_vector_env`.
    """
    from gymnasium.vector import AutoresetMode

    from envs.vector_env import PointNavVectorEnv

    simulator = make_simulator(
        config, sampler.resident_scenes, sampler.num_agents, [*cameras(config), *extra_cameras]
    )
    return PointNavVectorEnv(
        simulator,
        task_rules(config),
        sampler,
        observation_names(config),
        autoreset_mode=AutoresetMode.SAME_STEP if autoreset_mode is None else autoreset_mode,
        noise=noise(config),
        depth_range=(config.sensors.min_depth, config.sensors.max_depth),
        final_observations=final_observations,
    )


def make_simulator(
    config: TrainConfig, scenes: Sequence[Path], num_agents: int, sensors: Sequence[SensorSpec]
) -> Simulator:
    """The simulator that the settings choose, over some scenes.

    Raises:
        SimulatorError: its processes do not start.
    """
    device, threads = training_device(config.device), set_threads(config.num_threads)
    if config.simulator.name == "raycast":
        from envs.simulators.raycast.simulator import RaycastSimulator

        return RaycastSimulator(
            scenes, num_agents, sensors, agent_spec(config), device=str(device), num_threads=threads
        )
    from envs.simulators.habitat import HabitatSimulator

    settings = config.simulator
    workers = settings.workers or own_cores()
    return HabitatSimulator(
        scenes,
        num_agents,
        sensors,
        agent_spec(config),
        num_workers=workers,
        gpu_ids=simulator_gpus(config, workers),
        scene_dataset_config=_scene_dataset(config),
        python=_python(config),
        device=device,
        max_restarts=settings.max_restarts,
    )


def _scene_dataset(config: TrainConfig) -> Path | None:
    named = config.simulator.scene_dataset_config
    return None if named is None else Path(named).expanduser()


def _python(config: TrainConfig) -> str | None:
    python = config.simulator.python
    return None if python is None else str(Path(python).expanduser())


def simulator_gpus(config: TrainConfig, workers: int) -> list[int]:
    """The GPUs that habitat-sim's workers are spread over, -1 for none.

    Of several processes on a machine, each begins where the workers of the one before end.
    """
    named = gpu_numbers(config.simulator.gpu_ids)
    if named is None:
        device = training_device(config.device)
        return [device.index or 0] if device.type == "cuda" else [-1]
    launch = Launch.read()
    first = 0 if launch is None else launch.local_rank * workers
    return [named[(first + index) % len(named)] for index in range(len(named))]


def check_simulator(config: TrainConfig) -> None:
    """Raises where the simulator that the settings choose does not start, before homes are made.

    Raises:
        ConfigError: with the simulator's words, and what to do.
    """
    if config.simulator.name == "raycast":
        return
    from envs.simulators.base import SimulatorError
    from envs.simulators.habitat import check_habitat

    gpus = simulator_gpus(config, config.simulator.workers or own_cores())
    try:
        check_habitat(cameras(config), gpus, _python(config), _scene_dataset(config))
    except SimulatorError as error:
        raise ConfigError(f"simulator=habitat: {error}") from None


RESIDENT_BYTES = 256 << 20
"""A worker of habitat-sim holds scenes whose files have about so many bytes together, and ten times that of
memory for them."""


def max_resident_scenes(config: TrainConfig, scenes: Iterable[Path]) -> int | None:
    """How many scenes are played in at a time; None is all."""
    if config.simulator.name == "raycast":
        return None
    if config.simulator.resident_scenes:
        return config.simulator.resident_scenes
    sizes = [path.stat().st_size for path in scenes]
    if sum(sizes) <= RESIDENT_BYTES:
        return None
    return max(2, RESIDENT_BYTES * len(sizes) // sum(sizes))


def make_training_envs(
    config: TrainConfig, episodes: Sequence[Episode], scenes: dict[str, Path], ranks: Ranks
) -> list[PointNavVectorEnv]:
    """What this process's agents train in: one environment, or one for each half with ``speed.overlap``.

    Each of ``ranks`` has ``algorithm.num_envs`` agents, and all together share the streams of episodes.
    """
    agents = config.algorithm.num_envs
    first, everyone = ranks.rank * agents, ranks.size * agents
    half = (agents + 1) // 2 if config.speed.overlap else agents
    threads = set_threads(config.num_threads)
    if config.speed.overlap:
        # The other threads are the policy's, and the workers are shared.
        workers = config.simulator.workers or own_cores()
        config = dataclasses.replace(
            config,
            num_threads=max(1, threads // 2),
            simulator=dataclasses.replace(config.simulator, workers=max(1, workers // 2)),
        )
    envs = [
        make_vector_env(
            config,
            episodes,
            scenes,
            min(half, agents - begin),
            seed=config.seed,
            first_agent=first + begin,
            total_agents=everyone,
            # What the end of other episodes looked like is nothing to learn from.
            final_observations="truncated",
        )
        for begin in range(0, agents, half)
    ]
    torch.set_num_threads(threads)
    return envs


def check_perception(config: TrainConfig) -> None:
    """Raises where images, encoder, its weights and the method do not fit together, before homes are made.

    The networks are built once to see. That takes about as long as reading their weights.
    """
    import numpy as np
    from gymnasium import spaces

    from policies.adaptation import ADAPTATIONS
    from policies.extractor import AdaptedExtractor

    method, eyes = config.adaptation.name, cameras(config)
    if eyes and ADAPTATIONS[method].needs_earlier_task:
        raise ConfigError(
            f"adaptation={method} holds back the weights that earlier tasks need, and a training has no "
            "earlier task: it would be plain fine-tuning. Use adaptation=finetune; docs/methods.md tells how "
            "to learn tasks in sequence, and `navagent adapt compare` takes the base's own task for the first"
        )
    wanted = ("encoder", "weights", "adaptation", "adaptation_options")
    settings = {name: value for name, value in policy_settings(config).items() if name in wanted}
    for camera in eyes:
        shape = (camera.height, camera.width, 3 if camera.kind == "rgb" else 1)
        seen = spaces.Dict({camera.name: spaces.Box(0, 255, shape, np.uint8)})
        try:
            with torch.random.fork_rng(devices=[]):
                AdaptedExtractor(seen, **settings)
        except ValueError as error:
            raise ConfigError(f"encoder={config.encoder.name} adaptation={method}: {error}") from None


ADAM_EPSILON = 1e-5
"""As in Stable-Baselines3, Habitat, BPS and the side-tuning paper."""


def optimizer_settings(name: str) -> dict[str, Any]:
    """The policy's arguments for the optimiser of setting ``algorithm.optimizer``."""
    from navagent.learning.lamb import Lamb

    optimizers: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
        "adam": (torch.optim.Adam, {}),
        "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
        "lamb": (Lamb, {}),
    }
    kind, options = optimizers[name]
    return {"optimizer_class": kind, "optimizer_kwargs": {"eps": ADAM_EPSILON, **options}}


def policy_settings(config: TrainConfig, restored: bool = False) -> dict[str, Any]:
    """Keyword arguments of :class:`policies.actor_critic.NavigationPolicy`.

    A policy that is ``restored`` from a checkpoint needs none of the files that its weights started from.
    """
    # "default" leaves it to the method: training from scratch starts from random weights.
    weights = None if config.encoder.weights == "default" else config.encoder.weights
    return {
        "encoder": config.encoder.name,
        "weights": weights,
        "image_features": config.encoder.image_features,
        "restored": restored,
        "adaptation": config.adaptation.name,
        "adaptation_options": dict(config.adaptation.options),
        "memory": config.memory.name,
        "hidden_size": config.memory.hidden_size,
        "layers": config.memory.num_layers,
        "frames": config.memory.num_frames,
        "weight_decay": config.algorithm.weight_decay,
        **optimizer_settings(config.algorithm.optimizer),
    }
