"""Columns for tasks, and connections between them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from policies.adaptation import Progressive, ProgressiveConfig
from policies.encoders import BlockEncoder, InputSpec, make_encoder


class Toy(BlockEncoder):
    """Blocks of one convolution, whose arithmetic can be written down again."""

    def __init__(self):
        super().__init__(InputSpec())
        self.first = nn.Conv2d(3, 4, 1)
        self.chain = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 6, 2, 2)])

    @property
    def blocks(self):
        return list(self.chain)

    def stem(self, x):
        return self.first(x)

    def neck(self, x):
        return x.mean((2, 3))


def make(base=None, seed=0, **options):
    torch.manual_seed(seed)
    return Progressive(ProgressiveConfig(weights="random", **options), base or Toy())


def disturb(method, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in method.adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.fixture
def image():
    return torch.rand(3, 8, 8, 3, generator=torch.Generator().manual_seed(0))


def by_hand(method, image, lateral):
    """Equation 1 or 2 written out, column after column, from the weights alone."""
    frozen = method.base.encoder
    pixels = frozen.preprocess(image)
    networks = [frozen, *(method.adapters[task].network.encoder for task in method.tasks)]
    joints = [None, *(method.adapters[task].laterals for task in method.tasks)]
    h = [F.conv2d(pixels, net.first.weight, net.first.bias) for net in networks]
    for depth in range(3):
        entered = []
        for k in range(len(networks)):
            total = h[k]
            if k and lateral == "linear":
                for j in range(k):
                    u = joints[k][depth].u[j].weight[:, :, 0, 0]
                    total = total + torch.einsum("oc,nchw->nohw", u, h[j])
            elif k:
                joint = joints[k][depth]
                joined = torch.cat([joint.alpha[j] * h[j] for j in range(k)], 1)
                hidden = torch.einsum("oc,nchw->nohw", joint.v.weight[:, :, 0, 0], joined).relu()
                total = total + torch.einsum("oc,nchw->nohw", joint.u.weight[:, :, 0, 0], hidden)
            entered.append(total)
        if depth < 2:
            layers = [net.chain[depth] for net in networks]
            h = [F.conv2d(x, w.weight, w.bias, w.stride) for w, x in zip(layers, entered, strict=True)]
    return [x.mean((2, 3)) for x in entered[1:]]


@pytest.mark.parametrize("lateral", ["linear", "nonlinear"])
@pytest.mark.parametrize("init", ["random", "copy"])
def test_columns_compute_the_paper_s_equation(lateral, init, image):
    method = make(lateral=lateral, column_init=init)
    for task in ("task", "second", "third"):
        method.start_task(task)
        disturb(method)
    expected = by_hand(method, image, lateral)
    for task, features in zip(method.tasks, expected, strict=True):
        method.start_task(task)
        torch.testing.assert_close(method(image), features, rtol=1e-4, atol=1e-5)


def test_tokens_are_connected_token_by_token():
    method = make(make_encoder("vit_mini_tokens", weights="random").eval(), column_init="copy").eval()
    image = torch.rand(2, 64, 64, 3)
    weight = method.adapter.laterals[6].u[0].weight
    nn.init.normal_(weight, std=0.1)
    frozen = method.base.encoder
    # All but the last connection still add nothing, so that up to the neck the column is the base.
    last = method._base_taps(frozen.preprocess(image))[-1]
    expected = frozen.neck(last + torch.einsum("oc,ntc->nto", weight, last))
    torch.testing.assert_close(method(image), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, frozen.neck(last), atol=1e-2)
    assert method(image).shape == (2, 65, 96)


@pytest.mark.parametrize("lateral", ["linear", "nonlinear"])
def test_a_copied_column_starts_as_the_base_and_learns_from_it(lateral, image):
    base = make_encoder("resnet44", weights="random").eval()
    method = make(base, column_init="copy", lateral=lateral)
    for mode in (True, False):
        torch.testing.assert_close(method.train(mode)(image), method.base(image), rtol=0, atol=0)
    method(image).square().sum().backward()
    connections = [joint.u for joint in method.adapter.laterals]
    weights = [p for u in connections for p in u.parameters()]
    assert len(weights) == 22
    assert all(p.grad.abs().sum() > 0 for p in weights)


def test_a_random_column_is_a_network_of_its_own(image):
    base = make_encoder("resnet_small", weights="random").eval()
    method = make(base)
    own = method.adapter.network.encoder
    assert not any(
        torch.equal(p, b) and p.std() > 0
        for p, b in zip(own.parameters(), method.base.encoder.buffers(), strict=True)
    )
    for joint in method.adapter.laterals:
        joint.silence()
    torch.testing.assert_close(method(image), own(own.preprocess(image)), rtol=0, atol=0)


@pytest.mark.parametrize("init", ["random", "copy"])
def test_learning_a_task_leaves_what_earlier_ones_compute_to_the_bit(init, image):
    method = make(make_encoder("resnet44", weights="random"), column_init=init).train()
    optimizer = torch.optim.Adam(method.trainable_parameters(), lr=0.01)
    method(image).square().sum().backward()
    optimizer.step()
    first = method.eval()(image)
    state = {k: v.clone() for k, v in method.state_dict().items()}
    method.start_task("second")
    method.train()
    optimizer = torch.optim.Adam(method.trainable_parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        method(image).square().sum().backward()
        optimizer.step()
    assert not any(p.grad is not None for p in method.adapters["task"].parameters())
    assert all(torch.equal(method.state_dict()[k], v) for k, v in state.items())
    method.start_task("task")
    assert torch.equal(method.eval()(image), first)


def test_a_later_column_draws_on_every_earlier_one(image):
    method = make()
    method.start_task("second")
    before = method(image)
    for changed in ("task", "base"):
        earlier = method.adapters["task"].network.encoder if changed == "task" else method.base.encoder
        kept = earlier.chain[0].weight.detach().clone()
        with torch.no_grad():
            earlier.chain[0].weight.add_(1)
            assert not torch.allclose(method(image), before, atol=1e-3)
            earlier.chain[0].weight.copy_(kept)
    method.start_task("task")
    first = method(image)
    with torch.no_grad():
        method.adapters["second"].network.encoder.chain[0].weight.add_(1)
    assert torch.equal(method(image), first)


def test_only_the_current_task_s_column_is_in_training_mode():
    method = make(make_encoder("resnet44", weights="random")).train()
    method.start_task("second")
    assert not any(m.training for m in method.adapters["task"].modules())
    assert method.adapters["second"].network.encoder.bn1.training
    method.start_task("task")
    assert method.adapters["task"].network.encoder.bn1.training
    assert not any(m.training for m in method.adapters["second"].modules())
    copied = make(make_encoder("resnet44", weights="random"), column_init="copy").train()
    assert not copied.adapter.network.encoder.bn1.training


@pytest.mark.parametrize("lateral", ["linear", "nonlinear"])
def test_connections_grow_with_the_number_of_earlier_columns(lateral):
    base = make_encoder("resnet_small", weights="random")
    column = sum(p.numel() for p in base.parameters())
    method = make(base, lateral=lateral)
    for earlier in (1, 2, 3):
        # A stem and seven blocks of 32 channels: eight joints.
        joint = earlier * 32 * 32 if lateral == "linear" else earlier * (32 * 32 + 1) + 32 * 32
        assert sum(p.numel() for p in method.trainable_parameters()) == column + 8 * joint
        method.start_task(f"after {earlier}")


def test_stored_taps_spare_the_base_s_pass_and_are_many_times_the_image():
    method = make(make_encoder("resnet_small", weights="random"), store_taps=True)
    image = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    stored = method.base_features(image)
    assert sum(v.nbytes for v in stored.values()) == 2 * 90_112
    calls = []
    for block in method.base.encoder.blocks:
        block.register_forward_hook(lambda *call: calls.append(1))
    # Named, not counted: a buffer may give them in another order.
    again = method(image, dict(reversed(stored.items())))
    assert not calls
    torch.testing.assert_close(again, method(image), rtol=0, atol=0)
    assert len(calls) == 7


def test_a_state_of_several_tasks_is_restored(image):
    method = make(lateral="nonlinear")
    method.start_task("second")
    disturb(method)
    other = make(seed=5, lateral="nonlinear")
    other.base.load_state_dict(method.base.state_dict())
    other.start_task("second")
    other.load_delta(method.delta())
    for task in ("task", "second"):
        method.start_task(task)
        other.start_task(task)
        assert torch.equal(other(image), method(image))


def test_wrong_settings_and_encoders_without_blocks_are_refused():
    with pytest.raises(ValueError, match="column_init 'zero'"):
        ProgressiveConfig(column_init="zero")
    with pytest.raises(ValueError, match="lateral 'mlp'"):
        ProgressiveConfig(lateral="mlp")
    with pytest.raises(ValueError, match="'fcn5_small' has none"):
        Progressive(ProgressiveConfig(weights="random"))
