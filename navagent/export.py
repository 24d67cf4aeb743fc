"""``navagent export``: a trained policy as an ONNX file and a card, for robots without this package.

One call of the file is one step of one agent: observations as its sensors give them, the memory, and whether
an episode begins, to the logits of the actions, the value and the new memory. All preprocessing of images is
inside. The card is JSON and says what every input means, in words and numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor, nn

from envs.files import atomic_write
from envs.simulators.base import Action
from envs.vector_env import PREVIOUS_ACTION
from navagent.agent_spaces import action_space, observation_space
from navagent.build import cameras, task_rules
from navagent.config import TrainConfig, read_config
from navagent.evaluation.command import restore_policy
from navagent.runs import Run
from policies.encoders import Encoder

if TYPE_CHECKING:
    import onnxruntime

    from policies.actor_critic import NavigationPolicy

FORMAT = "navagent-policy"
VERSION = 1
MODEL, CARD = "policy.onnx", "policy.json"
MEMORY, START = "memory", "episode_start"
LOGITS, VALUE, NEXT_MEMORY = "logits", "value", "next_memory"

CHECKED_STEPS = 200
TOLERANCE = 1e-4
"""Largest difference from PyTorch, absolute below 1 and relative above, that rounding explains."""

_MEANING = {
    "pointgoal_with_gps_compass": "distance to the goal [m] and angle to it, positive to the left [rad in "
    "-pi..pi], in the ground plane, from where the agent is now",
    "pointgoal": "distance to the goal [m] and angle to it, positive to the left [rad in -pi..pi], in the "
    "ground plane, from where the episode started",
    "gps": "position ahead and to the right of the start, in the frame of the start [m]",
    "compass": "heading relative to the start, positive to the left [rad in -pi..pi]",
    PREVIOUS_ACTION: "0 in the first step of an episode, afterwards 1 + the index of the last action",
}
_ACTIONS = {
    Action.STOP: "stop: the goal is reached",
    Action.MOVE_FORWARD: "move forward",
    Action.TURN_LEFT: "turn left",
    Action.TURN_RIGHT: "turn right",
}


class ExportError(ValueError):
    """A policy that cannot be exported, or an exported one that does not do as it should."""


class PolicyStep(nn.Module):
    """One step of a policy, with its memory from outside: what the ONNX file computes."""

    def __init__(self, policy: NavigationPolicy) -> None:
        super().__init__()
        self.policy = policy.eval()
        self.remembers = 0 not in policy.memory_shape

    def forward(
        self, observations: dict[str, Tensor], memory: Tensor, episode_start: Tensor
    ) -> tuple[Tensor, ...]:
        """Logits (1, actions), value (1,) and, where the policy has one, the new memory (1, ...)."""
        policy = self.policy
        features = policy.features_extractor(observations)
        hidden, next_memory = policy.memory.step(features, memory, episode_start)
        answer = (policy.action_net(hidden).float(), policy.value_net(hidden)[:, 0].float())
        return (*answer, next_memory) if self.remembers else answer


@dataclass(frozen=True)
class Agreement:
    """How an exported file compares to the policy in PyTorch, each with its own memory."""

    steps: int
    """Steps with random observations, in episodes of random length."""
    largest_difference: float
    """Of any logit, value or number of the memory; relative to the largest one where that is above 1."""
    same_actions: int
    """Steps in which both find the same action most probable."""


def export_run(
    run_path: str | Path, out: str | Path | None = None, checkpoint: str = "best"
) -> tuple[Path, Agreement]:
    """Writes ``policy.onnx`` and ``policy.json``, once they are found to agree with PyTorch.

    Args:
        run_path: a run's folder.
        out: folder for the two files; ``RUN/export`` if None.
        checkpoint: ``best``, ``latest`` or a number of frames.

    Returns:
        The folder, and how well both agree.

    Raises:
        ExportError: the policy cannot be exported, by name of what stands in the way, or does not agree.
    """
    run = Run(run_path)
    config = read_config(run.config_path)
    folder = Path(out) if out is not None else run.path / "export"
    policy = _policy(run, config, checkpoint)
    with atomic_write(folder / MODEL) as temporary:
        write_onnx(policy, temporary, _title(config))
        agreement = compare(policy, temporary)
        _require(agreement, config)
        digest = _sha256(temporary)
    described = card(config, policy) | {
        "run": {"name": run.path.resolve().name, "checkpoint": run.checkpoint(checkpoint).name},
        "sha256": digest,
        "checked": {"steps": agreement.steps, "largest_difference": agreement.largest_difference},
    }
    with atomic_write(folder / CARD) as temporary:
        temporary.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return folder, agreement


def check_export(
    run_path: str | Path, out: str | Path | None = None, checkpoint: str = "best"
) -> tuple[Path, Agreement]:
    """Compares files that :func:`export_run` wrote with the run; arguments and answer are the same.

    Raises:
        ExportError: there are no such files, they were changed, or they do not agree with the run.
    """
    run = Run(run_path)
    config = read_config(run.config_path)
    folder = Path(out) if out is not None else run.path / "export"
    try:
        described = json.loads((folder / CARD).read_text(encoding="utf-8"))
        digest = _sha256(folder / MODEL)
    except (OSError, ValueError) as error:
        raise ExportError(f"{folder}: no exported policy to check ({error}); export it first") from None
    if described.get("format") != FORMAT or described.get("sha256") != digest:
        raise ExportError(f"{folder}: {CARD} does not describe {MODEL}, which was changed; export it again")
    agreement = compare(_policy(run, config, checkpoint), folder / MODEL)
    _require(agreement, config)
    return folder, agreement


def write_onnx(policy: NavigationPolicy, path: Path, title: str) -> None:
    """Writes one step of a policy as ONNX.

    Args:
        policy: on the CPU.
        path: the file.
        title: the policy's parts by name, for errors.

    Raises:
        ExportError: naming the parts, with what PyTorch's exporter says.
    """
    _require_packages()
    _refuse_draws(policy)
    step = PolicyStep(policy)
    observations, memory, start = next(_observed(policy, 1))
    names = [*observations, *((MEMORY, START) if step.remembers else ())]
    outputs = [LOGITS, VALUE, *((NEXT_MEMORY,) if step.remembers else ())]
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                step,
                (observations, memory, start),
                dynamo=True,
                verbose=False,
                input_names=[*observations, MEMORY, START],
                output_names=outputs,
            )
        assert program is not None
        for value in [v for v in program.model.graph.inputs if v.name not in names]:
            program.model.graph.inputs.remove(value)  # a memory of no numbers
        program.save(str(path), external_data=False)
    except Exception as error:  # the exporter raises whatever its passes do
        raise ExportError(f"{title} cannot be written as ONNX: {_cause(error)}") from error


def compare(policy: NavigationPolicy, path: Path, steps: int = CHECKED_STEPS) -> Agreement:
    """Runs a policy and its ONNX file side by side, each with its own memory, on random observations."""
    _require_packages()
    step = PolicyStep(policy)
    session = _session(path)
    inputs = {value.name for value in session.get_inputs()}
    memory = policy.initial_memory(1)
    remembered: NDArray[np.float32] = memory.numpy()
    largest, same = 0.0, 0
    for observations, _, start in _observed(policy, steps):
        with torch.no_grad():
            expected = [each.numpy() for each in step(observations, memory, start)]
        fed = {name: value.numpy() for name, value in observations.items()}
        fed |= {MEMORY: remembered, START: start.numpy()}
        found = session.run(None, {name: value for name, value in fed.items() if name in inputs})
        for ours, theirs in zip(expected, found, strict=True):
            scale = max(1.0, float(np.abs(ours).max()))
            difference = float(np.abs(ours - theirs).max()) / scale
            largest = max(largest, difference if np.isfinite(difference) else float("inf"))
        same += int(expected[0].argmax() == found[0].argmax())
        if step.remembers:
            memory, remembered = torch.from_numpy(expected[2]), found[2]
    return Agreement(steps, largest, same)


def card(config: TrainConfig, policy: NavigationPolicy) -> dict[str, Any]:
    """What a robot's programmer must know to use the file."""
    rules, step = task_rules(config), PolicyStep(policy)
    actions = [action for action in Action if rules.stop == "called" or action != Action.STOP]
    space = observation_space(config)
    described: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model": MODEL,
        "policy": _title(config),
        "inputs": {name: _input(config, policy, name, space[name]) for name in sorted(space.spaces)},
        "outputs": {
            LOGITS: {
                "shape": [1, rules.num_actions],
                "meaning": "unnormalised log-probabilities of the actions",
            },
            VALUE: {"shape": [1], "meaning": "discounted reward that is expected from here on"},
        },
        "actions": [
            {"index": index, "name": action.name.lower(), "meaning": _action(config, action)}
            for index, action in enumerate(actions)
        ],
        "choice": {
            "rule": "argmax" if config.evaluation.deterministic else "sample",
            "turn_back": config.evaluation.turn_back,
            "meaning": "how the run's own evaluation takes an action: the likeliest, or one drawn from "
            "softmax(logits); right after a turn, the turn back is left out where its probability is below "
            "turn_back",
        },
        "agent": {
            "radius_m": config.env.agent_radius,
            "height_m": config.env.agent_height,
            "success_distance_m": config.env.success_distance,
            "max_steps": config.env.max_steps,
            "stop": config.env.stop,
        },
    }
    if step.remembers:
        shape = [1, *policy.memory_shape]
        described["inputs"] |= {
            MEMORY: {
                "shape": shape,
                "dtype": "float32",
                "meaning": f"zeros at first, then {NEXT_MEMORY} of the step before ({config.memory.name})",
            },
            START: {
                "shape": [1],
                "dtype": "bool",
                "meaning": "true in the first step of an episode, which forgets the memory",
            },
        }
        described["outputs"][NEXT_MEMORY] = {"shape": shape, "meaning": f"{MEMORY} of the next step"}
    return described


