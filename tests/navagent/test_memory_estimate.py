import gc
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from memory_use import learner, measure, shape_of
from one_room import write_one_room
from torch import nn

from envs.scenes.gltf import load_scene
from envs.simulators.base import SensorSpec
from envs.simulators.raycast.renderer import Renderer
from navagent.config import ConfigError
from navagent.limits import available_memory
from navagent.memory_estimate import (
    Footprint,
    Growth,
    LiveBytes,
    MemoryPlan,
    Shape,
    check_scenes,
    feature_storage,
    footprint,
    held_bytes,
    need,
    scene_bytes,
    size,
)

MEASURED = {
    "side-tuning on stored features": {
        "num_envs": 48,
        "num_steps": 32,
        "num_minibatches": 2,
        "adaptation": "sidetune",
        "memory": "gru",
    },
    "fine-tuning": {
        "num_envs": 32,
        "num_steps": 32,
        "num_minibatches": 2,
        "adaptation": "finetune",
        "memory": "lstm",
    },
}


@pytest.mark.parametrize("returns_memory", [True, False], ids=["memory is returned", "heap as it is"])
@pytest.mark.parametrize("name", MEASURED)
def test_a_training_takes_what_was_estimated(tmp_path, processes, name, returns_memory):
    processes.finish(measure, MEASURED[name], returns_memory, tmp_path / "measured.json")
    estimate, taken = json.loads((tmp_path / "measured.json").read_text())
    assert estimate > 50 << 20
    assert 0.9 * estimate < taken < (1.2 if returns_memory else 2.0) * estimate


def test_tensors_count_while_they_live():
    weight = torch.zeros(1000)
    with LiveBytes() as counted:
        one = torch.zeros(250)  # 1000 bytes
        view = one[:10].view(2, 5)
        weight.add_(1)
        double = weight * 2  # 4000 bytes
        del double
        del one
        assert counted.live == 1000, "a view keeps what it looks at"
        del view
        torch.zeros(1)
    assert counted.live == 0
    assert max(counted.history) == 5000


@pytest.mark.parametrize("trial", [(2, 4), (4, 6)])
def test_what_a_network_keeps_for_its_gradients_is_counted(trial):
    net = nn.Sequential(nn.Linear(100, 1000), nn.Tanh(), nn.Linear(1000, 10))

    def learn(rows):
        x = torch.zeros(rows, 100)
        net.zero_grad(set_to_none=True)
        with LiveBytes() as counted:
            net(x).sum().backward()
        return counted.history

    growth = Growth.between(*((rows, learn(rows)) for rows in trial))
    assert growth(5000) == pytest.approx(max(learn(5000)), rel=0.01)
    # At least the hidden layer before and after, and its gradient.
    assert growth(5000) > 5000 * 3 * 1000 * 4


def test_between_two_lines_the_higher_counts():
    growth = Growth(np.array([100.0, 0.0]), np.array([1.0, 3.0]))
    assert growth(10) == 110
    assert growth(100) == 300
    assert growth.or_more(Growth(np.array([0.0]), np.array([9.0])))(100) == 900
    # Work that takes other steps for other numbers of frames.
    assert Growth.between((1, [5, 20, 7]), (2, [8, 30]))(4) == 50


