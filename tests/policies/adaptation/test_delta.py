"""Delta files: every method comes back as it was, on its own base only."""

import dataclasses
import json
import os
import struct

import pytest
import torch
from adaptation_cases import CASES
from torch import nn

from policies.adaptation import (
    ADAPTATIONS,
    FrozenEncoder,
    SideTuning,
    SideTuningConfig,
    make_adaptation,
)
from policies.adaptation.base import Adaptation
from policies.adaptation.delta import Delta, load_delta, read_delta, save_delta
from policies.encoders import make_encoder, wrap_encoder
from policies.weights import WeightsError, read_safetensors, save_safetensors, tensors_sha256


def make(name):
    """A method as its case describes it, and the network that it was made of."""
    torch.manual_seed(0)
    row = CASES[name]
    config = ADAPTATIONS[row.method].config_class(**{"weights": "random", **row.options})
    base = make_encoder(config.encoder, config.channels, "random")
    return ADAPTATIONS[row.method](config, base).eval(), base


def images(name, number=2):
    row = CASES[name]
    generator = torch.Generator().manual_seed(1)
    return torch.rand(number, *row.size, row.options.get("channels", 3), generator=generator)


def stir(method, seed=2):
    """Moves all that the method trains, as learning would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in method.trainable_parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def trained_base():
    """A network that nobody would take for an untrained one."""
    base = make_encoder("fcn5_small", 3, "random")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return base


def header(path):
    return json.loads(read_safetensors(path).metadata["delta"])


def forge(path, **changes):
    """Rewrites a delta's header."""
    file = read_safetensors(path)
    about = {**header(path), **changes}
    save_safetensors(path, file.tensors, {"format": "navagent-delta", "version": 1, "delta": about})


@pytest.fixture
def tuned(tmp_path):
    """A side-tuned method on a shipped base, and its file."""
    method = make_adaptation("sidetune").eval()
    stir(method)
    save_delta(method, tmp_path / "d.safetensors")
    return method, tmp_path / "d.safetensors"


@pytest.mark.parametrize("name", CASES)
def test_every_method_comes_back_with_its_tasks_and_their_outputs(name, tmp_path):
    method, base = make(name)
    stir(method)
    for task in ("a", "b") * method.several_tasks:
        method.start_task(task)
        stir(method, len(method.tasks))
    image = images(name)
    expected = {}
    # The task that was current when it was saved comes last here.
    for task in reversed(method.tasks):
        method.start_task(task)
        expected[task] = method(image)
    save_delta(method, tmp_path / "d.safetensors")
    again = load_delta(tmp_path / "d.safetensors", base if CASES[name].frozen_base else None).eval()
    assert type(again) is type(method)
    assert again.config == method.config
    assert (again.tasks, again.task) == (method.tasks, method.task)
    trained = {n for n, p in method.named_parameters() if p.requires_grad}
    assert {n for n, p in again.named_parameters() if p.requires_grad} == trained
    for task in reversed(expected):
        again.start_task(task)
        torch.testing.assert_close(again(image), expected[task], rtol=0, atol=0)


def test_what_mattered_to_finished_tasks_comes_back_too(tmp_path):
    method = make_adaptation("ewc", weights="random")
    method.finish_task(method(torch.rand(2, 64, 64, 3)).square().mean((1, 2, 3)))
    method.start_task("a")
    stir(method)
    assert method.penalty() > 0
    save_delta(method, tmp_path / "d.safetensors")
    assert torch.equal(load_delta(tmp_path / "d.safetensors").penalty(), method.penalty())


def test_a_shipped_base_is_found_by_its_settings(tuned):
    method, path = tuned
    image = torch.rand(2, 64, 64, 3)
    torch.testing.assert_close(load_delta(path).eval()(image), method(image), rtol=0, atol=0)
    delta = read_delta(path)
    assert isinstance(delta, Delta)
    assert (delta.method, delta.base, delta.tasks) == ("sidetune", "fcn5_small", ("task",))
    assert delta.base_sha256 == method.base.sha256()
    assert delta.config == dataclasses.asdict(method.config)


