"""The servers that a package comes from: what each has, how it is asked, and what its answers are worth.

A source is a file (a package or a volume), read by HTTP ranges (RFC 9110, section 14) or, from a server that has none,
from its start; or a directory, whose files are fetched one by one. No word of a server is trusted: lengths and
positions are compared with the manifest, bytes with its digests.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2

from penjing._version import __version__
from penjing.errors import InputError, PackageError
from penjing.package import manifest, volumes
from penjing.package.directory import MANIFEST, file_of
from penjing.package.manifest import Manifest

_FRONT = 64 << 10  # bytes asked for at first, in which the manifest of most packages is
_MAX_FRONT = 512 << 20
_REDIRECTS = 10
_SLOW = 256  # bytes a second below which a server is taken to have stalled
_CODINGS = ("", "identity", "gzip", "x-gzip", "deflate")
_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
_LENGTH = re.compile(r"[0-9]{1,18}")


class Gone(Exception):
    """This source does not give this, and will not however often it is asked; `wholly`: nor anything else."""

    def __init__(self, reason: str, *, wholly: bool = False) -> None:
        super().__init__(reason)
        self.wholly = wholly


class Passing(Exception):
    """A fault that may pass. `wait`: seconds for which the server asks to be left alone; `lie`: it gave wrong lengths
    or bytes, of `parts` where it is known."""

    def __init__(self, reason: str, *, wait: float = 0.0, lie: bool = False, parts: tuple[int, ...] = ()) -> None:
        super().__init__(reason)
        self.wait = wait
        self.lie = lie
        self.parts = parts


@dataclasses.dataclass(kw_only=True, eq=False)
class Source:
    """One server's share of a package.

    `parts`: numbers of the parts that it can have; `shift`: what is added to a position in the single file to find it
    here; `ranged`: whether it answers ranges; `dead`: why it is asked no more, or ""; `given`: bytes of parts that came
    from it; `faults`: in a row.
    """

    url: httpx2.URL
    is_directory: bool
    parts: range
    shift: int = 0
    ranged: bool = True
    dead: str = ""
    given: int = 0
    faults: int = 0
    active: int = 0
    turn: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)

    @property
    def in_turn(self) -> bool:
        """Whether it is read from its start, by one reader at a time."""
        return not self.ranged and not self.is_directory


def address(text: str) -> httpx2.URL:
    """A URL to pull from; raises InputError for any other text."""
    try:
        url = httpx2.URL(text.strip())
    except (httpx2.InvalidURL, TypeError, ValueError):
        raise InputError("the URL cannot be read", hint="write it as https://host/net.penjing") from None
    if url.scheme == "file" or not url.scheme:
        raise InputError(
            f"pull takes http:// and https:// URLs, got {text if not url.scheme else 'file://'}",
            hint="penjing unpack and penjing join read what is on this machine",
        )
    if url.scheme not in ("http", "https") or not url.host:
        raise InputError(f"pull takes http:// and https:// URLs, got {url.scheme}://", hint="https://host/net.penjing")
    return url


def shown(url: httpx2.URL) -> str:
    """A URL for people: without user, password and query, which may be secrets."""
    port = f":{url.port}" if url.port is not None else ""
    host = f"[{url.host}]" if ":" in url.host else url.host
    return f"{url.scheme}://{host}{port}{url.path}"


def child(url: httpx2.URL, name: str) -> httpx2.URL:
    """A file beside the one (or in the folder, if it ends with a slash) that `url` names, with the same query."""
    return url.copy_with(raw_path=_path(url).rpartition("/")[0].encode() + b"/" + name.encode() + _query(url))


class Web:
    """Asks servers; every fault of theirs becomes a Gone or a Passing."""

    def __init__(self, *, timeout: float, connections: int) -> None:
        """timeout: seconds without an answer, or with next to none of it, after which a request is given up."""
        self._timeout = timeout
        self._client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(timeout, pool=None),
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
            headers={"Accept-Encoding": "identity", "User-Agent": f"penjing/{__version__}"},
        )

    async def close(self) -> None:
        """Ends all connections."""
        await self._client.aclose()

    @asynccontextmanager
    async def get(self, url: httpx2.URL, *, start: int = 0, stop: int | None = None) -> AsyncIterator[Answer]:
        """The answer to a GET for the bytes from `start` to `stop` (None: to the end); checked, but its body unread."""
        wanted = {} if start == 0 and stop is None else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        with _faults(self._timeout):
            response = await self._follow(self._client.build_request("GET", url, headers=wanted))
            try:
                yield Answer(response, start, self._timeout)
            finally:
                await response.aclose()

    async def _follow(self, request: httpx2.Request) -> httpx2.Response:
        for _ in range(_REDIRECTS + 1):
            async with asyncio.timeout(2 * self._timeout):  # also for one that dribbles its headers
                response = await self._client.send(request, stream=True, follow_redirects=False)
            following = response.next_request
            if following is None:
                return response
            await response.aclose()
            if request.url.scheme == "https" and following.url.scheme != "https":
                raise Gone("redirects from https to a connection that is not", wholly=True)
            request = following
        raise Gone(f"redirects more than {_REDIRECTS} times", wholly=True)


class Answer:
    """The head of an answer, found to be of use, and its body to iterate over.

    `at` is the position of its first byte, `total` the bytes of the whole file where the server says so.
    """

    def __init__(self, response: httpx2.Response, start: int, timeout: float) -> None:
        status = response.status_code
        if status in (408, 425, 429) or status >= 500:
            raise Passing(f"answers {status} {response.reason_phrase}".rstrip(), wait=_wait(response))
        if status == 416 and start == 0:
            raise Gone("is an empty file")
        if status == 416:
            raise Passing("has a shorter file than the package is", lie=True)
        if status not in (200, 206):
            raise Gone(f"answers {status} {response.reason_phrase}".rstrip(), wholly=status in (401, 403, 407))
        coding = response.headers.get("content-encoding", "").strip().lower()
        if coding not in _CODINGS or (coding not in ("", "identity") and status == 206):
            raise Gone(f"encodes the file as {coding[:20]!r}, which it was asked not to", wholly=True)
        self.ranged = status == 206
        self.at, self.total = 0, None
        if self.ranged:
            found = _RANGE.fullmatch(response.headers.get("content-range", "").strip())
            if found is None or int(found[1]) != start:
                raise Passing("sends another range than it was asked for", lie=True)
            self.at = start
            self.total = None if found[3] == "*" else int(found[3])
        elif coding in ("", "identity") and _LENGTH.fullmatch(length := response.headers.get("content-length", "")):
            self.total = int(length)
        self._response, self._timeout = response, timeout

    async def body(self) -> AsyncIterator[bytes]:
        """The bytes as they come. Raises Passing where they come to a stop, or next to one."""
        began, got = time.monotonic(), 0
        async for data in self._response.aiter_bytes():
            yield data
            got += len(data)
            if (spent := time.monotonic() - began) > self._timeout:
                if got < _SLOW * spent:
                    raise Passing(f"sent {got} bytes in {spent:.0f} seconds")
                began, got = time.monotonic(), 0


async def open_source(web: Web, url: httpx2.URL, begun: dict[httpx2.URL, bytearray]) -> tuple[Source, Manifest]:
    """Finds out what stands at a URL: a package, a volume, or a directory, which the URL may name itself or by its
    manifest. `begun` keeps what has come of a manifest for the next try. Raises Gone (it is none of these), Passing.
    """
    if _path(url).endswith("/"):
        return await _open_file(web, child(url, MANIFEST), begun)
    try:
        return await _open_file(web, url, begun)
    except Gone as first:
        if _path(url).endswith("/" + MANIFEST):
            raise
        folder = url.copy_with(raw_path=_path(url).encode() + b"/" + _query(url))
        try:
            return await _open_file(web, child(folder, MANIFEST), begun)
        except Gone as second:
            if str(second) == str(first) or str(second).startswith("answers 404"):  # it is no directory
                raise first from None
            raise Gone(_both(first, second), wholly=first.wholly or second.wholly) from None
        except Passing as second:
            raise Passing(_both(first, second), wait=second.wait, lie=second.lie) from None


def _both(first: Gone, second: Gone | Passing) -> str:
    return f"{first}, and its manifest: {second}"


def part_url(source: Source, front: Manifest, number: int) -> httpx2.URL:
    """Where a directory has a part."""
    return child(source.url, file_of(front.parts[number]))


async def _open_file(web: Web, url: httpx2.URL, begun: dict[httpx2.URL, bytearray]) -> tuple[Source, Manifest]:
    """Reads the manifest and tells by the file's length what it is part of."""
    data = begun.setdefault(url, bytearray())
    resumed = bool(data)
    try:
        head, ranged, total = await _read_front(web, url, data)
        skip = volumes.HEAD_SIZE if head else 0
        front = manifest.parse(bytes(data[skip:]))
        if head is not None:
            head.check(front)
    except PackageError as error:
        data.clear()
        if resumed:  # the file may have changed between two requests
            raise Passing(error.message, lie=True) from None
        raise Gone(error.message) from None
    data.clear()
    run = range(len(front.parts))
    if head is not None:
        run = range(head.first, head.first + head.count)
    size = skip + len(front.data)
    end = size + front.offsets[run.stop] - front.offsets[run.start]
    by_name = total is None and _path(url).endswith("/" + MANIFEST)
    if head is None and (total == size or by_name):
        return Source(url=url, is_directory=True, parts=run, ranged=ranged), front
    if total not in (None, end):
        raise Passing(f"has {total} bytes where the index says {end}", lie=True)
    return Source(url=url, is_directory=False, parts=run, shift=size - front.offsets[run.start], ranged=ranged), front


