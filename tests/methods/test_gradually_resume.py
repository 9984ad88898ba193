"""Rounds that are cut off, and go on where they were."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from test_gradually import TUNE, Spoil, X, Y, assert_same, context, network, nothing_seen, recorded

import penjing as pj
from penjing.data import Data
from penjing.errors import OutputError, RecipeError
from penjing.methods.gradually import Gradually
from penjing.network import Network, SetWeights
from penjing.recipe import Context

__all__ = ["network", "nothing_seen"]  # fixtures


class Breaks:
    """Progress that ends everything at the `at`-th step of training."""

    def __init__(self, at: int, end: Callable[[], None]) -> None:
        self.at, self.end, self.notes = at, end, list[str]()

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        yield self.advance if description.startswith("fine-tuning") else lambda n: None

    def advance(self, n: int) -> None:
        self.at -= n
        if self.at == 0:
            self.end()

    def note(self, text: str) -> None:
        self.notes.append(text)


def interrupt() -> None:
    raise KeyboardInterrupt


def rounds(folder: Path | None) -> Gradually:
    """Four rounds, each with three steps of training."""
    resume = None if folder is None else str(folder)
    return Gradually(step=pj.PruneChannels(ratio=0.6), between=TUNE, rounds=4, floor="accuracy>=1%", resume=resume)


@pytest.fixture(scope="module")
def expected(network: Network) -> Network:
    return network.apply(rounds(None).plan(network, context(network)).edits)


def test_it_goes_on_where_it_stopped(
    network: Network, expected: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, folder = rounds(tmp_path / "run"), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        settings.plan(network, replace(context(network), progress=Breaks(8, interrupt)))
    assert sorted(f.name for f in folder.iterdir()) == ["round-0002.safetensors", "run.json"]
    plans = recorded(monkeypatch, pj.PruneChannels)
    watching = Breaks(99, interrupt)
    again = settings.plan(network, replace(context(network), progress=watching))
    assert len(plans) == 2  # of rounds 3 and 4
    assert watching.notes[0].startswith("going on after round 2")
    assert_same(network.apply(again.edits), expected)
    assert [r.layer for r in again.reasons[:4]] == [f"round {i} of 4" for i in (1, 2, 3, 4)]
    plans.clear()
    finished = settings.plan(network, context(network))
    assert not plans
    assert_same(network.apply(finished.edits), expected)
    assert str(finished) == str(again)
    assert sorted(f.name for f in folder.iterdir()) == ["plan.safetensors", "run.json"]


def test_it_goes_on_after_it_was_killed(network: Network, expected: Network, tmp_path: Path) -> None:
    network.save(tmp_path / "network.safetensors")
    script = f"""
import os, signal, sys
from dataclasses import replace
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_gradually_resume import Breaks, Network, context, rounds
network = Network.load({str(tmp_path / "network.safetensors")!r})
ends = Breaks(11, lambda: os.kill(os.getpid(), signal.SIGKILL))
rounds(Path({str(tmp_path / "run")!r})).plan(network, replace(context(network), progress=ends))
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "run" / "round-0003.safetensors").exists()
    settings = rounds(tmp_path / "run")
    assert_same(network.apply(settings.plan(network, context(network)).edits), expected)


def test_a_folder_of_another_run_is_refused(network: Network, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    settings = Gradually(step=pj.PruneWeights(sparsity=0.5), rounds=2, resume=folder)
    settings.plan(network, context(network))
    shutil.move(folder, tmp_path / "moved")
    settings = replace(settings, resume=str(tmp_path / "moved"))
    settings.plan(network, context(network))  # where it lies does not matter

    def refused(settings: Gradually, network: Network, at: Context) -> str:
        with pytest.raises(RecipeError, match="moved holds another run") as caught:
            settings.plan(network, at)
        assert "name another folder" in (caught.value.hint or "")
        return caught.value.message.partition("with other ")[2]

    at = context(network)
    assert refused(replace(settings, rounds=3), network, at) == "settings"
    assert refused(settings, network, replace(at, seed=1)) == "seed"
    assert refused(settings, network, replace(at, data=Data((X[1:], Y[1:])))) == "samples"
    assert refused(settings, network, replace(at, data=Data((X.flip(3), Y)))) == "samples"
    assert refused(settings, network, replace(at, task=None)) == "task"
    name = network.parameter_names[0]
    other = network.apply([SetWeights(parameter=name, value=network.tensors()[name] * 2)])
    assert refused(settings, other, at) == "network"
    assert refused(settings, network, replace(at, original=other)) == "original network"
    (tmp_path / "moved" / "run.json").write_text("{")
    with pytest.raises(RecipeError, match=r"run\.json cannot be read"):
        settings.plan(network, at)


def test_a_floor_that_ended_the_rounds_ends_them_again(network: Network, tmp_path: Path) -> None:
    settings = Gradually(
        step=pj.PruneWeights(sparsity=0.9), between=Spoil(at=2), floor="accuracy>=50%", resume=str(tmp_path)
    )
    first = settings.plan(network, context(network))
    again = settings.plan(network, context(network))
    assert Spoil.count == [2]
    assert str(first) == str(again)
    assert_same(network.apply(first.edits), network.apply(again.edits))


def test_a_folder_that_cannot_be_is_said(network: Network, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    settings = Gradually(step=pj.PruneWeights(sparsity=0.9), resume=str(tmp_path / "file"))
    with pytest.raises(OutputError):
        settings.plan(network, context(network))


def test_where_rounds_are_kept_is_no_part_of_what_was_done(network: Network, tmp_path: Path) -> None:
    fields = {"step": pj.PruneWeights(sparsity=0.5), "rounds": 2}
    here, there, nowhere = (
        pj.compress(network, pj.Recipe(Gradually(**fields, **more)), data=Data((X, Y)))
        for more in ({"resume": str(tmp_path / "here")}, {"resume": str(tmp_path / "there")}, {})
    )
    assert here.network.history == there.network.history == nowhere.network.history
    assert here.steps[0]["settings"]["resume"] == str(tmp_path / "here")  # a report of this run tells it
