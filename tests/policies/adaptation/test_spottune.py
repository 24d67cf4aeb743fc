"""Routing between frozen and fine-tuned blocks.

``tests/data/spottune.npz`` was recorded with the authors' code (github.com/gyhui14/spottune, only version):
``spottune_models.resnet26`` with its ``policy``, ``agent_net.resnet`` and ``gumbel_softmax``, made narrow
(widths 2 and 4, 8, 16 instead of 32 and 64, 128, 256) with [2, 1, 1] blocks, random weights and random
BatchNorm statistics, in evaluation mode. To run on today's Python and torch, tabs in the indentation became
spaces, ``torch.cuda.FloatTensor(shape).uniform_()`` became ``torch.rand(shape)``, and ReLUs no longer change
their input in place, since torch now refuses the backward pass. Recorded are the uniform draws, the agent's
logits, the one-hot actions, the features before the classifier, and gradients of the sum of their squares.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from policies.adaptation import SpotTune, SpotTuneConfig
from policies.adaptation.routing import PolicyNetwork, choose_path, choose_subset, gumbel
from policies.encoders import BlockEncoder, InputSpec, make_encoder

RECORDED = Path(__file__).parents[2] / "data" / "spottune.npz"


class Affine(nn.Module):
    """A block whose effect can be followed by hand, and which counts what it computed."""

    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.rows = []

    def forward(self, x):
        self.rows.append(len(x))
        return x * self.scale + 1


class Toy(BlockEncoder):
    def __init__(self, scales=(2.0, -1.0, 0.5)):
        super().__init__(InputSpec())
        self.first = nn.Parameter(torch.tensor(1.5))
        self.chain = nn.ModuleList(Affine(scale) for scale in scales)
        self.last = nn.Linear(3, 2)

    @property
    def blocks(self):
        return list(self.chain)

    def preprocess(self, image):
        return super().preprocess(image).to(self.first.dtype)

    def stem(self, x):
        return self.first * x

    def neck(self, x):
        return self.last(x.mean((2, 3)))


def make(base=None, seed=0, **options):
    torch.manual_seed(seed)
    return SpotTune(SpotTuneConfig(weights="random", **options), base or Toy())


def disturb(method, seed=1, by=0.2):
    """Moves copies and policy away from where they started, so that paths and routes differ."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in method.adapter.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return method


@pytest.fixture
def image():
    return torch.rand(6, 16, 16, 3, generator=torch.Generator().manual_seed(0))


def routed(monkeypatch, method, decisions):
    """Lets every image take the given path (L,) or paths (N, L)."""
    routes = torch.as_tensor(decisions, dtype=torch.float32)
    monkeypatch.setattr(method, "_routes", lambda pixels: routes.expand(len(pixels), -1))


# Routing


def test_noise_and_actions_are_those_of_the_released_code():
    data = {k: torch.from_numpy(v) for k, v in np.load(RECORDED).items()}
    routes = choose_path(data["logits"], 5.0, gumbel(data["uniform"]))
    torch.testing.assert_close(routes, data["action"][..., 1], rtol=0, atol=1e-6)
    assert 0 < routes.mean() < 1


