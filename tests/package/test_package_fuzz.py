"""Some thousand mutated inputs of those of benchmarks/fuzz.py: refused in words, or what they say they are, quickly."""

import random
import shutil
import sys
from pathlib import Path

import pytest

from penjing.errors import PackageError
from penjing.package import decode, encode, layout
from penjing.testing.forging import Forge, forged, mutated

pytest.importorskip("pyrage")
pytest.importorskip("securesystemslib")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import fuzz
import fuzz_readers


@pytest.fixture(scope="module", autouse=True)
def room():
    yield
    shutil.rmtree(fuzz_readers.ROOM, ignore_errors=True)


@pytest.mark.parametrize("name", fuzz_readers.READERS)
def test_no_reader_fails(name, monkeypatch):
    monkeypatch.setattr(layout, "_FREE", fuzz.FREE)
    reader, rng = fuzz_readers.READERS[name], random.Random(name)
    run = fuzz.Run(reader, fuzz_readers.REFUSALS)
    for seed in reader.seeds:
        run.feed(seed)
    assert not run.refused  # so the refusals below are not the seeds' fault
    for _ in range(max(60, 16 * reader.weight)):
        run.feed(reader.change(rng.choice(reader.seeds), rng, mutated))
    assert not run.failed, run.failures[:3]
    assert run.refused and run.accepted


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


def test_a_failure_is_told(monkeypatch):
    """The harness sees what it looks for."""

    def bad(data):
        if data == b"loop":
            while True:
                pass
        if data == b"wrong":
            raise fuzz_readers.Wrong("accepted")
        if data == b"memory":
            raise PackageError("no memory") from MemoryError()
        raise KeyError(data)

    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    monkeypatch.setattr(fuzz, "WAIT", 1000)  # of a busy machine
    run = fuzz.Run(fuzz_readers.Reader([], forged, bad, 1), fuzz_readers.REFUSALS)
    for data in (b"loop", b"wrong", b"memory", b"other"):
        run.feed(data)
    assert [failure["what"].split(":")[0] for failure in run.failures] == ["hang", "wrong", "memory", "exception"]


def test_a_forge_without_a_lie_gives_the_same_network(small, equal):
    assert equal(decode(Forge.of(encode(*small)).build())[1], small[1])