async def _read_front(web: Web, url: httpx2.URL, data: bytearray) -> tuple[volumes.VolumeHead | None, bool, int | None]:
    """Appends to `data` until a manifest is in it; the volume's head, whether the server keeps to ranges, and the
    file's bytes if it says."""
    ranged, total = True, None
    head, due = _due(data)
    while len(data) < due:
        asked = max(due, len(data) + _FRONT)
        async with web.get(url, start=len(data), stop=asked) as answer:
            ranged, total = answer.ranged, total if answer.total is None else answer.total
            del data[answer.at :]
            async for more in answer.body():
                data += more
                if len(data) >= due:
                    head, due = _due(data)
                if len(data) >= due:
                    break
                if due > _MAX_FRONT:
                    raise Gone(f"declares a manifest of {due} bytes")
        if len(data) < min(due, asked) or (total is not None and total < due):
            _due(data)  # says so if it is another kind of file
            given = len(data)
            data.clear()
            raise Passing(f"gives {given} bytes of a manifest of {due}", lie=True)
    return head, ranged, total


def _due(data: bytearray) -> tuple[volumes.VolumeHead | None, int]:
    """The head of a volume, if `data` begins with one, and the bytes to the manifest's end as far as `data` tells."""
    if len(data) < volumes.HEAD_SIZE and volumes.MAGIC.startswith(data[: len(volumes.MAGIC)]):
        return None, volumes.HEAD_SIZE
    head = volumes.parse_head(bytes(data[: volumes.HEAD_SIZE]))
    skip = volumes.HEAD_SIZE if head else 0
    return head, skip + manifest.extent(bytes(data[skip:]))


