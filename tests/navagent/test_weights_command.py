"""``navagent weights``: what a user sees of the catalogue, and what is found out about files."""

import dataclasses
import functools
import hashlib
import http.server
import pickle
import shutil
import threading

import pytest
import torch

import policies.catalogue
from navagent.build import cameras
from navagent.cli import BAD_INPUT, FAILED, main
from navagent.config import ConfigError, load_config
from navagent.weights_command import size_text, verify
from policies.catalogue import catalogue
from policies.encoders import make_encoder
from policies.weights import read_safetensors, save_safetensors


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NAVAGENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NAVAGENT_DEBUG", "0")
    monkeypatch.delenv("NAVAGENT_OFFLINE", raising=False)
    folder = tmp_path / "cache" / "weights"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def published(tmp_path, monkeypatch):
    """An entry whose file a server on this machine has."""
    folder = tmp_path / "web"
    save_safetensors(folder / "toy.safetensors", {"w": torch.ones(200_000)})
    data = (folder / "toy.safetensors").read_bytes()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    entry = dataclasses.replace(
        catalogue()["side-tuning-resnet44-cifar"],
        name="toy",
        url=f"http://127.0.0.1:{server.server_port}/toy.safetensors",
        sha256=hashlib.sha256(data).hexdigest(),
        size=len(data),
        tensors_sha256=None,
        note="a note",
    )
    entries = {**catalogue(), "toy": entry}
    for module in ("policies.catalogue", "navagent.weights_command"):
        monkeypatch.setattr(f"{module}.catalogue", lambda: entries)
    yield entry
    server.shutdown()
    server.server_close()


def run(capsys, *arguments):
    status = main(["weights", *map(str, arguments)])
    answer = capsys.readouterr()
    return status, answer.out, answer.err


def test_the_list_has_every_name_whole_in_any_window(cache, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    status, out, _ = run(capsys, "list")
    assert status == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    for name, entry in catalogue().items():
        assert entry.source.licence in lines[name]
        assert entry.about in lines[name]
    assert "ships" in lines["fcn5_small-normals-rgb"]
    assert "2.7 MB" in lines["side-tuning-resnet44-cifar"]
    assert "unknown" in lines["mae-base"]
    assert "CC-BY-NC-4.0" in lines["mae-base"]
    assert "(not trained)" in lines["side-tuning-curvature-distilled"]
    assert "…" not in out
    assert all(line == line.rstrip() for line in out.splitlines())


def test_the_list_can_be_searched_and_says_what_is_here(cache, capsys):
    (cache / "dinov2-small.safetensors").touch()
    status, out, _ = run(capsys, "list", "dino", "vit-s")
    assert status == 0
    rows = [line.split() for line in out.splitlines() if line.startswith("dinov2")]
    assert [row[0] for row in rows] == ["dinov2-small"]
    assert "yes" in rows[0]
    status, _, err = run(capsys, "list", "nothing-like-this")
    assert (status, "no weights match" in err) == (BAD_INPUT, True)


def test_show_tells_address_hash_licence_citation_and_use(cache, capsys):
    status, out, _ = run(capsys, "show", "taskonomy-normal")
    entry = catalogue()["taskonomy-normal"]
    assert status == 0
    for part in (entry.url, entry.sha256, "MIT", "non-commercial", "Zamir", "arXiv:1804.08328"):
        assert part in out
    assert "navagent train encoder.name=taskonomy_normal encoder.weights=taskonomy-normal" in out
    assert "navagent weights fetch taskonomy-normal" in out
    assert "recorded at the first fetch" in run(capsys, "show", "dinov2-base")[1]


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_every_entry_can_be_shown(name, cache, capsys):
    status, out, _ = run(capsys, "show", name)
    assert (status, name in out) == (0, True)
    command = out.partition("navagent train ")[2].split()
    assert bool(command) == bool(catalogue()[name].encoders)
    config = load_config(command)
    if command:
        entry = catalogue()[name]
        assert (config.encoder.name, config.encoder.weights) == (entry.encoders[0], name)
        assert [1 if camera.kind == "depth" else 3 for camera in cameras(config)] == [entry.channels]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shwo"], "there is no action 'shwo'; did you mean 'show'?"),
        (["show", "taskonomy-normals"], "did you mean 'taskonomy-normal'?"),
        (["fetch", "dinov2-larg"], "did you mean 'dinov2-"),
        (["fetch"], "required: NAME"),
        (["fetch", "x", "--ofline"], "did you mean --offline?"),
        (["verify", "no-such-file"], "no-such-file: no such weights file"),
        (["verify", "dinov2-base"], "`navagent weights fetch dinov2-base`"),
        (["import", "no-such-file"], "no-such-file: no such weights file"),
        (["import", "w.safetensors"], "w.safetensors is a safetensors file already"),
        (["import", "w.pth", "--out", "w.dat"], "--out w.dat: expected a name that ends in .safetensors"),
    ],
)
def test_mistakes_are_answered_with_what_would_be_right(arguments, message, cache, capsys):
    status, _, err = run(capsys, *arguments)
    assert status == BAD_INPUT
    assert message in err


