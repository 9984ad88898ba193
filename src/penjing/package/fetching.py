"""Which part is asked of which server, when, and how often."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections import Counter
from collections.abc import Callable

import httpx2

from penjing.package.arrivals import Arrivals, Intake
from penjing.package.manifest import Manifest
from penjing.package.sources import Gone, Passing, Source, Web, part_url, shown
from penjing.progress import Progress

Opened = asyncio.Future[tuple[Source, Manifest] | str]  # what stands at a URL, or why nothing does

_RUN = 1 << 20  # bytes up to which neighbouring parts are asked for together
_LIES = 2  # wrong answers about a part, after which a source is not asked for it any more
_LIED = 8  # parts of which that is so, after which it is asked for nothing
_LONGEST = 10.0

HEADWAY = 64 << 10  # bytes after which a server counts as good again


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


class Crew:
    """Fetches parts from sources, which may join while it is at work."""

    def __init__(self, web: Web, arrivals: Arrivals, patience: Patience, advance: Callable[[int], None]) -> None:
        self._web, self._arrivals, self._patience, self._advance = web, arrivals, patience, advance
        self._front = arrivals.front
        self._sources: list[Source] = []
        self._expected: set[Opened] = set()
        self._absent: list[str] = []  # URLs that are no source of this package, and why
        self._refused: dict[tuple[Source, int], str] = {}  # why a source is not asked for a part any more
        self._lies: Counter[tuple[Source, int]] = Counter()
        self._wanted: list[int] = []

    def expect(self, url: httpx2.URL, answer: Opened, progress: Progress) -> None:
        """Takes a source on as soon as it is open; what is none is told."""

        def arrived(answer: Opened) -> None:
            self._expected.discard(answer)
            if answer.cancelled():
                return
            found = answer.result()
            if not isinstance(found, str) and found[1].data == self._front.data:
                self._sources.append(found[0])
                return
            reason = found if isinstance(found, str) else "has another package"
            self._absent.append(f"{shown(url)} {reason}")
            progress.note(f"going on without {shown(url)}, which {reason}")

        if answer.done():
            arrived(answer)
        else:
            self._expected.add(answer)
            answer.add_done_callback(arrived)

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
        faults, before = Counter[Source](), Counter[Source]()
        while not self._arrivals.has(number):
            source = self._choose(number)
            if source is None and self._expected:
                await asyncio.wait(self._expected, return_when=asyncio.FIRST_COMPLETED)
                continue
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
                faults[source] = 1 if source.given - before[source] >= HEADWAY else faults[source] + 1
                before[source] = source.given
                if fault.lie:
                    for each in fault.parts or (number,):
                        self._lied(source, each, str(fault))
                elif faults[source] >= self._patience.tries:
                    self._refuse(source, number, f"{fault} ({faults[source]} times in a row)", wholly=True)
                if self._choose(number) is source:
                    await asyncio.sleep(self._patience.before(faults[source], fault.wait))
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
        named = []
        for s in self._sources:
            reason = self._refused.get((s, number))
            url = part_url(s, self._front, number) if reason and s.is_directory else s.url
            named.append(f"{shown(url)} {reason or s.dead or 'is a volume without it'}")
        return "; ".join([*named, *self._absent])

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
