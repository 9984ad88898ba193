"""Pulls from real servers, honest and lying: the same bytes, or a clear error and what has come kept."""

import asyncio
import gzip
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from web_servers import FileResponse, RedirectResponse, Response, StreamingResponse, benchmark, hosting, raw, slowly

from penjing import package
from penjing.errors import InputError, OutputError, TransferError
from penjing.package import manifest, transfer
from penjing.package.arrivals import Arrivals
from penjing.package.directory import MANIFEST, file_of
from penjing.package.transfer import Patience

QUICK = Patience(tries=3, pause=0.01, timeout=0.4)


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """No proxy between a test and its servers, whatever the machine's settings."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(2)
    arrays = {f"{i}.weight": rng.integers(-127, 128, (900, 1200)).astype(np.int8) for i in range(4)}
    arrays |= {"wide": rng.normal(size=(700, 900)).astype(np.float32), "bias": rng.random(40).astype(np.float32)}
    return package.encode("a topology", arrays)


@pytest.fixture(scope="module")
def front(data):
    return manifest.parse(data)


@pytest.fixture(scope="module")
def web(data, tmp_path_factory):
    """net.penjing, net/ and volumes of both kinds."""
    folder = tmp_path_factory.mktemp("web")
    package.save(data, folder / "net.penjing")
    package.save(data, folder / "net", layout="directory")
    package.split(folder / "net.penjing", folder / "files", into=3)
    package.split(folder / "net.penjing", folder / "hosts", into=3, layout="directory")
    return folder


@pytest.fixture
def host(web):
    with hosting(web) as host:
        yield host


@pytest.fixture
def pull(tmp_path):
    def pull(*urls, **more):
        return transfer.pull(urls, tmp_path / "out.penjing", **{"patience": QUICK, **more})

    pull.out, pull.kept = tmp_path / "out.penjing", tmp_path / "out.penjing.pull"
    return pull


def is_part(path, wanted=None):
    return len(path.rpartition("/")[2]) == 64


def unranged(host):
    """Lies as a server that has never heard of ranges."""
    return lambda path, wanted: Response(host.whole(path)) if (host.folder / path).is_file() else None


# ------------------------------------------------------------------------------------------------- honest servers
@pytest.mark.parametrize("place", ["net.penjing", "net", "net/", "net/manifest"])
@pytest.mark.parametrize("jobs", [1, 5])
def test_pulled_is_identical(host, pull, data, place, jobs):
    done = pull(f"{host.url}/{place}", jobs=jobs)
    assert done.complete and done.path == pull.out and done.missing == ()
    assert pull.out.read_bytes() == data and not pull.kept.exists()
    assert done.fetched_bytes == len(data) - len(manifest.parse(data).data)
    assert all(h["accept-encoding"] == "identity" for h in host.headers)


def test_a_directory_is_fetched_by_plain_gets(host, pull, front):
    pull(f"{host.url}/net/")
    parts = [(path, wanted) for path, wanted in host.asked if is_part(path)]
    assert sorted(parts) == sorted((f"net/{file_of(p)}", None) for p in front.parts)


def test_the_result_may_be_a_directory(host, tmp_path, web):
    done = transfer.pull(f"{host.url}/net.penjing", tmp_path / "net", layout="directory")
    assert done.path == tmp_path / "net"
    assert {f.name: f.read_bytes() for f in done.path.iterdir()} == {
        f.name: f.read_bytes() for f in (web / "net").iterdir()
    }


@pytest.mark.parametrize("place", ["net.penjing", "net/"])
def test_a_server_without_ranges(host, pull, data, place):
    host.lie = unranged(host)
    pull(f"{host.url}/{place}", jobs=3)
    assert pull.out.read_bytes() == data
    assert sum(path == "net.penjing" for path, _ in host.asked) <= 2  # one for the manifest, one for all parts


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
@pytest.mark.parametrize("more", ["", "gzip on; gzip_types *; gzip_min_length 1;", "max_ranges 0;"])
def test_nginx(web, pull, data, more):
    with benchmark.nginx(web, more=more) as port:
        for place in ("net.penjing", "net", "net/"):
            pull(f"http://127.0.0.1:{port}/{place}", patience=Patience())
            assert pull.out.read_bytes() == data
            pull.out.unlink()


@pytest.mark.parametrize("kind", ["files", "hosts"])
def test_split_hosts(host, pull, web, data, kind):
    volumes = [f"{host.url}/{kind}/{v.name}" for v in sorted((web / kind).iterdir())]
    with pytest.raises(TransferError, match=r"\d of \d+ parts cannot be had: part 0 .*: ") as caught:
        pull(*volumes[1:])
    assert "kept in" in caught.value.hint and pull.kept.is_dir() and not pull.out.exists()
    done = pull(volumes[0])
    assert done.complete and pull.out.read_bytes() == data


def test_mirrors_share_the_work(host, web, pull, data):
    with hosting(web) as other:
        pull(f"{host.url}/net.penjing", f"{other.url}/net/", f"{host.url}/nothing", jobs=4)
    assert pull.out.read_bytes() == data
    assert any(is_part(path) for path, _ in other.asked)


def test_a_mirror_with_another_package_is_told_and_left(host, web, pull, data, small):
    package.write(web / "old.penjing", small[0], small[1])
    notes = []

    class Told:
        task, note = transfer.SILENT.task, staticmethod(notes.append)

    pull(f"{host.url}/net.penjing", f"{host.url}/old.penjing", progress=Told())
    assert pull.out.read_bytes() == data
    assert len(notes) == 1 and "old.penjing, which has another package" in notes[0]


def test_a_mirror_that_is_slow_to_answer_is_not_waited_for(host, web, pull, data, monkeypatch):
    monkeypatch.setattr(transfer, "_GRACE", 0.05)
    done, gave_up = threading.Event(), []

    def silent(request):
        gave_up.append(not done.wait(60))
        return b""

    with raw(silent) as dead:
        pull(f"{dead}/net.penjing", f"{host.url}/net.penjing", patience=Patience(timeout=60))
        assert pull.out.read_bytes() == data and gave_up == []
        done.set()


def test_a_host_that_answers_late_is_waited_for_where_it_is_needed(host, web, pull, data, monkeypatch):
    monkeypatch.setattr(transfer, "_GRACE", 0.0)
    first, *others = [f"{host.url}/files/{v.name}" for v in sorted((web / "files").iterdir())]

    async def late(path):
        await asyncio.sleep(0.3)

    host.lie = lambda path, wanted: late(path) if path in first else None
    pull(first, *others, patience=Patience())
    assert pull.out.read_bytes() == data


# ------------------------------------------------------------------------------------------------- to be continued
def test_until_bytes_then_the_rest(host, pull, front, data):
    limit = front.offsets[2] + 5
    done = pull(f"{host.url}/net.penjing", until_bytes=limit)
    assert not done.complete and done.path == pull.kept and done.missing == tuple(range(2, len(front.parts)))
    assert done.here_bytes == front.offsets[2] and not pull.out.exists()
    assert {f.name for f in pull.kept.iterdir()} == {MANIFEST, *(file_of(p) for p in front.parts[:2])}
    rest = pull(f"{host.url}/net/")
    assert rest.complete and rest.fetched_bytes == len(data) - front.offsets[2]
    assert pull.out.read_bytes() == data


@pytest.mark.parametrize("place", ["net.penjing", "net/"])
def test_nothing_is_fetched_twice_after_a_kill(host, tmp_path, front, data, place):
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
    assert 900_000 <= here < len(data)
    host.lie = lambda path, wanted: None
    done = transfer.pull(f"{host.url}/{place}", tmp_path / "out.penjing", patience=QUICK)
    assert (tmp_path / "out.penjing").read_bytes() == data
    assert here - len(front.data) + done.fetched_bytes == len(data) - len(front.data)


def _size(folder):
    if not (folder / MANIFEST).is_file():
        return 0
    return sum(f.stat().st_size for f in folder.iterdir() if not f.name.startswith("."))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_it_says_what_is_kept(host, tmp_path, number):
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


def test_what_was_damaged_while_it_lay_there_is_fetched_again(host, pull, front, data):
    pull(f"{host.url}/net.penjing", until_bytes=front.offsets[2])
    whole, begun = pull.kept / file_of(front.parts[0]), pull.kept / (file_of(front.parts[3]) + ".part")
    whole.write_bytes(whole.read_bytes()[::-1])
    begun.write_bytes(b"not what it begins with")
    pull(f"{host.url}/net.penjing")
    assert pull.out.read_bytes() == data


def test_a_newer_package_keeps_the_parts_that_it_shares(host, pull, front, web, data):
    topology, arrays, _ = package.decode(data)
    package.write(web / "new.penjing", topology, {**arrays, "bias": arrays["bias"] + 1})
    pull(f"{host.url}/net.penjing", until_bytes=front.offsets[3])
    done = pull(f"{host.url}/new.penjing")
    assert pull.out.read_bytes() == (web / "new.penjing").read_bytes()
    assert done.fetched_bytes < len(data) - front.offsets[1]


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


# ------------------------------------------------------------------------------------------------- lying servers
def once(lie, when=is_part):
    """A lie that each file is given once."""
    told = set()

    def answer(path, wanted):
        if not when(path, wanted) or path in told:
            return None
        told.add(path)
        return lie(path, wanted)

    return answer


def flipped(host, path):
    true = host.whole(path)
    return true[:500] + bytes([true[500] ^ 1]) + true[501:]


@pytest.mark.parametrize(
    "lie",
    [
        lambda host, path: Response(status_code=503, headers={"retry-after": "0"}),
        lambda host, path: Response(status_code=500),
        lambda host, path: Response(flipped(host, path)),
        lambda host, path: Response(host.whole(path)[:-1]),
        lambda host, path: Response(host.whole(path) + b"more"),
        lambda host, path: Response(host.whole(path), status_code=206, headers={"content-range": "bytes 7-9/10"}),
        lambda host, path: Response(host.whole(path), headers={"content-encoding": "gzip"}),
        lambda host, path: Response(b"", headers={"content-length": "0"}),
        lambda host, path: StreamingResponse(slowly(host.whole(path), 1, 0.1)),
        lambda host, path: _hang(),
    ],
    ids=["503", "500", "bytes", "short", "long", "range", "no gzip", "empty", "stall", "silence"],
)
def test_lies_that_pass(host, pull, data, lie):
    host.lie = once(lambda path, wanted: lie(host, path))
    pull(f"{host.url}/net/")
    assert pull.out.read_bytes() == data


async def _hang():
    await asyncio.sleep(3)


def test_gzip_that_nobody_asked_for_is_undone(host, pull, data):
    host.lie = lambda path, wanted: Response(gzip.compress(host.whole(path), 1), headers={"content-encoding": "gzip"})
    pull(f"{host.url}/net/")
    assert pull.out.read_bytes() == data


LASTING = {
    "500": (lambda host, path: Response(status_code=500), r"answers 500 Internal Server Error \(3 times in a row\)"),
    "404": (lambda host, path: Response(status_code=404), "answers 404 Not Found"),
    "403": (lambda host, path: Response(status_code=403), "answers 403 Forbidden"),
    "bytes": (lambda host, path: Response(flipped(host, path)), "do not match the SHA-256 of part 0"),
    "short": (lambda host, path: Response(host.whole(path)[:-9]), "bytes where part 0 .* has"),
    "long": (lambda host, path: Response(host.whole(path) + b"more"), "bytes where part 0 .* has"),
    "unsaid short": (lambda host, path: StreamingResponse(slowly(host.whole(path)[:-9], 10**6, 0)), "9 bytes early"),
    "loop": (lambda host, path: RedirectResponse(f"{host.url}/{path}"), "redirects more than 10 times"),
    "elsewhere": (lambda host, path: RedirectResponse("file:///etc/passwd"), "none of the web"),
    "coding": (lambda host, path: Response(b"x", headers={"content-encoding": "br"}), "encodes the file as 'br'"),
    "stall": (lambda host, path: StreamingResponse(slowly(host.whole(path), 1, 0.1)), r"sent \d+ bytes in"),
    "silence": (lambda host, path: _hang(), "does not answer for 0.4 seconds"),
}


@pytest.mark.parametrize(("lie", "says"), LASTING.values(), ids=LASTING.keys())
def test_lies_that_last_are_told(host, pull, lie, says):
    host.lie = lambda path, wanted: lie(host, path) if is_part(path) else None
    with pytest.raises(TransferError, match=says) as caught:
        pull(f"{host.url}/net/", jobs=2)
    assert f"{host.url}/net/manifest" in caught.value.message and caught.value.message.count("\n") == 0
    assert not pull.out.exists()
    assert len(host.asked) < 200


def test_wrong_bytes_in_one_place_cost_that_part_alone(host, pull, front, data):
    """The file's server flips a bit; the rest is kept, and a mirror gives what it lacks."""
    at = front.offsets[2] + 100

    def lie(path, wanted):
        start, stop = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
        true = bytearray(host.whole(path))
        true[at] ^= 1
        head = {"content-range": f"bytes {start}-{min(stop + 1, len(true)) - 1}/{len(true)}"}
        return Response(bytes(true[start : stop + 1]), status_code=206, headers=head)

    host.lie = lambda path, wanted: lie(path, wanted) if path == "net.penjing" else None
    with pytest.raises(TransferError, match=r"1 of \d+ parts cannot be had: part 2"):
        pull(f"{host.url}/net.penjing")
    done = pull(f"{host.url}/net.penjing", f"{host.url}/net/")
    assert pull.out.read_bytes() == data and done.fetched_bytes <= 3 * front.parts[2].stored