def test_fetch_prints_where_the_file_is(published, cache, capsys):
    status, out, err = run(capsys, "fetch", "toy", "fcn5_small-normals-rgb")
    assert status == 0, err
    paths = out.splitlines()
    assert paths == [str(cache / "toy.safetensors"), str(catalogue()["fcn5_small-normals-rgb"].path)]
    assert f"toy: fetched, SHA-256 {published.sha256}" in err
    assert "a note" in err
    assert "already here" in run(capsys, "fetch", "--offline", "toy")[2]


def test_fetch_goes_on_with_the_rest_and_fails_in_the_end(published, cache, capsys, monkeypatch):
    monkeypatch.setenv("NAVAGENT_OFFLINE", "1")
    status, out, err = run(capsys, "fetch", "toy", "fcn5_small-normals-rgb")
    assert status == BAD_INPUT
    assert len(out.splitlines()) == 1
    for part in ("offline", published.url, str(cache / "toy.safetensors"), published.sha256):
        assert part in err


def test_a_wrong_name_among_several_downloads_nothing(published, cache, capsys):
    status, _, err = run(capsys, "fetch", "toy", "toi")
    assert (status, list(cache.iterdir())) == (BAD_INPUT, [])
    assert "did you mean 'toy'?" in err


@pytest.mark.parametrize("file", ["resnet44_cifar.pth", "curvature-distilled.pth", "reshading-distilled.pth"])
def test_published_pickles_are_imported(file, weights_dir, tmp_path, cache, capsys):
    source = tmp_path / file.replace(".pth", ".dat")
    shutil.copy(weights_dir / file, source)
    status, out, err = run(capsys, "import", source)
    assert status == 0, err
    entry = next(e for e in catalogue().values() if e.published_name == file)
    target = source.with_suffix(".safetensors")
    assert entry.name in out
    assert f"encoder.name={entry.encoders[0]} encoder.weights={target}" in out
    assert ("look untrained" in err) == (entry.encoders == ("fcn5",))
    assert read_safetensors(target).metadata["source_sha256"] == entry.sha256
    make_encoder(entry.encoders[0], 3, target)
    status, _, err = run(capsys, "import", source)
    assert (status, "exists already" in err) == (BAD_INPUT, True)


def test_a_hostile_file_is_refused_and_nothing_is_written(tmp_path, cache, capsys):
    class Hostile:
        def __reduce__(self):
            return eval, (f"open({str(tmp_path / 'proof')!r}, 'w')",)

    torch.save({"w": torch.ones(1), "x": Hostile()}, tmp_path / "w.pth", pickle_module=pickle)
    before = sorted(tmp_path.iterdir())
    status, _, err = run(capsys, "import", tmp_path / "w.pth")
    assert (status, "refused" in err) == (BAD_INPUT, True)
    assert sorted(tmp_path.iterdir()) == before


def test_verify_knows_a_published_file_and_its_untrained_twins(weights_dir, cache, capsys):
    status, out, _ = run(capsys, "verify", weights_dir / "curvature-distilled.pth")
    assert status == 0
    assert "side-tuning-curvature-distilled, as published" in out
    assert "18, 921,376 values, float32" in out
    assert "looks untrained" in out
    assert "side-tuning-reshading-distilled" in out
    found = verify(weights_dir / "resnet44_cifar.pth")
    assert (found.warnings, found.faults) == ([], [])


def test_verify_finds_the_same_weights_in_the_cache_whatever_their_format(tmp_path, cache):
    tensors = {"a.weight": torch.randn(3, 3), "b": torch.arange(4.0)}
    torch.save({"state_dict": {f"module.{k}": v for k, v in tensors.items()}}, tmp_path / "one.pth")
    save_safetensors(cache / "two.safetensors", tensors)
    save_safetensors(cache / "other.safetensors", {**tensors, "b": torch.arange(4.0) + 1})
    (cache / "broken.pth").write_bytes(b"nothing")
    assert verify(tmp_path / "one.pth").warnings == [
        f"the same weights go by other names too: {cache / 'two.safetensors'}"
    ]
    assert verify(cache / "two.safetensors").warnings == []