def test_decisions_are_hard_and_their_gradient_is_that_of_the_softmax():
    logits = torch.randn(50, 4, 2, requires_grad=True)
    noise, seen = gumbel(torch.rand_like(logits)), torch.randn(50, 4)
    hard = choose_path(logits, 5.0, noise)
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    (found,) = torch.autograd.grad((hard * seen).sum(), logits)
    soft = torch.softmax((logits + noise) / 5.0, -1)[..., 1]
    (expected,) = torch.autograd.grad((soft * seen).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert found.abs().sum() > 0


def test_drawn_paths_have_the_probability_of_their_logits():
    torch.manual_seed(0)
    logits = torch.tensor([0.3, -0.8]).expand(20_000, 2)
    drawn = choose_path(logits, 5.0, gumbel(torch.rand_like(logits)))
    # One standard deviation of the mean is 0.003.
    assert drawn.mean().item() == pytest.approx(torch.softmax(logits[0], 0)[1].item(), abs=0.012)


def test_extreme_uniform_draws_stay_finite():
    assert torch.isfinite(gumbel(torch.tensor([0.0, 1e-38, 1.0 - 2**-24, 1.0]))).all()


def test_a_subset_has_its_size_and_takes_the_best():
    logits = torch.tensor([0.1, 3.0, -1.0, 2.0, 3.0])
    for count in range(1, 6):
        assert choose_subset(logits, count, 5.0).sum() == count
    assert choose_subset(logits, 3, 5.0).tolist() == [0, 1, 0, 1, 1]
    assert choose_subset(torch.zeros(5), 2, 5.0).tolist() == [1, 1, 0, 0, 0]


def test_a_drawn_subset_is_a_draw_without_replacement():
    torch.manual_seed(0)
    logits = torch.tensor([1.0, 0.0, -1.0])
    draws = torch.stack([choose_subset(logits, 2, 5.0, gumbel(torch.rand(3))) for _ in range(3000)])
    p = torch.softmax(logits, 0).tolist()
    # Thing 2 is drawn first, or second after either of the others.
    expected = p[2] + p[0] * p[2] / (1 - p[0]) + p[1] * p[2] / (1 - p[1])
    # One standard deviation of the mean is 0.008.
    assert draws[:, 2].mean().item() == pytest.approx(expected, abs=0.035)
    assert (draws.sum(1) == 2).all()


def test_a_subset_of_one_has_the_gradient_of_the_gumbel_softmax():
    logits = torch.randn(5, requires_grad=True)
    noise, seen = gumbel(torch.rand(5)), torch.randn(5)
    (found,) = torch.autograd.grad(choose_subset(logits, 1, 2.0, noise) @ seen, logits)
    (expected,) = torch.autograd.grad(torch.softmax((logits + noise) / 2.0, 0) @ seen, logits)
    torch.testing.assert_close(found, expected)


def test_a_relaxed_subset_sums_to_its_size():
    # So that the gradient of the number of chosen things is 0: no logit gains by all of them rising.
    logits = torch.randn(6, requires_grad=True)
    (gradient,) = torch.autograd.grad(choose_subset(logits, 3, 1.0).sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros(6), rtol=0, atol=1e-6)


def test_the_policy_network_has_the_released_size():
    network = PolicyNetwork(3, 12, width=32, size=64, norm="batch")
    assert sum(p.numel() for p in network.parameters()) == 1_170_616


def test_routes_without_batchnorm_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    image = torch.randn(5, 3, 20, 20)
    for norm, alone in (("group", True), ("batch", False)):
        network = PolicyNetwork(3, 4, width=4, size=16, norm=norm).train()
        found, expected = network(image[:2]), network(image)[:2]
        assert torch.allclose(found, expected, atol=1e-5) == alone


# The whole network, against the authors'


class AuthorsBlock(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.stride = outputs // inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.avg_pool2d(x, 2)
            x = torch.cat((x, 0 * x), 1)
        return F.relu(x + y)


class AuthorsResNet(BlockEncoder):
    def __init__(self):
        super().__init__(InputSpec(mean=(0.0,), std=(1.0,)))
        self.conv1 = nn.Conv2d(3, 2, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(2)
        self.chain = nn.ModuleList(AuthorsBlock(i, o) for i, o in ((2, 4), (4, 4), (4, 8), (8, 16)))
        self.bn2 = nn.BatchNorm2d(16)

    @property
    def blocks(self):
        return list(self.chain)

    def stem(self, x):
        return self.bn1(self.conv1(x))

    def neck(self, x):
        return F.relu(self.bn2(x)).mean((2, 3))


BLOCKS = ("0.0", "0.1", "1.0", "2.0")


def recorded(data, prefix, renamed):
    """Recorded tensors whose names begin with ``prefix``, under our names."""
    found = {}
    for name, value in data.items():
        if name.startswith(prefix):
            name = name.removeprefix(prefix).replace("conv2.1.", "conv2.")
            for old, new in renamed:
                name = new + name.removeprefix(old) if name.startswith(old) else name
            found[name] = value
    return found


def test_routes_features_and_gradients_are_those_of_the_released_code(monkeypatch):
    data = {k: torch.from_numpy(v) for k, v in np.load(RECORDED).items()}
    chain = [(f"blocks.{old}.", f"chain.{new}.") for new, old in enumerate(BLOCKS)]
    net = recorded(data, "net.", [*chain, ("bn2.0.", "bn2.")])
    base = AuthorsResNet()
    base.load_tensors({k: v for k, v in net.items() if not k.startswith("parallel")})
    method = make(base, policy_width=2, policy_size=64, policy_norm="batch")
    tuned = recorded(data, "net.parallel_", [(f"blocks.{old}.", f"{new}.") for new, old in enumerate(BLOCKS)])
    policy = method.adapter.policy
    agent = recorded(
        data,
        "agent.",
        [
            *((f"blocks.{stage}.0.", f"blocks.{stage}.") for stage in range(3)),
            ("bn2.0.", "last_norm."),
            ("conv1.", "conv."),
            ("bn1.", "norm."),
        ],
    )
    agent = {n.replace(".bn", ".norm"): v for n, v in agent.items()}
    for module, tensors in ((method.adapter.blocks, tuned), (policy, agent)):
        missing = module.load_state_dict(tensors, strict=False)
        assert not missing.unexpected_keys
        assert all(name.endswith("num_batches_tracked") for name in missing.missing_keys)
    method.train()
    policy.eval()
    logits = []
    policy.register_forward_hook(lambda *call: call[2].retain_grad() or logits.append(call[2]))
    monkeypatch.setattr(torch, "rand_like", lambda like: data["uniform"])
    features = method(data["x"].permute(0, 2, 3, 1))
    torch.testing.assert_close(logits[0], data["logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features, data["features"], rtol=1e-5, atol=1e-5)
    features.square().sum().backward()
    torch.testing.assert_close(logits[0].grad, data["logits_grad"], rtol=1e-4, atol=1e-5)
    found = method.adapter.blocks[1].conv1.weight.grad
    torch.testing.assert_close(found, data["tuned_grad"], rtol=1e-4, atol=1e-5)
    # What evaluation computes, one path for each image, is what the authors compute by mixing both.
    method.eval()
    routed(monkeypatch, method, data["action"][..., 1])
    torch.testing.assert_close(method(data["x"].permute(0, 2, 3, 1)), data["features"], rtol=1e-5, atol=1e-5)


# Paths


@pytest.mark.parametrize("mode", [True, False])
def test_the_frozen_path_is_the_base_whatever_the_copies_learned(mode, monkeypatch, image):
    base = make_encoder("resnet44", weights="random").eval()
    method = disturb(make(base)).train(mode)
    routed(monkeypatch, method, torch.zeros(21))
    torch.testing.assert_close(method(image), method.base(image), rtol=0, atol=0)
    routed(monkeypatch, method, torch.ones(21))
    assert not torch.allclose(method(image), method.base(image), atol=1e-3)


@pytest.mark.parametrize("mode", [True, False])
def test_copies_start_as_the_base(mode, monkeypatch, image):
    base = make_encoder("resnet44", weights="random").eval()
    method = make(base).train(mode)
    routed(monkeypatch, method, torch.ones(21))
    torch.testing.assert_close(method(image), method.base(image), rtol=0, atol=0)


def test_a_mixture_is_what_following_the_routes_by_hand_gives(monkeypatch, image):
    method = disturb(make())
    routes = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 0], [0, 1, 1]]).float()
    routed(monkeypatch, method, routes)
    frozen, tuned = method.base.encoder, method.adapter.blocks
    expected = []
    for pixels, route in zip(image, routes.bool().tolist(), strict=True):
        x = frozen.stem(frozen.preprocess(pixels[None]))
        for own, copied, fine in zip(frozen.blocks, tuned, route, strict=True):
            x = (copied if fine else own)(x)
        expected.append(frozen.neck(x))
    for mode in (True, False):
        torch.testing.assert_close(method.train(mode)(image), torch.cat(expected), rtol=1e-5, atol=1e-6)


def test_evaluation_computes_one_path_for_each_image(monkeypatch, image):
    method = disturb(make()).eval()
    routed(monkeypatch, method, [[1, 0, 1], [0, 0, 1], [1, 0, 1], [0, 0, 1], [1, 0, 1], [0, 0, 1]])
    method(image)
    assert [block.rows for block in method.base.encoder.blocks] == [[3], [6], []]
    assert [block.rows for block in method.adapter.blocks] == [[3], [], [6]]
    method.train()(image)
    assert [block.rows[-1] for block in (*method.base.encoder.blocks, *method.adapter.blocks)] == [6] * 6


def test_evaluation_takes_the_likeliest_path_or_draws_one(image):
    method = disturb(make()).eval()
    logits = method.adapter.policy(method.base.encoder.preprocess(image))
    assert torch.equal(method.routes(image), logits.argmax(-1).float())
    drawing = make(evaluation="sample").eval()
    drawing.load_state_dict(method.state_dict())
    torch.manual_seed(0)
    draws = torch.stack([drawing.routes(image) for _ in range(400)])
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    # One standard deviation of each mean is at most 0.025.
    torch.testing.assert_close(draws.mean(0), logits.softmax(-1)[..., 1].detach(), rtol=0, atol=0.1)


def test_without_noise_the_network_that_learns_is_the_one_that_acted(image):
    method = disturb(make(make_encoder("resnet44", weights="random").eval(), noise=False), by=0.02)
    torch.testing.assert_close(method.train()(image), method.eval()(image), rtol=1e-5, atol=1e-6)
    noisy = disturb(make(make_encoder("resnet44", weights="random").eval()), by=0.02)
    assert not torch.allclose(noisy.train()(image), noisy.eval()(image), atol=1e-3)


# Gradients


def test_the_gradient_of_routing_is_that_of_the_soft_relaxation(image):
    method = disturb(make(temperature=2.0, noise=False).double()).train()
    frozen, tuned = method.base.encoder, method.adapter.blocks
    pixels = frozen.preprocess(image)
    logits = method.adapter.policy(pixels).detach()

    def loss(routes):
        x = frozen.stem(pixels)
        for index, (own, copied) in enumerate(zip(frozen.blocks, tuned, strict=True)):
            part = routes[:, index].view(-1, 1, 1, 1)
            x = (1 - part) * own(x) + part * copied(x)
        return frozen.neck(x).square().sum().item()

    # By finite differences: of the loss by each route, then of the softmax by each logit.
    step, expected = 1e-5, torch.zeros_like(logits)
    hard = logits.argmax(-1).double()
    for image_index, block in np.ndindex(*hard.shape):
        move = torch.zeros_like(hard)
        move[image_index, block] = step
        by_route = (loss(hard + move) - loss(hard - move)) / (2 * step)
        for path in range(2):
            shift = torch.zeros(2, dtype=torch.float64)
            shift[path] = step
            here = logits[image_index, block]
            up, down = (torch.softmax((here + sign * shift) / 2.0, 0)[1] for sign in (1, -1))
            expected[image_index, block, path] = by_route * (up - down) / (2 * step)
    leaf = []
    method.adapter.policy.register_forward_hook(lambda *call: call[2].retain_grad() or leaf.append(call[2]))
    x = method(image)
    x.square().sum().backward()
    assert leaf[0].grad.abs().min() > 0
    torch.testing.assert_close(leaf[0].grad, expected, rtol=1e-3, atol=1e-4)


def test_only_copies_that_were_chosen_learn_and_so_does_the_policy(monkeypatch, image):
    method = disturb(make(noise=False)).train()
    with torch.no_grad():
        method.adapter.policy.linear.weight.zero_()
        method.adapter.policy.linear.bias.copy_(torch.tensor([0.0, 1, 1, 0, 0, 1]))
    method(image).square().sum().backward()
    gradients = [block.scale.grad.item() for block in method.adapter.blocks]
    assert [gradient != 0 for gradient in gradients] == [True, False, True]
    assert method.adapter.policy.conv.weight.grad is not None
    assert method.adapter.policy.linear.bias.grad.abs().min() > 0
    assert method.metrics() == {"tuned_share": pytest.approx(2 / 3)}


def test_ends_are_copied_and_learn_only_where_asked(image):
    assert not any("ends" in name for name, _ in make().named_parameters())
    method = disturb(make(train_ends=True)).train()
    assert {n.split("ends.")[1] for n, _ in method.named_parameters() if "ends." in n} == {
        "first",
        "last.weight",
        "last.bias",
    }
    method(image).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in method.named_parameters() if "ends." in n)


def test_pretrained_batchnorm_statistics_of_copies_do_not_drift(image):
    method = make(make_encoder("resnet44", weights="random"), policy_norm="batch").train()
    before = {k: v.clone() for k, v in method.state_dict().items() if "running" in k}
    method(image)
    moved = {k for k, v in method.state_dict().items() if k in before and not torch.equal(v, before[k])}
    assert moved
    assert all(".policy." in name for name in moved)


# Tasks and the global variant


def test_each_task_has_its_own_copies_and_policy(image):
    method = disturb(make()).eval()
    first = method(image)
    method.start_task("second")
    torch.testing.assert_close(method(image), method.base(image))
    disturb(method, seed=5)
    method.start_task("task")
    torch.testing.assert_close(method(image), first, rtol=0, atol=0)


def test_the_global_variant_tunes_exactly_k_blocks_for_every_image(image):
    method = disturb(make(Toy((2, -1, 0.5, 3, 1)), global_k=2))
    assert method.adapter.policy is None
    torch.manual_seed(0)
    chosen = set()
    for _ in range(20):
        routes = method.train().routes(image)
        assert (routes == routes[0]).all()
        assert routes[0].sum() == 2
        chosen.add(tuple(routes[0].tolist()))
    assert len(chosen) > 3
    routes = method.eval().routes(image)
    assert routes[0].nonzero().flatten().tolist() == method.chosen_blocks()
    method(image)
    called = [index for index, block in enumerate(method.adapter.blocks) if block.rows]
    assert called == method.chosen_blocks()


def test_the_global_variant_learns_which_block_matters(image):
    torch.manual_seed(0)
    method = make(Toy((1.0, 1.0, 1.0, 1.0)), global_k=1, temperature=1.0).train()
    with torch.no_grad():
        # The target is what the copy of block 2 gives; the other copies lead away from it.
        for block, scale in zip(method.adapter.blocks, (0.5, 0.5, 3.0, 0.5), strict=True):
            block.scale.fill_(scale)
        method.eval()
        method.adapter.logits.copy_(torch.tensor([0.0, 0.0, 5.0, 0.0]))
        target = method(image)
        method.adapter.logits.zero_()
    optimizer = torch.optim.Adam([method.adapter.logits], lr=0.05)
    method.train()
    for _ in range(60):
        optimizer.zero_grad()
        (method(image) - target).abs().mean().backward()
        optimizer.step()
    assert method.chosen_blocks() == [2]


def test_the_global_variant_stores_k_copies_and_is_restored_from_them(image):
    method = disturb(make(Toy((2, -1, 0.5, 3, 1)), global_k=2)).eval()
    method.start_task("second")
    disturb(method, seed=7)
    delta = method.delta()
    for task in method.tasks:
        stored = {int(name.split(".")[3]) for name in delta if f".{task}.blocks." in name}
        assert sorted(stored) == method.chosen_blocks(task)
    other = disturb(make(Toy((2, -1, 0.5, 3, 1)), global_k=2), seed=9).eval()
    other.start_task("second")
    disturb(other, seed=11)
    assert other.chosen_blocks() != method.chosen_blocks()
    other.base.load_state_dict(method.base.state_dict())
    other.load_delta(delta)
    torch.testing.assert_close(other(image), method(image), rtol=0, atol=0)
    for index, block in enumerate(other.adapter.blocks):
        same = torch.equal(block.scale, other.base.encoder.blocks[index].scale)
        assert same == (index not in other.chosen_blocks())


def test_a_refused_delta_leaves_the_global_variant_as_it_was():
    method = disturb(make(Toy((2, -1, 0.5, 3, 1)), global_k=2))
    before = {k: v.clone() for k, v in method.state_dict().items()}
    delta = disturb(make(Toy((2, -1, 0.5, 3, 1)), global_k=2), seed=9).delta()
    with pytest.raises(ValueError, match="unexpected stranger"):
        method.load_delta({**delta, "stranger": torch.zeros(1)})
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"evaluation": "mean"}, "evaluation 'mean'"),
        ({"policy_norm": "layer"}, "policy_norm 'layer'"),
        ({"policy_rate": 0.0}, "policy_rate 0.0: expected a value above 0"),
        ({"policy_rate": -0.1}, "policy_rate -0.1: expected a value above 0"),
        ({"policy_width": 0}, "policy_width 0"),
        ({"policy_size": 4}, "policy_size 4"),
        ({"global_k": 0}, "global_k 0"),
        ({"global_k": 2, "evaluation": "sample"}, "nothing to draw"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SpotTuneConfig(**options)


def test_more_blocks_than_there_are_and_encoders_without_blocks_are_refused():
    with pytest.raises(ValueError, match="global_k 4: encoder 'Toy' has 3 blocks"):
        make(global_k=4)
    with pytest.raises(ValueError, match="'fcn5_small' has none"):
        SpotTune(SpotTuneConfig(weights="random"))
    with pytest.raises(ValueError, match="each image chooses"):
        make().chosen_blocks()
