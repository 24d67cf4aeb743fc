"""``lamb.npz``: twelve steps of Lamb as BPS has it, on layers and vectors with random gradients.

Recorded with ``bps_nav/rl/ppo/lamb.py`` of github.com/shacklettbp/bps-nav at 4c237ba, as it is, on torch
2.13: two groups as its PPO makes them, ``bias`` and ``alpha`` with ``min_trust=1`` and the rest with 0.01,
with ``lr=5e-3, eps=1e-5, weight_decay=1e-2``. ``long`` is longer than 10, ``zero`` starts at zero, and
``tiny`` is so short that the bound of its trust holds.
"""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from navagent.learning.lamb import Lamb, trust_ratio
from navagent.learning.schedules import square_root_scale

RECORDED = Path(__file__).parent.parent / "data" / "lamb.npz"
NAMES = ("linear", "conv", "bias", "alpha", "long", "zero", "tiny")


def test_twelve_steps_are_those_of_bps():
    with np.load(RECORDED) as recorded:
        data = {name: torch.from_numpy(recorded[name]) for name in recorded.files}
    parameters = {name: data[f"initial/{name}"].clone().requires_grad_(True) for name in NAMES}
    optimizer = Lamb(parameters.values(), lr=5e-3, eps=1e-5, weight_decay=1e-2)
    for step in range(len(data["gradients/linear"])):
        for name, parameter in parameters.items():
            parameter.grad = data[f"gradients/{name}"][step]
        optimizer.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), data[f"after/{name}"], atol=1e-6, rtol=1e-6)


def test_a_layers_step_is_the_papers_formula():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    gradients = torch.randn(5, 3, 4, generator=generator, dtype=torch.float64)
    lr, beta1, beta2, eps, decay = 0.01, 0.8, 0.95, 1e-3, 0.1
    parameter = weight.clone().requires_grad_(True)
    optimizer = Lamb([parameter], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    x, m, v = weight.tolist(), np.zeros((3, 4)), np.zeros((3, 4))
    for t, gradient in enumerate(gradients, start=1):
        parameter.grad = gradient.clone()
        optimizer.step()
        g = gradient.numpy()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        r = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps) + decay * np.array(x)
        trust = min(math.sqrt((np.array(x) ** 2).sum()), 10) / math.sqrt((r**2).sum())
        x = (np.array(x) - lr * trust * r).tolist()
    np.testing.assert_allclose(parameter.detach().numpy(), x, atol=1e-12)


def test_without_trust_and_for_vectors_it_is_adamw():
    generator = torch.Generator().manual_seed(2)
    for shape, min_trust in (((4, 3), 1.0), ((6,), 0.01), ((), 0.01)):
        start = torch.randn(shape, generator=generator)
        ours, theirs = (start.clone().requires_grad_(True) for _ in range(2))
        settings = {"lr": 1e-2, "eps": 1e-6, "weight_decay": 0.1}
        optimizers = Lamb([ours], min_trust=min_trust, **settings), torch.optim.AdamW([theirs], **settings)
        for _ in range(6):
            ours.grad = theirs.grad = torch.randn(shape, generator=generator)
            for optimizer in optimizers:
                optimizer.step()
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_trust_is_bounded_and_one_where_a_norm_is_zero():
    ones = torch.ones(2, 2)
    assert trust_ratio(3 * ones, ones, 0.01) == pytest.approx(3.0)
    assert trust_ratio(1000 * ones, ones, 0.01) == pytest.approx(10 / 2)
    assert trust_ratio(1e-6 * ones, ones, 0.01) == pytest.approx(0.01)
    assert trust_ratio(ones, 1e-6 * ones, 0.01) == pytest.approx(100)
    assert trust_ratio(0 * ones, ones, 0.01) == trust_ratio(ones, 0 * ones, 0.01) == 1


def test_groups_keep_their_own_decay_and_parameters_without_gradient_stay():
    decayed, kept, untouched = (torch.ones(2, 2, requires_grad=True) for _ in range(3))
    optimizer = Lamb([{"params": [decayed], "weight_decay": 0.5}, {"params": [kept, untouched]}], lr=0.1)
    decayed.grad, kept.grad = torch.zeros(2, 2), torch.zeros(2, 2)
    optimizer.step()
    assert torch.equal(kept, untouched)
    assert torch.equal(untouched, torch.ones(2, 2))
    assert (decayed < 1).all()


def test_a_restored_optimiser_goes_on_as_the_first():
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(4, 4, generator=generator).requires_grad_(True)
    one = Lamb([first], lr=0.01)
    for _ in range(3):
        first.grad = torch.randn(4, 4, generator=generator)
        one.step()
    second = first.detach().clone().requires_grad_(True)
    other = Lamb([second], lr=0.5)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    first.grad = second.grad = torch.randn(4, 4, generator=generator)
    one.step()
    other.step()
    assert torch.equal(first, second)


def test_wrong_settings_are_refused():
    parameters = [torch.zeros(2, requires_grad=True)]
    with pytest.raises(ValueError, match=r"min_trust 0 must be greater than 0"):
        Lamb(parameters, min_trust=0)
    with pytest.raises(ValueError, match=r"betas \(0\.9, 1\.0\) must be"):
        Lamb(parameters, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match=r"lr -1\.0"):
        Lamb(parameters, lr=-1.0)


def test_the_learning_rate_grows_with_the_square_root_of_the_batch():
    assert square_root_scale(256) == 1.0
    assert square_root_scale(16384) == 8.0
    assert square_root_scale(64) == 1.0, "a small batch does not lower it"