def test_a_trial_changes_nothing():
    model = learner(4, 4, 2, size=32, adaptation="sidetune", memory="gru", encoder="fcn5_small")
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    random = torch.get_rng_state()
    footprint(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.policy.optimizer.state
    for name, value in model.policy.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_footprint_counts_parameters_moments_and_observations():
    model = learner(4, 4, 2, size=32, adaptation="features", memory="none")
    found = footprint(model)
    trained = sum(p.numel() for p in model.policy.parameters() if p.requires_grad)
    assert found.observation == 32 * 32 * 3 + 2 * 4
    assert found.stored_values == math.prod(
        model.policy.features_extractor.adaptations["rgb"].output_shape(32, 32)
    )
    # Two moments each, and a step count a parameter tensor.
    tensors = sum(p.requires_grad for p in model.policy.parameters())
    assert found.optimiser == 2 * 4 * trained + 4 * tensors
    model.learn(16)
    asked = need(found, shape_of(model))
    stored = model.rollout_buffer.num_bytes
    # Advantages, returns and, while an expert teaches, its actions come on top.
    assert stored < asked.rollout <= stored + 16 * 16


def test_mid_tuning_is_measured_as_it_ends():
    settings = {"memory": "none", "size": 32, "num_envs": 4, "num_steps": 4, "num_minibatches": 2}
    frozen, mid, fine = (
        footprint(learner(adaptation=name, **settings)) for name in ("features", "midtune", "finetune")
    )
    assert mid.stored_values == frozen.stored_values > fine.stored_values == 0
    assert mid.learning(1000) == pytest.approx(fine.learning(1000), rel=0.05)
    assert mid.optimiser == fine.optimiser > frozen.optimiser


@pytest.mark.parametrize(
    ("adaptation", "encoder", "told"),
    [
        ("sidetune", "fcn5_small", "frozen features are stored once a frame"),
        (
            "midtune",
            "fcn5_small",
            "stored once a frame until the encoder learns, then computed in every pass",
        ),
        ("finetune", "fcn5_small", "computed in every pass, as FineTuning needs: all of its encoder learns"),
        ("piggyback", "fcn5_small", "Piggyback needs: its masks change what the layers compute"),
        ("spottune", "resnet_small", "SpotTune needs: what learns chooses the routes"),
    ],
)
def test_what_becomes_of_frozen_features_is_told_with_the_reason(adaptation, encoder, told):
    model = learner(2, 4, 2, size=32, adaptation=adaptation, encoder=encoder, memory="none")
    assert told in feature_storage(model.policy)["rgb"]


SMALL = Footprint(
    observation=1000,
    stored_values=500,
    acting=Growth(np.array([0.0]), np.array([100.0])),
    learning=Growth(np.array([5000.0]), np.array([2000.0])),
    state=7000,
    optimiser=3000,
)
SHAPE = Shape(num_envs=64, num_steps=32, num_minibatches=4, feature_bytes=4)
SCALARS = 37


def plan(available, shape=SHAPE, **more):
    return MemoryPlan(SMALL, shape, homes=0.0, held=10**6, available=available, **more)


def test_every_part_of_the_need_follows_from_the_settings():
    asked = need(SMALL, SHAPE, homes=11.0)
    frames, batch = 64 * 32, 16 * 32
    assert asked.rollout == frames * (1000 + SCALARS + 2000)
    assert asked.features == frames * 2000
    assert asked.minibatch == 5000 + batch * (2000 + 1000 + SCALARS + 2000)
    assert (asked.optimiser, asked.saving, asked.homes) == (3000, 20000, 11.0)
    assert asked.device == asked.rollout + asked.minibatch + 3000 + 11.0
    # Half precision is widened for learning; a minibatch of everything is a copy of nothing.
    half = need(SMALL, replace(SHAPE, feature_bytes=2))
    assert (half.features, half.minibatch) == (asked.features / 2, asked.minibatch)
    assert need(SMALL, replace(SHAPE, num_minibatches=1)).minibatch == 5000 + frames * 2000
    # Many agents on a large network may take more to act than to learn.
    acting = replace(SMALL, acting=Growth(np.array([0.0]), np.array([1e6])))
    assert need(acting, SHAPE).minibatch == 64e6


def test_what_cannot_fit_is_refused_with_settings_that_do():
    asked = need(SMALL, SHAPE)
    total = asked.device + asked.saving
    plan(math.ceil(total)).check()
    plan(None).check()
    with pytest.raises(ConfigError) as caught:
        plan(0.8 * total).check()
    assert str(caught.value).startswith(
        f"this training does not fit into memory: it needs {size(total)} beside"
    )
    for setting in plan(0.8 * total).advice():
        smaller = SHAPE
        for word in setting.partition(" needs")[0].split():
            name, value = word.removeprefix("algorithm.").split("=")
            change = {"feature_bytes": 2} if name == "feature_dtype" else {name: int(value)}
            smaller = replace(smaller, **change)
        assert smaller != SHAPE
        assert plan(0.8 * total).fits(need(SMALL, smaller)), setting
    assert plan(0.8 * total).advice()[0].startswith("algorithm.feature_dtype=float16 needs")
    with pytest.raises(ConfigError, match="nothing smaller fits either"):
        plan(1000).check()
    # Where labels alone are learned, their minibatches are what can be made smaller.
    labels = " ".join(plan(0.8 * total, minibatches="imitation.minibatches").advice())
    assert "imitation.minibatches=" in labels and "num_minibatches" not in labels


def test_the_gpu_and_the_host_each_hold_their_part():
    asked = need(SMALL, SHAPE)
    assert plan(asked.saving, device_free=asked.device).fits(asked)
    assert not plan(asked.saving - 1, device_free=asked.device).fits(asked)
    assert not plan(asked.saving, device_free=asked.device - 1).fits(asked)


def test_what_fits_barely_is_warned_of():
    asked = need(SMALL, SHAPE)
    total = asked.device + asked.saving
    assert "MALLOC_MMAP_THRESHOLD_" in plan(total + 1).describe()
    assert "MALLOC_MMAP_THRESHOLD_" not in plan(total + asked.minibatch).describe()


def test_this_machine_has_memory_and_this_process_holds_some():
    # What earlier tests left behind would be given back in between.
    gc.collect()
    held = held_bytes()
    assert 10 << 20 < held < 1 << 40
    assert available_memory() > 0
    # More than the C library keeps of freed memory, or other threads give back meanwhile.
    more = torch.ones(512 << 20, dtype=torch.uint8)
    assert held_bytes() - held > 0.8 * len(more)


def resident_bytes(path):
    """What a scene's arrays take once it is resident."""
    renderer = Renderer([SensorSpec("rgb", "rgb", 8, 8)])
    renderer.load_scenes([load_scene(path)])
    data = renderer._resident[0].data
    names = ("nodes", "corners", "faces", "tints", "surfaces", "levels", "texels")
    return sum(getattr(data, name).capacity for name in names)


def test_scenes_take_about_what_their_headers_say(reference_dir):
    for name in ("apartment", "loft", "studio"):
        path = reference_dir / f"{name}.glb"
        assert 0.5 < scene_bytes(path) / resident_bytes(path) < 2.0, name


def test_unreadable_scenes_count_nothing_and_too_many_are_refused(tmp_path, monkeypatch):
    (tmp_path / "broken.glb").write_bytes(b"glTF" + bytes(40))
    for name in ("broken.glb", "missing.glb"):
        assert scene_bytes(tmp_path / name) == 0
    room = write_one_room(tmp_path / "room", num_train=1, num_val=1) / "scenes" / "room" / "room.glb"
    # Five walls and floors of two triangles, without textures.
    assert scene_bytes(room) == 10 * 140
    check_scenes([room])
    monkeypatch.setattr("navagent.memory_estimate.available_memory", lambda: 10_000)
    check_scenes([room])
    with pytest.raises(ConfigError, match="the 9 scenes to train in need about 0 MB"):
        check_scenes([room] * 9)


def test_sizes_in_words():
    assert size(12.4 * 2**20) == "12 MB"
    assert size(3.44 * 2**30) == "3.4 GB"
