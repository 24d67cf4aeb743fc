"""Fisher information and the penalty, against closed forms and the authors' code.

``tests/data/ewc.npz`` was recorded with side-tuning's ``EWC`` (github.com/jozhang97/side-tuning, commit
dea34569, ``tlkit/models/ewc.py``) on two tasks of four images, in batches of one, with cross entropy;
``tqdm`` and the unpacking of a batch were replaced by trivial stand-ins. Its penalty has no factor 1/2.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from policies.adaptation import EWC, EWCConfig
from policies.encoders import Encoder, InputSpec

RECORDED = Path(__file__).parents[2] / "data" / "ewc.npz"


class Toy(Encoder):
    """The network of the recording."""

    def __init__(self):
        super().__init__(InputSpec())
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)
        self.linear = nn.Linear(64, 5)

    def forward(self, x):
        return self.linear(torch.relu(self.conv(x)).flatten(1))


class Linear(Encoder):
    """y = W x for images of 2 x 2 pixels."""

    def __init__(self):
        super().__init__(InputSpec())
        self.linear = nn.Linear(12, 3, bias=False)

    def forward(self, x):
        return self.linear(x.flatten(1))


def make(base=None, **options):
    torch.manual_seed(0)
    return EWC(EWCConfig(weights="random", **options), base or Linear())


@pytest.fixture
def image():
    return torch.rand(6, 2, 2, 3, generator=torch.Generator().manual_seed(0))


def weight(method):
    return method.network.encoder.linear.weight


def quadratic(method, image, generator):
    """Losses of a random regression."""
    return [(row - torch.randn(3, generator=generator)).square().sum() for row in method(image)]


def test_fisher_information_and_penalty_are_those_of_the_authors_code():
    with np.load(RECORDED) as archive:
        recorded = {name: torch.from_numpy(archive[name]) for name in archive.files}
    method = make(Toy(), coef=2.0).eval()
    names = [name for name, _ in method.network.encoder.named_parameters()]

    def load(stage):
        method.network.encoder.load_state_dict({name: recorded[f"{stage}.{name}"] for name in names})

    for task in range(2):
        load(task)
        part = slice(4 * task, 4 * task + 4)
        losses = F.cross_entropy(method(recorded["image"][part]), recorded["label"][part], reduction="none")
        expected = torch.cat([recorded[f"{task}.{name}.fisher"].flatten() for name in names])
        torch.testing.assert_close(method.fisher(losses), expected, rtol=1e-5, atol=1e-5)
        method.finish_task(losses)
    load(2)
    penalty = method.penalty()
    torch.testing.assert_close(penalty, recorded["penalty"], rtol=1e-5, atol=1e-5)
    penalty.backward()
    for name, parameter in method.network.encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, recorded[f"{name}.gradient"], rtol=1e-4, atol=1e-4)


def test_the_fisher_information_of_a_linear_model_with_gaussian_noise_is_known(image):
    # y ~ N(W x, s^2): F of W[i, j] is E[x_j^2] / s^2 for every i. Noise of exactly +-s has the variance s^2.
    spread = 0.3
    method = make()
    x = method.network.encoder.preprocess(image).flatten(1)
    noise = spread * torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).sign()
    means = method(image)
    losses = (means - (means + noise).detach()).square().sum(1) / (2 * spread**2)
    expected = (x.square().mean(0) / spread**2).repeat(3)
    torch.testing.assert_close(method.fisher(losses), expected)


def test_without_a_finished_task_there_is_no_penalty(image):
    method = make()
    with torch.no_grad():
        weight(method).add_(1)
    penalty = method.penalty()
    assert penalty.shape == ()
    assert penalty.item() == 0
    penalty.backward()
    assert not weight(method).grad.any()


def test_the_penalty_is_a_spring_to_the_weights_at_the_end_of_the_task(image):
    method = make(coef=3.0)
    losses = quadratic(method, image, torch.Generator().manual_seed(1))
    importance = method.fisher(losses)
    method.finish_task(losses)
    assert method.penalty().item() == 0
    shift = torch.randn(3, 12, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        weight(method).add_(shift)
    penalty = method.penalty()
    torch.testing.assert_close(penalty, 1.5 * (importance * shift.flatten().square()).sum())
    penalty.backward()
    torch.testing.assert_close(weight(method).grad, 3.0 * importance.view(3, 12) * shift)


def test_training_a_second_task_ends_at_the_minimum_in_closed_form(image):
    # a / 2 (w - b)^2 + coef / 2 F (w - w*)^2 is least at (a b + coef F w*) / (a + coef F).
    method = make(coef=10.0)
    method.finish_task(quadratic(method, image, torch.Generator().manual_seed(1)))
    method.start_task("second")
    importance, anchor = method.importance.view(3, 12).clone(), weight(method).detach().clone()
    stiffness, wish = 2.0, torch.randn(3, 12, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.LBFGS(method.parameters(), lr=1.0, max_iter=200, tolerance_grad=1e-9)

    def loss():
        optimizer.zero_grad()
        value = stiffness / 2 * (weight(method) - wish).square().sum() + method.penalty()
        value.backward()
        return value

    optimizer.step(loss)
    expected = (stiffness * wish + 10 * importance * anchor) / (stiffness + 10 * importance)
    torch.testing.assert_close(weight(method).detach(), expected, rtol=1e-3, atol=1e-3)
    # Weights without importance go where they are wanted, important ones stay.
    assert (importance > 1).any()


def run_tasks(method, image, number):
    """Finishes tasks at random weights; the weights and the Fisher information of each."""
    generator = torch.Generator().manual_seed(5)
    ends = []
    for task in range(number):
        method.start_task(f"task{task}")
        with torch.no_grad():
            weight(method).copy_(torch.randn(3, 12, generator=generator))
            # The first pixel is grey, 0 to the network, and never matters.
            image = image.clone()
            image[:, 0, 0] = 0.5
        losses = quadratic(method, image, generator)
        ends.append((weight(method).detach().flatten().clone(), method.fisher(losses)))
        method.finish_task(losses)
    with torch.no_grad():
        weight(method).copy_(torch.randn(3, 12, generator=generator))
    return ends


def test_springs_of_several_tasks_add_up(image):
    method = make(coef=4.0)
    ends = run_tasks(method, image, 3)
    now = weight(method).flatten()
    expected = 2.0 * sum((importance * (now - end).square()).sum() for end, importance in ends)
    (wanted,) = torch.autograd.grad(expected, weight(method))
    penalty = method.penalty()
    torch.testing.assert_close(penalty, expected)
    (found,) = torch.autograd.grad(penalty, weight(method))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    assert torch.isfinite(method.anchor).all()
    assert not method.importance.view(3, 3, 4)[:, :, 0].any()


def test_online_there_is_one_spring_to_the_latest_weights(image):
    method = make(coef=4.0, earlier_tasks="online", decay=0.5)
    ends = run_tasks(method, image, 3)
    importance = 0.25 * ends[0][1] + 0.5 * ends[1][1] + ends[2][1]
    expected = 2.0 * (importance * (weight(method).flatten() - ends[2][0]).square()).sum()
    torch.testing.assert_close(method.penalty(), expected)


def test_weights_that_mattered_move_less_than_in_fine_tuning(image):
    torch.manual_seed(1)
    target = torch.randn(6, 3)
    moved = {}
    for coef in (0.0, 1e3):
        method = make(coef=coef)
        method.finish_task(quadratic(method, image, torch.Generator().manual_seed(1)))
        start = weight(method).detach().clone()
        optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
        for _ in range(50):
            optimizer.zero_grad()
            ((method(image) - target).square().mean() + method.penalty()).backward()
            optimizer.step()
        moved[coef] = (weight(method) - start).norm().item()
    assert moved[1e3] < 0.1 * moved[0.0]


def test_no_more_samples_are_asked_for_than_needed(image):
    method = make(fisher_samples=3)
    asked = []

    def losses():
        for row in range(6):
            asked.append(row)
            yield method(image[row : row + 1]).square().sum()

    found = method.fisher(losses())
    assert asked == [0, 1, 2]
    torch.testing.assert_close(found, method.fisher(method(image[:3]).square().sum(1)))


def test_what_was_finished_is_saved_and_stored(image):
    method = make()
    run_tasks(method, image, 2)
    for take, give in ((EWC.load_state_dict, method.state_dict()), (EWC.load_delta, method.delta())):
        other = make()
        other.start_task("task1")
        take(other, give)
        torch.testing.assert_close(other.penalty(), method.penalty(), rtol=0, atol=0)


def test_losses_that_give_no_estimate_are_refused(image):
    method = make()
    with pytest.raises(ValueError, match="no losses to estimate"):
        method.finish_task([])
    with pytest.raises(ValueError, match=r"loss of shape \(6, 3\): expected one scalar a sample"):
        method.finish_task([method(image)])
    with pytest.raises(ValueError, match="loss 0 is not connected"):
        method.finish_task([torch.ones(())])
    with pytest.raises(ValueError, match="not all finite"):
        method.finish_task([method(image).sum() / 0])
    assert method.penalty().item() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coef": -1.0}, "coef -1.0: expected 0 or more"),
        ({"coef": float("inf")}, "coef inf"),
        ({"fisher_samples": 0}, "fisher_samples 0"),
        ({"earlier_tasks": "mean"}, "earlier_tasks 'mean': expected one of sum, online"),
        ({"earlier_tasks": "online", "decay": 1.5}, "decay 1.5: expected a value in 0..1"),
        ({"decay": 0.5}, "'sum', which forgets nothing; use 'online'"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EWCConfig(**options)
