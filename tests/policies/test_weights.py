"""Reading weights: what published files hold, and what hostile or broken ones get."""

import io
import os
import pickle
import subprocess
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

from policies.weights import (
    WeightsError,
    convert_to_safetensors,
    read_pth,
    read_safetensors,
    read_weights,
    save_safetensors,
    sha256,
    tensors_sha256,
    untrained_reason,
)


class Hostile:
    """Pickles to a call of any function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def legacy(content) -> bytes:
    """A file in torch's old format around any pickled content, without storages."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(part, 2, fix_imports=False) for part in [*head, content, []])


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return OrderedDict(a=torch.randn(3, 4), b=torch.arange(5), c=torch.randn(2, 6).t(), d=torch.tensor(2.5))


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_what_torch_saves(tensors, zipped, tmp_path):
    file = tmp_path / "w.pth"
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    read = read_pth(file).tensors
    assert list(read) == list(tensors)
    for name, value in tensors.items():
        assert torch.equal(read[name], value)
        assert read[name].dtype == value.dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.bool])
def test_reads_every_type(dtype, tmp_path):
    value = torch.tensor([0, 1, 1, 0]).to(dtype)
    torch.save({"x": value}, tmp_path / "w.pth")
    assert torch.equal(read_pth(tmp_path / "w.pth").tensors["x"], value)


def test_finds_the_state_dictionary_in_a_checkpoint_and_drops_the_parallel_prefix(tensors, tmp_path):
    state = {f"module.{k}": v for k, v in tensors.items()}
    torch.save({"epoch": 7, "state_dict": state, "optimizer": {"lr": 0.1}}, tmp_path / "w.pth")
    checkpoint = read_pth(tmp_path / "w.pth")
    assert set(checkpoint.tensors) == set(tensors)
    assert checkpoint.metadata == {"epoch": 7}


def test_reads_a_whole_pickled_module(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    torch.save(network, tmp_path / "w.pth")
    read = read_pth(tmp_path / "w.pth").tensors
    assert {k: v.shape for k, v in read.items()} == {k: v.shape for k, v in network.state_dict().items()}
    assert torch.equal(read["0.weight"], network[0].weight)


def test_reads_a_module_for_several_devices_in_a_checkpoint(tmp_path):
    # As the authors' CIFAR student is stored: devices, and a module in a module, beside the optimiser.
    network = nn.DataParallel(nn.Sequential(nn.Conv2d(3, 4, 3)), device_ids=[])
    network.src_device_obj = torch.device("cpu")
    torch.save({"epoch": 59, "state_dict": network}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    checkpoint = read_pth(tmp_path / "w.pth")
    assert list(checkpoint.tensors) == ["0.weight", "0.bias"]
    assert torch.equal(checkpoint.tensors["0.weight"], network.module[0].weight)


def test_reads_a_published_state_dictionary(weights_dir):
    read = read_pth(weights_dir / "resnet44_cifar.pth").tensors
    assert read["conv1.weight"].shape == (16, 3, 3, 3)
    assert read["layer3.6.bn2.running_var"].shape == (64,)


def test_reads_a_published_module_of_a_missing_package(weights_dir):
    checkpoint = read_pth(weights_dir / "curvature-distilled.pth")
    assert sum(v.numel() for v in checkpoint.tensors.values()) == 921_376
    assert checkpoint.metadata["epoch"] == 0


def test_the_hash_of_tensors_does_not_depend_on_how_they_are_stored(tensors, tmp_path):
    torch.save(tensors, tmp_path / "w.pth")
    convert_to_safetensors(tmp_path / "w.pth", tmp_path / "w.safetensors")
    digest = tensors_sha256(tensors)
    assert tensors_sha256(read_pth(tmp_path / "w.pth").tensors) == digest
    assert tensors_sha256(read_safetensors(tmp_path / "w.safetensors").tensors) == digest
    assert tensors_sha256({k: tensors[k] for k in reversed(tensors)}) == digest
    for other in (
        {"e": tensors["a"]},
        {"a": tensors["a"].t()},
        {"b": tensors["b"].int()},
        {"d": -tensors["d"]},
    ):
        assert tensors_sha256({**tensors, **other}) != digest


def test_untrained_published_weights_are_named(weights_dir):
    with pytest.warns(UserWarning, match="curvature-distilled.pth: these weights look untrained"):
        read_weights(weights_dir / "curvature-distilled.pth")


def test_trained_weights_are_not(weights_dir, recwarn):
    read_weights(weights_dir / "resnet44_cifar.pth")
    assert not recwarn.list


def test_networks_without_normalisation_are_not_called_untrained():
    assert untrained_reason(nn.Linear(3, 3).state_dict()) is None


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ((os.system, "touch {}"), "system"),
        ((subprocess.call, "touch {}"), "subprocess.call"),
        ((eval, "open('{}', 'w')"), "eval"),
        ((getattr, "x", "upper"), "getattr"),
        ((torch.load, "{}"), "torch.serialization.load"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_files_are_refused_by_name_and_do_nothing(call, name, zipped, tmp_path):
    proof = tmp_path / "proof"
    function, *arguments = call
    content = {"w": Hostile(function, *(a.format(proof) for a in arguments))}
    file = tmp_path / "w.pth"
    if zipped:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(content, 2, fix_imports=False))
    else:
        file.write_bytes(legacy(content))
    with pytest.raises(WeightsError, match=rf"w\.pth: .*{name}.* refused"):
        read_weights(file)
    assert not proof.exists()


def test_a_hostile_first_pickle_is_refused_too(tmp_path):
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Hostile(os.system, "true"), protocol=2))
    with pytest.raises(WeightsError, match="refused"):
        read_pth(tmp_path / "w.pth")


