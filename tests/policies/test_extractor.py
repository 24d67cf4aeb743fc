"""The features extractor, alone and under a plain Stable-Baselines3 PPO."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO

from policies.extractor import AdaptedExtractor, PolarGoal, TransferHead

IMAGE = spaces.Box(0, 255, (64, 64, 3), np.uint8)
DEPTH = spaces.Box(0.0, 1.0, (64, 64, 1), np.float32)
GOAL = spaces.Box(-np.inf, np.inf, (2,), np.float32)


class TinyWorld(gymnasium.Env):
    """Random pictures; reward for the action that a discrete sensor names."""

    observation_space = spaces.Dict(
        rgb=IMAGE, depth=DEPTH, pointgoal_with_gps_compass=GOAL, compass=spaces.Box(-4, 4, (1,)),
        gps=spaces.Box(-9, 9, (2,)), previous_action=spaces.Discrete(4),
    )  # fmt: skip
    action_space = spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.time += 1
        return self.observation_space.sample(), float(action == 1), self.time == 8, False, {}


def observation(space, number=2):
    space.seed(0)
    samples = [space.sample() for _ in range(number)]
    return {key: torch.as_tensor(np.stack([s[key] for s in samples])) for key in samples[0]}


def make(space, **options):
    torch.manual_seed(0)
    return AdaptedExtractor(space, **{"weights": "random", **options})


@pytest.mark.parametrize("adaptation", ["sidetune", "features", "finetune", "scratch", "blind"])
def test_plain_stable_baselines3_ppo_trains_on_it(adaptation, tmp_path):
    options = {"adaptation": adaptation, "weights": "random", "image_features": 16}
    model = PPO(
        "MultiInputPolicy",
        TinyWorld(),
        n_steps=16,
        batch_size=8,
        n_epochs=1,
        seed=0,
        device="cpu",
        policy_kwargs={
            "features_extractor_class": AdaptedExtractor,
            "features_extractor_kwargs": options,
            "net_arch": [16],
        },
    )
    extractor = model.policy.features_extractor
    frozen = {key: value.clone() for key, value in extractor.state_dict().items() if ".base." in key}
    assert bool(frozen) == (adaptation in ("sidetune", "features"))
    model.learn(32)
    state = extractor.state_dict()
    assert all(torch.equal(state[key], value) for key, value in frozen.items())
    model.save(tmp_path / "model.zip")
    again = PPO.load(tmp_path / "model.zip", device="cpu")
    seen, _ = TinyWorld().reset(seed=1)
    assert model.predict(seen, deterministic=True)[0] == again.predict(seen, deterministic=True)[0]


def test_every_part_contributes():
    space = TinyWorld.observation_space
    extractor = make(space, image_features=16)
    seen = observation(space)
    features = extractor(seen)
    assert features.shape == (2, extractor.features_dim)
    for key in seen:
        changed = {**seen, key: observation(space, 4)[key][2:]}
        assert not torch.equal(extractor(changed), features), key


def sizes(head):
    return {name: tuple(p.shape) for name, p in head.named_parameters()}


def test_small_maps_pass_the_transfer_network():
    found = sizes(TransferHead((8, 16, 16), 32))
    assert found.pop("compress.weight") == (32, 2048)
    assert found.pop("compress.bias") == (32,)
    assert sum(torch.Size(shape).numel() for shape in found.values()) == 1168


@pytest.mark.parametrize(
    ("shape", "kernel", "chosen"),
    [
        ((768, 14, 14), 3, 10),
        ((384, 16, 16), 3, 8),
        ((216, 8, 8), 3, 32),
        ((12, 4, 4), 3, 128),
        ((256, 1, 1), 3, 2048),
        ((9, 90, 90), 3, 1),
        ((197, 768), 1, 10),
        ((5, 96), 1, 96),
    ],
)
def test_maps_and_tokens_are_compressed_to_about_2048_values(shape, kernel, chosen):
    head = TransferHead(shape, 7)
    channels = shape[1] if len(shape) == 2 else shape[0]
    places = torch.Size(shape).numel() // channels
    assert sizes(head) == {
        "compression.0.weight": (chosen, channels, kernel, kernel),
        "compression.1.weight": (chosen,),
        "compression.1.bias": (chosen,),
        "compress.weight": (7, chosen * places),
        "compress.bias": (7,),
    }
    assert head(torch.randn(3, *shape)).shape == (3, 7)


def test_tokens_are_compressed_each_by_itself():
    torch.manual_seed(0)
    head = TransferHead((4, 6), 3)
    tokens = torch.randn(1, 4, 6)
    order = torch.tensor([2, 0, 3, 1])
    convolution = head.compression[0]
    mixed = convolution(tokens[:, order].mT.unsqueeze(3))
    torch.testing.assert_close(mixed, convolution(tokens.mT.unsqueeze(3))[:, :, order])


def test_vectors_pass_the_linear_layer_alone():
    assert sizes(TransferHead((64,), 3)) == {"compress.weight": (3, 64), "compress.bias": (3,)}


@pytest.mark.parametrize("encoder", ["vit_mini", "vit_mini_tokens", "vit_mini_cls"])
def test_every_form_of_features_reaches_the_policy(encoder):
    extractor = make(spaces.Dict(rgb=IMAGE), adaptation="features", encoder=encoder)
    seen = observation(spaces.Dict(rgb=IMAGE))
    features = extractor(seen)
    assert features.shape == (2, 256)
    assert not torch.equal(features[0], features[1])


def test_channels_first_images_are_the_same_images():
    torch.manual_seed(0)
    seen = observation(spaces.Dict(rgb=IMAGE))
    last = make(spaces.Dict(rgb=IMAGE))
    first = make(spaces.Dict(rgb=spaces.Box(0, 255, (3, 64, 64), np.uint8)))
    torch.testing.assert_close(first({"rgb": seen["rgb"].permute(0, 3, 1, 2)}), last(seen))


def test_one_hot_indices_are_the_same_indices():
    extractor = make(spaces.Dict(previous_action=spaces.Discrete(5)))
    index = torch.tensor([0, 3, 4])
    one_hot = torch.nn.functional.one_hot(index, 5).float()
    torch.testing.assert_close(extractor({"previous_action": one_hot}), extractor({"previous_action": index}))


def test_a_single_image_space_works():
    assert make(IMAGE)(torch.zeros(2, 64, 64, 3, dtype=torch.uint8)).shape == (2, 256)


def test_stored_features_replace_the_base(monkeypatch):
    space = spaces.Dict(rgb=IMAGE, depth=DEPTH)
    extractor = make(space)
    seen = observation(space)
    stored = extractor.frozen_features(seen)
    expected = extractor(seen)
    assert set(stored) == {"rgb/base", "depth/base"}

    def fail(image):
        raise AssertionError("the base ran again")

    for method in extractor.adaptations.values():
        monkeypatch.setattr(method.base, "forward", fail)
    torch.testing.assert_close(extractor(seen, stored), expected, rtol=0, atol=0)


def test_a_blind_agent_ignores_images():
    space = spaces.Dict(rgb=IMAGE, pointgoal_with_gps_compass=GOAL)
    extractor = make(space, adaptation="blind")
    seen = observation(space)
    assert extractor.features_dim == 32
    assert torch.equal(extractor({**seen, "rgb": seen["rgb"] * 0}), extractor(seen))
    assert extractor.frozen_features(seen) == {}


def test_angles_have_no_jump_at_half_a_turn():
    extractor = make(spaces.Dict(pointgoal_with_gps_compass=GOAL, compass=spaces.Box(-4, 4, (1,))))
    left, right = (
        extractor(
            {
                "pointgoal_with_gps_compass": torch.tensor([[2.0, side * torch.pi]]),
                "compass": torch.tensor([[side * torch.pi]]),
            }
        )
        for side in (1, -1)
    )
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


def test_millimetres_count_where_an_episode_begins_to_succeed():
    torch.manual_seed(0)
    embed = PolarGoal()

    def change(nearer: float, farther: float) -> float:
        goals = torch.tensor([[nearer, 0.3], [farther, 0.3]])
        near, far = embed(goals).detach()
        return float((near - far).norm())

    assert change(0.199, 0.201) > 10 * change(0.299, 0.301)
    assert change(0.199, 0.201) > 10 * change(0.099, 0.101)


def test_weights_can_differ_by_image(weights_dir, tmp_path):
    space = spaces.Dict(rgb=IMAGE, depth=DEPTH)
    make(space, weights={"rgb": "random", "depth": "random"})
    with pytest.raises(ValueError, match="does not fit FCN5"):
        make(space, weights={"rgb": str(weights_dir / "resnet44_cifar.pth"), "depth": "random"})


@pytest.mark.parametrize(
    ("space", "options", "message"),
    [
        (spaces.Dict(rgb=IMAGE), {"adaptation": "blind"}, "at least a goal sensor"),
        (spaces.Dict(rgb=spaces.Box(0, 255, (64, 64, 4), np.uint8)), {}, "1 or 3 channels"),
        (spaces.Dict(x=spaces.Text(4)), {}, "expected an image, a vector or a discrete value"),
        (spaces.Dict(rgb=IMAGE), {"adaptation": "sidetuning"}, "did you mean 'sidetune'"),
        (spaces.Dict(rgb=IMAGE), {"encoder": "fcn6"}, "unknown encoder 'fcn6'"),
    ],
)
def test_wrong_spaces_and_settings_are_refused(space, options, message):
    with pytest.raises(ValueError, match=message):
        make(space, **options)
