"""Counted costs against what can be worked out by hand."""

import pytest
import torch
from torch import nn

from policies.adaptation import make_adaptation
from policies.adaptation.costs import measure
from policies.encoders import Encoder, InputSpec

ROWS, COLUMNS, WIDTH = 8, 12, 5
CONV = 2 * 3 * 9 * WIDTH * ROWS * COLUMNS
"""Operations of a 3x3 convolution from 3 to 5 channels without padding loss."""


class OneConv(Encoder):
    output_layers = ("conv",)

    def __init__(self):
        super().__init__(InputSpec(3))
        self.conv = nn.Conv2d(3, WIDTH, 3, padding=1, bias=False)

    def forward(self, x):
        return self.conv(x)


def cost(name, **options):
    return measure(make_adaptation(name, OneConv(), **options), ROWS, COLUMNS, batch_size=10)


def test_features_cost_one_pass_to_act_and_none_to_learn():
    found = cost("features")
    assert (found.trainable, found.stored_bytes, found.learn_bytes) == (0, 0, 0)
    assert (found.act_flops, found.learn_flops, found.backward_flops) == (CONV, 0, 0)
    assert found.cached


def test_finetuning_costs_its_weights_and_the_image_kept_for_their_gradient():
    found = cost("finetune")
    weights = 3 * 9 * WIDTH
    assert found.trainable == weights
    assert found.stored_bytes == weights * 4
    # The image needs no gradient, so the backward pass is the weights' alone.
    assert (found.act_flops, found.learn_flops, found.backward_flops) == (CONV, CONV, CONV)
    assert found.learn_bytes == 10 * 3 * ROWS * COLUMNS * 4 + 3 * weights * 4
    assert not found.cached


def test_sidetuning_acts_with_both_networks_and_learns_with_one():
    found = cost("sidetune", side_init="copy")
    assert found.trainable == 3 * 9 * WIDTH + 1
    assert found.stored_bytes == found.trainable * 4
    assert (found.act_flops, found.learn_flops, found.backward_flops) == (2 * CONV, CONV, CONV)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_method_as_it_was(training):
    method = make_adaptation("sidetune", OneConv()).train(training)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    measure(method, ROWS, COLUMNS)
    assert method.tasks == ("task",)
    assert method.training == training
    assert all(torch.equal(method.state_dict()[k], v) for k, v in before.items())
    assert all(p.grad is None for p in method.parameters())
