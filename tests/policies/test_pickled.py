"""The stack machine for torch's files: what honest files hold, and what hostile ones cannot do."""

import io
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from policies.weights import WeightsError, read_pth

ROOT = Path(__file__).resolve().parents[2]
HEAD = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
NO_KEYS = pickle.dumps([], 2)
ONE = pickle.dumps(["1"], 2)
HUGE = 1 << 40


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def storage(key: str, numel: int) -> bytes:
    """Pushes a storage."""
    return (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
        + pickle.dumps(numel, 2)[2:-1] + b"tQ"
    )  # fmt: skip


def tensor(key: str, numel: int, size: bytes = b"K\x01\x85", stride: bytes = b"K\x01\x85") -> bytes:
    """Pushes a tensor that is a view of a storage."""
    return (
        b"ctorch._utils\n_rebuild_tensor\n(" + storage(key, numel) + b"K\x00" + size + stride + b"tR"
    )  # fmt: skip


def state(body: bytes) -> bytes:
    """A program for a dictionary of one value."""
    return b"\x80\x02}" + text("w") + body + b"s."


def legacy(program: bytes, keys: bytes = NO_KEYS, storages: bytes = b"") -> bytes:
    return HEAD + program + keys + storages


def zipped(program: bytes, entries=(), compression=zipfile.ZIP_STORED, prefix="archive/") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr(f"{prefix}data.pkl", program)
        for name, data in entries:
            archive.writestr(name, data)
    return stream.getvalue()


def refused(data: bytes, folder: Path, match: str) -> None:
    (folder / "w.pth").write_bytes(data)
    with pytest.raises(WeightsError, match=match) as error:
        read_pth(folder / "w.pth")
    assert str(error.value).startswith(str(folder / "w.pth"))


@pytest.mark.parametrize(
    ("protocol", "zip_format"), [(1, False), *((p, z) for p in (2, 3, 4, 5) for z in (True, False))]
)
def test_reads_every_protocol_as_torch_does(protocol, zip_format, tmp_path):
    content = {
        "epoch": 3,
        "best": 0.5,
        "note": "naïve\n",
        "flags": (True, None, -70000, 2**70, [1.5, {"x": b"bytes", "y": {1, 2}}], frozenset([3])),
        "state_dict": OrderedDict(
            [
                ("a.weight", torch.randn(3, 2)),
                ("b", torch.tensor([1, 2, 3])[1:]),
                ("p", torch.nn.Parameter(torch.ones(2))),
            ]
        ),
    }
    file = tmp_path / "w.pth"
    torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=zip_format)
    checkpoint = read_pth(file)
    expected = torch.load(file, weights_only=False)["state_dict"]
    assert list(checkpoint.tensors) == list(expected)
    assert all(torch.equal(checkpoint.tensors[name], value) for name, value in expected.items())
    assert checkpoint.metadata == {"epoch": 3, "best": 0.5, "note": "naïve\n"}


def test_reads_what_python_2_wrote_as_torch_does(tmp_path):
    # Byte strings for texts, __builtin__, an OrderedDict made of a list of pairs, and a view of a storage.
    values = b"ctorch._utils\n_rebuild_tensor\n((U\x07storagectorch\nFloatStorage\nU\x011U\x03cpuK\x04NtQ"
    pair = b"]U\x01wa" + values + b"K\x01K\x02\x85K\x01\x85tRa"
    program = (
        b"\x80\x02}(U\nstate_dictccollections\nOrderedDict\n](" + pair + b"e\x85R"
        b"U\x04bestc__builtin__\nset\n]\x85Ru."
    )
    head = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001})
    data = b"".join(pickle.dumps(part, 2) for part in head) + program + ONE
    (tmp_path / "w.pth").write_bytes(data + struct.pack("<q4f", 4, 1.0, 2.0, 3.0, 4.0))
    expected = torch.load(tmp_path / "w.pth", weights_only=False, encoding="latin1")["state_dict"]["w"]
    assert expected.tolist() == [2.0, 3.0]
    assert torch.equal(read_pth(tmp_path / "w.pth").tensors["w"], expected)