def _input(
    config: TrainConfig, policy: NavigationPolicy, name: str, space: spaces.Space[Any]
) -> dict[str, Any]:
    if isinstance(space, spaces.Discrete):
        described = {"shape": [1], "dtype": "int64", "values": int(space.n)}
    else:
        described = {"shape": [1, *(space.shape or ())], "dtype": str(space.dtype)}
    camera = next((camera for camera in cameras(config) if camera.name == name), None)
    if camera is None:
        return described | {"meaning": _MEANING[name]}
    near, far = config.sensors.min_depth, config.sensors.max_depth
    described["camera"] = {
        "hfov_deg": camera.hfov_deg,
        "height_above_feet_m": camera.sensor_height,
        "pitch_deg": camera.pitch_deg,
    }
    if camera.kind == "depth":
        described["meaning"] = (
            "distance along the camera's axis, rows from the top: metres cut off to "
            f"{near}..{far} m and mapped to 0..1; where nothing was measured, 0 m is taken"
        )
        described["depth_range_m"] = [near, far]
    else:
        described["meaning"] = "colours red, green, blue in 0..255, rows from the top"
    described["inside_the_model"] = _preprocessing(policy, name)
    return described


def _preprocessing(policy: NavigationPolicy, name: str) -> str:
    """What the file does with an image before its encoder sees it."""
    adaptations = policy.features_extractor.adaptations
    if name not in adaptations:
        return "nothing: this policy is blind"
    encoder = next(module for module in adaptations[name].modules() if isinstance(module, Encoder))
    spec = encoder.input_spec
    size = "as it comes" if spec.size is None else f"resized to {spec.size[0]} x {spec.size[1]}"
    return f"{size}, scaled to 0..1, minus {list(spec.mean)}, divided by {list(spec.std)}"