def test_the_file_holds_the_side_network_and_not_the_base(tuned):
    method, path = tuned
    side = sum(p.nbytes for p in [*method.adapters.parameters(), *method.adapters.buffers()])
    assert side < path.stat().st_size < side + 6000
    assert not any(name.startswith("base.") for name in read_delta(path).tensors)


def test_a_mask_takes_about_one_bit_a_weight(tmp_path):
    base = make_encoder("resnet44", 3, "random")
    method = make_adaptation("piggyback", base, encoder="resnet44", weights="random")
    save_delta(method, tmp_path / "d.safetensors")
    weights = sum(v.numel() for v in method.masks().values())
    assert weights > 600_000
    assert weights / 8 < (tmp_path / "d.safetensors").stat().st_size < weights / 8 + 12_000


def test_another_base_is_refused_by_name_and_hash(tuned):
    method, path = tuned
    other = make_encoder("resnet44", 3, "random")
    mine, theirs = method.base.sha256()[:8], FrozenEncoder(other).sha256()[:8]
    with pytest.raises(WeightsError, match=rf"made for fcn5_small {mine}\.\.\., not resnet44 {theirs}\.\.\."):
        load_delta(path, other)
    with pytest.raises(WeightsError, match=r"not fcn5_small .*base=\.\.\."):
        load_delta(path, make_encoder("fcn5_small", 3, "random"))


def test_a_random_base_cannot_be_guessed(tmp_path):
    method, base = make("sidetune")
    save_delta(method, tmp_path / "d.safetensors")
    with pytest.raises(WeightsError, match=r"its weights were random.*base=\.\.\."):
        load_delta(tmp_path / "d.safetensors")
    load_delta(tmp_path / "d.safetensors", base)


def test_a_base_from_a_file_is_found_while_the_file_is_there(tmp_path):
    weights = tmp_path / "w.safetensors"
    base = trained_base()
    save_safetensors(weights, base.state_dict())
    save_delta(make_adaptation("features", weights=str(weights)), tmp_path / "d.safetensors")
    load_delta(tmp_path / "d.safetensors")
    weights.unlink()
    with pytest.raises(WeightsError, match=r"base cannot be made: .*w\.safetensors: no such .*base=\.\.\."):
        load_delta(tmp_path / "d.safetensors")
    load_delta(tmp_path / "d.safetensors", base)
    save_safetensors(weights, trained_base().state_dict())
    with pytest.raises(WeightsError, match="made for fcn5_small"):
        load_delta(tmp_path / "d.safetensors")


def test_a_network_that_learned_whole_needs_no_file_that_it_began_with(tmp_path):
    weights = tmp_path / "w.safetensors"
    save_safetensors(weights, trained_base().state_dict())
    method = make_adaptation("finetune", weights=str(weights)).eval()
    save_delta(method, tmp_path / "d.safetensors")
    weights.unlink()
    again = load_delta(tmp_path / "d.safetensors").eval()
    image = torch.rand(1, 64, 64, 3)
    torch.testing.assert_close(again(image), method(image), rtol=0, atol=0)
    assert again.config.weights == str(weights)


def test_a_distilled_side_needs_no_file_but_for_another_task(tmp_path):
    weights = tmp_path / "student.safetensors"
    save_safetensors(weights, trained_base().state_dict())
    method = make_adaptation("sidetune", side_init="distilled", side_weights=str(weights)).eval()
    method.start_task("a")
    stir(method)
    save_delta(method, tmp_path / "d.safetensors")
    weights.unlink()
    again = load_delta(tmp_path / "d.safetensors").eval()
    image = torch.rand(1, 64, 64, 3)
    for task in ("a", "task"):
        method.start_task(task)
        again.start_task(task)
        torch.testing.assert_close(again(image), method(image), rtol=0, atol=0)
    assert again.config == method.config
    with pytest.raises(WeightsError, match=r"student\.safetensors: no such weights file"):
        again.start_task("b")


