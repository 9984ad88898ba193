"""Pull: a package fetched from web servers, in parallel, from whichever has its parts.

What has arrived stands in a folder OUT.pull beside the result and is never fetched again, whatever happened to the
transfer; the package appears at OUT when all of it is there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import httpx2

from penjing.errors import InputError, TransferError
from penjing.package import directory
from penjing.package.arrivals import Arrivals, Intake
from penjing.package.manifest import Manifest
from penjing.package.sources import Gone, Passing, Source, Web, address, open_source, part_url, shown
from penjing.progress import SILENT, Progress

_RUN = 1 << 20  # bytes up to which neighbouring parts are asked for together
_HEADWAY = 64 << 10  # bytes after which a server counts as good again
_LIES = 2  # wrong answers about a part, after which a source is not asked for it any more
_LIED = 8  # parts of which that is so, after which it is asked for nothing
_LONGEST = 10.0

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patience:
    """How long faulty servers are borne with.

    tries: faults in a row, without headway, after which a source is given up. pause: seconds after the first; each
    further one doubles it, to 10 at most, and chance shortens it by up to a half. timeout: seconds without an answer.
    """

    tries: int = 6
    pause: float = 0.5
    timeout: float = 20.0

    def before(self, again: int, asked: float = 0.0) -> float:
        """Seconds to wait after fault number `again`, counted from 1; `asked`: those the server wants."""
        return max(asked, min(self.pause * 2.0 ** (again - 1), _LONGEST) * random.uniform(0.5, 1.0))


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
    jobs: int = 4,
    layout: str = "file",
    patience: Patience | None = None,
    progress: Progress = SILENT,
) -> Pulled:
    """Fetches a package from one or several http(s) URLs: packages, directories, volumes; mirrors, or each with some.

    until_bytes: end early, with the parts that lie within so many first bytes of the package; the next pull goes on.
    jobs: requests at a time. layout: of the result, "file" or "directory". Raises InputError for arguments that make
    no sense, TransferError where the servers do not give the package (what has come is kept), OutputError.
    """
    addresses = [address(url) for url in ([urls] if isinstance(urls, str) else urls)]
    if not addresses:
        raise InputError("there is nothing to pull", hint="name a URL")
    if jobs < 1:
        raise InputError(f"jobs must be at least 1, got {jobs}")
    if until_bytes is not None and until_bytes < 0:
        raise InputError(f"until_bytes must not be negative, got {until_bytes}")
    directory.check(layout)
    out = Path(out)

    async def all_of_it() -> Pulled:
        web = Web(timeout=(patience or Patience()).timeout, connections=jobs)
        try:
            return await _pull(web, addresses, out, until_bytes, jobs, layout, patience or Patience(), progress)
        finally:
            await web.close()

    return _finished(all_of_it)


def wanted(front: Manifest, until_bytes: int | None) -> list[int]:
    """Numbers of the parts to fetch: all, or those within the first bytes of the single file."""
    return [n for n, end in enumerate(front.offsets[1:]) if until_bytes is None or end <= until_bytes]


def _finished(work: Callable[[], Awaitable[T]]) -> T:
    """The result of a coroutine, also where a loop runs already (a notebook): in a thread, then."""

    async def run() -> T:
        return await work()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(run())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(run())).result()


async def _pull(
    web: Web,
    addresses: list[httpx2.URL],
    out: Path,
    until_bytes: int | None,
    jobs: int,
    layout: str,
    patience: Patience,
    progress: Progress,
) -> Pulled:
    with progress.task("asking for the manifest"):
        sources, front = await _opened(web, addresses, patience, progress)
    folder = out.with_name(out.name + ".pull")
    numbers = wanted(front, until_bytes)
    arrivals = Arrivals(folder, front, numbers)
    due = {front.parts[n].digest: front.parts[n] for n in numbers}
    with progress.task("pulling (bytes)", sum(p.stored for p in due.values())) as advance:
        advance(sum(map(arrivals.begun, due.values())))
        crew = Crew(web, sources, arrivals, patience, advance)
        lost = await crew.fetch(numbers, jobs)
    if lost:
        raise _failure(front, lost, folder)
    missing = arrivals.missing()
    if not missing:
        arrivals.finish(out, layout)
    return Pulled(
        path=folder if missing else out,
        complete=not missing,
        bytes=front.total,
        here_bytes=front.total - sum(p.stored - arrivals.begun(p) for p in map(front.parts.__getitem__, missing)),
        fetched_bytes=arrivals.fetched,
        missing=tuple(missing),
    )


async def _opened(
    web: Web, addresses: list[httpx2.URL], patience: Patience, progress: Progress
) -> tuple[list[Source], Manifest]:
    """The sources that answer, and the package that the first of them has; what others lack is told."""
    answers = await asyncio.gather(*(_patiently(web, url, patience) for url in addresses))
    faults = {shown(url): a for url, a in zip(addresses, answers, strict=True) if isinstance(a, str)}
    found = [a for a in answers if not isinstance(a, str)]
    if not found:
        named = "; ".join(f"{url} {reason}" for url, reason in faults.items())
        raise TransferError(f"there is no package to pull: {named}", hint="is the URL right, and the server well?")
    front = found[0][1]
    for source, other in found:
        if other.data != front.data:
            faults[shown(source.url)] = f"has another package than {shown(found[0][0].url)}"
    for url, reason in faults.items():
        progress.note(f"going on without {url}: it {reason}")
    return [source for source, other in found if other.data == front.data], front


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
            faults = 1 if here - before >= _HEADWAY else faults + 1
            before = here
            if faults >= patience.tries:
                return f"{fault} ({faults} times in a row)"
            await asyncio.sleep(patience.before(faults, fault.wait))


class Crew:
    """Fetches parts from sources: which part is asked of whom, when, and how often."""

    def __init__(
        self, web: Web, sources: list[Source], arrivals: Arrivals, patience: Patience, advance: Callable[[int], None]
    ) -> None:
        self._web, self._sources, self._arrivals = web, sources, arrivals
        self._patience, self._advance = patience, advance
        self._front = arrivals.front
        self._refused: dict[tuple[Source, int], str] = {}  # why a source is not asked for a part any more
        self._lies: Counter[tuple[Source, int]] = Counter()
        self._wanted: list[int] = []

    async def fetch(self, numbers: list[int], jobs: int) -> dict[int, str]:
        """Fetches parts, `jobs` at a time; those that no source gives, each with the reasons."""
        self._wanted = numbers
        runs = iter(self._runs(numbers))
        lost: dict[int, str] = {}

        async def work() -> None:
            for run in runs:
                for number in run:
                    reason = await self._bring(number, run)
                    if reason:
                        lost[number] = reason

        workers = [asyncio.ensure_future(work()) for _ in range(jobs)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return dict(sorted(lost.items()))

    def _runs(self, numbers: list[int]) -> list[list[int]]:
        """Neighbouring parts that are not here, as many together as are worth one request; no two of equal bytes."""
        runs: list[list[int]] = []
        seen: set[bytes] = set()
        offsets = self._front.offsets
        for n in numbers:
            digest = self._front.parts[n].digest
            if self._arrivals.has(n) or digest in seen:
                continue
            seen.add(digest)
            if runs and runs[-1][-1] == n - 1 and offsets[n + 1] - offsets[runs[-1][0]] <= _RUN:
                runs[-1].append(n)
            else:
                runs.append([n])
        return runs

    async def _bring(self, number: int, run: list[int]) -> str:
        """Fetches a part, and what follows it in its run along with it; "" or why no source gives it."""
        faults, before = 0, 0
        while not self._arrivals.has(number):
            source = self._choose(number)
            if source is None:
                return self._reasons(number)
            source.active += 1
            try:
                await self._ask(source, number, run)
                source.faults = 0
            except Gone as fault:
                self._refuse(source, number, str(fault), wholly=fault.wholly)
            except Passing as fault:
                source.faults += 1
                faults = 1 if source.given - before >= _HEADWAY else faults + 1
                before = source.given
                if fault.lie:
                    for each in fault.parts or (number,):
                        self._lied(source, each, str(fault))
                elif faults >= self._patience.tries:
                    self._refuse(source, number, f"{fault} ({faults} times in a row)", wholly=True)
                if self._choose(number) is source:
                    await asyncio.sleep(self._patience.before(faults, fault.wait))
            finally:
                source.active -= 1
        return ""

    def _refuse(self, source: Source, number: int, reason: str, *, wholly: bool) -> None:
        self._refused[source, number] = reason
        if wholly:
            source.dead = source.dead or reason

    def _lied(self, source: Source, number: int, reason: str) -> None:
        self._lies[source, number] += 1
        if self._lies[source, number] == _LIES:
            lied = sum(n >= _LIES for (each, _), n in self._lies.items() if each is source)
            self._refuse(source, number, reason, wholly=lied >= _LIED)

    def _reasons(self, number: int) -> str:
        """Why no source gives a part, source by source."""
        return "; ".join(
            f"{shown(s.url)} {self._refused.get((s, number)) or s.dead or 'is a volume without it'}"
            for s in self._sources
        )

    def _choose(self, number: int) -> Source | None:
        """Of the sources that may have a part, one that can be asked for just that, is well, and the least busy."""
        able = [s for s in self._sources if number in s.parts and not s.dead and (s, number) not in self._refused]
        return min(able, key=lambda s: (s.in_turn, s.faults, s.active), default=None)

    async def _ask(self, source: Source, number: int, run: list[int]) -> None:
        """One request; what comes is kept. Ends when the part is here, or raises Gone or Passing."""
        if source.in_turn:
            async with source.turn:
                if not self._arrivals.has(number):
                    every = [n for n in self._wanted if not self._arrivals.has(n) and self._choose(n) is source]
                    if every:
                        await self._read(source, every, 0, None)
            return
        part = self._front.parts[number]
        begun = self._arrivals.begun(part)
        if source.is_directory:
            await self._read(source, [number], begun, None)
            return
        last = number
        while last + 1 in run and last + 1 in source.parts and not self._arrivals.has(last + 1):
            last += 1
        start, stop = self._front.offsets[number] + begun, self._front.offsets[last + 1]
        await self._read(source, list(range(number, last + 1)), start + source.shift, stop + source.shift)

    async def _read(self, source: Source, numbers: list[int], start: int, stop: int | None) -> None:
        """Reads an answer's body into the parts `numbers`; `start`, `stop` as in the file that is asked for."""
        offsets = self._front.offsets
        url = part_url(source, self._front, numbers[0]) if source.is_directory else source.url
        shift = -offsets[numbers[0]] if source.is_directory else source.shift
        end = offsets[numbers[-1] + 1]
        intake = Intake(self._arrivals, numbers, self._advance)
        async with self._web.get(url, start=start, stop=stop) as answer:
            if stop is not None and not answer.ranged:
                source.ranged = False  # it did before, or its first answer was no proof: from now on, from its start
                raise Passing("does not keep to ranges")
            at = answer.at - shift
            if source.is_directory and answer.total not in (None, end + shift):
                named = self._front.name(numbers[0])
                raise Passing(f"has {answer.total} bytes where {named} has {end + shift}", lie=True)
            async for data in answer.body():
                source.given += intake.feed(at, data)
                at += len(data)
                if at >= end or intake.done:
                    break
        if intake.wrong:
            named = self._front.names(intake.wrong)
            raise Passing(f"has bytes that do not match the SHA-256 of {named}", lie=True, parts=tuple(intake.wrong))
        if not intake.done:
            raise Passing(f"ends its answer {end - at} bytes early")


def _failure(front: Manifest, lost: dict[int, str], folder: Path) -> TransferError:
    number, reasons = next(iter(lost.items()))
    others = f", and {len(lost) - 1} more parts" if len(lost) > 1 else ""
    return TransferError(
        f"{len(lost)} of {len(front.parts)} parts cannot be had: {front.name(number)}: {reasons}{others}",
        hint=f"what has come is kept in {folder}: the same command goes on there, or name a further URL",
    )