def test_a_server_that_forgets_about_ranges(host, pull, data):
    host.lie = lambda path, wanted: Response(host.whole(path)) if wanted and not wanted.startswith("bytes=0-") else None
    pull(f"{host.url}/net.penjing")
    assert pull.out.read_bytes() == data


MANIFESTS = {
    "text": (lambda true: b"<html>hello</html>", "not a .penjing package"),
    "nothing": (lambda true: b"", "empty file|gives 0 bytes of a manifest"),
    "cut": (lambda true: true[:90], "gives 90 bytes of a manifest"),
    "flipped": (lambda true: true[:70] + bytes([true[70] ^ 1]) + true[71:], "does not match its SHA-256"),
    "newer": (lambda true: true[:8] + b"\x09" + true[9:], "format version 9"),
    "huge": (lambda true: true[:13] + b"\xff\xff\xff\x0f" + true[17:], "absurd size|manifest of"),
    "cut file": (lambda true: true[:-1], "bytes where the index says"),
    "long file": (lambda true: true + b"!", "bytes where the index says"),
}


@pytest.mark.parametrize(("change", "says"), MANIFESTS.values(), ids=MANIFESTS.keys())
@pytest.mark.parametrize("ranged", [True, False])
def test_files_that_are_no_package(host, web, pull, change, says, ranged):
    (web / "bad").write_bytes(change(host.whole("net.penjing")))
    if not ranged:
        host.lie = unranged(host)
    with pytest.raises(TransferError, match=says):
        pull(f"{host.url}/bad")
    assert not pull.out.exists() and not pull.kept.exists()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"", "broke the connection"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "broke the connection"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", "not a .penjing|broke the connection|gives"),
        (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", "answers 302"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://[::1/x\r\nContent-Length: 0\r\n\r\n", "answers 302"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\nabc", "broke the connection|not a .penjing"),
        (b"HTTP/1.1 206 Partial Content\r\nContent-Length: 3\r\n\r\nabc", "another range"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 300_000 + b"\r\n\r\n", "broke the connection"),
    ],
)
def test_servers_that_hardly_speak_http(pull, answer, says):
    with raw(lambda request: answer) as url, pytest.raises(TransferError, match=says):
        pull(f"{url}/net.penjing")