def test_verify_finds_a_copy_of_what_ships(tmp_path, cache):
    entry = catalogue()["fcn5_small-normals-rgb"]
    assert verify(entry.name).warnings == []
    save_safetensors(tmp_path / "mine.safetensors", read_safetensors(entry.path).tensors)
    assert "fcn5_small-normals-rgb" in verify(tmp_path / "mine.safetensors").warnings[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_verify_refuses_numbers_that_are_none(value, tmp_path, cache, capsys):
    tensors = {"good": torch.ones(2), "bad": torch.tensor([1.0, value])}
    save_safetensors(tmp_path / "w.safetensors", tensors)
    status, out, _ = run(capsys, "verify", tmp_path / "w.safetensors")
    assert status == FAILED
    assert "1 of its tensors hold NaN or infinity: bad" in out
    assert "every value is finite" not in out


def test_verify_refuses_a_file_that_only_has_the_name(weights_dir, tmp_path, cache, capsys):
    data = bytearray((weights_dir / "resnet44_cifar.pth").read_bytes())
    data[-1] ^= 1
    (tmp_path / "resnet44_cifar.pth").write_bytes(data)
    status, out, _ = run(capsys, "verify", tmp_path / "resnet44_cifar.pth")
    assert status == FAILED
    assert "side-tuning-resnet44-cifar by its name only" in out
    assert catalogue()["side-tuning-resnet44-cifar"].sha256 in out
    shutil.copy(weights_dir / "curvature-distilled.pth", tmp_path / "reshading-distilled.pth")
    assert "but is side-tuning-curvature-distilled" in verify(tmp_path / "reshading-distilled.pth").faults[0]
    (tmp_path / "resnet44_cifar.pth").write_bytes(data[:1000])
    assert any("truncated" in fault for fault in verify(tmp_path / "resnet44_cifar.pth").faults)


def test_verify_holds_an_import_against_what_it_says_it_was_made_from(weights_dir, tmp_path, cache):
    entry = catalogue()["side-tuning-resnet44-cifar"]
    origin = {"source_sha256": entry.sha256}
    tensors = make_encoder("resnet44", 3, weights_dir / "resnet44_cifar.pth").state_dict()
    save_safetensors(tmp_path / "good.safetensors", tensors, origin)
    found = verify(tmp_path / "good.safetensors")
    assert (found.warnings, found.faults) == ([], [])
    assert entry.name in found.facts["made from"]
    save_safetensors(tmp_path / "bad.safetensors", {**tensors, "bn1.bias": torch.ones(16)}, origin)
    assert "whose tensors are others" in verify(tmp_path / "bad.safetensors").faults[0]


def test_verify_says_where_there_is_nothing_to_compare_with(cache, capsys):
    save_safetensors(cache / "dinov2-base.safetensors", {"w": torch.ones(1)})
    assert "neither published nor recorded" in verify("dinov2-base").facts["catalogue"]
    policies.catalogue.fetch("dinov2-base", offline=True)
    assert "as it was when it was fetched first" in verify("dinov2-base").facts["catalogue"]
    save_safetensors(cache / "dinov2-base.safetensors", {"w": torch.zeros(1)})
    assert "recorded in" in verify("dinov2-base").faults[0]


def test_settings_take_weights_by_their_name(cache):
    chosen = ["encoder=resnet44", "encoder.weights=side-tuning-resnet44-cifar"]
    assert load_config(chosen).encoder.weights == "side-tuning-resnet44-cifar"
    student = ["adaptation.side_init=distilled", "adaptation.side_encoder=fcn4"]
    load_config([*chosen, *student, "adaptation.side_weights=side-tuning-cifar-distilled"])
    with pytest.raises(ConfigError, match=r"nor 'random', nor a name .* did you mean 'dinov2-small'"):
        load_config(["encoder.weights=dinov2-smal"])


def test_sizes_are_for_people():
    assert [size_text(n) for n in (None, 352_444, 12_300, 94_600_000)] == [
        "unknown",
        "0.4 MB",
        "12.3 kB",
        "94.6 MB",
    ]
