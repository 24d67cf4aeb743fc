"""Transfer: how well each adaptation method learns another perception task from few or many images.

A base that was pre-trained on one task, surface normals, is adapted to another by every method: with the same
images, the same small decoder behind the features, learning at one rate, the same number of optimiser steps
on the same batches, and the same choice of learning rates for what the method trains. What differs is the
method. Errors are those in homes that neither the base nor the method has seen.

One :class:`Job` is one such training; :class:`Bench` carries it out. :mod:`~navagent.learning.comparison`
runs them all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from navagent.learning.decoder import Decoder, decoder_beside, decoder_for, read_decoder
from navagent.learning.frames import Frames, FrameSource, View
from navagent.learning.perception import TASKS
from navagent.learning.quality import blind_predictors, measure
from navagent.learning.training import warm_cosine
from policies.adaptation import ADAPTATIONS, Adaptation, make_adaptation, set_learning_rate
from policies.encoders import Encoder, default_weights, make_encoder

BASE_TASK = "normals"
"""What bases were pre-trained on."""
TARGET = "target"
"""Name of the task that a method goes on to, where the base's own counts as its first."""
DECODER_LEARNING_RATE = 5e-3
"""Peak learning rate of the decoder, which starts from nothing whatever the method."""
WEIGHT_DECAY = 2e-6
MAX_GRADIENT = 1.0
"""Norm to which gradients are clipped. This and the weight decay are the side-tuning authors'."""
HELD_OUT = 0.2
"""Share of a seed's images that learning rates are judged on."""
FISHER_FRAMES = 200
"""Images of the base's task that a method may ask for."""
_CHUNK = 100


@dataclass(frozen=True)
class Row:
    """One method with its options, as it is compared."""

    name: str
    """What it is called."""
    method: str
    """Key of :data:`~policies.adaptation.ADAPTATIONS`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options that differ from the defaults."""


VARIANTS = (
    Row("sidetune-small-random", "sidetune", {"side_encoder": "fcn5_small", "side_init": "random"}),
    # The published ratio of learning rate and threshold, at ten times the published learning rate.
    Row("piggyback", "piggyback", {"mask_scale": 0.1, "threshold": 0.05}),
    Row("hst", "hst", {"output": "map"}),
    Row("ewc", "ewc", {"fisher_samples": FISHER_FRAMES}),
)
"""Methods with other options than the defaults: in their method's place, or beside it under another name."""


def rows() -> list[Row]:
    """What is compared: every method there is by its defaults, but for :data:`VARIANTS`."""
    table = {name: Row(name, name) for name in ADAPTATIONS}
    table |= {row.name: row for row in VARIANTS if row.method in ADAPTATIONS}
    order = {method: place for place, method in enumerate(ADAPTATIONS)}
    return sorted(table.values(), key=lambda row: order[row.method])


@dataclass(frozen=True)
class Base:
    """A pre-trained encoder and the decoder that it was trained with."""

    name: str
    """Name of the encoder."""
    weights: str
    """File of its weights."""
    decoder: str | None
    """File of the decoder, if there is one."""

    @staticmethod
    def find(text: str) -> Base:
        """A base by what a user calls it.

        Args:
            text: name of an encoder that ships with weights for colour images, or ``NAME=FOLDER`` with the
                folder of a pre-training.

        Raises:
            ValueError: if there are no such weights.
        """
        name, equals, folder = text.partition("=")
        weights = Path(folder) / "encoder.safetensors" if equals else default_weights(name)
        if not weights.is_file():
            raise ValueError(f"base {text!r}: there is no file {weights}")
        decoder = decoder_beside(weights)
        return Base(name, str(weights), None if decoder is None else str(decoder))


