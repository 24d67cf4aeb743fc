"""Vision transformers that the ``transformers`` library has loaded, as encoders."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from policies.encoders.base import InputSpec
from policies.encoders.vit import Output, VisionTransformer
from policies.weights import read_weights

_KINDS = ("vit", "vit_mae", "dinov2")


def from_transformers(
    model: Any, input_spec: InputSpec | None = None, output: Output = "map"
) -> VisionTransformer:
    """An encoder with the sizes and weights of a ViT, MAE or DINOv2 model of ``transformers``.

    For models and sizes beyond those that have a name in :data:`policies.encoders.ENCODERS`:

        >>> from transformers import AutoModel
        >>> base = from_transformers(AutoModel.from_pretrained("facebook/dinov2-large"))  # doctest: +SKIP
        >>> make_adaptation("ladder", base)  # doctest: +SKIP

    The model is compared with the encoder on a random image before it is handed out.

    Args:
        model: a ``ViTModel``, ``ViTMAEModel``, ``Dinov2Model``, or a model with a head on one of them.
        input_spec: the images that it was trained on; None for its own size with mean and deviation 0.5.
        output: what the encoder gives, see :class:`VisionTransformer`.

    Raises:
        ValueError: if it is another kind of model, or computes something that the encoder does not.
    """
    config = model.config
    if config.model_type not in _KINDS:
        raise ValueError(
            f"a transformers model of type {config.model_type!r}: expected one of {', '.join(_KINDS)}; "
            "wrap other networks with policies.encoders.wrap.wrap_encoder"
        )
    size = config.image_size
    side = config.patch_size
    encoder = VisionTransformer(
        input_spec or InputSpec(config.num_channels, (size, size)),
        patch=side,
        dim=config.hidden_size,
        depth=config.num_hidden_layers,
        heads=config.num_attention_heads,
        grid=(size // side, size // side),
        eps=config.layer_norm_eps,
        layer_scale=config.model_type == "dinov2",
        output=output,
    )
    encoder.name = config.name_or_path or config.model_type
    with tempfile.TemporaryDirectory() as folder:
        # Names of layers differ between versions of the library; those in its files do not.
        model.save_pretrained(folder)
        encoder.load_tensors(read_weights(Path(folder) / "model.safetensors").tensors, encoder.name)
    _compare(model, encoder, size)
    return encoder


@torch.no_grad()
def _compare(model: Any, encoder: VisionTransformer, size: int) -> None:
    """Raises where model and encoder give different tokens."""
    image = torch.randn(
        1, encoder.input_spec.channels, size, size, generator=torch.Generator().manual_seed(0)
    )
    backbone = model.base_model
    inputs: dict[str, Any] = {}
    if model.config.model_type == "vit_mae":
        patches = encoder.grid[0] * encoder.grid[1]
        backbone.config.mask_ratio, kept = 0.0, backbone.config.mask_ratio
        inputs["noise"] = torch.arange(patches)[None].float()
    training = model.training
    model.eval()
    try:
        expected = backbone(image, **inputs).last_hidden_state
    finally:
        model.train(training)
        if inputs:
            backbone.config.mask_ratio = kept
    tokens = encoder.eval().stem(image)
    for block in encoder.blocks:
        tokens = block(tokens)
    found = encoder.norm(tokens)
    error = float((found - expected).abs().max())
    if found.shape != expected.shape or not error < 1e-3:
        raise ValueError(
            f"{encoder.name} of transformers computes something else than a plain vision transformer of its "
            f"sizes (tokens differ by {error:.2g}); wrap it with policies.encoders.wrap.wrap_encoder"
        )