def _path(url: httpx2.URL) -> str:
    return url.raw_path.decode().partition("?")[0]


def _query(url: httpx2.URL) -> bytes:
    return b"?" + url.query if url.query else b""


def _wait(response: httpx2.Response) -> float:
    """Seconds of a Retry-After header, at most a minute; dates are passed over."""
    text = response.headers.get("retry-after", "")
    return min(float(text), 60.0) if text.isdecimal() else 0.0


class _faults:
    """Inside, the errors of the HTTP library become a Gone or a Passing, whose words hold nothing of the URL."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, httpx2.TimeoutException | TimeoutError):
            raise Passing(f"does not answer for {self._timeout:g} seconds") from None
        if isinstance(error, httpx2.UnsupportedProtocol | httpx2.InvalidURL):
            raise Gone("redirects to an address that is none of the web", wholly=True) from None
        if isinstance(error, httpx2.DecodingError):
            raise Passing("sends an encoding that cannot be undone", lie=True) from None
        if isinstance(error, httpx2.ConnectError):
            if _is_certificate(error):
                raise Gone("has a certificate that is not trusted", wholly=True) from None
            raise Passing("cannot be reached") from None
        if isinstance(error, httpx2.HTTPError):
            raise Passing("broke the connection") from None


def _is_certificate(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
