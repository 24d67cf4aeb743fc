import gzip
import os
from pathlib import Path

import pytest

from envs import files
from envs.files import atomic_write, cache_dir, read_unpacked


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "notes.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("first")
        assert temporary.suffix == ".txt" and not path.exists()
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_text("half of the sec")
        raise ZeroDivisionError
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_a_finished_file_may_be_read_by_whom_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a") as temporary:
            temporary.write_text("a")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_packed_and_plain_files_read_alike_whatever_their_names(tmp_path):
    path = tmp_path / "a.json"
    for data in (b"", b"x", b"[1, 2]"):
        path.write_bytes(data)
        assert read_unpacked(path) == data
        path.write_bytes(gzip.compress(data))
        assert read_unpacked(path) == data


def test_nothing_unpacks_to_more_than_a_hundred_times_its_size(tmp_path, monkeypatch):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(bytes(10**6)))
    assert len(read_unpacked(path)) == 10**6
    monkeypatch.setattr(files, "_ALWAYS_ALLOWED", 1000)
    with pytest.raises(ValueError, match=f"its {path.stat().st_size} bytes unpack to more than"):
        read_unpacked(path)


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("NAVAGENT_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.setenv("NAVAGENT_CACHE", "")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_dir() == Path("/home/somebody/.cache/navagent")
