"""Downloads from a real server on this machine, which can drop, delay, lie and refuse."""

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections import namedtuple
from email.utils import formatdate
from pathlib import Path

import pytest
from web_server import CONTENT, SHA256, Server

from policies.download import DownloadError, _HttpsOnly, download

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def fetch(server, target, **options):
    return download(server.url, target, **{"sha256": SHA256, "pause": 0.01, "timeout": 5, **options})


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_file_arrives_whole_and_nothing_else_is_left(server, tmp_path):
    target = tmp_path / "deep" / "w.pth"
    told = []
    assert fetch(server, target, size=len(CONTENT), report=lambda *now: told.append(now)) == SHA256
    assert target.read_bytes() == CONTENT
    assert left(target.parent) == ["w.pth"]
    assert told[0] == (0, len(CONTENT))
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_the_file_has_the_permissions_of_any_other(server, tmp_path):
    (tmp_path / "plain").touch()
    fetch(server, tmp_path / "w.pth")
    assert (tmp_path / "w.pth").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_dropped_connection_goes_on_where_it_was(server, tmp_path):
    server.answers = [1_000_000, 500_000]
    notices = []
    fetch(server, tmp_path / "w.pth", notice=notices.append)
    assert (tmp_path / "w.pth").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=1000000-", "bytes=1500000-"]
    assert all("the connection was lost" in notice for notice in notices)
    assert len(notices) == 2


def test_a_later_call_goes_on_where_an_earlier_one_gave_up(server, tmp_path):
    server.answers = [700_000]
    with pytest.raises(DownloadError, match=r"lost at 700000 of 3000000 bytes.*gave up after 1 tries"):
        fetch(server, tmp_path / "w.pth", attempts=1)
    assert left(tmp_path) == [".partial-w.pth"]
    fetch(server, tmp_path / "w.pth")
    assert server.requests[1:] == ["bytes=700000-"]
    assert (tmp_path / "w.pth").read_bytes() == CONTENT
    assert left(tmp_path) == ["w.pth"]


def test_all_that_was_left_is_all_there_is(server, tmp_path):
    (tmp_path / ".partial-w.pth").write_bytes(CONTENT)
    fetch(server, tmp_path / "w.pth")
    assert (tmp_path / "w.pth").read_bytes() == CONTENT


@pytest.mark.parametrize("rest", [b"another file" * 1000, CONTENT + b"and more"])
def test_what_is_left_of_another_file_is_dropped(rest, server, tmp_path):
    (tmp_path / ".partial-w.pth").write_bytes(rest)
    fetch(server, tmp_path / "w.pth")
    assert (tmp_path / "w.pth").read_bytes() == CONTENT


def test_without_a_known_hash_nothing_is_kept_for_later(server, tmp_path):
    (tmp_path / ".partial-w.pth").write_bytes(b"another file")
    server.answers = [700_000]
    with pytest.raises(DownloadError):
        fetch(server, tmp_path / "w.pth", sha256=None, attempts=1)
    assert left(tmp_path) == []
    assert fetch(server, tmp_path / "w.pth", sha256=None) == SHA256
    assert server.requests == [None, None]


def test_a_file_that_changes_on_the_way_is_fetched_from_its_beginning(server, tmp_path):
    server.answers = [700_000]

    def change(_):
        server.content, server.tag = CONTENT[::-1], '"two"'

    digest = fetch(server, tmp_path / "w.pth", sha256=None, notice=change)
    assert server.requests == [None, "bytes=700000-"]
    assert (tmp_path / "w.pth").read_bytes() == CONTENT[::-1]
    assert digest == hashlib.sha256(CONTENT[::-1]).hexdigest()


def test_a_server_that_knows_no_ranges_begins_anew(server, tmp_path):
    server.ranges = False
    server.answers = [700_000]
    fetch(server, tmp_path / "w.pth")
    assert (tmp_path / "w.pth").read_bytes() == CONTENT


