"""What a training needs of memory, counted before it starts, and what the machine has of it.

Rollouts and the optimiser follow from their shapes. What acting and learning take for a moment is found by a
trial on a few frames, in which every tensor counts for as long as it lives, and grows with the number of
frames. Scenes are estimated from the headers of their files.

What is counted is needed: measured, trainings on the CPU take up to a tenth more where the C library returns
what is freed (``MALLOC_MMAP_THRESHOLD_=65536``), and, as it keeps pieces of it by default, up to as much more
as a minibatch takes. So what does not fit by this estimate does not fit, and what fits barely may not.
"""

from __future__ import annotations

import copy
import io
import json
import os
import struct
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from navagent.config import ConfigError, TrainConfig
from navagent.distributed import Launch
from navagent.limits import available_memory, size

if TYPE_CHECKING:
    from navagent.learning.updates import SequenceLearner
    from policies.adaptation import Adaptation

TRIAL_STEPS = 2
"""Steps of the sequences that the trial learns from."""
TRIAL_SEQUENCES = (2, 3)
"""How many sequences it learns from, at first and then."""
TRIANGLE_BYTES = 140
"""A triangle of a resident scene with its share of the tree: 36 for its corners, 64 for shading, some 40."""
TEXEL_BYTES = 4 * 4 / 3
"""A texel with its share of the coarser levels."""
REPLAYED_BYTES = 8 + 4 + 1 + 4
"""Action, reward, start flag and log-probability of a step that is kept to learn from again."""
SCALAR_BYTES = 8 + 4 + 1 + 4 + 4 + 4 + 4 + 8
"""Action, reward, start flag, value, log-probability, advantage, return and the expert's action of a step."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made in the block, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        """Now [bytes]."""
        self.history: list[int] = []
        """After each operation so far [bytes]."""
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                # Whatever is met first as an argument was made outside.
                self._known.setdefault(value.untyped_storage(), True)
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        self.history.append(self.live)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        self.live += storage.nbytes()
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.live -= size


@dataclass(frozen=True)
class Growth:
    """The most bytes at any moment of some work, against the number of frames that it is done for.

    At each moment some of what lives grows with the frames and some does not, so the most of all moments is
    where one line crosses another: between two small trials the gradients of the parameters may hide what
    activations will take in earnest.
    """

    starts: npt.NDArray[np.float64]
    """Bytes at each moment for no frames at all: (M,)."""
    slopes: npt.NDArray[np.float64]
    """Bytes at each moment for each frame more: (M,)."""

    @classmethod
    def between(cls, few: tuple[int, list[int]], many: tuple[int, list[int]]) -> Growth:
        """From the histories of the same work for two numbers of frames."""
        (frames, first), (more, second) = few, many
        if len(first) != len(second):
            # Work that takes other steps for other numbers: its worst moments.
            first, second = [max(first)], [max(second)]
        slopes = (np.array(second, np.float64) - first) / (more - frames)
        return cls(np.array(first, np.float64) - slopes * frames, slopes)

    def __call__(self, frames: float) -> float:
        """Bytes for so many frames."""
        return float((self.starts + self.slopes * frames).max())

    def or_more(self, other: Growth) -> Growth:
        """The most of both."""
        return Growth(np.append(self.starts, other.starts), np.append(self.slopes, other.slopes))


@dataclass(frozen=True)
class Footprint:
    """What one policy needs for a frame, a step of learning, and its state [bytes]."""

    observation: int
    """An observation in the rollout."""
    stored_values: int
    """Numbers in the frozen features of a frame that are stored; 0 where they are computed anew."""
    acting: Growth
    """Acting, by the number of agents."""
    learning: Growth
    """One update of the parameters, by the frames of its minibatch; gradients included."""
    state: int
    """Parameters and buffers."""
    optimiser: int
    """The optimiser's own tensors, once it has taken a step."""
    memory: int = 0
    """What one agent remembers."""


