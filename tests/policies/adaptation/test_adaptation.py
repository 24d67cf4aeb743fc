"""Every method against every behaviour; a new method joins by its rows in ``adaptation_cases``."""

import copy
import re

import gymnasium
import numpy as np
import pytest
import torch
from adaptation_cases import CASES
from gymnasium import spaces
from stable_baselines3 import PPO
from torch import nn

from policies.actor_critic import NavigationPolicy
from policies.adaptation import ADAPTATIONS, make_adaptation
from policies.adaptation.options import method_options
from policies.encoders import make_encoder, wrap_encoder
from policies.extractor import AdaptedExtractor

FROZEN = [name for name, row in CASES.items() if row.frozen_base]
TRAINING = [name for name, row in CASES.items() if row.trains]
STEPS = 20


def make(case, seed=0, base=None):
    torch.manual_seed(seed)
    row = CASES[case]
    return make_adaptation(row.method, base, **{"weights": "random", **row.options})


def images(case, number=3, size=None):
    rows, columns = size or CASES[case].size
    channels = CASES[case].options.get("channels", 3)
    generator = torch.Generator().manual_seed(1)
    if channels == 1:
        return torch.rand(number, rows, columns, 1, generator=generator)
    return torch.randint(0, 256, (number, rows, columns, 3), dtype=torch.uint8, generator=generator)


def disturbed(case):
    """A method some way into its training: what cancels out at initialisation no longer does."""
    method = make(case)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in method.parameters():
            spread = 0.1 * parameter.std() if parameter.numel() > 1 else torch.zeros(())
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((0.01 + spread.nan_to_num()) * noise)
    return method


class Learner(nn.Module):
    """A method and a linear head, as a supervised loop has them."""

    def __init__(self, case):
        super().__init__()
        self.method = make(case)
        size = torch.Size(self.method.output_shape(*CASES[case].size)).numel()
        self.head = nn.Linear(size, 2)

    def forward(self, image):
        return self.head(self.method(image).flatten(1))

    def optimizer(self, kind, **options):
        groups = [*self.method.parameter_groups(0.1), {"params": self.head.parameters()}]
        return kind([group for group in groups if group["params"]], **options)


def learn(learner, case, steps, optimizer):
    """Losses of a regression on two images."""
    image, target = images(case, 2), torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    losses = []
    for step in range(steps):
        learner.method.set_progress(step * 2, steps * 2)
        loss = (learner(image) - target).square().mean() + learner.method.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_every_method_has_a_case():
    assert {row.method for row in CASES.values()} == set(ADAPTATIONS)


@pytest.mark.parametrize("case", CASES)
def test_output_has_the_declared_shape(case):
    method = make(case)
    assert method(images(case)).shape == (3, *method.output_shape(*CASES[case].size))


@pytest.mark.parametrize("case", CASES)
def test_one_image_gives_what_it_gives_in_a_batch_and_can_be_learned_from(case):
    method = disturbed(case).eval()
    image = images(case)
    torch.testing.assert_close(method(image[:1]), method(image)[:1], rtol=1e-4, atol=1e-4)
    output = method.train()(image[:1])
    assert torch.isfinite(output).all()
    if CASES[case].trains:
        output.float().square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize("case", CASES)
