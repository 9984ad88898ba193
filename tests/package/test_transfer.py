"""Pulls from real, honest servers: the same bytes, from whoever has them, and nothing twice."""

import asyncio
import contextlib
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
from penjing.errors import InputError, OutputError, PackageError, TransferError
from penjing.package import keys, manifest, refining, sealing, transfer
from penjing.package.arrivals import Arrivals
from penjing.package.directory import MANIFEST, file_of
from penjing.package.layered import Layered
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


@pytest.mark.parametrize("jobs", [1, 4])
def test_a_mirror_that_is_slow_to_answer_is_not_waited_for(host, web, pull, carried, monkeypatch, jobs):
    monkeypatch.setattr(transfer, "_GRACE", 0.05)
    done, gave_up = threading.Event(), []

    def silent(request):
        gave_up.append(not done.wait(60))
        return b""

    with raw(silent) as dead:
        pull(f"{dead}/net.penjing", f"{host.url}/net.penjing", jobs=jobs, patience=Patience(timeout=60))
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
    host.lie = dribbling(host)
    here = killed_pull(tmp_path, f"{host.url}/{place}", at=900_000)
    assert here < len(carried)
    host.honest()
    done = pull(f"{host.url}/{place}")
    assert pull.out.read_bytes() == carried
    assert here + done.fetched_bytes == len(carried)
    # What the server was asked for, beside the manifest: exactly what was not here.
    assert sum(asked_bytes(host, place, front)) == len(carried) - here


def test_without_ranges_only_the_parts_under_way_come_again(host, tmp_path, pull, front, carried):
    host.lie = dribbling(host)
    killed_pull(tmp_path, f"{host.url}/net/", at=3_500_000)
    whole = {f.name for f in pull.kept.iterdir() if is_part(f.name)}
    under_way = [f for f in pull.kept.iterdir() if f.suffix == ".part"]
    assert whole and 1 <= len(under_way) <= 3
    host.honest()
    host.lie = unranged(host)
    pull(f"{host.url}/net/")
    assert pull.out.read_bytes() == carried
    parts = [path for path, _ in host.asked if is_part(path)]
    assert len(parts) == len(set(parts)) and not whole & {path.rpartition("/")[2] for path in parts}


def dribbling(host):
    """Lies as a slow server, so that a kill comes in the middle."""

    def slow(path, wanted):
        true, start = host.whole(path), 0
        if wanted and not is_part(path):
            start, stop = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
            part = true[start : stop + 1]
            head = {"content-range": f"bytes {start}-{min(stop + 1, len(true)) - 1}/{len(true)}"}
            return StreamingResponse(slowly(part, 20_000, 0.01), status_code=206, headers=head)
        return StreamingResponse(slowly(true, 20_000, 0.01)) if not wanted else FileResponse(host.folder / path)

    return slow


def killed_pull(folder, url, *more, at):
    """The command line's pull to out.penjing, killed by SIGKILL at so many bytes; the bytes that are here then."""
    command = [sys.executable, "-m", "penjing", "pull", url, "-o", "out.penjing", "--jobs", "3", *more]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE)
    kept = folder / "out.penjing.pull"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and _size(kept) < at:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert _size(kept) >= at and not (folder / "out.penjing").exists()
    return _size(kept)


def asked_bytes(host, place, front):
    """The bytes of parts in each request."""
    sizes = {f"net/{file_of(p)}": p.stored for p in front.parts}
    for path, wanted in host.asked:
        start, stop = (int(n) if n else None for n in (wanted or "bytes=0-").removeprefix("bytes=").split("-"))
        if path in sizes:
            yield sizes[path] - start
        elif path == place and start > 0:  # 0: the manifest
            yield stop + 1 - start


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


def test_what_stands_at_the_result_already_is_not_fetched(host, pull, front, web, carried):
    """Pulled again nothing comes; of a newer package what changed; a damaged part is not taken over."""
    pull(f"{host.url}/net.penjing")
    assert pull(f"{host.url}/net/").fetched_bytes == 0 and not any(is_part(path) for path, _ in host.asked)
    topology, arrays, _ = package.decode(carried)
    package.write(web / "new.penjing", topology, {**arrays, "bias": arrays["bias"] + 1})
    old = {p.digest for p in front.parts}
    changed = sum(p.stored for p in manifest.parse((web / "new.penjing").read_bytes()).parts if p.digest not in old)
    assert 0 < pull(f"{host.url}/new.penjing").fetched_bytes == changed < 10_000
    damaged = bytearray(pull.out.read_bytes())
    damaged[front.offsets[1] + 50] ^= 1
    pull.out.write_bytes(damaged)
    assert pull(f"{host.url}/new.penjing").fetched_bytes == front.parts[1].stored
    assert pull.out.read_bytes() == (web / "new.penjing").read_bytes()


def test_a_client_that_refines_while_a_pull_comes_to_its_end(host, pull, sealed):
    plain, _, _ = sealed
    package.save(plain, host.folder / "plain.penjing")
    pull(f"{host.url}/plain.penjing", layers=1)
    arriving = refining.Refining(pull.kept)
    arriving.refresh()
    assert arriving.layers == 1
    pull(f"{host.url}/plain.penjing")
    assert not pull.kept.exists()
    assert arriving.refresh() and arriving.missing() == []
    assert all((a == package.decode(plain)[1][n]).all() for n, a in arriving.read()[1].items())


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
    assert [f.name for f in pull.kept.iterdir()] == [MANIFEST]


