"""Pulls from real, honest servers: the same bytes, from whoever has them, and nothing twice."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from web_servers import FileResponse, StreamingResponse, benchmark, hosting, is_part, raw, slowly, unranged

from penjing import package
from penjing.errors import OutputError, TransferError
from penjing.package import manifest, transfer
from penjing.package.arrivals import Arrivals
from penjing.package.directory import MANIFEST, file_of
from penjing.package.transfer import Patience


# ------------------------------------------------------------------------------------------------- honest servers
@pytest.mark.parametrize("place", ["net.penjing", "net", "net/", "net/manifest"])
@pytest.mark.parametrize("jobs", [1, 5])
def test_pulled_is_identical(host, pull, carried, place, jobs):
    done = pull(f"{host.url}/{place}", jobs=jobs)
    assert done.complete and done.path == pull.out and done.missing == ()
    assert pull.out.read_bytes() == carried and not pull.kept.exists()
    assert done.fetched_bytes == len(carried) - len(manifest.parse(carried).data)
    assert all(h["accept-encoding"] == "identity" for h in host.headers)


def test_a_directory_is_fetched_by_plain_gets(host, pull, front):
    pull(f"{host.url}/net/")
    parts = [(path, wanted) for path, wanted in host.asked if is_part(path)]
    assert sorted(parts) == sorted((f"net/{file_of(p)}", None) for p in front.parts)


def test_the_result_may_be_a_directory(host, tmp_path, pull, web):
    done = transfer.pull(f"{host.url}/net.penjing", tmp_path / "net", layout="directory")
    assert done.path == tmp_path / "net"
    assert {f.name: f.read_bytes() for f in done.path.iterdir()} == {
        f.name: f.read_bytes() for f in (web / "net").iterdir()
    }


@pytest.mark.parametrize("place", ["net.penjing", "net/"])
def test_a_server_without_ranges(host, pull, carried, place):
    host.lie = unranged(host)
    pull(f"{host.url}/{place}", jobs=3)
    assert pull.out.read_bytes() == carried
    assert sum(path == "net.penjing" for path, _ in host.asked) <= 2  # one for the manifest, one for all parts


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
@pytest.mark.parametrize("more", ["", "gzip on; gzip_types *; gzip_min_length 1;", "max_ranges 0;"])
def test_nginx(web, pull, carried, more):
    with benchmark.nginx(web, more=more) as port:
        for place in ("net.penjing", "net", "net/"):
            pull(f"http://127.0.0.1:{port}/{place}", patience=Patience())
            assert pull.out.read_bytes() == carried
            pull.out.unlink()


@pytest.mark.parametrize("kind", ["files", "hosts"])
def test_split_hosts(host, pull, web, carried, kind):
    volumes = [f"{host.url}/{kind}/{v.name}" for v in sorted((web / kind).iterdir())]
    with pytest.raises(TransferError, match=r"\d of \d+ parts cannot be had: part 0 .*: ") as caught:
        pull(*volumes[1:])
    assert "kept in" in caught.value.hint and pull.kept.is_dir() and not pull.out.exists()
    done = pull(volumes[0])
    assert done.complete and pull.out.read_bytes() == carried


def test_mirrors_share_the_work(host, web, pull, carried):
    with hosting(web) as other:
        pull(f"{host.url}/net.penjing", f"{other.url}/net/", f"{host.url}/nothing", jobs=4)
    assert pull.out.read_bytes() == carried
    assert any(is_part(path) for path, _ in other.asked)


def test_a_mirror_with_another_package_is_told_and_left(host, web, pull, carried, small):
    package.write(web / "old.penjing", small[0], small[1])
    notes = []

    class Told:
        task, note = transfer.SILENT.task, staticmethod(notes.append)

    pull(f"{host.url}/net.penjing", f"{host.url}/old.penjing", progress=Told())
    assert pull.out.read_bytes() == carried
    assert len(notes) == 1 and "old.penjing, which has another package" in notes[0]


def test_a_mirror_that_is_slow_to_answer_is_not_waited_for(host, web, pull, carried, monkeypatch):
    monkeypatch.setattr(transfer, "_GRACE", 0.05)
    done, gave_up = threading.Event(), []

    def silent(request):
        gave_up.append(not done.wait(60))
        return b""

    with raw(silent) as dead:
        pull(f"{dead}/net.penjing", f"{host.url}/net.penjing", patience=Patience(timeout=60))
        assert pull.out.read_bytes() == carried and gave_up == []
        done.set()


def test_a_host_that_answers_late_is_waited_for_where_it_is_needed(host, web, pull, carried, monkeypatch):
    monkeypatch.setattr(transfer, "_GRACE", 0.0)
    first, *others = [f"{host.url}/files/{v.name}" for v in sorted((web / "files").iterdir())]

    async def late(path):
        await asyncio.sleep(0.3)

    host.lie = lambda path, wanted: late(path) if path in first else None
    pull(first, *others, patience=Patience())
    assert pull.out.read_bytes() == carried


# ------------------------------------------------------------------------------------------------- to be continued
def test_until_bytes_then_the_rest(host, pull, front, carried):
    limit = front.offsets[2] + 5
    done = pull(f"{host.url}/net.penjing", until_bytes=limit)
    assert not done.complete and done.path == pull.kept and done.missing == tuple(range(2, len(front.parts)))
    assert done.here_bytes == front.offsets[2] and not pull.out.exists()
    assert {f.name for f in pull.kept.iterdir()} == {MANIFEST, *(file_of(p) for p in front.parts[:2])}
    rest = pull(f"{host.url}/net/")
    assert rest.complete and rest.fetched_bytes == len(carried) - front.offsets[2]
    assert pull.out.read_bytes() == carried


@pytest.mark.parametrize("place", ["net.penjing", "net/"])
def test_nothing_is_fetched_twice_after_a_kill(host, tmp_path, pull, front, carried, place):
    def slow(path, wanted):
        true, start = host.whole(path), 0
        if wanted and not is_part(path):
            start, stop = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
            part = true[start : stop + 1]
            head = {"content-range": f"bytes {start}-{min(stop + 1, len(true)) - 1}/{len(true)}"}
            return StreamingResponse(slowly(part, 20_000, 0.01), status_code=206, headers=head)
        return StreamingResponse(slowly(true, 20_000, 0.01)) if not wanted else FileResponse(host.folder / path)

    host.lie = slow
    command = [sys.executable, "-m", "penjing", "pull", f"{host.url}/{place}", "-o", "out.penjing", "--jobs", "3"]
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ}, stderr=subprocess.PIPE)
    kept = tmp_path / "out.penjing.pull"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and _size(kept) < 900_000:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    here = _size(kept)
    assert 900_000 <= here < len(carried)
    host.lie = lambda path, wanted: None
    done = pull(f"{host.url}/{place}")
    assert pull.out.read_bytes() == carried
    assert here - len(front.data) + done.fetched_bytes == len(carried) - len(front.data)


def _size(folder):
    if not (folder / MANIFEST).is_file():
        return 0
    total = 0
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # it may be renamed just now
            total += 0 if file.name.startswith(".") else file.stat().st_size
    return total


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_it_says_what_is_kept(host, tmp_path, pull, number):
    host.lie = lambda path, wanted: StreamingResponse(slowly(host.whole(path), 20_000, 0.05)) if is_part(path) else None
    command = [sys.executable, "-m", "penjing", "pull", f"{host.url}/net/", "-o", "out.penjing"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and _size(tmp_path / "out.penjing.pull") < 300_000:
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == (130 if number == signal.SIGINT else 143)
    assert said.count("\n") == 1 and "what has come is kept in out.penjing.pull" in said


def test_what_was_damaged_while_it_lay_there_is_fetched_again(host, pull, front, carried):
    pull(f"{host.url}/net.penjing", until_bytes=front.offsets[2])
    whole, begun = pull.kept / file_of(front.parts[0]), pull.kept / (file_of(front.parts[3]) + ".part")
    whole.write_bytes(whole.read_bytes()[::-1])
    begun.write_bytes(b"not what it begins with")
    pull(f"{host.url}/net.penjing")
    assert pull.out.read_bytes() == carried


def test_a_newer_package_keeps_the_parts_that_it_shares(host, pull, front, web, carried):
    topology, arrays, _ = package.decode(carried)
    package.write(web / "new.penjing", topology, {**arrays, "bias": arrays["bias"] + 1})
    pull(f"{host.url}/net.penjing", until_bytes=front.offsets[3])
    done = pull(f"{host.url}/new.penjing")
    assert pull.out.read_bytes() == (web / "new.penjing").read_bytes()
    assert done.fetched_bytes < len(carried) - front.offsets[1]


def test_two_pulls_into_one_place(host, pull, front):
    with Arrivals(pull.kept, front, []), pytest.raises(OutputError, match="another pull is writing"):
        pull(f"{host.url}/net.penjing")
    assert pull(f"{host.url}/net.penjing").complete


def test_a_folder_of_something_else_is_left_alone(host, pull):
    pull.kept.mkdir()
    (pull.kept / "thesis.txt").write_text("hello")
    with pytest.raises(OutputError, match="holds other files: thesis.txt"):
        pull(f"{host.url}/net.penjing")
    assert [f.name for f in pull.kept.iterdir()] == ["thesis.txt"]


def test_too_little_room_is_told_at_once(host, pull, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match="has room for 1,000"):
        pull(f"{host.url}/net.penjing")
    assert not any(is_part(path) for path, _ in host.asked)


def test_inside_a_running_loop(host, pull, carried):
    async def notebook():
        return pull(f"{host.url}/net.penjing")

    assert asyncio.run(notebook()).complete and pull.out.read_bytes() == carried


def test_through_a_proxy_that_kills_connections():
    """A few of the 200 pulls of benchmarks/transfer.py."""
    found = benchmark.measure(benchmark.network(3), pulls=8, mean=150_000, seed=1)
    assert found["identical"] == found["pulls"] == 8
    assert found["connections_killed"] > 20


@pytest.mark.parametrize("arrays", [{}, {"none": np.zeros((0, 4), np.float32)}], ids=["no part", "an empty part"])
def test_packages_of_next_to_nothing(host, pull, tmp_path, web, arrays):
    package.write(web / "little.penjing", "a topology", arrays)
    package.join([web / "little.penjing"], web / "little", layout="directory")
    for place in ("little.penjing", "little"):
        assert pull(f"{host.url}/{place}").complete
        assert package.read(pull.out)[0] == "a topology"
    volumes = package.split(web / "little.penjing", tmp_path / "volumes", size=100_000)
    assert package.join(volumes, tmp_path / "again.penjing").read_bytes() == (web / "little.penjing").read_bytes()