def test_without_an_announced_length_the_known_size_tells_the_end(server, tmp_path):
    server.length = False
    server.answers = [700_000]
    fetch(server, tmp_path / "w.pth", size=len(CONTENT))
    assert (tmp_path / "w.pth").read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_server_errors_are_tried_again_and_a_pause_is_granted(server, tmp_path):
    soon = formatdate(time.time() + 1.5, usegmt=True)
    server.answers = [(500, {}), (503, {"Retry-After": "1"}), (429, {"Retry-After": soon})]
    notices = []
    start = time.monotonic()
    fetch(server, tmp_path / "w.pth", notice=notices.append)
    assert time.monotonic() - start > 1.0
    assert [re.search(r"HTTP status (\d+)", notice)[1] for notice in notices] == ["500", "503", "429"]
    assert "again in 1 s" in notices[1]


def test_pauses_double(server, tmp_path):
    server.answers = [(500, {})] * 3
    notices = []
    with pytest.raises(DownloadError, match=r"HTTP status 500.*gave up after 3 tries"):
        fetch(server, tmp_path / "w.pth", attempts=3, pause=0.6, notice=notices.append)
    assert [re.search(r"in (\d+) s", notice)[1] for notice in notices] == ["1", "1"]


def test_too_long_a_pause_is_not_waited_for(server, tmp_path):
    server.answers = [(429, {"Retry-After": "3600"})]
    with pytest.raises(DownloadError, match="HTTP status 429"):
        fetch(server, tmp_path / "w.pth")
    assert left(tmp_path) == []


def test_tries_are_counted_anew_while_the_file_grows(server, tmp_path):
    server.content = CONTENT * 3
    server.answers = [1_500_000] * 5
    fetch(server, tmp_path / "w.pth", sha256=hashlib.sha256(CONTENT * 3).hexdigest(), attempts=2)
    assert len(server.requests) == 6


@pytest.mark.parametrize(("status", "hint"), [(404, "may have moved"), (403, "consent to a licence")])
def test_what_is_not_there_is_not_asked_for_twice(status, hint, server, tmp_path):
    server.answers = [(status, {})]
    with pytest.raises(DownloadError, match=f"{server.url}: HTTP status {status} .*{hint}"):
        fetch(server, tmp_path / "w.pth")
    assert len(server.requests) == 1
    assert left(tmp_path) == []


def test_the_wrong_file_is_refused_with_both_hashes_and_the_old_one_stays(server, tmp_path):
    (tmp_path / "w.pth").write_bytes(b"old")
    server.content = b"x" * len(CONTENT)
    found = hashlib.sha256(server.content).hexdigest()
    with pytest.raises(DownloadError, match=f"SHA-256 is {found}, and should be {SHA256}"):
        fetch(server, tmp_path / "w.pth")
    assert left(tmp_path) == ["w.pth"]
    assert (tmp_path / "w.pth").read_bytes() == b"old"


def test_a_size_that_cannot_be_right_is_refused_before_the_file_comes(server, tmp_path):
    with pytest.raises(DownloadError, match="has 3000000 bytes; 7 were expected"):
        fetch(server, tmp_path / "w.pth", size=7)
    assert left(tmp_path) == []


def test_more_than_was_announced_is_not_taken(server, tmp_path):
    server.length = False
    with pytest.raises(DownloadError, match="sends more than the 7 bytes"):
        fetch(server, tmp_path / "w.pth", size=7)
    assert left(tmp_path) == []


def test_a_file_that_the_check_refuses_is_not_kept(server, tmp_path):
    def check(path):
        assert path.read_bytes() == CONTENT
        raise ValueError("no weights")

    with pytest.raises(ValueError, match="no weights"):
        fetch(server, tmp_path / "w.pth", check=check)
    assert left(tmp_path) == []


