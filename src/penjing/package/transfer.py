"""Pull: a package fetched from web servers, in parallel, from whichever has its parts.

What has arrived stands in a folder OUT.pull beside the result and is never fetched again, whatever happened to the
transfer; the package appears at OUT when all of it is there.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, cast

import httpx2

from penjing.errors import InputError, PackageError, TransferError
from penjing.package import directory
from penjing.package.arrivals import Arrivals
from penjing.package.fetching import HEADWAY, Crew, Opened, Patience
from penjing.package.layout import SEALED, parse_header
from penjing.package.manifest import Manifest
from penjing.package.sources import Gone, Passing, Source, Web, address, open_source, shown
from penjing.package.volumes import Holding, holding
from penjing.progress import SILENT, Progress

_GRACE = 3.0  # seconds for which the URLs named first are waited for once another has answered

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pulled:
    """What a pull did.

    Attributes:
        path: the package; the folder of what has arrived, if the pull was to end early.
        complete: whether the package is whole.
        bytes: of the package, as a single file.
        here_bytes: of them, those that are on this machine now.
        fetched_bytes: of them, those that came in this pull.
        missing: numbers of the parts that are not here.
    """

    path: Path
    complete: bool
    bytes: int
    here_bytes: int
    fetched_bytes: int
    missing: tuple[int, ...]


def pull(
    urls: str | Sequence[str],
    out: str | Path,
    *,
    until_bytes: int | None = None,
    layers: int | None = None,
    layers_of: Callable[[Manifest], Sequence[int]] | None = None,
    jobs: int = 4,
    layout: str = "file",
    patience: Patience | None = None,
    progress: Progress = SILENT,
) -> Pulled:
    """Fetches a package from one or several http(s) URLs: packages, directories, volumes; mirrors, or each with some.

    until_bytes: end early, with the parts that lie within so many first bytes of the package; layers: with those of so
    many quality layers. The next pull goes on. layers_of: tells the layer of each part of a package that hides it
    (`sealing.layers_of` with a recipient's keys). jobs: requests at a time. layout: of the result, "file" or
    "directory".
    Raises InputError for arguments that make no sense, TransferError where the servers do not give the package (what
    has come is kept), OutputError.
    """
    addresses = [address(url) for url in ([urls] if isinstance(urls, str) else urls)]
    if not addresses:
        raise InputError("there is nothing to pull", hint="name a URL")
    if jobs < 1:
        raise InputError(f"jobs must be at least 1, got {jobs}")
    if until_bytes is not None and until_bytes < 0:
        raise InputError(f"until_bytes must not be negative, got {until_bytes}")
    if layers is not None and layers < 1:
        raise InputError(f"layers must be at least 1, got {layers}", hint="1 is the coarsest network that runs")
    directory.check(layout)
    out = Path(out)

    def chosen(front: Manifest) -> list[int]:
        return wanted(front, until_bytes, layers, layers_of)

    async def all_of_it() -> Pulled:
        # A URL that is slow to open holds a connection, and must hold up no other.
        web = Web(timeout=(patience or Patience()).timeout, connections=jobs + len(addresses))
        try:
            return await _pull(web, addresses, out, chosen, jobs, layout, patience or Patience(), progress)
        finally:
            await web.close()

    return _finished(all_of_it)


def wanted(
    front: Manifest,
    until_bytes: int | None,
    layers: int | None = None,
    layers_of: Callable[[Manifest], Sequence[int]] | None = None,
) -> list[int]:
    """Numbers of the parts to fetch: all, or those in the first bytes of the single file, and of the first layers.

    Raises InputError where the layers of a sealed package are asked for and nothing tells them.
    """
    numbers = [n for n, end in enumerate(front.offsets[1:]) if until_bytes is None or end <= until_bytes]
    if layers is None:
        return numbers
    if layers_of is not None:
        found = layers_of(front)
    elif parse_header(front.data).required & SEALED:
        raise InputError(
            "the package is sealed: only its recipients can tell its layers",
            hint="give --identity KEY; or --until-bytes, as layers come one after another",
        )
    else:
        found = [part.layer for part in front.parts]
    return [n for n in numbers if found[n] <= layers]


def _finished(work: Callable[[], Awaitable[T]]) -> T:
    """The result of a coroutine, also where a loop runs already (a notebook): in a thread, then."""

    running: list[asyncio.Task[T]] = []

    async def run() -> T:
        running.append(cast("asyncio.Task[T]", asyncio.current_task()))
        return await work()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(run())
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(lambda: asyncio.run(run()))
        try:
            return done.result()
        except KeyboardInterrupt:  # the pool would wait for the end of the pull
            for task in running:
                task.get_loop().call_soon_threadsafe(task.cancel)
            raise


async def _pull(
    web: Web,
    addresses: list[httpx2.URL],
    out: Path,
    chosen: Callable[[Manifest], list[int]],
    jobs: int,
    layout: str,
    patience: Patience,
    progress: Progress,
) -> Pulled:
    answers = [asyncio.ensure_future(_patiently(web, url, patience)) for url in addresses]
    try:
        with progress.task("asking for the manifest"):
            front = await _first(addresses, answers)
        folder = out.with_name(out.name + directory.PULL)
        numbers = chosen(front)
        due = {front.parts[n].digest: front.parts[n] for n in numbers}
        whole_file = front.total if layout == "file" and len(numbers) == len(front.parts) else 0
        with Arrivals(folder, front, numbers, earlier=_earlier(out), besides=whole_file) as arrivals:
            with progress.task("pulling (bytes)", sum(p.stored for p in due.values())) as advance:
                advance(sum(map(arrivals.begun, due.values())))
                crew = Crew(web, arrivals, patience, advance)
                for url, answer in zip(addresses, answers, strict=True):
                    crew.expect(url, answer, progress)
                lost = await crew.fetch(numbers, jobs)
            if lost:
                raise _failure(front, lost, folder)
            missing = arrivals.missing()
            if not missing:
                arrivals.finish(out, layout, progress)
    finally:
        for answer in answers:
            answer.cancel()
        await asyncio.gather(*answers, return_exceptions=True)
    return Pulled(
        path=folder if missing else out,
        complete=not missing,
        bytes=front.total,
        here_bytes=front.total - sum(p.stored - arrivals.begun(p) for p in map(front.parts.__getitem__, missing)),
        fetched_bytes=arrivals.fetched,
        missing=tuple(missing),
    )


def _earlier(out: Path) -> Holding | None:
    """The package that stands where the new one will: what they share need not come again."""
    try:
        return holding(out) if out.exists() else None
    except PackageError:
        return None


async def _first(addresses: list[httpx2.URL], answers: Sequence[Opened]) -> Manifest:
    """The package to pull: that of the first URL that has one. The others, where slow, may join later."""
    waiting = set(answers)
    while waiting and not any(a.done() and not isinstance(a.result(), str) for a in answers):
        _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    if not waiting and all(isinstance(a.result(), str) for a in answers):
        named = "; ".join(f"{shown(url)} {a.result()}" for url, a in zip(addresses, answers, strict=True))
        raise TransferError(f"there is no package to pull: {named}", hint="is the URL right, and the server well?")
    if waiting:
        await asyncio.wait(waiting, timeout=_GRACE)
    return next(r[1] for a in answers if a.done() and not isinstance(r := a.result(), str))


async def _patiently(web: Web, url: httpx2.URL, patience: Patience) -> tuple[Source, Manifest] | str:
    """What stands at a URL, or why it cannot be told."""
    begun: dict[httpx2.URL, bytearray] = {}
    faults, before = 0, 0
    while True:
        try:
            return await open_source(web, url, begun)
        except Gone as fault:
            return str(fault)
        except Passing as fault:
            here = sum(map(len, begun.values()))
            faults = 1 if here - before >= HEADWAY else faults + 1
            before = here
            if faults >= patience.tries:
                return f"{fault} ({faults} times in a row)"
            await asyncio.sleep(patience.before(faults, fault.wait))


def _failure(front: Manifest, lost: dict[int, str], folder: Path) -> TransferError:
    number, reasons = next(iter(lost.items()))
    others = f", and {len(lost) - 1} more parts" if len(lost) > 1 else ""
    return TransferError(
        f"{len(lost)} of {len(front.parts)} parts cannot be had: {front.name(number)}: {reasons}{others}",
        hint=f"what has come is kept in {folder}: the same command goes on there, or name a further URL",
    )