def test_functions_of_missing_packages_are_never_called(tmp_path):
    # protocol 0: GLOBAL nowhere.to_be_found.run, called with one argument
    program = b"cnowhere.to_be_found\nrun\n(S'argument'\ntR."
    head = [0x1950A86A20F9469CFC6C, 1001, {}]
    body = b"".join(pickle.dumps(part, protocol=2) for part in head) + program + pickle.dumps([], protocol=2)
    (tmp_path / "w.pth").write_bytes(body)
    with pytest.raises(WeightsError, match="no named tensors"):
        read_pth(tmp_path / "w.pth")


def test_a_view_beyond_its_storage_is_refused(tmp_path):
    stream = io.BytesIO()
    torch.save({"x": torch.zeros(4)}, stream, _use_new_zipfile_serialization=False)
    # The tensor's size, a pickled tuple of the number 4 (BININT1 4, TUPLE1), becomes 200.
    forged = stream.getvalue().replace(b"K\x04\x85", b"K\xc8\x85", 1)
    assert forged != stream.getvalue()
    (tmp_path / "w.pth").write_bytes(forged)
    with pytest.raises(WeightsError, match=r"w\.pth"):
        read_pth(tmp_path / "w.pth")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.3, 0.7, 0.99])
def test_truncated_files_are_refused_by_name(tensors, zipped, keep, tmp_path):
    file = tmp_path / "w.pth"
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    with pytest.raises(WeightsError, match=r"w\.pth"):
        read_pth(file)


def test_a_published_file_cut_short_is_called_truncated(weights_dir, tmp_path):
    data = (weights_dir / "resnet44_cifar.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(data[:-1000])
    with pytest.raises(WeightsError, match="truncated"):
        read_pth(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_missing_and_foreign_files_are_refused_by_name(name, tmp_path):
    with pytest.raises(WeightsError, match=f"{name}: no such weights file"):
        read_weights(tmp_path / name)
    (tmp_path / name).write_bytes(b"\x89PNG not weights at all")
    with pytest.raises(WeightsError, match=name):
        read_weights(tmp_path / name)


def test_conversion_keeps_tensors_and_notes_the_origin(weights_dir, tmp_path):
    source = weights_dir / "resnet44_cifar.pth"
    convert_to_safetensors(source, tmp_path / "r.safetensors")
    read = read_safetensors(tmp_path / "r.safetensors")
    original = read_pth(source).tensors
    assert set(read.tensors) == set(original)
    assert all(torch.equal(read.tensors[k], v) for k, v in original.items())
    assert read.metadata["source"] == source.name
    assert read.metadata["source_sha256"] == sha256(source)


def test_failed_writing_leaves_nothing_behind(tensors, tmp_path):
    (tmp_path / "w.safetensors").mkdir()
    with pytest.raises(OSError, match=r"w\.safetensors"):
        save_safetensors(tmp_path / "w.safetensors", tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