def test_stored_features_change_nothing(case):
    method = make(case).eval()
    image = images(case)
    stored = method.base_features(image)
    assert bool(stored) == CASES[case].stores
    for value in stored.values():
        assert len(value) == len(image)
        assert value.dtype == torch.float32
        assert not value.requires_grad
    torch.testing.assert_close(method(image, stored), method(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", [name for name, row in CASES.items() if row.stores])
def test_stored_features_of_other_images_are_refused_with_their_shapes(case):
    method = make(case).eval()
    image = images(case)
    stored = method.base_features(image)
    first = next(iter(stored))
    for wrong in (1, 2):
        shape = re.escape(str((wrong, *stored[first].shape[1:])))
        given = re.escape(str(tuple(image.shape)))
        with pytest.raises(
            ValueError, match=f"features '{first}' of shape {shape} with images of shape {given}"
        ):
            method(image, {name: value[:wrong] for name, value in stored.items()})


@pytest.mark.parametrize("case", [name for name, row in CASES.items() if row.identity])
def test_before_it_learns_the_output_is_the_base_s(case):
    torch.manual_seed(5)
    options = CASES[case].options
    encoder = make_encoder(options.get("encoder", "fcn5_small"), options.get("channels", 3), "random").eval()
    image = images(case)
    with torch.no_grad():
        expected = encoder(encoder.preprocess(image))
    for mode in (True, False):
        method = make(case, base=encoder).train(mode)
        torch.testing.assert_close(method(image), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", FROZEN)
def test_the_base_survives_a_parent_that_thaws_and_trains_byte_for_byte(case):
    learner = Learner(case)
    base = learner.method.base
    before = {k: v.clone() for k, v in base.state_dict().items()}
    digest = base.sha256()
    learner.train()
    learner.requires_grad_(True)
    learn(learner, case, STEPS, torch.optim.Adam(learner.parameters(), lr=0.01, weight_decay=0.1))
    assert not any(module.training for module in base.modules())
    assert not any(value.requires_grad for value in [*base.parameters(), *base.buffers()])
    assert not list(base.parameters())
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert base.sha256() == digest


@pytest.mark.parametrize("case", TRAINING)
def test_a_supervised_loop_learns_and_changes_what_it_should(case):
    learner = Learner(case).train()
    before = {k: v.detach().clone() for k, v in learner.method.named_parameters()}
    losses = learn(learner, case, STEPS, learner.optimizer(torch.optim.Adam, lr=1e-3))
    assert np.mean(losses[-3:]) < losses[0]
    moved = {k for k, v in learner.method.named_parameters() if not torch.equal(v, before[k])}
    assert moved <= {k for k, v in learner.method.named_parameters() if v.requires_grad}
    assert moved


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_exactly_the_trainable_parameters(case):
    method = disturbed(case).train()
    reached = set()
    # A gate or a mask may leave some parameters out for one batch: over a few, each has its turn.
    for _ in range(4):
        output = method(images(case, 4))
        assert output.requires_grad == CASES[case].trains
        if output.requires_grad:
            output.float().square().sum().backward()
        reached |= {n for n, p in method.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    # Parameters of a method that does not train yet are the optimiser's, but nothing reaches them.
    learning = {n for n, p in method.named_parameters() if p.requires_grad}
    assert reached == (learning if CASES[case].trains else set())


@pytest.mark.parametrize("case", CASES)
def test_optimiser_groups_hold_each_trainable_parameter_once(case):
    method = make(case)
    grouped = [id(p) for group in method.parameter_groups(0.1) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in method.trainable_parameters())


@pytest.mark.parametrize("case", CASES)
def test_weight_decay_spares_exactly_what_the_method_says(case):
    method = make(case)
    names = {id(p): n for n, p in method.named_parameters()}
    spared, decayed = set(), set()
    for group in method.parameter_groups(0.1):
        assert group["weight_decay"] in (0.0, 0.1)
        (decayed if group["weight_decay"] else spared).update(names[id(p)] for p in group["params"])
    parts = CASES[case].no_decay
    assert {name for name in spared | decayed if any(part in name for part in parts)} == spared


@pytest.mark.parametrize("case", CASES)
def test_evaluation_is_deterministic_and_leaves_the_state_alone(case):
    method = disturbed(case).eval()
    before = {k: v.clone() for k, v in method.state_dict().items()}
    image = images(case)
    torch.testing.assert_close(method(image), method(image), rtol=0, atol=0)
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    assert not any(module.training for module in method.modules())


@pytest.mark.parametrize("case", CASES)
def test_learning_computes_what_acting_does_or_the_method_says_why_not(case):
    method = disturbed(case)
    if CASES[case].method == "spottune":
        # With even odds, routes that are drawn are not those that are decided for.
        for name, parameter in method.named_parameters():
            if "policy.linear" in name or name.endswith("logits"):
                parameter.data.zero_()
    image = images(case, 4)
    method.eval()
    acted = method(image)
    found = method.noises()
    assert not method.training
    learned = method.train()(image)
    same = torch.allclose(learned, acted, rtol=1e-4, atol=1e-5)
    assert same != bool(found), found


@pytest.mark.parametrize("case", CASES)
def test_a_saved_state_restores_the_method(case):
    method = disturbed(case).eval()
    other = make(case, seed=99).eval()
    image = images(case)
    assert not torch.equal(other(image), method(image))
    other.load_state_dict(method.state_dict())
    torch.testing.assert_close(other(image), method(image), rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_a_delta_restores_the_method_on_the_same_base(case):
    method = disturbed(case).eval()
    other = make(case, seed=0 if CASES[case].frozen_base else 99).eval()
    if CASES[case].frozen_base:
        other.base.load_state_dict(method.base.state_dict())
    delta = method.delta()
    assert not any(name.startswith("base.") for name in delta)
    other.load_delta(delta)
    torch.testing.assert_close(other(images(case)), method(images(case)), rtol=0, atol=0)


@pytest.mark.parametrize("case", TRAINING)
def test_a_delta_of_another_shape_is_refused(case):
    method = make(case)
    delta = method.delta()
    with pytest.raises(ValueError, match="unexpected"):
        method.load_delta({**delta, "stranger": torch.zeros(1)})
    name = next(iter(delta))
    with pytest.raises(ValueError, match="missing"):
        method.load_delta({k: v for k, v in delta.items() if k != name})


@pytest.mark.parametrize("case", CASES)
def test_copies_are_independent(case):
    method = make(case)
    twin = copy.deepcopy(method)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert not any(torch.equal(a, b) for a, b in zip(method.parameters(), twin.parameters(), strict=True))
    image = images(case)
    torch.testing.assert_close(make(case).eval()(image), method.eval()(image), rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_half_precision_stays_near_and_finite(case):
    method = make(case).eval()
    image = images(case)
    exact = method(image)
    with torch.autocast("cpu", torch.bfloat16):
        rough = method(image)
        stored = method.base_features(image)
    assert all(value.dtype == torch.float32 for value in stored.values())
    assert torch.isfinite(rough).all()
    assert (rough.float() - exact).abs().mean() < 0.05 * exact.abs().mean() + 1e-3


@pytest.mark.parametrize("case", TRAINING)
def test_half_precision_training_gives_finite_gradients(case):
    method = disturbed(case).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(images(case)).float().square().mean()
    loss.backward()
    gradients = [p.grad for p in method.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_method_computes_the_same(case):
    method = disturbed(case).eval()
    image = images(case)
    torch._dynamo.reset()
    compiled = torch.compile(method, backend="aot_eager")
    torch.testing.assert_close(compiled(image), method(image), rtol=1e-4, atol=1e-4)
    if CASES[case].trains:
        compiled(image).float().square().mean().backward()
        found = [p.grad.clone() for p in method.parameters() if p.grad is not None]
        method.zero_grad()
        method(image).float().square().mean().backward()
        expected = [p.grad for p in method.parameters() if p.grad is not None]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()) + 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_wrong_images_are_refused(case):
    with pytest.raises(ValueError, match=r"image of shape \(2, 64, 64, 2\)"):
        make(case)(torch.zeros(2, 64, 64, 2))
    with pytest.raises(ValueError, match=r"image of shape \(64, 64, 3\)"):
        make(case)(torch.zeros(64, 64, 3))


@pytest.mark.parametrize("case", CASES)
def test_odd_sizes_are_taken_or_refused_clearly(case):
    method = make(case)
    odd = images(case, 2, (50, 70))
    if CASES[case].any_size:
        assert method(odd).shape == (2, *method.output_shape(50, 70))
    else:
        with pytest.raises(ValueError, match="50"):
            method(odd)


class Sighted(gymnasium.Env):
    """Random images; going straight on is rewarded."""

    def __init__(self, case):
        rows, columns = CASES[case].size
        channels = CASES[case].options.get("channels", 3)
        pixels = (
            spaces.Box(0.0, 1.0, (rows, columns, 1), np.float32)
            if channels == 1
            else spaces.Box(0, 255, (rows, columns, 3), np.uint8)
        )
        self.observation_space = spaces.Dict(image=pixels)
        self.action_space = spaces.Discrete(3)
        self.observation_space.seed(0)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return (
            self.observation_space.sample(),
            float(action == 1),
            False,
            bool(self.np_random.random() < 0.3),
            {},
        )


def settings(case):
    row = CASES[case]
    options = {k: v for k, v in row.options.items() if k not in ("encoder", "channels")}
    return {
        "encoder": row.options.get("encoder", "fcn5_small"),
        "weights": "random",
        "adaptation": row.method,
        "adaptation_options": options,
        "image_features": 8,
    }


@pytest.mark.parametrize("case", CASES)
def test_plain_stable_baselines3_trains_it(case):
    agent = PPO(
        "MultiInputPolicy",
        Sighted(case),
        n_steps=8,
        batch_size=8,
        n_epochs=1,
        policy_kwargs={
            "features_extractor_class": AdaptedExtractor,
            "features_extractor_kwargs": settings(case),
            "normalize_images": False,
            "net_arch": [],
        },
        seed=0,
        device="cpu",
    )
    method = agent.policy.features_extractor.adaptations["image"]
    before = {k: v.clone() for k, v in method.state_dict().items()}
    agent.learn(16)
    state = method.state_dict()
    assert all(torch.isfinite(v.float()).all() for v in state.values())
    assert all(torch.equal(v, before[k]) for k, v in state.items() if k.startswith("base."))
    changed = {k for k, v in state.items() if not torch.equal(v, before[k])}
    assert bool(changed) == CASES[case].trains


@pytest.mark.parametrize("case", CASES)
def test_the_navigation_policy_learns_sequences_with_it(case):
    torch.manual_seed(0)
    policy = NavigationPolicy(
        Sighted(case).observation_space,
        spaces.Discrete(3),
        lambda _: 1e-3,
        memory="gru",
        hidden_size=8,
        weight_decay=0.01,
        **settings(case),
    )
    seen = {"image": torch.stack([images(case, 2), images(case, 2).flip(1)])}
    memory, starts = policy.initial_memory(2), torch.zeros(2, 2, dtype=torch.bool)
    frozen = policy.frozen_features({"image": seen["image"].flatten(0, 1)})
    stored = {k: v.unflatten(0, (2, 2)) for k, v in frozen.items()}
    values, *_ = policy.evaluate_sequences(seen, None, memory, starts, stored or None)
    (values.sum() + policy.penalty()).backward()
    policy.optimizer.step()
    learning = {n for n, p in policy.named_parameters() if p.requires_grad and p.grad is not None}
    assert any(n.startswith("features_extractor.adaptations") for n in learning) == CASES[case].trains


def test_pretrained_batchnorm_statistics_do_not_drift():
    resnet = make_adaptation("finetune", encoder="resnet44", weights="random").train()
    before = resnet.network.encoder.bn1.running_mean.clone()
    resnet(torch.rand(2, 32, 32, 3))
    assert torch.equal(resnet.network.encoder.bn1.running_mean, before)


def test_a_second_task_begins_where_the_first_began_and_leaves_it_alone():
    method = make("sidetune random side").eval()
    image = images("sidetune")
    method.start_task("second")
    with torch.no_grad():
        for parameter in method.adapter.parameters():
            parameter.add_(1)
    assert method.tasks == ("task", "second")
    assert {n.split(".")[1] for n, p in method.named_parameters() if p.requires_grad} == {"second"}
    second = method(image)
    method.start_task("task")
    torch.testing.assert_close(method(image), make("sidetune random side").eval()(image), rtol=0, atol=0)
    assert not torch.equal(method(image), second)


@pytest.mark.parametrize("case", ["sidetune", "finetune", "midtune", "ewc", "progressive", "superposition"])
@pytest.mark.parametrize("name", ["a.b", "", "keys", "training", "_modules"])
def test_tasks_need_names_that_can_be_stored(case, name):
    method = make(case)
    method.set_progress(1, 1)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    with pytest.raises(ValueError, match=f"task '{re.escape(name)}': expected a name without dots"):
        method.start_task(name)
    assert method.tasks == (method.task,) == ("task",)
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


class Attention(nn.Module):
    """Pixels that look at each other, at some of them in training only."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1, dropout=0.5, batch_first=True)

    def forward(self, x):
        x = x.flatten(2).mT
        return self.attention(x, x, x)[0]


def test_dropout_of_torch_s_attention_is_told_where_it_learns():
    base = wrap_encoder(Attention(), (None, 3))
    for method, told in (("finetune", True), ("piggyback", False)):
        adapted = make_adaptation(method, base)
        image = torch.rand(1, 4, 4, 3)
        assert torch.equal(adapted.train()(image), adapted.eval()(image)) != told
        assert adapted.noises() == ["dropout leaves inputs out at random"] * told


def test_unknown_methods_and_options_name_the_nearest():
    with pytest.raises(ValueError, match="unknown adaptation 'side-tune'; did you mean 'sidetune'"):
        make_adaptation("side-tune")
    with pytest.raises(ValueError, match="'sidetune' has no option 'alfa'; did you mean 'alpha'"):
        make_adaptation("sidetune", alfa=0.5)
    with pytest.raises(ValueError, match="'features' has no option 'alpha'"):
        make_adaptation("features", alpha=0.5)


SETTINGS = [(method, option) for method in ADAPTATIONS for option in method_options(method)]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_numbers_that_are_not_finite_are_refused_by_name(value):
    floats = [(method, option) for method, option in SETTINGS if "float" in str(option.type)]
    assert {"alpha", "temperature", "gate_init", "coef"} <= {option.name for _, option in floats}
    for method, option in floats:
        with pytest.raises(ValueError, match=rf"{option.name} {value}"):
            ADAPTATIONS[method].config_class(**{option.name: value})


def test_words_that_are_not_listed_are_refused_with_those_that_are():
    words = [(method, option) for method, option in SETTINGS if option.choices]
    assert len(words) > 15
    for method, option in words:
        with pytest.raises(
            ValueError, match=f"{option.name} 'none such': expected one of {option.choices[0]}"
        ):
            ADAPTATIONS[method].config_class(**{option.name: "none such"})


def test_scratch_takes_no_weights():
    with pytest.raises(ValueError, match="from scratch starts from 'random'"):
        make_adaptation("scratch", weights="default")