def test_settings_and_scores_beside_the_tensors_are_left_out(tmp_path):
    import argparse

    import numpy

    content = {
        "state_dict": {"w": torch.ones(2)},
        "args": argparse.Namespace(lr=0.1),
        "best": numpy.float64(0.9),
        "device": torch.device("cpu"),
        "optimizer": torch.optim.Adam([torch.nn.Parameter(torch.ones(1))]).state_dict(),
    }
    torch.save(content, tmp_path / "w.pth")
    checkpoint = read_pth(tmp_path / "w.pth")
    assert checkpoint.tensors["w"].tolist() == [1.0, 1.0]
    assert checkpoint.metadata == {}


def test_old_views_of_storages_are_read_as_torch_reads_them(tmp_path):
    view = (
        b"("
        + text("storage")
        + b"ctorch\nFloatStorage\n"
        + text("1")
        + text("cpu")
        + b"K\x04("
        + text("v")
        + b"K\x02K\x02ttQ"
    )
    body = b"ctorch._utils\n_rebuild_tensor\n(" + view + b"K\x00K\x02\x85K\x01\x85tR"
    data = legacy(state(body), ONE, struct.pack("<q4f", 4, 1.0, 2.0, 3.0, 4.0))
    (tmp_path / "w.pth").write_bytes(data)
    expected = torch.load(tmp_path / "w.pth", weights_only=False)["w"]
    assert read_pth(tmp_path / "w.pth").tensors["w"].tolist() == expected.tolist() == [3.0, 4.0]


