"""The encoders and decoders of Taskonomy (Zamir et al., CVPR 2018, arXiv:1804.08328), by task.

These are the mid-level visual representations of Sax et al. (arXiv:1812.11971): 25 ResNet-50s, one a vision
task, from a colour image to eight channels, and for 17 of the tasks a decoder from there to the task's own
output. The PyTorch versions were published with the package ``visualpriors``; names of parameters are those
of its files, so these load unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policies.catalogue import catalogue_path
from policies.encoders.base import BlockEncoder, Encoder, InputSpec, check_tensors, load_tensors
from policies.names import nearest
from policies.weights import read_weights

ENCODER_TASKS = (
    "autoencoding",
    "class_object",
    "class_scene",
    "colorization",
    "curvature",
    "denoising",
    "depth_euclidean",
    "depth_zbuffer",
    "edge_occlusion",
    "edge_texture",
    "egomotion",
    "fixated_pose",
    "inpainting",
    "jigsaw",
    "keypoints2d",
    "keypoints3d",
    "nonfixated_pose",
    "normal",
    "point_matching",
    "reshading",
    "room_layout",
    "segment_semantic",
    "segment_unsup25d",
    "segment_unsup2d",
    "vanishing_point",
)
"""The tasks that an encoder was published for."""

DECODER_CHANNELS = {
    "autoencoding": 3,
    "class_object": 1000,
    "class_scene": 63,
    "curvature": 2,
    "denoising": 3,
    "depth_euclidean": 1,
    "depth_zbuffer": 1,
    "edge_occlusion": 1,
    "edge_texture": 1,
    "inpainting": 3,
    "keypoints2d": 1,
    "keypoints3d": 1,
    "normal": 3,
    "reshading": 1,
    "segment_semantic": 17,
    "segment_unsup25d": 64,
    "segment_unsup2d": 64,
}
"""The tasks that a decoder was published for, and its output channels, or classes."""

CLASSIFICATION_TASKS = ("class_object", "class_scene")
"""The tasks whose decoder gives one vector an image."""

MAX_COVERAGE = (
    ("autoencoding",),
    ("segment_unsup2d", "segment_unsup25d"),
    ("edge_texture", "reshading", "curvature"),
    ("normal", "keypoints2d", "segment_unsup2d", "segment_semantic"),
)
"""The sets of one to four tasks from which every other task is at the least distance (Sax et al.,
arXiv:1812.11971, the max-coverage feature set), as ``visualpriors`` has them."""

_LAYERS = ((64, 3, 2), (128, 4, 2), (256, 6, 1), (512, 3, 1))
"""Width of the bottleneck, number of blocks, and stride of the last block."""


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, members: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False, groups=members)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False, groups=members)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False, groups=members)
        self.bn3 = nn.BatchNorm2d(outputs)
        # The published networks subsample at the end of a stage, where torchvision's do at its start.
        self.stride = stride
        self.downsample: nn.Sequential | None = None
        if inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, bias=False, groups=members), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.downsample is not None:
            x = self.downsample(x)
        return F.relu(y + x[:, :, :: self.stride, :: self.stride])


class TaskonomyEncoder(BlockEncoder):
    """Taskonomy's ResNet-50: (N, C, 256, 256) to (N, 8, 16, 16).

    As published it resizes with a filter that widens as images shrink, Pillow's. It computes images of other
    sizes too, 16 pixels to a feature, if its :attr:`input_spec` is replaced by one that asks for them.

    Several of these networks on the same image can be one: its weights are theirs, one after the other, and
    its convolutions are grouped, a group a member. See :class:`TaskonomySet`.

    Args:
        channels: 3 for colour, as published; 1 for depth.
        members: k, how many networks are computed at once. Features are (N, 8 k, 16, 16).
        normalise_outputs: whether each channel of an image's features is brought to mean 0 and variance 1, as
            ``visualpriors`` gives them to agents. Decoders take features without it. May be set afterwards.
    """

    def __init__(self, channels: int = 3, members: int = 1, normalise_outputs: bool = True) -> None:
        super().__init__(InputSpec(channels, (256, 256), antialias=True))
        self.members = members
        self.normalise_outputs = normalise_outputs
        inputs = 64 * members
        self.conv1 = nn.Conv2d(channels, inputs, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        for index, (width, blocks, stride) in enumerate(_LAYERS, 1):
            layer = nn.Sequential()
            for block in range(blocks):
                last = block == blocks - 1
                layer.append(_Bottleneck(inputs, width * members, stride if last else 1, members))
                inputs = 4 * width * members
            self.add_module(f"layer{index}", layer)
        self.compress1 = nn.Conv2d(inputs, 8 * members, 3, 1, 1, bias=False, groups=members)
        self.compress_bn = nn.BatchNorm2d(8 * members)

    @property
    def output_layers(self) -> tuple[str, ...]:  # type: ignore[override]
        """The last normalisation; none if outputs are normalised, since these have one scale only."""
        return () if self.normalise_outputs else ("compress_bn",)

    @property
    def blocks(self) -> list[nn.Module]:
        """The 16 bottleneck blocks."""
        return [
            block
            for index in range(1, len(_LAYERS) + 1)
            for block in self.get_submodule(f"layer{index}").children()
        ]

    def stem(self, x: Tensor) -> Tensor:
        """First convolution and pooling: (N, C, 256, 256) to (N, 64 k, 64, 64)."""
        x = F.relu(self.bn1(self.conv1(x)))
        return F.max_pool2d(x, kernel_size=3, stride=2, ceil_mode=True)

    def neck(self, x: Tensor) -> Tensor:
        """Compression to eight channels: (N, 2048 k, 16, 16) to (N, 8 k, 16, 16)."""
        x = F.relu(self.compress_bn(self.compress1(x)))
        return F.group_norm(x, x.shape[1]) if self.normalise_outputs else x

    def initialise(self) -> None:
        """Draws fresh random weights, each member's as if it were alone."""
        super().initialise()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                for weight in module.weight.chunk(self.members):
                    nn.init.xavier_uniform_(weight)