def test_a_silent_server_is_given_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/w"
        start = time.monotonic()
        with pytest.raises(DownloadError, match=r"timed out; gave up after 2 tries"):
            download(url, tmp_path / "w", sha256=SHA256, attempts=2, pause=0.01, timeout=0.3)
        assert time.monotonic() - start < 5
    with pytest.raises(DownloadError, match="refused; gave up after 2 tries"):
        download(url, tmp_path / "w", sha256=SHA256, attempts=2, pause=0.01)
    assert left(tmp_path) == []


def test_redirections_are_followed_but_never_out_of_encryption(server, tmp_path):
    server.answers = [(302, {"Location": server.url + "?there"})]
    fetch(server, tmp_path / "w.pth")
    request = urllib.request.Request("https://safe.example/w")
    with pytest.raises(DownloadError, match=r"leads to http://.* not encrypted"):
        _HttpsOnly().redirect_request(request, None, 302, "", {}, "http://unsafe.example/w")


def test_a_full_disk_is_told_before_anything_is_written(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 10, 1_000_000)
    monkeypatch.setattr("policies.download.shutil.disk_usage", lambda _: usage)
    with pytest.raises(
        DownloadError, match=r"no room .* 3000000 bytes, and 1000000 are free.*NAVAGENT_CACHE"
    ):
        fetch(server, tmp_path / "w.pth")
    assert left(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_fills_up_on_the_way_leaves_nothing(server, tmp_path):
    (tmp_path / ".partial-w.pth").symlink_to("/dev/full")
    with pytest.raises(DownloadError, match=r"cannot write in .*: No space left on device.*NAVAGENT_CACHE"):
        fetch(server, tmp_path / "w.pth", sha256=None)  # else it would read what an earlier call left
    assert left(tmp_path) == []
    assert len(server.requests) == 1


def test_a_folder_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match=r"cannot write in .*file.*NAVAGENT_CACHE"):
        fetch(server, tmp_path / "file" / "w.pth")
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(DownloadError, match=r"cannot write in .*closed: Permission denied"):
            fetch(server, tmp_path / "closed" / "w.pth")
    assert server.requests == []


FETCH = textwrap.dedent(
    """
    import signal
    import sys
    from policies.download import download

    # A shell starts what it puts in the background deaf to Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    download(sys.argv[1], sys.argv[2], sha256=sys.argv[3], pause=0.01, notice=print,
             report=lambda done, total: print(done, flush=True))
    """
)


def process(server, target, log):
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, server.url, str(target), SHA256],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=log.open("w"),
    )


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_processes_that_want_one_file_fetch_it_once(server, tmp_path):
    server.gate.clear()
    target = tmp_path / "cache" / "w.pth"
    logs = [tmp_path / f"{number}.log" for number in range(4)]
    processes = [process(server, target, log) for log in logs]
    waiting = "another process is fetching w.pth; waiting for it"
    wait_for(lambda: sum(waiting in log.read_text() for log in logs) == 3)
    server.gate.set()
    assert [p.wait(timeout=60) for p in processes] == [0, 0, 0, 0]
    assert len(server.requests) == 1
    assert target.read_bytes() == CONTENT
    assert left(target.parent) == ["w.pth"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_stopped_leaves_a_beginning_to_go_on_from(how, server, tmp_path):
    server.pause = 0.1
    target, log = tmp_path / "cache" / "w.pth", tmp_path / "log"
    stopped = process(server, target, log)
    wait_for(lambda: log.exists() and len(log.read_text().split()) > 1)
    stopped.send_signal(how)
    assert stopped.wait(timeout=60) != 0
    server.pause = 0.0
    beginning = (target.parent / ".partial-w.pth").stat().st_size
    assert 0 < beginning < len(CONTENT)
    fetch(server, target)
    assert server.requests[-1] == f"bytes={beginning}-"
    assert target.read_bytes() == CONTENT
    assert left(target.parent) == ["w.pth"]
