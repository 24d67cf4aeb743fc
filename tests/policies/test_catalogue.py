"""The catalogue: what it says of published files, and that only the right ones are handed out."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from web_server import Server

import policies
from envs.files import cache_dir
from policies.catalogue import (
    CatalogueError,
    Entry,
    Source,
    catalogue,
    catalogue_path,
    fetch,
    find_entry,
    weights_dir,
)
from policies.download import DownloadError
from policies.encoders import ENCODERS, default_weights, make_encoder
from policies.weights import read_weights, save_safetensors, sha256, tensors_sha256, untrained_reason

HEX = set("0123456789abcdef")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NAVAGENT_CACHE", str(tmp_path))
    monkeypatch.delenv("NAVAGENT_OFFLINE", raising=False)
    return tmp_path / "weights"


@pytest.fixture
def server(tmp_path_factory):
    server = Server()
    file = tmp_path_factory.mktemp("published") / "w.safetensors"
    save_safetensors(file, {"conv.weight": torch.randn(8, 3, 3, 3)})
    server.content = file.read_bytes()
    server.url = server.url.replace(".pth", ".safetensors")
    yield server
    server.close()


@pytest.fixture
def publish(server, monkeypatch):
    """Makes the catalogue hold one entry, for what the server has."""

    def publish(**known):
        source = Source("test files", "nowhere", "MIT")
        entry = Entry("toy", source, "encoder", "nothing", ("fcn4",), url=server.url, **known)
        monkeypatch.setattr("policies.catalogue.catalogue", lambda: {"toy": entry})
        return entry

    return publish


def blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def test_every_entry_says_what_a_user_has_to_know():
    for name, entry in catalogue().items():
        assert name == entry.name
        assert name not in ("default", "random")
        assert not set(name) & set("/. ")
        assert entry.about
        assert entry.source.licence
        assert entry.source.citations or entry.shipped
        assert bool(entry.url) != bool(entry.shipped)
        assert entry.url.startswith("https://") or not entry.url
        assert entry.path.suffix in (".safetensors", ".pth", ".dat", ".bin")
        assert bool(entry.encoders) == (entry.kind == "encoder")
        for digest, length in ((entry.sha256, 64), (entry.tensors_sha256, 64), (entry.git_blob, 40)):
            assert digest is None or (len(digest) == length and set(digest) <= HEX)


def test_no_two_entries_share_a_place_an_address_or_a_default():
    entries = list(catalogue().values())
    assert len({entry.path for entry in entries}) == len(entries)
    assert len({entry.url or entry.shipped for entry in entries}) == len(entries)
    defaults = [(name, e.channels) for e in entries if e.default for name in e.encoders]
    assert len(set(defaults)) == len(defaults)


def test_taskonomys_addresses_and_hashes_are_those_of_visualpriors():
    network = pytest.importorskip("visualpriors.taskonomy_network")
    published = network.TASKONOMY_PRETRAINED_URLS
    assert len(published) == 42
    entries = {e.url: e for e in catalogue().values() if e.name.startswith("taskonomy-")}
    assert set(entries) == set(published.values())
    for key, url in published.items():
        task, kind = key.rsplit("_", 1)
        entry = entries[url]
        assert entry.name == f"taskonomy-{task}" + ("-decoder" if kind == "decoder" else "")
        assert entry.kind == kind
        assert f"-{entry.sha256}.pth" in url


def test_the_entries_of_published_files_at_hand_are_right(weights_dir):
    by_file = {e.published_name: e for e in catalogue().values() if e.name.startswith("side-tuning-")}
    assert len(by_file) == 15
    files = sorted(weights_dir.glob("*.pth"))
    assert files
    for file in files:
        entry, data = by_file[file.name], file.read_bytes()
        assert (entry.size, entry.sha256, entry.git_blob) == (len(data), sha256(file), blob(data))


def test_the_catalogue_knows_that_two_published_names_hold_one_untrained_network(weights_dir):
    entries = catalogue()
    twins = [e for e in entries.values() if e.tensors_sha256 and "fcn5" in e.encoders]
    assert len(twins) == 8
    assert len({e.tensors_sha256 for e in twins}) == 1
    assert all("Not trained" in e.note for e in twins)
    for file in ("curvature-distilled.pth", "reshading-distilled.pth"):
        with pytest.warns(UserWarning, match="untrained"):
            tensors = read_weights(weights_dir / file).tensors
        assert untrained_reason(tensors)
        entry = next(e for e in twins if e.published_name == file)
        assert tensors_sha256(tensors) == entry.tensors_sha256
    resnet = read_weights(weights_dir / "resnet44_cifar.pth").tensors
    assert tensors_sha256(resnet) == entries["side-tuning-resnet44-cifar"].tensors_sha256


def test_entries_name_encoders_that_there_are():
    assert {name for entry in catalogue().values() for name in entry.encoders} <= set(ENCODERS)


def test_all_that_ships_is_in_the_catalogue_and_loads():
    folder = Path(policies.__file__).parent
    shipped = {e.path: e for e in catalogue().values() if e.shipped}
    files = set(folder.rglob("*.safetensors"))
    # The decoder that an encoder was trained with lies beside it, and is found from there.
    decoders = {path.with_name(f"{path.stem}-decoder.safetensors") for path in shipped}
    assert set(shipped) == files - decoders
    for path, entry in shipped.items():
        assert catalogue_path(entry.name) == path
        assert fetch(entry.name, offline=True).path == path
        make_encoder(entry.encoders[0], entry.channels, entry.name)


def test_one_variable_moves_all_that_is_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("NAVAGENT_CACHE", str(tmp_path))
    assert weights_dir() == cache_dir() / "weights" == tmp_path / "weights"
    monkeypatch.delenv("NAVAGENT_CACHE")
    assert weights_dir() == cache_dir() / "weights"


def test_reading_the_catalogue_imports_nothing_heavy():
    code = "import sys, policies.catalogue as c; c.catalogue(); print('torch' in sys.modules)"
    root = Path(policies.__file__).parents[1]
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert answer.stdout == "False\n", answer.stderr


def test_unknown_names_get_the_nearest():
    with pytest.raises(CatalogueError, match=r"no weights 'dinov2-smal'; did you mean 'dinov2-small'"):
        find_entry("dinov2-smal")


def test_weights_that_are_not_here_are_asked_for_by_command(cache):
    with pytest.raises(CatalogueError, match=r"`navagent weights fetch dinov2-base`"):
        catalogue_path("dinov2-base")


def test_a_known_file_is_fetched_once_and_verified(cache, server, publish):
    digest = hashlib.sha256(server.content).hexdigest()
    publish(sha256=digest, size=len(server.content))
    first = fetch("toy")
    assert (first.path, first.sha256) == (cache / "toy.safetensors", digest)
    assert (first.downloaded, first.trusted) == (True, False)
    second = fetch("toy")
    assert not second.downloaded
    assert len(server.requests) == 1
    assert catalogue_path("toy") == first.path
    assert [p.name for p in cache.iterdir()] == ["toy.safetensors"]


def test_a_damaged_file_is_not_handed_out_and_fetched_again(cache, server, publish):
    publish(sha256=hashlib.sha256(server.content).hexdigest())
    path = fetch("toy").path
    path.write_bytes(server.content[:-1] + bytes([server.content[-1] ^ 1]))
    with pytest.raises(
        CatalogueError, match=r"has SHA-256 \w{64}; in the catalogue it is .*weights fetch toy"
    ):
        catalogue_path("toy")
    notices = []
    assert fetch("toy", notice=notices.append).downloaded
    assert "fetching it again" in notices[0]
    assert path.read_bytes() == server.content


def test_a_wrong_file_on_the_web_keeps_the_damaged_one_and_is_not_taken(cache, server, publish):
    publish(sha256="0" * 64)
    cache.mkdir()
    (cache / "toy.safetensors").write_bytes(b"old")
    with pytest.raises(DownloadError, match=r"should be 0{64}"):
        fetch("toy")
    assert [p.name for p in cache.iterdir()] == ["toy.safetensors"]
    assert (cache / "toy.safetensors").read_bytes() == b"old"


def test_an_unknown_hash_is_recorded_at_first_and_held_to_later(cache, server, publish):
    publish()
    first = fetch("toy")
    assert first.trusted
    record = cache / "toy.safetensors.sha256"
    assert record.read_text() == f"{hashlib.sha256(server.content).hexdigest()}  toy.safetensors\n"
    assert subprocess.run(["sha256sum", "-c", record.name], cwd=cache, capture_output=True).returncode == 0
    again = fetch("toy")
    assert not again.trusted
    assert not again.downloaded
    first.path.write_bytes(b"other")
    with pytest.raises(CatalogueError, match=r"recorded in toy\.safetensors\.sha256 it is"):
        catalogue_path("toy")
    first.path.unlink()
    server.content = server.content[:-1] + bytes([server.content[-1] ^ 1])
    with pytest.raises(DownloadError, match=r"should be .*remove it to trust anew"):
        fetch("toy")
    record.unlink()
    assert fetch("toy").trusted


def test_what_is_no_weights_file_is_not_trusted(cache, server, publish):
    publish()
    server.content = b"<html>please log in</html>"
    with pytest.raises(CatalogueError, match="no weights file"):
        fetch("toy")
    assert list(cache.iterdir()) == []


def test_gits_name_of_a_file_stands_in_for_an_unknown_hash(cache, server, publish):
    publish(git_blob=blob(server.content))
    assert not fetch("toy").trusted
    catalogue_path("toy")
    (cache / "toy.safetensors.sha256").unlink()
    catalogue_path("toy")
    (cache / "toy.safetensors").write_bytes(b"other")
    with pytest.raises(CatalogueError, match=r"is git blob \w{40}, not"):
        catalogue_path("toy")
    server.content += b"more"
    with pytest.raises(CatalogueError, match="is not the file that was published"):
        fetch("toy")
    assert [p.name for p in cache.iterdir()] == ["toy.safetensors"]


@pytest.mark.parametrize("how", ["argument", "variable"])
def test_offline_opens_no_connection_and_says_what_goes_where(how, cache, publish, monkeypatch):
    def connect(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr("socket.getaddrinfo", connect)
    entry = publish(sha256="1" * 64, size=77)
    if how == "variable":
        monkeypatch.setenv("NAVAGENT_OFFLINE", "1")
    with pytest.raises(DownloadError, match="offline") as error:
        fetch("toy", offline=how == "argument")
    for part in (entry.url, "77 bytes", "1" * 64, str(cache / "toy.safetensors")):
        assert part in str(error.value)


def test_without_a_network_the_same_is_said(cache, server, publish):
    server.close()
    publish(sha256="1" * 64)
    with pytest.raises(DownloadError, match="refused") as error:
        fetch("toy", pause=0.001)
    assert str(cache / "toy.safetensors") in str(error.value)


def test_a_file_put_there_by_hand_is_taken_when_it_is_fetched(cache, server, publish):
    publish()
    cache.mkdir()
    (cache / "toy.safetensors").write_bytes(server.content)
    with pytest.raises(CatalogueError, match=r"put there by hand.*weights fetch toy"):
        catalogue_path("toy")
    found = fetch("toy", offline=True)
    assert (found.downloaded, found.trusted) == (False, True)
    assert catalogue_path("toy") == cache / "toy.safetensors"


def test_encoders_take_weights_by_their_name_in_the_catalogue(cache, weights_dir):
    cache.mkdir()
    (cache / "side-tuning-resnet44-cifar.pth").write_bytes((weights_dir / "resnet44_cifar.pth").read_bytes())
    expected = make_encoder("resnet44", 3, weights_dir / "resnet44_cifar.pth").state_dict()
    for weights in ("side-tuning-resnet44-cifar", "default"):
        state = make_encoder("resnet44", 3, weights).state_dict()
        assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert default_weights("resnet44") == cache / "side-tuning-resnet44-cifar.pth"


@pytest.mark.parametrize(
    ("encoder", "channels", "weights", "message"),
    [
        ("resnet44", 3, "default", r"`navagent weights fetch side-tuning-resnet44-cifar`"),
        ("taskonomy_max_coverage_1", 3, "default", r"`navagent weights fetch taskonomy-autoencoding`"),
        ("resnet44", 1, "default", r"no default weights .*'resnet44' with 1 input channel"),
        (
            "resnet44",
            3,
            "fcn5_small-normals-rgb",
            r"are for fcn5_small with 3 input channel.*not for 'resnet44'",
        ),
        ("fcn5_small", 3, "fcn5_small-normals-depth", r"are for fcn5_small with 1 input channel"),
        ("resnet44", 3, "taskonomy-normal-decoder", r"are for a decoder with"),
        ("resnet44", 3, "dinov2-smal", r"did you mean 'dinov2-small'"),
        ("resnet44", 3, "no/such/file.pth", r"no/such/file.pth: no such weights file"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(encoder, channels, weights, message, cache):
    with pytest.raises(ValueError, match=message):
        make_encoder(encoder, channels, weights)


def test_the_data_file_has_no_fields_that_nobody_reads():
    import policies.catalogue

    data = json.loads(Path(policies.catalogue.__file__).with_suffix(".json").read_text("utf-8"))
    fields = {field.name for field in dataclasses.fields(Entry)}
    assert {key for row in data["entries"] for key in row} <= fields
    assert {row["source"] for row in data["entries"]} == set(data["sources"])