@dataclass(frozen=True)
class TransferConfig:
    """What all trainings of a comparison share."""

    view: View
    """Images, and the tasks that they have ground truth for: the target, and the base's own."""
    task: str
    """The target task."""
    frames: Path
    """Folder of the rendered frames."""
    bases: tuple[Base, ...]
    """Networks to adapt."""
    images: tuple[int, ...]
    """Numbers of training images."""
    seeds: int
    """How often each is done, with other images, another decoder and another order."""
    steps: int
    """Optimiser steps."""
    batch_size: int
    """Images a step."""
    test_frames: int
    """Images in unseen homes."""

    def render(self, source: FrameSource, report: Callable[[str], None]) -> None:
        """Renders what is not there yet: training images by seed, test images, and some of the base's task.

        Args:
            source: renders.
            report: is told what is being rendered.
        """
        target, own = replace(self.view, tasks=(self.task,)), replace(self.view, tasks=(BASE_TASK,))
        both = replace(self.view, tasks=tuple(dict.fromkeys((self.task, BASE_TASK))))
        wanted = [
            (self.unseen_file, both, "val", self.test_frames, 1),
            (self.own_file, own, "train", FISHER_FRAMES, 2),
            *(
                (self.train_file(seed), target, "train", max(self.images), 1000 + seed)
                for seed in range(self.seeds)
            ),
        ]
        for path, view, split, count, seed in wanted:
            if not path.is_file():
                report(f"rendering {count} images for {path.stem}")
                frames = source(view, split, count, seed)
                # In random order, so that the first images are from all homes.
                order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
                frames[order].save(path, {"split": split, "seed": seed})

    @property
    def unseen_file(self) -> Path:
        """File of the test images."""
        return self.frames / "unseen.safetensors"

    @property
    def own_file(self) -> Path:
        """File of images with ground truth for the base's own task."""
        return self.frames / "own.safetensors"

    def train_file(self, seed: int) -> Path:
        """File of one seed's training images."""
        return self.frames / f"train-{seed}.safetensors"


@dataclass(frozen=True)
class Job:
    """One training."""

    base: str
    """Name of the base."""
    row: Row
    """What adapts it."""
    images: int
    """Training images."""
    seed: int
    """Which images, decoder and order."""
    learning_rate: float
    """Peak learning rate of Adam for what the method trains."""
    phase: Literal["choose", "final"]
    """Half as long on a part of the images and judged on the rest, to choose the learning rate; or whole, and
    judged in unseen homes."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from all others."""
        return (self.phase, self.base, self.row.name, self.images, self.seed, self.learning_rate)


@dataclass(frozen=True)
class Outcome:
    """What came of a job."""

    phase: str
    base: str
    row: str
    images: int
    seed: int
    learning_rate: float
    measures: dict[str, float | None]
    """The task's measures; None for what is no number because the training diverged."""
    trainable: int
    """Parameters that learn, without the decoder."""
    seconds: float
    """Wall time."""

    @property
    def key(self) -> tuple[Any, ...]:
        """The job's."""
        return (self.phase, self.base, self.row, self.images, self.seed, self.learning_rate)

    @property
    def label(self) -> str:
        """Method and base."""
        return f"{self.row} on {self.base}"

    def error(self, task: str) -> float:
        """The measure that counts, infinite where the training diverged."""
        value = self.measures[TASKS[task].measure]
        return math.inf if value is None else value


