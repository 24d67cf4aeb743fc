"""Models of transformers as encoders."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from policies.adaptation import make_adaptation
from policies.encoders.hub import from_transformers

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}


def shaken(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize(
    "model",
    [
        ViTModel(ViTConfig(**SIZES)),
        ViTForImageClassification(ViTConfig(**SIZES)),
        Dinov2Model(Dinov2Config(**SIZES)),
    ],
    ids=["vit", "classifier", "dinov2"],
)
def test_the_encoder_gives_the_models_tokens(model):
    encoder = from_transformers(shaken(model), output="tokens").eval()
    image = torch.rand(2, 32, 32, 3)
    with torch.no_grad():
        expected = model.base_model(encoder.preprocess(image)).last_hidden_state
        torch.testing.assert_close(encoder(encoder.preprocess(image)), expected, rtol=1e-4, atol=2e-5)


def test_mae_sees_the_whole_image_and_the_model_stays_as_it_was():
    model = shaken(ViTMAEModel(ViTMAEConfig(**SIZES, mask_ratio=0.75))).train()
    encoder = from_transformers(model)
    assert encoder.output_shape(32, 32) == (24, 4, 4)
    assert model.config.mask_ratio == 0.75
    assert model.training


def test_it_can_be_adapted():
    base = from_transformers(shaken(Dinov2Model(Dinov2Config(**SIZES))))
    method = make_adaptation("lora", base, target="attention")
    assert method(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).shape == (2, 24, 4, 4)


def test_other_kinds_of_models_are_refused():
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(ValueError, match="of type 'bert': expected one of vit, vit_mae, dinov2"):
        from_transformers(BertModel(config))


def test_a_model_that_computes_something_else_is_refused():
    model = shaken(ViTModel(ViTConfig(**SIZES, hidden_act="relu")))
    with pytest.raises(ValueError, match="computes something else"):
        from_transformers(model)
