"""Mutated inputs for every reader of foreign bytes in penjing.package: what may come of them, and what never.

    python benchmarks/fuzz.py [--inputs 1000000] [--seed 0] [--only packages layered …] [--engine guided] [--out FILE]

Inputs change sound ones, mostly behind digests that are computed anew (penjing.testing.forging), as a bit flipped
anywhere tests SHA-256 alone. `guided`: Atheris (libFuzzer) picks what to change on by the code that was reached;
`plain`: at random, without Atheris. Each reader runs in a process of its own, in which a package may declare 1 MiB of
raw bytes in place of 256 (so that a bomb differs from a network), under a limit of memory.

Failures are: an exception other than a refusal; a MemoryError, also within a refusal; more than 2 s of processor time;
a process that ends; a network, package or signature accepted that is none (fuzz_readers.py says what holds for each).
The JSON has counts by reader and refusal, and of each failure the input in base64. Exit code 1 if there is any.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

SECONDS = 2.0  # of processor time for one input
MEMORY = 512 << 20  # bytes beyond those of the process at its start
WAIT = 10  # times as long, by the clock on the wall
FREE = 1 << 20  # raw bytes that a package may declare
SHOWN = 20  # failures that are kept, and refusals that are named


class Hang(BaseException):
    """An input takes too long; no handler in a reader holds it."""


def alarm(*_: object) -> None:
    disarm()  # one Hang an input
    raise Hang


def disarm() -> None:
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)


class Run:
    """Feeds a reader and counts what comes of it."""

    def __init__(self, reader: Any, refusals: tuple[type[Exception], ...]) -> None:
        self.reader, self.refusals = reader, refusals
        self.inputs = 0
        self.accepted: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.failures: list[dict[str, str]] = []
        self.failed: Counter[str] = Counter()
        self.slowest = 0.0
        self.began = time.time()
        signal.signal(signal.SIGVTALRM, alarm)
        signal.signal(signal.SIGALRM, alarm)

    def feed(self, data: bytes) -> None:
        """One input."""
        self.inputs += 1
        began, stopped = time.process_time(), False
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WAIT * SECONDS)  # for those who wait
        try:
            self.accepted[self.reader.read(data)] += 1
        except self.refusals as error:
            self.refused[kind_of(error)] += 1
            if out_of_memory(error):
                self.fail("memory", error, data)
        except MemoryError as error:
            self.fail("memory", error, data)
        except Hang as error:
            stopped = True
            self.fail("hang", error, data)
        except BaseException as error:  # a panic of a library in Rust is no Exception
            self.fail("wrong" if type(error).__name__ == "Wrong" else "exception", error, data)
        finally:
            disarm()
        spent = time.process_time() - began
        self.slowest = max(self.slowest, spent)
        if spent > SECONDS and not stopped:
            self.fail("hang", Hang(f"{spent:.1f} s"), data)

    def fail(self, kind: str, error: BaseException, data: bytes) -> None:
        what = f"{kind}: {type(error).__name__}: {str(error)[:200]}"
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        if where is not None:
            what += f" ({Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno})"
        key = re.sub(r"[0-9]+", "N", what)
        self.failed[key] += 1
        if self.failed[key] == 1 and len(self.failures) < SHOWN:
            self.failures.append({"what": what, "input": base64.b64encode(data).decode()})

    def report(self) -> dict[str, Any]:
        """What came of it, as plain JSON values."""
        return {
            "inputs": self.inputs,
            "seconds": round(time.time() - self.began, 1),
            "accepted": dict(self.accepted.most_common()),
            "refused": sum(self.refused.values()),
            "kinds_of_refusal": len(self.refused),
            "refusals": dict(self.refused.most_common(SHOWN)),
            "slowest_ms": round(1000 * self.slowest, 1),
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
            "failed": dict(self.failed),
            "failures": self.failures,
        }


def kind_of(error: Exception) -> str:
    """A refusal without what is different in each."""
    text = re.sub(r"/\S+|(?<!\w)'[^']*'|\([^)]*\)", "…", str(error).split("\n")[0])
    return f"{type(error).__name__}: {re.sub(r'[0-9a-f]{6,}|[0-9,]+', 'N', text)[:70]}"


def out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def child(args: argparse.Namespace) -> None:
    """Feeds one reader in this process; the report goes to --out."""
    guided = args.engine == "guided"
    if guided:
        import atheris

        with atheris.instrument_imports(include=["penjing.package", "penjing.tensors.sparse_coding"]):
            import fuzz_readers
    else:
        import fuzz_readers
    from penjing.package import layout
    from penjing.testing.forging import mutated

    layout._FREE = FREE
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, resource.RLIM_INFINITY))
    reader = fuzz_readers.READERS[args.only[0]]
    run = Run(reader, fuzz_readers.REFUSALS)

    def done() -> None:
        args.out.write_text(json.dumps(run.report()))
        shutil.rmtree(fuzz_readers.ROOM, ignore_errors=True)

    rng = random.Random(args.seed)
    for seed in reader.seeds:
        run.feed(seed)
    if run.refused or run.failed:
        sys.exit(f"a sound input is refused: {run.report()}")
    if not guided:
        while run.inputs < args.inputs:
            run.feed(reader.change(rng.choice(reader.seeds), rng, mutated))
        done()
        return

    def bitwise(data: bytes, rng: random.Random) -> bytes:
        """libFuzzer's own mutations, which know the numbers that the code compares with; or ours."""
        return bytes(atheris.Mutate(data, len(data) + 16)) if rng.random() < 0.5 else mutated(data, rng)

    def change(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        start = data if len(data) > 1 and rng.random() < 0.7 else rng.choice(reader.seeds)
        try:
            out: bytes = reader.change(start, rng, bitwise)
        except Exception as error:  # Atheris waits for ever where this raises
            run.fail("mutator", error, start)
            return mutated(start, rng)[:most]
        return out if len(out) <= most else mutated(rng.choice(reader.seeds), rng)[:most]

    def feed(data: bytes) -> None:
        run.feed(data)
        if run.inputs >= args.inputs:
            done()
            os._exit(0)

    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(reader.seeds):
            (Path(corpus) / str(number)).write_bytes(seed)
        longest = max(map(len, reader.seeds)) * 2 + 4096
        options = [f"-seed={args.seed + 1}", f"-max_len={longest}", "-timeout=0", "-rss_limit_mb=0"]
        atheris.Setup([sys.argv[0], *options, corpus], feed, custom_mutator=change)
        atheris.Fuzz()


def measured(name: str, inputs: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The report of one reader, from a process of its own."""
    out = folder / f"{name}.json"
    command = [sys.executable, __file__, "--child", "--only", name, "--inputs", str(inputs), "--seed", str(args.seed)]
    command += ["--engine", args.engine, "--out", str(out)]
    log = folder / f"{name}.log"
    try:
        with log.open("w") as stream:
            done = subprocess.run(command, stdout=stream, stderr=stream, cwd=folder, timeout=60 + inputs / 50)
    except subprocess.TimeoutExpired:
        return {"inputs": 0, "failed": {"hang: the process did not end": 1}}
    said = log.read_text(errors="replace")
    if not out.exists():
        last = "\n".join(said.splitlines()[-8:])
        return {"inputs": 0, "failed": {f"crash: ended with {done.returncode}: {last}": 1}}
    report: dict[str, Any] = json.loads(out.read_text())
    if found := re.findall(r"cov: (\d+)", said):
        report["edges_reached"] = [int(found[0]), int(found[-1])]
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="readers")
    parser.add_argument("--engine", choices=("guided", "plain"), default="guided")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    import fuzz_readers

    shutil.rmtree(fuzz_readers.ROOM, ignore_errors=True)
    names = args.only or list(fuzz_readers.READERS)
    weights = {name: fuzz_readers.READERS[name].weight for name in names}
    began, found = time.time(), {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            share = -(-args.inputs * weights[name] // sum(weights.values()))
            found[name] = measured(name, share, args, Path(folder))
            row = found[name]
            print(
                name, row["inputs"], "inputs,", row.get("seconds"), "s,", row["failed"] or "no failure", file=sys.stderr
            )
    total = {
        "inputs": sum(row["inputs"] for row in found.values()),
        "seconds": round(time.time() - began, 1),
        "failures": sum(sum(row["failed"].values()) for row in found.values()),
    }
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    head = {"benchmark": "fuzz", "engine": args.engine, "seed": args.seed, "machine": machine, **total}
    text = json.dumps({**head, "readers": found}, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    sys.exit(1 if total["failures"] else 0)


if __name__ == "__main__":
    main()
