"""The small network that turns a feature map into a perception task's prediction."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor, nn

from policies.weights import Checkpoint, WeightsError, read_safetensors


class Decoder(nn.Module):
    """From a feature map (N, C, h, w) back to the image's size, doubling it by pixel shuffles.

    Kept small, so that what the task needs has to be in the features.
    """

    def __init__(self, channels: int, doublings: int, outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(channels, 64, 3, padding=1, bias=False),
            nn.GroupNorm(2, 64),
            nn.ReLU(),
        ]
        width = 64
        for _ in range(doublings - 1):
            layers += [
                nn.Conv2d(width, 64, 3, padding=1, bias=False),
                nn.GroupNorm(2, 64),
                nn.ReLU(),
                nn.PixelShuffle(2),
            ]
            width = 16
        layers += [nn.Conv2d(width, outputs * 4, 3, padding=1), nn.PixelShuffle(2)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Predictions (N, outputs, H, W)."""
        return self.layers(features)


def decoder_for(features: tuple[int, ...], height: int, width: int, outputs: int, whose: str) -> Decoder:
    """A decoder with random weights from features of one shape to images of ``outputs`` channels.

    Args:
        features: shape of one image's features.
        height: image rows.
        width: image columns.
        outputs: channels to predict.
        whose: what gives these features, for the error.

    Raises:
        ValueError: if the features are no map that doublings bring to the image's size.
    """
    fits = len(features) == 3 and height * features[2] == width * features[1]
    factor = height / features[1] if fits else 0.0
    if factor < 2 or 2 ** round(math.log2(factor)) != factor:
        raise ValueError(
            f"{whose} gives features {features} for {height}x{width} images; the decoder needs a map that "
            "doublings bring back to the image's size"
        )
    return Decoder(features[0], round(math.log2(factor)), outputs)


def read_decoder(path: str | Path) -> tuple[Decoder, Checkpoint]:
    """Reads the decoder that a pre-training wrote, and the rest of what its file says.

    Raises:
        WeightsError: for a file that is none.
    """
    checkpoint = read_safetensors(path)
    try:
        convolutions = {int(k.split(".")[1]): v for k, v in checkpoint.tensors.items() if v.dim() == 4}
        first, last = convolutions[min(convolutions)], convolutions[max(convolutions)]
        decoder = Decoder(first.shape[1], len(convolutions) - 1, last.shape[0] // 4)
        decoder.load_state_dict({name: value.float() for name, value in checkpoint.tensors.items()})
    except (ValueError, IndexError, RuntimeError) as error:
        raise WeightsError(f"{path}: not a decoder.safetensors of `navagent pretrain` ({error})") from error
    return decoder, checkpoint


def decoder_beside(weights: str | Path) -> Path | None:
    """The file of the decoder that an encoder was trained with, if it lies beside the encoder's weights.

    That is ``decoder.safetensors`` beside ``encoder.safetensors``, as a pre-training leaves them, and
    ``NAME-decoder.safetensors`` beside ``NAME.safetensors``.
    """
    weights = Path(weights)
    name = "decoder" if weights.stem == "encoder" else f"{weights.stem}-decoder"
    path = weights.with_name(f"{name}.safetensors")
    return path if path.is_file() else None