class TaskonomySet(TaskonomyEncoder):
    """Encoders of several tasks on the same image, computed as one: (N, 3, 256, 256) to (N, 8 k, 16, 16).

    Features are those of the tasks in their order, one after the other. The pass is one of grouped
    convolutions, which is for GPUs: few large kernels in place of many small ones. A CPU is better served by
    one network after the other: four tasks on four images took 2.9 s of one core in a loop, 4.3 s so, and
    4.8 s with torch.vmap (0.70, 0.81 and 0.94 s on one image).

    Args:
        tasks: k names out of :data:`ENCODER_TASKS`.
        channels: 3 for colour, as published; 1 for depth.
        normalise_outputs: see :class:`TaskonomyEncoder`.
    """

    def __init__(self, tasks: Sequence[str], channels: int = 3, normalise_outputs: bool = True) -> None:
        if not tasks:
            raise ValueError("a Taskonomy set of no tasks: expected one or more")
        for task in tasks:
            _check_task(task, ENCODER_TASKS, "encoder")
        super().__init__(channels, len(tasks), normalise_outputs)
        self.tasks = tuple(tasks)

    def load_members(self, members: Sequence[Mapping[str, Tensor]], source: str = "weights") -> None:
        """Loads the tensors of one published encoder a task, in the order of :attr:`tasks`.

        Raises:
            ValueError: naming the task whose tensors do not fit.
        """
        if len(members) != len(self.tasks):
            raise ValueError(f"weights of {len(members)} encoders for the {len(self.tasks)} of {self.tasks}")
        with torch.device("meta"):
            one = TaskonomyEncoder(self.input_spec.channels)
        for task, tensors in zip(self.tasks, members, strict=True):
            check_tensors(one, tensors, f"{source} of {task}")
        self.load_tensors(
            {
                name: torch.cat([tensors[name] for tensors in members])
                for name, value in one.state_dict().items()
                if value.dim()
            },
            source,
        )


class _DropLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :-1, :-1]


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)
    )


def _doubling(inputs: int, outputs: int) -> nn.Sequential:
    """Doubles rows and columns as TensorFlow's "same" padding does: what is too many goes at the end."""
    return nn.Sequential(
        nn.Identity(),  # the published files number the layers with a padding here
        nn.ConvTranspose2d(inputs, outputs, 3, 2, bias=False),
        _DropLast(),
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(0.2),
    )