def test_a_side_of_ones_own_is_given_again(tmp_path):
    def side():
        return wrap_encoder(nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Tanh()), (8, None, None))

    method = SideTuning(SideTuningConfig(), side=side()).eval()
    stir(method)
    path = tmp_path / "d.safetensors"
    save_delta(method, path)
    image = torch.rand(1, 64, 64, 3)
    torch.testing.assert_close(load_delta(path, side=side()).eval()(image), method(image), rtol=0, atol=0)
    with pytest.raises(WeightsError, match=r"do not fit SideTuning: .*missing adapters\.task\.side"):
        load_delta(path)
    save_delta(make_adaptation("features"), path)
    with pytest.raises(WeightsError, match="'features', which takes no side network"):
        load_delta(path, side=side())


@pytest.mark.parametrize("cut", [0, 7, 100, 3000, -1])
def test_truncated_files_are_refused(cut, tuned):
    _, path = tuned
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(WeightsError, match=r"d\.safetensors: .*(truncated|safetensors)"):
        load_delta(path)


def test_a_flipped_bit_is_noticed_wherever_it_is(tuned):
    _, path = tuned
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    for place in range(8 + length, len(data), len(data) // 20):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(WeightsError, match="damaged"):
            load_delta(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "sidetuning"}, r"unknown method 'sidetuning'; did you mean 'sidetune'"),
        ({"config": {"encoder": "fcn5_small", "alhpa": 0.5}}, r"no setting 'alhpa'; did you mean 'alpha'"),
        ({"config": {"alpha": 7.0, "weights": "default"}}, r"alpha 7.0"),
        ({"config": {"alpha": "x", "weights": "default"}}, r"d\.safetensors: "),
        ({"config": {"encoder": "fcn55", "weights": "default"}}, r"unknown encoder 'fcn55'"),
        ({"config": [1]}, "header is damaged"),
        ({"tasks": 3}, "header is damaged"),
        ({"tasks": [3]}, "header is damaged"),
        ({"tasks": ["task", "a"]}, "missing adapters.a"),
        ({"tasks": ["a.b"]}, "without dots"),
        ({"surplus": 1}, "header is damaged"),
        ({"tensors_sha256": "0"}, "damaged"),
    ],
)
def test_headers_that_make_no_sense_are_refused(changes, message, tuned):
    _, path = tuned
    forge(path, **changes)
    with pytest.raises(WeightsError, match=message):
        load_delta(path)


def test_other_files_and_newer_versions_are_refused(tuned):
    _, path = tuned
    tensors = read_safetensors(path).tensors
    save_safetensors(path, tensors)
    with pytest.raises(WeightsError, match=r"no delta of navagent"):
        load_delta(path)
    save_safetensors(path, tensors, {"format": "navagent-delta", "version": 2})
    with pytest.raises(WeightsError, match=r"delta version '2'.*reads version 1"):
        load_delta(path)
    with pytest.raises(WeightsError, match="no such weights file"):
        load_delta(path.with_name("none.safetensors"))


def test_a_file_of_another_version_of_navagent_says_so_where_it_does_not_fit(tuned):
    _, path = tuned
    forge(path, package="99.0", tasks=["task", "a"])
    with pytest.raises(WeightsError, match=r"written by navagent 99\.0, read by"):
        load_delta(path)


def test_a_failed_save_keeps_the_file_before(tuned, monkeypatch):
    method, path = tuned
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("policies.weights.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_delta(method, path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_method_without_a_name_is_not_saved(tmp_path):
    class Mine(type(make_adaptation("features", weights="random"))):
        pass

    method = Mine(Mine.config_class(weights="random"))
    assert isinstance(method, Adaptation)
    with pytest.raises(ValueError, match="Mine has no name in ADAPTATIONS"):
        save_delta(method, tmp_path / "d.safetensors")


def test_tensors_in_bfloat16_and_shared_memory_survive(tmp_path):
    method = make_adaptation("sidetune")
    method.adapters.to(torch.bfloat16)
    side = method.adapter.side.encoder
    first, *_ = side.parameters()
    first.data = torch.zeros(2, *first.shape, dtype=torch.bfloat16)[1]
    save_delta(method, tmp_path / "d.safetensors")
    delta = read_delta(tmp_path / "d.safetensors")
    assert tensors_sha256(delta.tensors) == tensors_sha256(method.delta())