def _action(config: TrainConfig, action: Action) -> str:
    amount = {
        Action.MOVE_FORWARD: f" by {config.env.forward_step:g} m",
        Action.TURN_LEFT: f" by {config.env.turn_angle_deg:g} degrees",
        Action.TURN_RIGHT: f" by {config.env.turn_angle_deg:g} degrees",
    }
    return _ACTIONS[action] + amount.get(action, "")


def _observed(policy: NavigationPolicy, steps: int) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """The same random observations each time, of one agent, with an empty memory and where episodes start."""
    rng = np.random.default_rng(0)
    space = policy.observation_space
    assert isinstance(space, spaces.Dict)
    for step in range(steps):
        observed: dict[str, Tensor] = {}
        # In the order in which the space keeps them, which is that of the exported inputs.
        for name, part in space.spaces.items():
            observed[name] = torch.from_numpy(_sample(part, rng))
        start = torch.tensor([step == 0 or rng.random() < 0.05])
        yield observed, policy.initial_memory(1), start


def _sample(space: spaces.Space[Any], rng: np.random.Generator) -> NDArray[Any]:
    if isinstance(space, spaces.Discrete):
        return rng.integers(space.start, space.start + space.n, 1)
    assert isinstance(space, spaces.Box)
    if space.dtype == np.uint8:
        return rng.integers(0, 256, (1, *space.shape), np.uint8)
    # A few metres where there is no end.
    low, high = np.clip(space.low, -10.0, None), np.clip(space.high, None, 10.0)
    return rng.uniform(low, high, (1, *space.shape)).astype(space.dtype)


def _policy(run: Run, config: TrainConfig, checkpoint: str) -> NavigationPolicy:
    return restore_policy(run, observation_space(config), action_space(config), checkpoint)


def _refuse_draws(policy: NavigationPolicy) -> None:
    """Refuses what draws at random while it acts: a file cannot be compared with that."""
    for name, method in policy.features_extractor.adaptations.items():
        if getattr(method.config, "evaluation", None) == "sample":
            raise ExportError(
                f"adaptation {type(method).__name__} of {name!r} draws its routes at random "
                "(adaptation.evaluation=sample), which an ONNX file does not; use argmax"
            )


def _title(config: TrainConfig) -> str:
    adaptation, encoder, memory = config.adaptation.name, config.encoder.name, config.memory.name
    return f"a policy of adaptation={adaptation} encoder={encoder} memory={memory}"


def _require(agreement: Agreement, config: TrainConfig) -> None:
    if agreement.largest_difference > TOLERANCE:
        raise ExportError(
            f"{_title(config)}: ONNX Runtime differs from PyTorch by {agreement.largest_difference:.2g} in "
            f"{agreement.steps} steps, more than rounding ({TOLERANCE:g}); it is not to be used"
        )


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f'{error}: exporting needs python -m pip install "navagent[onnx]"') from None


def _session(path: Path) -> onnxruntime.InferenceSession:
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no class but this
        raise ExportError(f"{path}: ONNX Runtime does not load it: {error}") from None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _cause(error: BaseException) -> str:
    """The first error behind the exporter's own, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back what the exporter says about itself and about packages that it does not need."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