class TaskonomyDecoder(nn.Module):
    """From features of a task's encoder to the task's output.

    Images are (N, 8, h, w) to (N, C, 16 h, 16 w), values in -1..1, but for semantic segmentation, whose C
    values are logits. Classes are (N, 8, 16, 16) to (N, C) logits. C is in :data:`DECODER_CHANNELS`.

    The features are those that are not normalised, see :class:`TaskonomyEncoder`.

    Args:
        task: a key of :data:`DECODER_CHANNELS`.
    """

    def __init__(self, task: str) -> None:
        super().__init__()
        _check_task(task, DECODER_CHANNELS, "decoder")
        self.task = task
        outputs = DECODER_CHANNELS[task]
        if task in CLASSIFICATION_TASKS:
            self.fc0 = nn.Linear(2048, 2048, bias=False)
            self.bn0 = nn.BatchNorm1d(2048)
            self.dropout = nn.Dropout(0.5)
            self.fc2 = nn.Linear(2048, outputs)
            return
        self.conv2 = _convolution(8, 1024)
        self.conv3 = _convolution(1024, 1024)
        self.conv4 = _convolution(1024, 512)
        self.conv5 = _convolution(512, 256)
        self.conv6 = _convolution(256, 256)
        self.conv7 = _convolution(256, 128)
        self.deconv8 = _doubling(128, 64)
        self.conv9 = _convolution(64, 64)
        self.deconv10 = _doubling(64, 32)
        self.conv11 = _convolution(32, 32)
        self.deconv12 = _doubling(32, 16)
        self.conv13 = _convolution(16, 32)
        self.deconv14 = _doubling(32, 16)
        self.decoder_output = nn.Sequential(nn.Conv2d(16, outputs, 3, 1, 1))
        if task != "segment_semantic":
            self.decoder_output.append(nn.Tanh())

    def forward(self, features: Tensor) -> Tensor:
        """The task's output of features (N, 8, h, w)."""
        if self.task not in CLASSIFICATION_TASKS:
            for layer in self.children():
                features = layer(features)
            return features
        if features.shape[1:] != (8, 16, 16):
            raise ValueError(
                f"features of shape {tuple(features.shape)}: the decoder of {self.task} takes (N, 8, 16, 16)"
            )
        # The weights come from a network that kept channels last.
        x = features.permute(0, 2, 3, 1).flatten(1)
        return self.fc2(self.dropout(F.relu(self.bn0(self.fc0(x)))))

    def load_tensors(self, tensors: Mapping[str, Tensor], source: str = "weights") -> None:
        """Loads tensors by name, all of them and no others.

        Raises:
            ValueError: naming the tensors that are missing, unexpected or of another shape.
        """
        load_tensors(self, tensors, source)


def make_decoder(task: str, weights: str | Path = "default") -> TaskonomyDecoder:
    """Builds a decoder.

    Args:
        task: a key of :data:`DECODER_CHANNELS`.
        weights: ``"default"`` for the published ones, which have to be fetched before, ``"random"`` for fresh
            ones, or the path of a ``.safetensors`` or ``.pth`` file.

    Raises:
        ValueError: for an unknown task, or weights that are not there, are unreadable or do not fit.
    """
    decoder = TaskonomyDecoder(task)
    if str(weights) != "random":
        path = catalogue_path(f"taskonomy-{task}-decoder") if str(weights) == "default" else Path(weights)
        decoder.load_tensors(read_weights(path).tensors, str(path))
    return decoder


def _check_task(task: str, known: Sequence[str] | Mapping[str, int], kind: str) -> None:
    if task not in known:
        raise ValueError(
            f"no Taskonomy {kind} for task {task!r}{nearest(task, known)} (known: {', '.join(known)})"
        )


TASKONOMY_ENCODERS: dict[str, Callable[[int], Encoder]] = {
    **{f"taskonomy_{task}": TaskonomyEncoder for task in ENCODER_TASKS},
    **{f"taskonomy_max_coverage_{len(tasks)}": partial(TaskonomySet, tasks) for tasks in MAX_COVERAGE},
}
"""Taskonomy's encoders by name, each called with the number of input channels."""
