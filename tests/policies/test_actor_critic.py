"""The policy: one step, sequences, numpy loops, and plain Stable-Baselines3."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv
from test_extractor import TinyWorld

from policies.actor_critic import NavigationPolicy
from policies.encoders import make_encoder
from policies.weights import save_safetensors

SPACE = spaces.Dict(
    rgb=spaces.Box(0, 255, (64, 64, 3), np.uint8),
    pointgoal_with_gps_compass=spaces.Box(-np.inf, np.inf, (2,), np.float32),
    previous_action=spaces.Discrete(5),
)
ACTIONS = spaces.Discrete(4)
MEMORIES = ["gru", "lstm", "frame_stack", "none"]
METHODS = ["sidetune", "features", "finetune", "scratch", "blind"]


def make(memory="gru", adaptation="sidetune", **options):
    torch.manual_seed(0)
    policy = NavigationPolicy(
        SPACE,
        ACTIONS,
        lambda _: 1e-3,
        **{
            "weights": "random",
            "memory": memory,
            "adaptation": adaptation,
            "hidden_size": 24,
            "image_features": 16,
            **options,
        },
    )
    with torch.no_grad():
        # The actor starts nearly uniform; differences must show in these tests.
        policy.action_net.weight.mul_(100)
    return policy


def observations(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "rgb": torch.randint(0, 256, (*shape, 64, 64, 3), dtype=torch.uint8, generator=generator),
        "pointgoal_with_gps_compass": torch.rand(*shape, 2, generator=generator) * 5,
        "previous_action": torch.randint(0, 5, shape, generator=generator),
    }


def roll(policy, obs, memory, starts):
    steps = []
    with torch.no_grad():
        for t in range(len(starts)):
            out = policy.act({k: v[t] for k, v in obs.items()}, memory, starts[t])
            memory = out[3]
            steps.append(out)
    actions, values, log_probs, _, frozen, logits = zip(*steps, strict=True)
    stacked = {k: torch.stack([f[k] for f in frozen]) for k in frozen[0]}
    return torch.stack(actions), torch.stack(values), torch.stack(log_probs), stacked, torch.stack(logits)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("adaptation", METHODS)
def test_sequences_equal_acting_step_by_step(memory, adaptation):
    policy = make(memory, adaptation)
    obs = observations(9, 3)
    starts = torch.rand(9, 3, generator=torch.Generator().manual_seed(1)) < 0.25
    state = torch.randn(3, *policy.memory_shape)
    actions, values, log_probs, frozen, logits = roll(policy, obs, state, starts)
    assert bool(frozen) == (adaptation in ("sidetune", "features"))
    for stored in (frozen, None):
        again = policy.evaluate_sequences(obs, actions, state, starts, stored)
        torch.testing.assert_close(again[0], values, rtol=0, atol=1e-5)
        torch.testing.assert_close(again[1], log_probs, rtol=0, atol=1e-5)
        torch.testing.assert_close(again[3], logits, rtol=0, atol=1e-5)
    distribution = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(again[2], distribution.entropy(), rtol=0, atol=1e-5)
    torch.testing.assert_close(again[1], distribution.log_prob(actions), rtol=0, atol=1e-5)


def test_without_actions_there_are_no_log_probabilities():
    policy = make()
    values, log_probs, _, logits = policy.evaluate_sequences(
        observations(4, 2), None, policy.initial_memory(2), torch.zeros(4, 2, dtype=torch.bool)
    )
    assert log_probs is None
    assert values.shape == (4, 2)
    assert logits.shape == (4, 2, 4)


def test_deterministic_actions_are_the_likeliest():
    policy = make()
    starts = torch.ones(6, dtype=torch.bool)
    out = policy.act(observations(6), policy.initial_memory(6), starts, deterministic=True)
    assert torch.equal(out[0], out[5].argmax(1))


def test_drawn_actions_follow_the_probabilities():
    policy = make("none")
    obs = {k: v.expand(4000, *v.shape[1:]) for k, v in observations(1).items()}
    stored = {k: v[:1].expand(4000, *v.shape[1:]) for k, v in policy.frozen_features(observations(1)).items()}
    actions, *_, logits = policy.act(
        {k: v[:4000] for k, v in obs.items()},
        policy.initial_memory(4000),
        torch.zeros(4000, dtype=torch.bool),
        frozen=stored,
    )
    drawn = torch.bincount(actions, minlength=4) / 4000
    torch.testing.assert_close(drawn, logits[0].softmax(0), rtol=0, atol=0.04)


def test_the_actor_starts_nearly_uniform():
    policy = make()
    with torch.no_grad():
        policy.action_net.weight.div_(100)
    logits = policy.act(observations(5), policy.initial_memory(5), torch.ones(5, dtype=torch.bool))[5]
    assert (logits.softmax(1) - 0.25).abs().max() < 0.02


@pytest.mark.parametrize("adaptation", METHODS)
def test_the_optimiser_holds_every_trainable_parameter_once_and_spares_alpha(adaptation):
    policy = make(adaptation=adaptation, weight_decay=0.1)
    grouped = [p for group in policy.optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in grouped}) == len(grouped)
    assert {id(p) for p in grouped} == {id(p) for p in policy.parameters() if p.requires_grad}
    spared = [g for g in policy.optimizer.param_groups if g["weight_decay"] == 0]
    assert len(spared) == (1 if adaptation == "sidetune" else 0)
    if spared:
        (alpha,) = spared[0]["params"]
        assert alpha is policy.features_extractor.adaptations["rgb"].fusion.alpha.logit


@pytest.mark.parametrize("adaptation", ["sidetune", "features"])
def test_learning_leaves_the_base_as_it_was(adaptation):
    policy = make(adaptation=adaptation)
    base = policy.features_extractor.adaptations["rgb"].base
    before = {k: v.clone() for k, v in base.state_dict().items()}
    policy.set_training_mode(True)
    policy.requires_grad_(True)
    obs, starts = observations(4, 2), torch.zeros(4, 2, dtype=torch.bool)
    for _ in range(3):
        policy.optimizer.zero_grad()
        out = policy.evaluate_sequences(obs, torch.ones(4, 2), policy.initial_memory(2), starts)
        (out[0].square().mean() - out[1].mean()).backward()
        policy.optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert all(p.grad is not None for p in policy.parameters())


def test_gradients_are_finite_in_half_precision():
    policy = make()
    starts = torch.zeros(4, 2, dtype=torch.bool)
    obs = observations(4, 2)
    exact = policy.evaluate_sequences(obs, torch.ones(4, 2), policy.initial_memory(2), starts)
    with torch.autocast("cpu", torch.bfloat16):
        rough = policy.evaluate_sequences(obs, torch.ones(4, 2), policy.initial_memory(2), starts)
    torch.testing.assert_close(rough[0], exact[0], rtol=0.1, atol=0.1)
    assert rough[0].dtype == rough[1].dtype == torch.float32
    (rough[0].mean() + rough[1].mean()).backward()
    assert all(torch.isfinite(p.grad).all() for p in policy.parameters())


@pytest.mark.parametrize("memory", MEMORIES)
def test_predict_carries_memory_through_numpy(memory):
    policy = make(memory)
    obs = observations(6, 3)
    starts = torch.zeros(6, 3, dtype=torch.bool)
    starts[0] = starts[3, 1] = True
    state, recurrent = None, []
    memories = policy.initial_memory(3)
    for t in range(6):
        now = {k: v[t] for k, v in obs.items()}
        with torch.no_grad():
            expected, *_ = (out := policy.act(now, memories, starts[t], deterministic=True))
        memories = out[3]
        actions, state = policy.predict(
            {k: v.numpy() for k, v in now.items()}, state, starts[t].numpy(), deterministic=True
        )
        assert actions.tolist() == expected.tolist()
        recurrent.append(torch.from_numpy(state[0]))
        torch.testing.assert_close(recurrent[-1], memories)


def test_predict_takes_a_single_observation():
    action, state = make().predict({k: v[0].numpy() for k, v in observations(1).items()})
    assert np.shape(action) == ()
    assert state[0].shape == (1, 1, 24)


def test_saving_and_loading_keeps_the_policy(tmp_path):
    policy = make("lstm", "sidetune", adaptation_options={"alpha": 0.8}, layers=2, weight_decay=0.01)
    policy.save(tmp_path / "policy.pt")
    again = NavigationPolicy.load(tmp_path / "policy.pt", device="cpu")
    obs, starts = observations(3), torch.ones(3, dtype=torch.bool)
    out = [p.act(obs, p.initial_memory(3), starts, True)[5] for p in (policy, again)]
    assert torch.equal(*out)
    assert again.memory_shape == (4, 24)
    assert again.optimizer.param_groups[0]["weight_decay"] == 0.01


@pytest.mark.filterwarnings("ignore:.*look untrained")
@pytest.mark.parametrize(
    ("adaptation", "options"),
    [
        ("sidetune", {"side_init": "distilled", "side_weights": "side.safetensors"}),
        # No layer of random weights would pass this threshold.
        ("piggyback", {"mask_init": "weight_based_1s", "threshold": 0.4}),
        ("scratch", {}),
        ("finetune", {}),
    ],
)
def test_a_saved_policy_is_loaded_without_the_files_that_it_started_from(
    adaptation, options, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    network = make_encoder("fcn5_small", 3, "random")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.5 * (1 + parameter.detach()))
    for name in ("base", "side"):
        save_safetensors(f"{name}.safetensors", network.state_dict())
    weights = None if adaptation == "scratch" else "base.safetensors"
    policy = make(adaptation=adaptation, adaptation_options=options, weights=weights)
    policy.save(tmp_path / "policy")
    for name in ("base", "side"):
        (tmp_path / f"{name}.safetensors").unlink()
    loaded = NavigationPolicy.load(tmp_path / "policy")
    for key, value in policy.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key])
    (method,) = loaded.features_extractor.adaptations.values()
    (before,) = policy.features_extractor.adaptations.values()
    assert method.config == before.config
    # What comes after is checked and read as ever.
    if adaptation in ("sidetune", "piggyback"):
        match = "no such weights file" if adaptation == "sidetune" else "would start removed"
        if adaptation == "piggyback":
            with torch.no_grad():
                method.base.encoder.conv1[0].weight.zero_()
        with pytest.raises(ValueError, match=match):
            method.start_task("another")


def test_plain_stable_baselines3_ppo_trains_a_policy_without_memory(tmp_path):
    model = PPO(
        NavigationPolicy,
        TinyWorld(),
        n_steps=16,
        batch_size=8,
        n_epochs=1,
        seed=0,
        device="cpu",
        policy_kwargs={"memory": "none", "weights": "random", "hidden_size": 16, "image_features": 16},
    )
    model.learn(32)
    mean, _ = evaluate_policy(model, DummyVecEnv([TinyWorld] * 2), n_eval_episodes=4)
    assert 0 <= mean <= 8
    model.save(tmp_path / "model.zip")
    again = PPO.load(tmp_path / "model.zip", device="cpu")
    seen, _ = TinyWorld().reset(seed=1)
    assert model.predict(seen, deterministic=True)[0] == again.predict(seen, deterministic=True)[0]


def test_a_policy_with_memory_says_what_a_plain_ppo_lacks():
    with pytest.raises(ValueError, match="memory 'gru' needs the state"):
        make()(observations(1))


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="needs a Discrete one"):
        NavigationPolicy(SPACE, spaces.Box(-1, 1, (2,)), lambda _: 1e-3)
    with pytest.raises(ValueError, match="use_sde"):
        NavigationPolicy(SPACE, ACTIONS, lambda _: 1e-3, use_sde=True)
    with pytest.raises(ValueError, match="unknown memory 'rnn'"):
        make(memory="rnn")
