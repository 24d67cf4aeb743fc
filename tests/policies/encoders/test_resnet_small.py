"""The small residual network: size, cost and what holds block by block."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from policies.encoders import ENCODERS, make_encoder


@pytest.fixture
def network():
    torch.manual_seed(0)
    return make_encoder("resnet_small", weights="random")


def cost(network):
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 64, 64)).sum().backward()
    return counter.get_total_flops()


def test_learning_step_costs_at_most_half_more_than_the_small_fcn5(network):
    assert cost(network) <= 1.5 * cost(ENCODERS["fcn5_small"](3))


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("size", [(64, 64), (48, 96), (61, 83), (9, 9)])
def test_features_have_an_eighth_of_the_rows_and_columns_rounded_up(channels, size):
    shape = ENCODERS["resnet_small"](channels).output_shape(*size)
    assert shape == (8, -(-size[0] // 8), -(-size[1] // 8))


def test_evaluation_and_training_compute_the_same(network):
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(network.train()(x), network.eval()(x))


def test_features_have_the_scale_of_the_small_fcn5(network):
    x = network.preprocess(torch.rand(4, 64, 64, 3))
    features = network(x)
    torch.testing.assert_close(
        features.unflatten(1, (2, 4)).std((2, 3, 4)), torch.ones(4, 2), atol=0.01, rtol=0
    )


def test_every_block_takes_and_gives_one_map(network):
    x = network.stem(torch.randn(2, 3, 64, 64))
    assert x.shape == (2, 32, 16, 16)
    for block in network.blocks:
        x = block(x)
        assert x.shape == (2, 32, 8, 8)


def test_blocks_hold_most_of_the_weights_once(network):
    names = {id(p) for block in network.blocks for p in block.parameters()}
    inside = sum(p.numel() for p in network.parameters() if id(p) in names)
    assert inside > 0.9 * sum(p.numel() for p in network.parameters())
    assert len(network.blocks) == 7
