"""A benchmark in sections, each of which yields rows: chosen on the command line, printed and kept as they come."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

import penjing as pj
from penjing.data import Data

ROOT = Path(__file__).resolve().parents[1]
Section = Callable[[Path], Iterator[dict[str, Any]]]  #: the folder with the data → rows


def run(told: str | None, sections: Mapping[str, Section], name: str) -> None:
    """Runs the sections that the command line names, with the benchmark's docstring `told` as help."""
    parser = argparse.ArgumentParser(description=told, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--only", nargs="+", default=list(sections), choices=list(sections))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / f"{name}.json")
    chosen = parser.parse_args()
    sys.path.insert(0, str(chosen.data))
    torch.set_num_threads(chosen.threads)
    rows: list[dict[str, Any]] = []
    for section in chosen.only:
        for row in sections[section](chosen.data):
            rows.append({"section": section, **row})
            print(json.dumps(rows[-1]), flush=True)
            _keep(chosen.out, {"threads": chosen.threads, "torch": torch.__version__, "rows": rows})


def first(samples: TensorDataset, count: int) -> TensorDataset:
    """The first samples."""
    return TensorDataset(*(t[:count] for t in samples.tensors))


def accuracy(network: pj.Network, tested: Any) -> float:
    """The share of labelled samples that a network gets right, in percent."""
    right = [(network.run(x)[0].argmax(1) == y).float() for x, y in Data(tested).batches(200)]
    return round(100 * torch.cat(right).mean().item(), 2)


def _keep(file: Path, result: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".part")
    aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
    aside.replace(file)
