"""Features of a frozen encoder, computed once for a file of demonstrations and mapped into memory.

They are kept in the cache under a key that says what made them: the weights and preprocessing of every frozen
encoder, the cameras, the demonstrations, their scenes and the simulator. Whatever differs has another key,
and a folder that says another key is refused. Methods that use the same features of the same encoder share
them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from envs.files import cache_dir
from navagent import __version__
from navagent.build import cameras
from navagent.config import TrainConfig
from navagent.demonstrations.arrays import open_arrays, read_about, writing
from navagent.demonstrations.recorded import DemonstrationError, DemonstrationSet
from policies.adaptation.base import Adaptation, FrozenEncoder
from policies.weights import tensors_sha256

if TYPE_CHECKING:
    from navagent.demonstrations.arrays import ArrayWriter
    from navagent.demonstrations.replay import Replay

KIND = "features of demonstrations"


class StoredFeatures:
    """Frozen features of every step of a file of demonstrations."""

    def __init__(self, arrays: dict[str, NDArray[Any]], dtype: torch.dtype) -> None:
        """``arrays`` are by name, as ``policy.frozen_features`` gives them: (steps of the file, ...).

        ``dtype`` is what their bytes mean.
        """
        self._arrays, self._dtype = arrays, dtype

    @property
    def num_bytes(self) -> int:
        """Their size [bytes]."""
        return sum(array.nbytes for array in self._arrays.values())

    def read(self, steps: NDArray[np.int64], device: torch.device) -> dict[str, Tensor]:
        """Features of some steps (N,), counted through the file: (N, ...) float32 by name."""
        # Indexing copies the rows that are asked for from the map; the rest stays on the disk.
        return {
            name: torch.from_numpy(np.asarray(array[steps])).view(self._dtype).to(device).float()
            for name, array in self._arrays.items()
        }


def encoder_key(policy: Any, config: TrainConfig) -> dict[str, Any]:
    """What decides a policy's frozen features of a picture: encoders, their preprocessing and the cameras.

    Empty where the policy has no features that never change.
    """
    images = {}
    for image, method in policy.features_extractor.adaptations.items():
        assert isinstance(method, Adaptation)
        # Some networks are frozen now and learn later: all of their weights count.
        frozen = [module for module in method.modules() if isinstance(module, FrozenEncoder)]
        images[image] = {
            "features": sorted(method.base_features(_blank(policy, image))),
            "encoders": [
                {
                    "class": type(module.encoder).__qualname__,
                    "input": dataclasses.asdict(module.encoder.input_spec),
                    "sha256": module.sha256(),
                }
                for module in frozen
            ]
            or [{"class": type(method).__qualname__, "sha256": tensors_sha256(method.state_dict())}],
        }
    if not any(image["features"] for image in images.values()):
        return {}
    key = {
        "images": images,
        "cameras": [dataclasses.asdict(camera) for camera in cameras(config)],
        "depth_range": [config.sensors.min_depth, config.sensors.max_depth],
        "navagent": __version__,
    }
    # What is read from a file has no tuples.
    plain: dict[str, Any] = json.loads(json.dumps(key))
    return plain


def _blank(policy: Any, image: str) -> Tensor:
    space = policy.observation_space[image]
    return torch.as_tensor(np.zeros((1, *space.shape), space.dtype), device=policy.device)


def stored_features(
    policy: Any,
    config: TrainConfig,
    demonstrations: DemonstrationSet,
    replay: Callable[[], Replay],
    dtype: torch.dtype = torch.float32,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> StoredFeatures | None:
    """The frozen features of every step, from the cache, or computed now where they are not there yet.

    Args:
        policy: a :class:`policies.actor_critic.NavigationPolicy`.
        config: its sensors.
        demonstrations: all of a file.
        replay: starts a replay of them with these sensors, each once.
        dtype: how they are stored; half precision halves their size.
        folder: where they are kept; a folder of the cache named by the key if None.
        progress: called with the steps done and all steps.

    Returns:
        The features; None where the policy has none that never change.

    Raises:
        DemonstrationError: cameras are noisy, so that no picture comes twice; or the stored features are
            damaged, or are of another encoder.
    """
    key = encoder_key(policy, config)
    if not key:
        return None
    if config.env.rgb_noise or config.env.depth_noise:
        raise DemonstrationError(
            f"features cannot be stored with noisy cameras (env.rgb_noise={config.env.rgb_noise}, "
            f"env.depth_noise={config.env.depth_noise}), for no picture comes twice; set both to 0"
        )
    key |= {
        "demonstrations": demonstrations.sha256,
        # Paths are the same in other colours, and pictures are not.
        "scenes": {scene.scene_id: scene.sha256 for scene in demonstrations.header.scenes},
        "simulator": config.simulator.name,
        "dtype": str(dtype).removeprefix("torch."),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_dir() / "features" / name if folder is None else folder
    with writing(folder) as writer:
        if writer is not None:
            running = replay()
            try:
                _compute(policy, running, writer, dtype, progress)
            finally:
                running.close()
            writer.finish({"kind": KIND, "key": key})
    about = read_about(folder, KIND)
    if about.get("key") != key:
        raise DemonstrationError(
            f"{folder}: features of {_difference(about.get('key'), key)}; delete the folder, or give "
            "another, to compute them for this encoder and these demonstrations"
        )
    return StoredFeatures(open_arrays(folder, about), dtype)


@torch.no_grad()
def _compute(
    policy: Any,
    replay: Replay,
    writer: ArrayWriter,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None,
) -> None:
    from navagent.demonstrations.replay import replay_once

    demonstrations = replay.demonstrations
    total, done = int(demonstrations.steps.sum()), 0
    # NumPy has no bfloat16: its bytes are kept as whole numbers.
    stored_as = torch.int16 if dtype == torch.bfloat16 else dtype
    policy.set_training_mode(False)
    for step in replay_once(replay):
        active = np.flatnonzero(step.rows >= 0)
        seen = {name: value[torch.from_numpy(active)] for name, value in step.observations.items()}
        places = demonstrations.first_steps[step.rows[active]] + step.steps[active]
        for name, value in policy.frozen_features(seen).items():
            if name not in writer:
                shape = (demonstrations.file_steps, *value.shape[1:])
                writer.array(name, shape, torch.empty(0, dtype=stored_as).numpy().dtype)
            writer[name][places] = value.to("cpu", dtype).view(stored_as).numpy()
        done += len(active)
        if progress is not None:
            progress(done, total)


def _difference(found: Any, wanted: dict[str, Any]) -> str:
    """Which parts of a key differ, in words."""
    if not isinstance(found, dict):
        return "nobody knows what"
    names = {
        "images": "another encoder",
        "cameras": "other cameras",
        "depth_range": "another range of depths",
        "navagent": "another version of navagent",
        "demonstrations": "other demonstrations",
        "scenes": "other scenes",
        "simulator": "another simulator",
        "dtype": "another precision",
    }
    return " and ".join(text for part, text in names.items() if found.get(part) != wanted[part])