@dataclass(frozen=True)
class Shape:
    """The settings that decide how much memory a training needs."""

    num_envs: int
    num_steps: int
    num_minibatches: int
    """The fewest of any phase: their minibatches are the largest."""
    feature_bytes: int
    """Of one stored number."""
    replay_steps: int = 0
    """Steps of every agent that are kept to learn from again."""


@dataclass(frozen=True)
class Need:
    """What a training takes beside what the process holds before it starts [bytes]."""

    rollout: float
    """Stored observations, features and numbers."""
    features: float
    """The part of it that frozen features are."""
    minibatch: float
    """A minibatch's copy, its activations and gradients; or all agents' activations while acting, if more."""
    optimiser: float
    """The optimiser's own tensors."""
    saving: float
    """Copies of the state, for the checkpoint and for the update in progress; in the host's memory."""
    homes: float
    """Scenes to evaluate in, roughly."""
    replay: float = 0.0
    """Past rollouts, the window of them that is learned from, and its copy while it is laid out."""

    @property
    def device(self) -> float:
        """What the device that learns must have."""
        return self.rollout + self.replay + self.minibatch + self.optimiser + self.homes


def need(footprint: Footprint, shape: Shape, homes: float = 0.0) -> Need:
    """What a training of this ``shape`` takes."""
    frames = shape.num_envs * shape.num_steps
    features = footprint.stored_values * shape.feature_bytes
    batch_frames = -(-shape.num_envs // shape.num_minibatches) * shape.num_steps
    # A minibatch of everything is not copied, except to widen its features.
    copied = footprint.observation + SCALAR_BYTES if shape.num_minibatches > 1 else 0
    widened = 4 * footprint.stored_values if copied or shape.feature_bytes != 4 else 0
    learning = footprint.learning(batch_frames) + (copied + widened) * batch_frames
    rollout = frames * (footprint.observation + SCALAR_BYTES + features)
    replayed = footprint.observation + features + footprint.memory + REPLAYED_BYTES
    ring = shape.num_envs * shape.replay_steps * replayed
    return Need(
        rollout=rollout,
        features=frames * features,
        minibatch=max(learning, footprint.acting(shape.num_envs)),
        optimiser=footprint.optimiser,
        saving=2 * (footprint.state + footprint.optimiser + ring),
        homes=homes,
        replay=ring + 2 * rollout if ring else 0.0,
    )


def footprint(model: SequenceLearner) -> Footprint:
    """Measures a policy by a trial on a few frames, on a copy; random numbers are left as they were."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        policy: Any = copy.deepcopy(model.policy)
        policy.set_progress(0, 1)
        found = _trial(model, policy)
        kept = _stored(policy)
        policy.set_progress(1, 1)
        if _stored(policy) != kept:
            # A method that learns more later, and needs more then.
            later = _trial(model, policy)
            found = replace(
                found,
                acting=found.acting.or_more(later.acting),
                learning=found.learning.or_more(later.learning),
                optimiser=max(found.optimiser, later.optimiser),
            )
    return found


def _stored(policy: Any) -> list[str]:
    """Names of the frozen features that a rollout would store now."""
    return sorted(policy.frozen_features(_observations(policy, (1,))))


def _observations(policy: Any, shape: tuple[int, ...]) -> dict[str, Tensor]:
    spaces: Any = policy.observation_space
    return {
        key: torch.from_numpy(np.zeros((*shape, *(space.shape or ())), space.dtype)).to(policy.device)
        for key, space in spaces.items()
    }


def _trial(model: SequenceLearner, policy: Any) -> Footprint:
    small, large = TRIAL_SEQUENCES
    policy.set_training_mode(True)
    _learn(policy, small)  # the first step makes the optimiser's tensors
    learning = Growth.between(
        (small * TRIAL_STEPS, _learn(policy, small)), (large * TRIAL_STEPS, _learn(policy, large))
    )
    policy.set_training_mode(False)
    acting = Growth.between((small, _act(policy, small)), (large, _act(policy, large)))
    one = _observations(policy, (1,))
    with torch.inference_mode():
        frozen = policy.frozen_features(one)
    moments = tree_leaves(policy.optimizer.state_dict()["state"])
    return Footprint(
        observation=sum(value.nbytes for value in one.values()),
        stored_values=sum(value.numel() for value in frozen.values()),
        acting=acting,
        learning=learning,
        state=sum(value.nbytes for value in policy.state_dict().values()),
        optimiser=sum(value.nbytes for value in moments if isinstance(value, Tensor)),
        memory=policy.initial_memory(1).nbytes,
    )


def _learn(policy: Any, sequences: int) -> list[int]:
    """Bytes alive after each operation while the policy learns from a minibatch of so many sequences."""
    shape = (TRIAL_STEPS, sequences)
    observations = _observations(policy, shape)
    with torch.no_grad():
        flat = policy.frozen_features({key: value.flatten(0, 1) for key, value in observations.items()})
    frozen = {name: value.unflatten(0, shape) for name, value in flat.items()}
    actions = torch.zeros(shape, dtype=torch.int64, device=policy.device)
    starts = torch.zeros(shape, dtype=torch.bool, device=policy.device)
    memory = policy.initial_memory(sequences)
    with LiveBytes() as counted:
        values, log_probs, entropy, _ = policy.evaluate_sequences(
            observations, actions, memory, starts, frozen or None
        )
        loss = values.mean() + log_probs.mean() + entropy.mean() + policy.penalty()
        policy.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        policy.optimizer.step()
    return counted.history


def _act(policy: Any, agents: int) -> list[int]:
    """Bytes alive after each operation while so many agents act."""
    observations = _observations(policy, (agents,))
    starts = torch.zeros(agents, dtype=torch.bool, device=policy.device)
    memory = policy.initial_memory(agents)
    with torch.inference_mode(), LiveBytes() as counted:
        policy.act(observations, memory, starts)
    return counted.history


def feature_storage(policy: Any) -> dict[str, str]:
    """For each image that the policy sees: whether its frozen features are stored, and if not, why."""
    spaces: Any = policy.observation_space
    told = {}
    for key, method in policy.features_extractor.adaptations.items():
        names = [name for name in _stored(policy) if name.startswith(f"{key}/")]
        told[key] = "frozen features are stored once a frame" if names else _recomputed(method)
        if names and _later_trained(policy, key):
            told[key] += " until the encoder learns, then computed in every pass"
    return {key: told[key] for key in spaces.spaces if key in told}


def _recomputed(method: Adaptation) -> str:
    kind = type(method).__name__
    return f"features are computed in every pass, as {kind} needs: {method.recomputed}"


def _later_trained(policy: Any, key: str) -> bool:
    later = copy.deepcopy(policy.features_extractor.adaptations[key])
    later.set_progress(1, 1)
    space = policy.observation_space[key]
    image = torch.from_numpy(np.zeros((1, *space.shape), space.dtype)).to(policy.device)
    return not later.base_features(policy.features_extractor._image(key, image))


def scene_bytes(path: Path) -> float:
    """About how many bytes a scene takes once it is resident, from the headers of its file.

    0 where the file cannot be read: loading it says what is wrong with it.
    """
    try:
        with path.open("rb") as file:
            document, binary = _document(file)
            triangles = sum(
                _count(document, primitive) * uses
                for mesh, uses in _meshes(document)
                for primitive in mesh["primitives"]
            )
            texels = 0
            for image in document.get("images", []):
                if "bufferView" in image:
                    view = document["bufferViews"][image["bufferView"]]
                    file.seek(binary + view.get("byteOffset", 0))
                    texels += _texels(io.BytesIO(file.read(view["byteLength"])))
                elif not image["uri"].startswith("data:"):
                    texels += _texels(path.parent / image["uri"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error):
        return 0.0
    return TRIANGLE_BYTES * triangles + TEXEL_BYTES * texels


def _document(file: Any) -> tuple[dict[str, Any], int]:
    """A glTF file's JSON, and where its binary chunk begins."""
    head = file.read(20)
    if head[:4] != b"glTF":
        return json.loads(head + file.read()), 0
    length = struct.unpack_from("<I", head, 12)[0]
    return json.loads(file.read(length)), 20 + length + 8


def _meshes(document: dict[str, Any]) -> Iterable[tuple[dict[str, Any], int]]:
    """Every mesh, and how many nodes show it."""
    shown = [node["mesh"] for node in document.get("nodes", []) if "mesh" in node]
    for index, mesh in enumerate(document["meshes"]):
        yield mesh, shown.count(index)


def _count(document: dict[str, Any], primitive: dict[str, Any]) -> float:
    """Triangles of one primitive."""
    accessor = primitive.get("indices", primitive["attributes"]["POSITION"])
    return document["accessors"][accessor]["count"] / 3


def _texels(source: Any) -> int:
    from PIL import Image

    try:
        with Image.open(source) as image:
            return image.width * image.height
    except OSError:
        return 0  # compressed for the GPU: it is not loaded either


def held_bytes() -> int:
    """What this process holds now [bytes]; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def own_part(available: int | None) -> int | None:
    """What is this process's of the host's memory [bytes], where several of a training share a machine."""
    launch = Launch.read()
    return available if available is None or launch is None else available // launch.local_size


def free_on(device: torch.device) -> int | None:
    """What a CUDA device has free [bytes]; None for the CPU."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


@dataclass(frozen=True)
class MemoryPlan:
    """What a training needs and what there is."""

    footprint: Footprint
    shape: Shape
    homes: float
    """Scenes to evaluate in [bytes]."""
    held: int
    """What the process holds already [bytes]."""
    available: int | None
    """What it may still take of the host's memory [bytes]; None where unknown."""
    device_free: int | None = None
    """What the CUDA device that learns has free [bytes]; None where the CPU learns."""
    minibatches: str = "algorithm.num_minibatches"
    """The setting that decides how large a minibatch is."""

    @property
    def need(self) -> Need:
        """What the settings ask for."""
        return need(self.footprint, self.shape, self.homes)

    def fits(self, asked: Need) -> bool:
        """Whether there is as much, as far as that is known."""
        on_host = asked.saving if self.device_free is not None else asked.saving + asked.device
        if self.device_free is not None and asked.device > self.device_free:
            return False
        return self.available is None or on_host <= self.available

    def describe(self) -> str:
        """One line for the person who starts a training."""
        asked = self.need
        parts = [f"a rollout {size(asked.rollout)}"]
        if asked.features:
            stored = f"{8 * self.shape.feature_bytes}-bit frozen features"
            parts[0] += f" ({size(asked.features)} of it {stored})"
        if asked.replay:
            parts.append(f"replay {size(asked.replay)}")
        parts.append(f"a minibatch {size(asked.minibatch)}")
        parts.append(f"optimiser {size(asked.optimiser)}")
        parts.append(f"saving {size(asked.saving)}")
        parts.append(f"unseen homes about {size(asked.homes)}")
        total = asked.device + asked.saving
        known = "" if self.available is None else f"; {size(self.available)} are free"
        if self.device_free is not None:
            known += f", {size(self.device_free)} on the GPU"
        told = f"{size(total)} beside the {size(self.held)} held now: {', '.join(parts)}{known}"
        if self.device_free is None and not self.fits(replace(asked, minibatch=2 * asked.minibatch)):
            told += (
                f". It may take up to {size(asked.minibatch)} more, as the C library keeps pieces of what is "
                "freed; the environment variable MALLOC_MMAP_THRESHOLD_=65536 prevents that"
            )
        return told

    def check(self) -> None:
        """Refuses settings that cannot fit.

        Raises:
            ConfigError: with what is missing and which settings would fit.
        """
        if self.fits(self.need):
            return
        fitting = "; ".join(self.advice()) or (
            "nothing smaller fits either: choose a smaller encoder or images, a method that trains less, or "
            "a machine with more memory"
        )
        raise ConfigError(f"this training does not fit into memory: it needs {self.describe()}. {fitting}")

    def advice(self) -> list[str]:
        """For each setting that could be lowered alone, the first value at which everything fits."""
        told = []
        for names, shapes in _smaller(self.shape, self.minibatches):
            for values, shape in shapes:
                smaller = need(self.footprint, shape, self.homes)
                if self.fits(smaller):
                    words = " ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
                    told.append(f"{words} needs {size(smaller.device + smaller.saving)}")
                    break
        return told[:3]


def _smaller(
    shape: Shape, minibatches: str
) -> Iterable[tuple[Sequence[str], Iterable[tuple[Sequence[Any], Shape]]]]:
    """Ways to need less memory: names of settings, and values for them with the shape that they make."""
    if shape.feature_bytes == 4:
        half = replace(shape, feature_bytes=2)
        yield ("algorithm.feature_dtype",), [(("float16",), half)]
    shorter = [
        replace(shape, replay_steps=kept)
        for kept in (shape.replay_steps >> k for k in range(1, shape.replay_steps.bit_length()))
        if kept >= shape.num_steps + 2
    ]
    yield ("algorithm.replay_steps",), [((each.replay_steps,), each) for each in shorter]
    divided = [replace(shape, num_minibatches=m) for m in _doubled(shape.num_minibatches, shape.num_envs)]
    yield (minibatches,), [((each.num_minibatches,), each) for each in divided]
    steps = [replace(shape, num_steps=shape.num_steps >> k) for k in range(1, shape.num_steps.bit_length())]
    yield ("algorithm.num_steps",), [((each.num_steps,), each) for each in steps]
    fewer = [
        replace(shape, num_envs=count, num_minibatches=min(shape.num_minibatches, count))
        for count in (shape.num_envs >> k for k in range(1, shape.num_envs.bit_length()))
    ]
    yield (
        ("algorithm.num_envs", minibatches),
        [((each.num_envs, each.num_minibatches), each) for each in fewer],
    )


def _doubled(start: int, most: int) -> list[int]:
    values = []
    while start < most:
        start = min(2 * start, most)
        values.append(start)
    return values


def plan_memory(config: TrainConfig, model: SequenceLearner, val_scenes: Iterable[Path]) -> MemoryPlan:
    """What the settings' training needs, with everything built and nothing trained yet."""
    algorithm = config.algorithm
    minibatches, setting = algorithm.num_minibatches, "algorithm.num_minibatches"
    if algorithm.name == "imitation":
        minibatches, setting = config.imitation.minibatches, "imitation.minibatches"
    elif config.imitation.frames:
        minibatches = min(minibatches, config.imitation.minibatches)
    homes = sum(map(scene_bytes, val_scenes)) if config.evaluation.every_frames else 0.0
    return MemoryPlan(
        footprint=footprint(model),
        shape=Shape(
            model.n_envs,
            model.n_steps,
            min(minibatches, model.n_envs),
            model.feature_dtype.itemsize,
            model.replay_steps,
        ),
        homes=homes,
        held=held_bytes(),
        available=own_part(available_memory()),
        device_free=free_on(model.device),
        minibatches=setting,
    )


def check_scenes(scenes: Iterable[Path]) -> None:
    """Refuses scenes that cannot all be resident, before the first is loaded.

    Raises:
        ConfigError: with what they need and what there is.
    """
    files = list(scenes)
    total, available = sum(map(scene_bytes, files)), own_part(available_memory())
    if available is not None and total > available:
        raise ConfigError(
            f"the {len(files)} scenes to train in need about {size(total)} of memory, and {size(available)} "
            "are free: use a split with fewer scenes, or a machine with more memory"
        )
