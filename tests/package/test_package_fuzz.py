"""Some thousand mutated inputs of those of benchmarks/fuzz.py: refused in words, or what they say they are, quickly."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from penjing.errors import PackageError
from penjing.package import decode, encode
from penjing.testing.forging import Forge, forged, mutated

pytest.importorskip("pyrage")
pytest.importorskip("securesystemslib")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def ran(*arguments):
    """What a Python of its own prints: the harness stops what hangs by signals."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=500, cwd=BENCHMARKS)
    return json.loads(done.stdout or done.stderr)


@pytest.mark.slow
def test_no_reader_fails():
    found = ran("fuzz.py", "--engine", "plain", "--inputs", "4000")
    assert found["failures"] == 0, found["readers"]
    assert found["inputs"] >= 4000 and len(found["readers"]) > 10
    assert all(row["refused"] and row["accepted"] for row in found["readers"].values())


@pytest.mark.parametrize("seed", range(4))
def test_damage_is_always_seen(small, equal, seed):
    """Without digests computed anew nothing but the package itself is accepted."""
    rng, good = random.Random(seed), encode(*small, metadata={"a": 1})
    for _ in range(400):
        bad = mutated(good, rng)
        try:
            got = decode(bad)
        except PackageError as error:
            assert bad != good and error.message
        else:
            assert bad == good and equal(got[1], small[1])


def test_forged_packages_reach_behind_the_digests(small):
    rng, good = random.Random(0), encode(*small)
    said = []
    for _ in range(300):
        try:
            decode(forged(good, rng))
        except PackageError as error:
            said.append(error.message)
    assert sum("SHA-256" in text for text in said) < len(said) / 5 and len(set(said)) > 30


TOLD = """
import json, fuzz, fuzz_readers
from penjing.errors import PackageError

def bad(data):
    if data == b"loop":
        while True:
            pass
    if data == b"wrong":
        raise fuzz_readers.Wrong("accepted")
    if data == b"memory":
        raise PackageError("no memory") from MemoryError()
    raise KeyError(data)

fuzz.SECONDS, fuzz.WAIT = 0.2, 1000  # of a busy machine
run = fuzz.Run(fuzz_readers.Reader([], None, bad, 1), fuzz_readers.REFUSALS)
for data in (b"loop", b"wrong", b"memory", b"other"):
    run.feed(data)
print(json.dumps([failure["what"].split(":")[0] for failure in run.failures]))
"""


def test_a_failure_is_told():
    """The harness sees what it looks for."""
    assert ran("-c", TOLD) == ["hang", "wrong", "memory", "exception"]


def test_a_forge_without_a_lie_gives_the_same_network(small, equal):
    assert equal(decode(Forge.of(encode(*small)).build())[1], small[1])