def test_a_server_that_is_not_there(pull):
    with pytest.raises(TransferError, match=r"cannot be reached \(3 times in a row\)"):
        pull("http://127.0.0.1:9/net.penjing")


# ------------------------------------------------------------------------------------------------- secrets, arguments
def test_credentials_are_sent_and_never_told(host, web, pull, data):
    url = host.url.replace("//", "//me:hunter2@") + "/net/?sig=s3cret"
    pull(url)
    assert pull.out.read_bytes() == data
    assert all(h["authorization"].startswith("Basic ") for h in host.headers)
    host.lie = lambda path, wanted: Response(status_code=403) if is_part(path) else None
    with hosting(web) as other:
        other.lie = lambda path, wanted: Response(status_code=401)
        for place in (url, url.replace("net/", "nothing"), other.url.replace("//", "//me:hunter2@") + "/x?sig=s3cret"):
            with pytest.raises(TransferError) as caught:
                pull(place)
            assert not any(word in str(caught.value) for word in ("hunter2", "s3cret", "me:"))


def test_credentials_do_not_follow_to_another_host(host, web, pull, data):
    with hosting(web) as other:
        host.lie = lambda path, wanted: RedirectResponse(f"{other.url}/{path}")
        pull(host.url.replace("//", "//me:hunter2@") + "/net.penjing")
    assert pull.out.read_bytes() == data
    assert not any("authorization" in h for h in other.headers) and "authorization" in host.headers[0]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("file:///etc/passwd", r"takes http:// and https:// URLs, got file://"),
        ("net.penjing", "got net.penjing"),
        ("ftp://host/net.penjing", "got ftp://"),
        ("http:///net.penjing", "got http://"),
        ("http://me:hunter2@host:port/", "cannot be read"),
    ],
)
def test_urls_that_cannot_be(pull, url, says):
    with pytest.raises(InputError, match=says) as caught:
        pull(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "says"), [({"jobs": 0}, "jobs"), ({"until_bytes": -1}, "until_bytes"), ({"layout": "tar"}, "layout")]
)
def test_arguments_that_cannot_be(pull, more, says):
    with pytest.raises(InputError, match=says):
        pull("http://localhost/net", **more)
    with pytest.raises(InputError, match="nothing to pull"):
        pull()


def test_too_little_room_is_told_at_once(host, pull, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match="has room for 1,000"):
        pull(f"{host.url}/net.penjing")
    assert not any(is_part(path) for path, _ in host.asked)


def test_inside_a_running_loop(host, pull, data):
    async def notebook():
        return pull(f"{host.url}/net.penjing")

    assert asyncio.run(notebook()).complete and pull.out.read_bytes() == data


def test_through_a_proxy_that_kills_connections():
    """A few of the 200 pulls of benchmarks/transfer.py."""
    found = benchmark.measure(benchmark.network(3), pulls=8, mean=150_000, seed=1)
    assert found["identical"] == found["pulls"] == 8
    assert found["connections_killed"] > 20
