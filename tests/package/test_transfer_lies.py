"""Pulls from servers that lie, fail and stall: the same bytes in the end, or a clear error that tells no secret."""

import asyncio
import gzip
import random

import pytest
from web_servers import RedirectResponse, Response, StreamingResponse, hosting, is_part, raw, slowly, unranged

from penjing.errors import InputError, TransferError
from penjing.package.directory import file_of
from penjing.package.transfer import Patience


def once(lie):
    """A lie that is told once of each part."""
    told = set()

    def answer(path, wanted):
        if not is_part(path) or path in told:
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
def test_lies_that_pass(host, pull, carried, lie):
    host.lie = once(lambda path, wanted: lie(host, path))
    pull(f"{host.url}/net/")
    assert pull.out.read_bytes() == carried


async def _hang():
    await asyncio.sleep(3)


def test_gzip_that_nobody_asked_for_is_undone(host, pull, carried):
    host.lie = lambda path, wanted: Response(gzip.compress(host.whole(path), 1), headers={"content-encoding": "gzip"})
    pull(f"{host.url}/net/")
    assert pull.out.read_bytes() == carried


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
    assert f"{host.url}/net/" in caught.value.message and caught.value.message.count("\n") == 0
    assert not pull.out.exists()
    assert len(host.asked) < 200


def test_wrong_bytes_in_one_place_cost_that_part_alone(host, pull, front, carried):
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
    assert pull.out.read_bytes() == carried and done.fetched_bytes <= 3 * front.parts[2].stored


def test_a_server_that_forgets_about_ranges(host, pull, carried):
    host.lie = lambda path, wanted: Response(host.whole(path)) if wanted and not wanted.startswith("bytes=0-") else None
    pull(f"{host.url}/net.penjing")
    assert pull.out.read_bytes() == carried


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


FOLDERS = {
    "page": (lambda true: Response(b"<html>log in</html>"), "manifest: this is not a .penjing package"),
    "coding": (lambda true: Response(true, headers={"content-encoding": "br"}), "manifest: encodes the file as 'br'"),
    "gzip": (
        lambda true: Response(true, headers={"content-encoding": "gzip"}),
        "manifest: sends an encoding that cann",
    ),
    "endless": (lambda true: StreamingResponse(slowly(b"x" * 10**7, 10**5, 0)), "manifest: this is not a .penjing"),
    "forbidden": (lambda true: Response(status_code=403), "manifest: answers 403 Forbidden"),
    "broken": (lambda true: Response(status_code=500), "manifest: answers 500 Internal Server Error"),
    "nothing": (lambda true: Response(status_code=404), "net answers 404 Not Found"),
}


@pytest.mark.parametrize(("answer", "says"), FOLDERS.values(), ids=FOLDERS.keys())
def test_what_is_wrong_with_a_folders_manifest_is_told(host, pull, answer, says):
    """A server that answers a folder's own URL with 404, as many do, hides nothing by it."""
    true = host.whole("net/manifest")
    host.lie = lambda path, wanted: answer(true) if path == "net/manifest" else None
    with pytest.raises(TransferError, match=says) as caught:
        pull(f"{host.url}/net")
    assert f"{host.url}/net answers 404 Not Found" in caught.value.message
    assert ("manifest" in caught.value.message) == ("manifest" in says)
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
def test_credentials_are_sent_and_never_told(host, web, pull, carried):
    url = host.url.replace("//", "//me:hunter2@") + "/net/?sig=s3cret"
    pull(url)
    assert pull.out.read_bytes() == carried
    pull.out.unlink()
    assert all(h["authorization"].startswith("Basic ") for h in host.headers)
    host.lie = lambda path, wanted: Response(status_code=403) if is_part(path) else None
    with hosting(web) as other:
        other.lie = lambda path, wanted: Response(status_code=401)
        for place in (url, url.replace("net/", "nothing"), other.url.replace("//", "//me:hunter2@") + "/x?sig=s3cret"):
            with pytest.raises(TransferError) as caught:
                pull(place)
            assert not any(word in str(caught.value) for word in ("hunter2", "s3cret", "me:"))


def test_credentials_do_not_follow_to_another_host(host, web, pull, carried):
    with hosting(web) as other:
        host.lie = lambda path, wanted: RedirectResponse(f"{other.url}/{path}")
        pull(host.url.replace("//", "//me:hunter2@") + "/net.penjing")
    assert pull.out.read_bytes() == carried
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


@pytest.mark.parametrize("seed", range(8))
def test_lies_at_random(host, pull, carried, seed):
    """Every other answer is a lie of some kind: the same bytes, or a TransferError and then the same."""
    drawn = random.Random(seed)
    lies = [
        lambda path: Response(status_code=drawn.choice([429, 500, 502, 504])),
        lambda path: Response(flipped(host, path)),
        lambda path: Response(host.whole(path)[: drawn.randrange(900)]),
        lambda path: StreamingResponse(slowly(host.whole(path)[: drawn.randrange(500_000)], 50_000, 0)),
        lambda path: Response(host.whole(path) + b"more"),
        lambda path: Response(host.whole(path), status_code=206, headers={"content-range": "bytes 0-9/*"}),
        lambda path: Response(host.whole(path)),
        lambda path: Response(gzip.compress(host.whole(path), 1), headers={"content-encoding": "gzip"}),
        lambda path: Response(host.whole(path), headers={"content-encoding": "deflate"}),
        lambda path: RedirectResponse(f"{host.url}/{path}?again"),
    ]

    def lie(path, wanted):
        told = (host.folder / path).is_file() and drawn.random() < 0.5
        return drawn.choice(lies)(path) if told else None

    host.lie = lie
    places = drawn.sample(["net.penjing", "net/", "net"], drawn.choice([1, 2]))
    urls = [f"{host.url}/{place}" for place in places]
    try:
        pull(*urls, jobs=drawn.choice([1, 4]), patience=Patience(tries=5, pause=0.001, timeout=1))
    except TransferError:
        assert not pull.out.exists()
        host.honest()
        pull(*urls)
    assert pull.out.read_bytes() == carried


def test_two_servers_that_die_are_both_given_up(host, web, pull, front):
    """What one gave before it died is no headway of the other."""
    with hosting(web) as other:
        alive = {f"net/{f}" for f in ("manifest", *(file_of(p) for p in front.parts[:2]))}
        host.lie = other.lie = lambda path, wanted: None if path in alive else Response(status_code=503)
        with pytest.raises(TransferError, match="answers 503"):
            pull(f"{host.url}/net/", f"{other.url}/net/", jobs=1)
        assert len(host.asked) + len(other.asked) < 50