class Bench:
    """Carries out jobs; keeps the frames and bases that they have in common."""

    def __init__(self, config: TransferConfig) -> None:
        self.config = config
        self._bases = {base.name: base for base in config.bases}
        self._encoders: dict[str, Encoder] = {}
        self._files: dict[Path, Frames] = {}

    def run(self, job: Job) -> Outcome:
        """Trains and judges."""
        began = time.perf_counter()
        train = self._frames(self.config.train_file(job.seed))[: job.images]
        steps = self.config.steps
        test = train
        if job.phase == "final":
            test = self._frames(self.config.unseen_file)
        else:
            count = max(1, round(HELD_OUT * job.images))
            train, test = train[count:], train[:count]
            steps = max(1, steps // 2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed)
            adaptation = self.start(job.base, job.row)
            torch.manual_seed(job.seed)
            decoder = self._decoder(adaptation, job.row)
            trainable = sum(parameter.numel() for parameter in adaptation.trainable_parameters())
            self._train(adaptation, decoder, train, steps, job)

        def predict(image: Tensor) -> Tensor:
            return decoder(adaptation(image))

        measures = measure(predict, self.config.task, test, _CHUNK)
        return Outcome(
            job.phase,
            job.base,
            job.row.name,
            job.images,
            job.seed,
            job.learning_rate,
            {name: value if math.isfinite(value) else None for name, value in measures.items()},
            trainable,
            round(time.perf_counter() - began, 3),
        )

    def start(self, base: str, row: Row) -> Adaptation:
        """A method before it learns the target task.

        Where the method keeps the base frozen, the target is its first task. Where all tasks share what
        learns, the base's own task counts as the first: the method is told the losses of that, and goes on to
        the target as its second.

        Raises:
            ValueError: if the method does not take this base.
        """
        adaptation = make_adaptation(row.method, self._encoder(base), encoder=base, **row.options)
        if adaptation.several_tasks and not hasattr(adaptation, "base"):
            adaptation.eval()
            adaptation.finish_task(self._own_losses(base, adaptation))
            adaptation.start_task(TARGET)
        return adaptation

    def refusal(self, base: str, row: Row) -> str | None:
        """Why a method cannot be compared on a base; None if it can."""
        try:
            with torch.random.fork_rng(devices=[]):
                self._decoder(self.start(base, row), row)
        except ValueError as error:
            return str(error)
        return None

    def baselines(self) -> dict[str, dict[str, dict[str, float]]]:
        """By task: the measures in unseen homes of predictors that never look, and of bases at their own."""
        config = self.config
        unseen = self._frames(config.unseen_file)
        files = {BASE_TASK: config.own_file, config.task: config.train_file(0)}
        found: dict[str, dict[str, dict[str, float]]] = {
            task: {
                name: measure(predictor, task, unseen)
                for name, predictor in blind_predictors(task, self._frames(file)).items()
            }
            for task, file in files.items()
        }
        for name, base in self._bases.items():
            if base.decoder is not None:
                encoder, decoder = self._encoder(name), self._own_decoder(base)
                found[BASE_TASK][name] = measure(
                    lambda image, e=encoder, d=decoder: d(e(e.preprocess(image))),  # type: ignore[misc]
                    BASE_TASK,
                    unseen,
                )
        return found

    def _train(
        self, adaptation: Adaptation, decoder: nn.Module, frames: Frames, steps: int, job: Job
    ) -> None:
        config, task = self.config, TASKS[self.config.task]
        total = steps * config.batch_size
        groups = adaptation.parameter_groups(WEIGHT_DECAY)
        set_learning_rate(groups, job.learning_rate)
        groups.append(
            {"params": decoder.parameters(), "weight_decay": WEIGHT_DECAY, "lr": DECODER_LEARNING_RATE}
        )
        groups = [{**group, "params": list(group["params"])} for group in groups]
        optimizer = torch.optim.Adam([g for g in groups if g["params"]], lr=job.learning_rate)
        schedule = LambdaLR(optimizer, lambda step: warm_cosine(step / steps))
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        # Where most images come but once, storing what the base gives for them would save nothing.
        stored = _stored(adaptation, frames) if total > len(frames) else None
        adaptation.train()
        decoder.train()
        for step, chosen in enumerate(batches(len(frames), config.batch_size, steps, job.seed)):
            adaptation.set_progress(step * config.batch_size, total)
            given = {name: value[chosen] for name, value in stored.items()} if stored else None
            prediction = decoder(adaptation(frames.image[chosen], given))
            loss = task.loss(prediction, frames.targets[config.task][chosen].float())
            optimizer.zero_grad()
            (loss + adaptation.penalty()).backward()
            nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT)
            optimizer.step()
            schedule.step()
        adaptation.eval()
        decoder.eval()

    def _decoder(self, adaptation: Adaptation, row: Row) -> Decoder:
        view = self.config.view
        shape = adaptation.output_shape(view.height, view.width)
        outputs = TASKS[self.config.task].channels
        return decoder_for(shape, view.height, view.width, outputs, f"method {row.name!r}")

    def _own_losses(self, name: str, adaptation: Adaptation) -> Iterator[Tensor]:
        """Losses of the base's task, one an image, for methods that ask; nothing is computed for others."""
        base = self._bases[name]
        if base.decoder is None:
            raise ValueError(
                f"base {name!r} comes without the decoder that it was trained with; give the folder of a "
                f"pre-training, --bases {name}=FOLDER"
            )
        decoder = self._own_decoder(base)
        own = self._frames(self.config.own_file)
        for index in range(len(own)):
            prediction = decoder(adaptation(own.image[index : index + 1]))
            yield TASKS[BASE_TASK].loss(prediction, own.targets[BASE_TASK][index : index + 1].float())

    def _own_decoder(self, base: Base) -> Decoder:
        assert base.decoder is not None
        return read_decoder(base.decoder)[0].eval().requires_grad_(False)

    def _encoder(self, name: str) -> Encoder:
        if name not in self._encoders:
            self._encoders[name] = make_encoder(name, 3, self._bases[name].weights).eval()
        return self._encoders[name]

    def _frames(self, path: Path) -> Frames:
        if path not in self._files:
            self._files[path] = Frames.load(path)
        return self._files[path]


def batches(images: int, batch_size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Images of each step: all of them in random order before any comes again, the same for every method."""
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(waiting) < batch_size:
            waiting = torch.cat((waiting, torch.randperm(images, generator=generator)))
        chosen, waiting = waiting[:batch_size], waiting[batch_size:]
        yield chosen


@torch.no_grad()
def _stored(adaptation: Adaptation, frames: Frames) -> dict[str, Tensor]:
    """What never changes for each image."""
    adaptation.eval()
    parts = [adaptation.base_features(image) for image in frames.image.split(_CHUNK)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
