"""sensitivity: accuracy-against-ratio curves of every channel group or weight, and their cache."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penjing._version import __version__
from penjing.analysis.footprint import footprint
from penjing.analysis.gradients import gradients
from penjing.analysis.ranking import rank
from penjing.analysis.sensitivity import (
    ENTRY_SCORES,
    Part,
    channel_parts,
    prunable_weights,
    selected_groups,
    silence,
    weight_parts,
)
from penjing.data import Data
from penjing.errors import DataError, InputError, PenjingError
from penjing.evaluation.curves import SCHEMA, Point, Sensitivity
from penjing.evaluation.describe import DataDigest, digest
from penjing.evaluation.fidelity import compare_outputs
from penjing.evaluation.metric import pieces, scores_of
from penjing.files import appearing
from penjing.network import Network
from penjing.progress import SILENT, Progress
from penjing.recipe import matches
from penjing.task import Task, get_task
from penjing.tensors.criteria import CRITERIA, require_samples

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_KINDS = ("channels", "weights")
_GRADIENT_BATCHES = 6


def sensitivity(
    network: Network,
    data: Any,
    *,
    task: str | Task | None = None,
    ratios: Sequence[float] = RATIOS,
    kind: str = "channels",
    criterion: str | None = None,
    reconstruct: bool = False,
    where: str | list[str] = "*",
    samples: int = 256,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: Progress = SILENT,
) -> Sensitivity:
    """What the metric becomes as each part of `network` alone loses more and more of its channels or weights.

    Args:
        network: stays as it is; parts are silenced on copies of their tensors, and only what lies behind them is run.
        data: batches of (inputs, labels), or inputs alone.
        task: what the metric is; None takes the network's own. Without one, or without labels, there is only the
            output error.
        ratios: shares to silence, 0 to 1; of channels at least one stays.
        kind: "channels" (one curve a channel group) or "weights" (one a weight tensor, its entries pruned singly).
        criterion: which go first: of channels a criterion of PruneChannels ("l2" if None), of weights "magnitude" (if
            None) or "random".
        reconstruct: of channels: the layers behind make up for what goes, fitted on as many other samples.
        where: which layers, as in Steps.
        samples: how many samples to measure on, drawn by `seed`.
        cache: a folder to keep the curves in: the same network, samples and settings are then read, not measured.
        progress: told what is going on.

    Raises:
        InputError, DataError, RecipeError: settings that make no sense, samples that do not fit.
    """
    if not isinstance(network, Network):
        raise InputError(
            f"sensitivity takes a Network, got {type(network).__name__}",
            hint="network = pj.capture(model, inputs=(x,))",
        )
    settings = _Settings(
        ratios=_ratios(ratios), kind=kind, criterion=criterion, reconstruct=reconstruct, where=where, samples=samples,
        seed=seed,
    )  # fmt: skip
    goal = get_task(task if task is not None else network.task)
    drawn = _draw(network, data, goal, settings)
    if drawn.judged[0].labels is None:
        goal = None
    if cache is None:
        return _measure(network, goal, settings, drawn, progress)
    key = {
        "penjing": __version__, "schema": SCHEMA, "network": digest(network), "data": drawn.digest,
        "task": _identity(goal), "settings": settings.to_dict(),
    }  # fmt: skip
    file = Path(cache) / f"sensitivity-{_sha256(key)[:32]}.json"
    found = _read(file)
    if found is None:
        found = _measure(network, goal, settings, drawn, progress)
        _write(file, found)
    return found


@dataclass(frozen=True, kw_only=True)
class _Settings:
    ratios: tuple[float, ...]
    kind: str
    criterion: str | None
    reconstruct: bool
    where: str | list[str]
    samples: int
    seed: int

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise InputError(f"kind must be one of {', '.join(_KINDS)}, got {self.kind!r}")
        if self.criterion is not None:
            (CRITERIA if self.kind == "channels" else ENTRY_SCORES).get(self.criterion)
        if self.reconstruct and self.kind != "channels":
            raise InputError("reconstruct is for channels", hint="leave it out for weights")
        if type(self.samples) is not int or self.samples < 1:
            raise InputError(f"samples must be a whole number above 0, got {self.samples!r}")

    @property
    def order(self) -> str:
        """The criterion in use."""
        return self.criterion or ("l2" if self.kind == "channels" else "magnitude")

    def to_dict(self) -> dict[str, Any]:
        """What the result depends on."""
        return {**self.__dict__, "criterion": self.order}


@dataclass(frozen=True)
class _Batch:
    """Bound inputs, and the labels of the first `n` samples of it."""

    bound: dict[str, Tensor]
    labels: Any
    n: int


@dataclass(frozen=True)
class _Samples:
    """Batches to judge on, others to reconstruct from, a few as they were drawn (inputs, labels), the digest of all."""

    judged: list[_Batch]
    spare: list[_Batch]
    drawn: list[tuple[Any, Any]]
    digest: dict[str, Any]


def _ratios(given: Sequence[float]) -> tuple[float, ...]:
    try:
        ratios = tuple(sorted({float(r) for r in given}))
    except (TypeError, ValueError):
        raise InputError(f"ratios must be numbers between 0 and 1, got {given!r}") from None
    if not ratios or not all(0 <= r <= 1 for r in ratios):
        raise InputError(f"ratios must be numbers between 0 and 1, got {given!r}", hint="for example (0.25, 0.5, 0.75)")
    return ratios


def _draw(network: Network, data: Any, task: Task | None, settings: _Settings) -> _Samples:
    source = data if isinstance(data, Data) else Data(data)
    wanted = settings.samples * (2 if settings.reconstruct else 1)
    largest = max(footprint(network).largest, 1)
    size = max(1, min(64, (1 << 24) // largest)) if network.batch_is_dynamic else int(network.inputs[0].shape[0])
    if network.batch_is_dynamic:  # even batches, so that half of them are half of the samples
        size = math.ceil(settings.samples / math.ceil(settings.samples / size))
    seen, batches, drawn = DataDigest(), list[_Batch](), list[tuple[Any, Any]]()
    for inputs, labels in source.batches(size, shuffle=True, seed=settings.seed, limit=wanted):
        known = None if task is None else labels
        found = [_Batch(bound, part, n) for bound, part, n in pieces(network, inputs, known)]
        seen.update(inputs, known, sum(b.n for b in found))
        batches += found
        if len(drawn) < _GRADIENT_BATCHES:
            drawn.append((inputs, known))
    half = max(len(batches) // 2, 1) if settings.reconstruct else len(batches)
    return _Samples(batches[:half], batches[half:] or batches, drawn, seen.to_dict())


def _measure(
    network: Network, task: Task | None, settings: _Settings, samples: _Samples, progress: Progress
) -> Sensitivity:
    parts = _parts(network, task, settings, samples, progress)
    if not parts:
        raise _nothing(network, settings)
    judged = samples.judged
    table = _Table(network, task, judged)
    for part, count, batch, outputs in silence(network, parts, [b.bound for b in judged], progress):
        table.take((part, count), batch, outputs)
    rows = [
        Point(group=part.name, size=part.size, ratio=ratio, removed=count, **table.mean((number, count)))
        for number, part in enumerate(parts)
        for ratio, count in zip(settings.ratios, part.counts, strict=True)
    ]
    whole = table.mean(None)["metric"]
    if task is not None and whole is None:
        raise DataError(
            f"the {task.metric} of {network.name} is not a number on these samples", hint="check the samples and labels"
        )
    metric = None if task is None else {
        "name": task.metric, "value": whole, "unit": task.unit, "higher_is_better": task.higher_is_better,
    }  # fmt: skip
    return Sensitivity(
        network=network.name,
        digest=digest(network),
        kind=settings.kind,
        criterion=settings.order,
        reconstruct=settings.reconstruct,
        samples=sum(b.n for b in judged),
        seed=settings.seed,
        metric=metric,
        rows=tuple(rows),
        inexact={part.name: part.inexact for part in parts if part.inexact},
    )


def _nothing(network: Network, settings: _Settings) -> InputError:
    """Why there is not one curve."""
    if settings.kind == "channels" and not any(g.size > 1 for g in network.groups()):
        return InputError(
            f"{network.name} has no channel groups, so no channels can be silenced",
            hint="kind 'weights' silences single weights instead",
        )
    return InputError(
        f"{network.name} has nothing to silence that 'where' selects",
        hint="print(network.groups()) lists the channel groups",
    )


class _Table:
    """Scores and errors by (part, count), a list over the batches each; None is the network as it is."""

    def __init__(self, network: Network, task: Task | None, batches: Sequence[_Batch]) -> None:
        self._network, self._task, self._batches = network, task, batches
        self._scores: dict[Any, list[NDArray[Any]]] = {}
        self._errors: dict[Any, list[NDArray[Any]]] = {}
        self._original: list[list[NDArray[Any]]] = []
        for number, batch in enumerate(batches):
            outputs = network.run(batch.bound)
            self._original.append(self._arrays(outputs, batch))
            self.take(None, number, outputs)

    def take(self, key: Any, number: int, outputs: Sequence[Tensor]) -> None:
        """Takes in the outputs for one batch."""
        batch, arrays = self._batches[number], self._arrays(outputs, self._batches[number])
        names = self._network.output_names
        error = compare_outputs(self._original[number], arrays, names=names).relative_error
        self._errors.setdefault(key, []).append(error)
        if self._task is not None:
            scores = scores_of(self._task, self._network, arrays, batch.labels, batch.n)
            self._scores.setdefault(key, []).append(scores)

    def mean(self, key: Any) -> dict[str, Any]:
        """The metric and the output error; with nothing silenced those of the network as it is."""
        if key is not None and key[1] == 0:
            key = None
        metric = float(np.concatenate(self._scores[key]).mean()) if self._task is not None else None
        metric = metric if metric is not None and math.isfinite(metric) else None
        return {"metric": metric, "output_error": float(np.concatenate(self._errors[key]).mean())}

    def _arrays(self, outputs: Sequence[Tensor], batch: _Batch) -> list[NDArray[Any]]:
        """As arrays without what was added to fill a batch; what is not a number is as wrong as can be."""
        arrays = []
        for tensor in outputs:
            held = tensor.detach()
            if held.is_floating_point():
                held = torch.where(held.isnan(), float("inf"), held.float())
            cut = not self._network.batch_is_dynamic and held.ndim and len(held) > batch.n
            arrays.append((held[: batch.n] if cut else held).cpu().numpy())
        return arrays


def _parts(
    network: Network, task: Task | None, settings: _Settings, samples: _Samples, progress: Progress
) -> list[Part]:
    def chosen(name: str) -> bool:
        return matches(settings.where, name)

    if settings.kind == "weights":
        names = [name for name in prunable_weights(network) if chosen(name)]
        return weight_parts(network, names, settings.order, settings.ratios, settings.seed)
    require_samples(settings.order, samples=True, labels=task is not None)
    needed = "gradients" in CRITERIA.get(settings.order).needs
    slopes = gradients(network, samples.drawn, task.loss) if task is not None and needed else []
    ranked = rank(
        network, selected_groups(network, chosen), settings.order, [b.bound for b in samples.judged],
        footprint(network), by_cost=False, refitted=False, gradients=slopes, seed=settings.seed, progress=progress,
    )  # fmt: skip
    watched = [b.bound for b in samples.spare] if settings.reconstruct else []
    return channel_parts(network, ranked, settings.ratios, watched, progress)


# --------------------------------------------------------------------------------------------------------- the cache
def _identity(task: Task | None) -> Any:
    """What tells a task from another of the same name, as far as that can be seen."""
    if task is None:
        return None
    code = getattr(task.scores, "__code__", None)
    seen = "" if code is None else f"{code.co_code.hex()} {[c for c in code.co_consts if not hasattr(c, 'co_code')]}"
    return [task.name, task.metric, task.higher_is_better, getattr(task.scores, "__qualname__", ""), seen]


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read(file: Path) -> Sensitivity | None:
    """What is kept in `file`; None if it is not there or damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError, PenjingError):
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["sha256"] == _sha256(kept["sensitivity"]):
            return Sensitivity.from_dict(kept["sensitivity"])
    return None


def _write(file: Path, found: Sensitivity) -> None:
    kept: Mapping[str, Any] = found.to_dict()
    with appearing(file) as aside:
        aside.write_text(json.dumps({"sha256": _sha256(kept), "sensitivity": kept}, indent=1) + "\n", encoding="utf-8")