def test_room_for_the_parts_and_the_file_made_of_them(host, pull, front, carried, monkeypatch):
    usage, parts = shutil.disk_usage("/"), len(carried) - front.offsets[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=parts + len(carried) - 1))
    with pytest.raises(OutputError, match=f"{parts + len(carried):,} bytes are to be written"):
        pull(f"{host.url}/net.penjing")
    assert pull(f"{host.url}/net.penjing", until_bytes=front.offsets[2]).missing


def test_inside_a_running_loop(host, pull, carried):
    async def notebook():
        return pull(f"{host.url}/net.penjing")

    assert asyncio.run(notebook()).complete and pull.out.read_bytes() == carried


NOTEBOOK = """
import asyncio, sys
from penjing.package.transfer import pull
async def notebook(): pull(sys.argv[1], sys.argv[2])
asyncio.new_event_loop().run_until_complete(notebook())
"""


def test_interrupted_inside_a_running_loop(host, pull):
    """The interrupt of a notebook ends the pull, and does not wait for it."""
    stuck = threading.Event()

    def lie(path, wanted):
        if is_part(path):
            stuck.set()
            return StreamingResponse(slowly(host.whole(path), 5_000, 0.5))  # minutes for each part
        return None

    host.lie = lie
    command = [sys.executable, "-c", NOTEBOOK, f"{host.url}/net/", str(pull.out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert stuck.wait(100)
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.communicate(timeout=100)[1]
    host.honest()
    assert pull(f"{host.url}/net.penjing").complete  # nobody holds the folder any more


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


# -------------------------------------------------------------------------------------------------------- sealed
@pytest.fixture
def sealed(web, tmp_path):
    """A package of three layers, sealed, on the web as a file and as a directory; as it was, and the reader's key."""
    rng = np.random.default_rng(3)
    arrays = {f"{i}.weight": rng.normal(0, 30, (900, 800)).clip(-127, 127).astype(np.int8) for i in range(5)}
    plain = Layered("a topology", arrays, layers=3).encode()
    keys.keygen(tmp_path / "reader", kind="age")
    data = sealing.seal(plain, [str(tmp_path / "reader.pub")])
    for layout, name in (("file", "sealed.penjing"), ("directory", "sealed")):
        package.save(data, web / name, layout=layout)
    return plain, data, tmp_path / "reader"


@pytest.mark.parametrize("place", ["sealed.penjing", "sealed/"])
def test_a_sealed_package_by_layers_killed_resumed_and_opened(host, tmp_path, pull, sealed, place):
    plain, data, reader = sealed
    own, url = keys.identities(reader), f"{host.url}/{place}"
    with pytest.raises(InputError, match="only its recipients can tell its layers"):
        pull(url, layers=1)
    host.lie = dribbling(host)
    here = killed_pull(tmp_path, url, "--layers", "1", "--identity", str(reader), at=600_000)
    host.honest()
    done = pull(url, layers=1, layers_of=lambda front: sealing.layers_of(front, own))
    inside = manifest.parse(plain)
    first = sum(p.layer == 1 for p in inside.parts)
    assert done.missing == tuple(range(1 + first, 1 + len(inside.parts))) and not pull.out.exists()
    assert here + done.fetched_bytes == done.here_bytes < 0.6 * len(data)
    # The first layer opens, and is the one of the package that was sealed; the second is told to be missing.
    sealing.decrypt(pull.kept, tmp_path / "first", reader, layers=1)
    package.save(plain, tmp_path / "plain.penjing")
    coarse, expected = (refining.read(tmp_path / n, layers=1)[1] for n in ("first", "plain.penjing"))
    assert all((coarse[n] == expected[n]).all() for n in expected)
    with pytest.raises(PackageError, match=r"\d of \d+ parts are missing"):
        sealing.decrypt(pull.kept, tmp_path / "second", reader, layers=2)
    assert not (tmp_path / "second").exists()
    rest = pull(url)
    assert rest.complete and here + done.fetched_bytes + rest.fetched_bytes == len(data)
    assert pull.out.read_bytes() == data
    sealing.decrypt(pull.out, tmp_path / "opened.penjing", reader)
    assert (tmp_path / "opened.penjing").read_bytes() == plain


def test_a_sealed_part_that_was_changed_on_its_way_in_is_named(host, tmp_path, pull, sealed):
    _, _, reader = sealed
    pull(f"{host.url}/sealed/", layers=1, layers_of=lambda front: sealing.layers_of(front, keys.identities(reader)))
    part = next(f for f in pull.kept.iterdir() if is_part(f.name))
    part.write_bytes(part.read_bytes()[::-1])
    with pytest.raises(PackageError, match=r"part \d of the sealed package cannot be decrypted"):
        sealing.decrypt(pull.kept, tmp_path / "first", reader, layers=1)
    assert not (tmp_path / "first").exists()