CALLS = {
    "REDUCE": lambda name: b"c" + name + b"\n(" + text("{}") + b"tR",
    "INST": lambda name: b"(" + text("{}") + b"i" + name + b"\n",
    "OBJ": lambda name: b"(c" + name + b"\n" + text("{}") + b"o",
    "NEWOBJ": lambda name: b"c" + name + b"\n(" + text("{}") + b"t\x81",
    "STACK_GLOBAL": lambda name: (
        b"".join(text(word.decode()) for word in name.split(b"\n")) + b"\x93(" + text("{}") + b"tR"
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "name",
    [
        b"posix\nsystem",
        b"os\nsystem",
        b"builtins\neval",
        b"builtins\nexec",
        b"__builtin__\napply",
        b"builtins\ngetattr",
        b"commands\ngetoutput",
        b"subprocess\nPopen",
        b"importlib\nimport_module",
        b"pickle\nloads",
        b"operator\nattrgetter",
        b"functools\npartial",
        b"torch\nload",
        b"torch.serialization\nload",
        b"torch.hub\nload",
        b"torch.jit\nload",
        b"torch.storage\n_load_from_bytes",
        b"torch._inductor.codecache\n_load_triton_kernel_from_source",
        b"numpy\nload",
        b"numpy.testing._private.utils\nrunstring",
        b"policies.weights\nread_weights",
    ],
)
def test_no_instruction_calls_a_function_that_is_not_needed(call, name, tmp_path):
    module, function = name.decode().split("\n")
    for data in (legacy(state(CALLS[call](name))), zipped(state(CALLS[call](name)))):
        refused(data, tmp_path, rf"asks for {module}\.{function}, .*refused")


def test_names_inside_of_torchs_networks_are_never_looked_up(tmp_path):
    # A dotted name would lead from any module of torch to os.system.
    proof = tmp_path / "proof"
    body = (
        text("torch.nn.modules.module") + text("torch.os.system") + b"\x93(" + text(f"touch {proof}") + b"tR"
    )
    refused(legacy(state(body)), tmp_path, "no named tensors")
    assert not proof.exists()


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"cnowhere\nmake\n)R)R", "calls Placeholder"),
        (b"ctorch\nSize\n](cnowhere\nmake\n)Rae)R)R", "calls list"),
        (b"ctorch\nFloatStorage\n)R", "calls the type of a storage"),
        (b"ctorch\nFloatStorage\n}" + text("dtype") + text("x") + b"sb", "sets attributes of _Name"),
        (b"ctorch._utils\n_rebuild_tensor\n}" + text("__code__") + b"Nsb", "sets attributes of _Name"),
        (b"K\x01}b", "sets attributes of int"),
        (b"\x82\x01", "instruction .* is not needed"),
        (b"\x96" + struct.pack("<Q", 1 << 40), "instruction .* is not needed"),
        (text("x") + b"Q", "persistent object"),
        (b"(" + text("storage") + b"cnowhere\nX\n" + text("0") + text("cpu") + b"K\x01tQ", "unknown type"),
    ],
)
def test_objects_are_neither_called_nor_changed(body, match, tmp_path):
    refused(legacy(state(body)), tmp_path, match)
    torch.save({"x": torch.ones(2)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert read_pth(tmp_path / "w.pth").tensors["x"].dtype == torch.float32


def test_names_in_an_archive_lead_nowhere_outside_of_it(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "secret").write_bytes(b"\x00" * 4)
    before = sorted(tmp_path.rglob("*"))
    refused(zipped(state(tensor("../../secret", 1))), inner, "secret")
    refused(zipped(state(tensor(str(tmp_path / "secret"), 1)), prefix="/"), inner, "secret")
    # Such names are only names: with its storage under the same one, the file is read.
    data = zipped(state(tensor("../x", 1)), [("../up/data/../x", struct.pack("<f", 7.0))], prefix="../up/")
    (inner / "w.pth").write_bytes(data)
    assert read_pth(inner / "w.pth").tensors["w"].tolist() == [7.0]
    assert sorted(p for p in tmp_path.rglob("*") if p.name != "w.pth") == before


@pytest.mark.parametrize("order", ["big", "zip"])
def test_files_of_the_other_byte_order_are_refused(order, tmp_path):
    if order == "zip":
        data = zipped(state(b"N"), [("archive/byteorder", b"big")])
    else:
        head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": False}]
        data = b"".join(pickle.dumps(part, 2) for part in head) + state(b"N") + NO_KEYS
    refused(data, tmp_path, "other order")


def test_the_oldest_torch_files_are_named(tmp_path):
    with tarfile.open(tmp_path / "w.pth", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    with pytest.raises(WeightsError, match=r"w\.pth: a tar archive"):
        read_pth(tmp_path / "w.pth")


def test_a_storage_without_its_bytes_is_not_taken_for_zeros(tmp_path):
    refused(legacy(state(tensor("1", 1))), tmp_path, "storage '1' is missing")


MODULE = b"cnowhere\nM\n)\x81"
VIEW = b"ctorch._utils\n_rebuild_tensor\n(h\x00K\x00\x8a\x03\x00\x00\x01\x85K\x01\x85tR"
DOUBLED = b"K\x01\x85q\x00" + b"h\x00h\x00\x86q\x00" * 60


def modules(*names: str) -> bytes:
    """A chain of modules, each with the one before as every one of its children."""
    link = MODULE + b"}" + text("_modules") + b"}("
    link += b"".join(text(name) + b"h\x01" for name in names) + b"usbq\x01"
    return b"\x80\x02" + MODULE + b"q\x01" + link * 60 + b"."


def forged() -> bytes:
    """An archive whose directory claims four gigabytes for each of its entries."""
    data = bytearray(zipped(state(tensor("0", 1)), [("archive/data/0", bytes(4))]))
    for start in range(len(data) - 4):
        if data[start : start + 4] == b"PK\x01\x02":
            data[start + 20 : start + 28] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    return bytes(data)


# Small files that ask for much time or memory.
BOMBS = {
    "memory index": legacy(b"\x80\x02Nr\xff\xff\xff\xff."),
    "text length": legacy(state(b"\x8d" + struct.pack("<Q", HUGE))),
    "frame length": legacy(b"\x80\x04\x95" + struct.pack("<Q", HUGE)),
    "number": legacy(state(b"\x8b" + struct.pack("<i", 3_000_000) + b"\x7f" * 3_000_000)),
    "digits": legacy(state(b"L" + b"9" * 1_000_000 + b"L\n")),
    "storage": legacy(state(tensor("1", HUGE))),
    "negative storage": legacy(state(tensor("1", -1))),
    "storages": legacy(state(b"(" + b"".join(storage(str(key), 10_000) for key in range(2000)) + b"l")),
    "expanded tensor": legacy(
        state(tensor("1", 1, b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85", b"K\x00\x85")),
        ONE,
        struct.pack("<qf", 1, 1.0),
    ),
    "dimensions": legacy(state(tensor("1", 1, b"(" + b"K\x01" * 100_000 + b"t"))),
    "hash of a key": legacy(b"\x80\x02}" + DOUBLED + b"K\x01s."),
    "hash of an item": legacy(state(b"c__builtin__\nset\n](" + DOUBLED + b"e\x85R")),
    "text of an object": legacy(state(DOUBLED + b"Q")),
    "copies": legacy(
        b"\x80\x02](" + b"".join(text(str(n)) + b"K\x01\x86" for n in range(3000)) + b"eq\x00("
        + b"ccollections\nOrderedDict\nh\x00\x85R" * 20_000 + b"l."
    ),
    "module in itself": legacy(
        b"\x80\x02" + MODULE + b"q\x01}" + text("_modules") + b"}" + text("a") + b"h\x01ssb."
    ),
    "modules doubled": legacy(modules("a", "b")),
    "long names": legacy(modules("n" * 500)),
    "nested tuples": legacy(state(b"N" + b"\x85" * 200_000)),
    "nested dictionaries": legacy(
        b"\x80\x02}q\x01" + (b"}" + text("state_dict") + b"h\x01sq\x01") * 100_000 + b"."
    ),
    "shared storage": legacy(
        b"\x80\x02" + storage("1", 1 << 16) + b"q\x000}("
        + b"".join(text(f"t{n}") + VIEW for n in range(9000)) + b"u.",
        ONE,
        struct.pack("<q", 1 << 16) + bytes(4 << 16),
    ),
    "packed program": zipped(bytes(1 << 26), compression=zipfile.ZIP_DEFLATED),
    "packed storage": zipped(
        state(tensor("0", 1 << 24)), [("archive/data/0", bytes(1 << 26))], zipfile.ZIP_DEFLATED
    ),
    "forged sizes": forged(),
}  # fmt: skip


def test_bombs_are_refused_at_once_and_in_little_memory(tmp_path):
    for name, data in BOMBS.items():
        assert len(data) < 4 << 20, name
        (tmp_path / f"{name}.pth").write_bytes(data)
    code = """
        import resource, sys, time
        from pathlib import Path
        from policies.weights import WeightsError, read_pth
        import torch

        torch.zeros(1)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), resource.RLIM_INFINITY))
        for file in sorted(Path(sys.argv[1]).glob("*.pth")):
            start = time.monotonic()
            try:
                read_pth(file)
                print(file.stem, "was read")
            except WeightsError as error:
                if "MemoryError" in str(error) or len(str(error)) > 500:
                    print(file.stem, str(error)[:500])
            if time.monotonic() - start > 5:
                print(file.stem, "took", time.monotonic() - start)
    """
    answer = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (answer.returncode, answer.stdout) == (0, ""), answer.stderr


@pytest.mark.parametrize("zip_format", [True, False])
def test_damage_anywhere_is_refused_or_harmless(zip_format, tmp_path):
    torch.save(
        OrderedDict(a=torch.randn(3, 4), b=torch.arange(5)),
        tmp_path / "whole.pth",
        _use_new_zipfile_serialization=zip_format,
    )
    whole = (tmp_path / "whole.pth").read_bytes()
    draw = random.Random(0)
    refusals = 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path / "w.pth").write_bytes(data)
        try:
            read_pth(tmp_path / "w.pth")
        except WeightsError:
            refusals += 1
    assert refusals > 40
