"""The task's metric, measured on the outputs of runtime sessions: several sessions walk over the same samples together.

Walking together makes every comparison a paired one, and the data is read and preprocessed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penjing.data import Data
from penjing.errors import DataError, ParityError, PenjingError
from penjing.evaluation.describe import DataDigest
from penjing.evaluation.fidelity import Agreement, compare_outputs
from penjing.evaluation.intervals import Scores
from penjing.network import Network
from penjing.network.structure import substitute
from penjing.progress import SILENT, Progress
from penjing.task import Task, primary

Arrays = dict[str, NDArray[Any]]
Run = Callable[[Arrays], list[NDArray[Any]]]


@dataclass
class Scored:
    """What one session did on all samples: per-sample scores (n,) of the task (None without one), and its fidelity."""

    scores: Scores | None
    fidelity: Agreement


@dataclass
class _Collected:
    scores: list[Scores] = field(default_factory=list)
    fidelity: list[Agreement] = field(default_factory=list)


def score(
    runs: Mapping[str, Run],
    data: Data,
    *,
    network: Network,
    task: Task | None,
    reference: str | None = None,
    batch_size: int = 64,
    limit: int | None = None,
    seen_data: DataDigest | None = None,
    progress: Progress = SILENT,
) -> dict[str, Scored]:
    """Run every session of ``runs`` on the samples of ``data``.

    Args:
        runs: name → function from input arrays by name to the flat outputs, in the order of ``network.output_names``.
        data: batches of (inputs, labels); labels are looked at only when there is a task.
        network: says how inputs are bound and how outputs are structured.
        task: whose scores are taken; None takes fidelity alone.
        reference: the name of the run the others are compared with; None: the network itself, run by PyTorch.
        batch_size: samples at a time; a network with a fixed batch is fed its own number, the last batch padded.
        limit: at most so many samples.
        seen_data: takes in what was measured on.
        progress: told about the samples done.

    Returns:
        per run: the scores and the agreement with the reference.

    Raises:
        DataError: no samples, missing or impossible labels, outputs that do not fit the task.
        ParityError: an output that is not a number.
    """
    collected = {name: _Collected() for name in runs}
    seen = 0
    total = len_of(data, limit)
    with progress.task("measuring on " + _words(len(runs), "session"), total) as advance:
        for inputs, labels in data.batches(_batch(network, batch_size), limit=limit):
            start = seen
            for bound, part_labels, n in pieces(network, inputs, labels):
                arrays = {name: tensor.detach().cpu().numpy() for name, tensor in bound.items()}
                outputs = {name: _checked(run(arrays), name, network, seen, n) for name, run in runs.items()}
                against = outputs[reference] if reference else _own(network, bound, n)
                for name, found in outputs.items():
                    collected[name].fidelity.append(compare_outputs(against, found, names=network.output_names))
                    if task is not None:
                        collected[name].scores.append(scores_of(task, network, found, part_labels, n))
                seen += n
                advance(n)
            if seen_data is not None:
                seen_data.update(inputs, labels, seen - start)
    if seen == 0:
        raise DataError("there is not one sample to measure on", hint="give data with at least one batch")
    return {
        name: Scored(
            scores=np.concatenate(each.scores) if task is not None else None,
            fidelity=Agreement.joined(each.fidelity),
        )
        for name, each in collected.items()
    }


def len_of(data: Data, limit: int | None = None) -> int | None:
    """The number of samples, where it is known before reading them."""
    try:
        known = len(data)
    except TypeError:
        return limit
    return known if limit is None or known is None else min(known, limit)


def fit_batch(network: Network, bound: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    """The same samples repeated or cut to ``batch`` of them; a network with a fixed batch keeps its own number."""
    wanted = _batch(network, batch)
    return {name: _resized(tensor, wanted) for name, tensor in _batched(network, bound).items()} | {
        name: tensor for name, tensor in bound.items() if name not in _batched(network, bound)
    }


def pieces(network: Network, inputs: Any, labels: Any) -> Iterator[tuple[dict[str, Tensor], Any, int]]:
    """Pieces that the network can run: (inputs, labels, number of true samples)."""
    if network.batch_is_dynamic:
        bound = network.bind(inputs)
        n = next((len(tensor) for tensor in _batched(network, bound).values()), 1)
        if n:
            yield bound, labels, n
        return
    fixed = _batch(network, 1)
    given = [inputs] if isinstance(inputs, Tensor) else list(inputs.values() if isinstance(inputs, Mapping) else inputs)
    n = len(given[0])
    for start in range(0, n, fixed):
        taken = min(fixed, n - start)
        piece = _map(inputs, _Slice(start, taken, fixed))
        part = None if labels is None else _map(labels, _Slice(start, taken, taken))
        yield network.bind(piece), part, taken


@dataclass(frozen=True)
class _Slice:
    """Samples ``start`` to ``start + taken``, the last ones repeated up to ``size``."""

    start: int
    taken: int
    size: int

    def __call__(self, tensor: Tensor) -> Tensor:
        return _resized(tensor[self.start : self.start + self.taken], self.size)


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _map(inner, change) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_map(inner, change) for inner in value)
    return change(value)


def _batch(network: Network, wanted: int) -> int:
    return wanted if network.batch_is_dynamic else int(network.inputs[0].shape[0])


def _batched(network: Network, bound: Mapping[str, Tensor]) -> dict[str, Tensor]:
    specs = {spec.name: spec for spec in network.inputs}
    fixed = not network.batch_is_dynamic
    return {n: t for n, t in bound.items() if t.ndim and (fixed or specs[n].dynamic.get(0) is not None)}


def _resized(tensor: Tensor, batch: int) -> Tensor:
    repeats = -(-batch // max(len(tensor), 1))
    return torch.cat([tensor] * repeats)[:batch] if repeats > 1 else tensor[:batch]


def _checked(outputs: list[NDArray[Any]], run: str, network: Network, seen: int, n: int) -> list[NDArray[Any]]:
    cut = []
    for name, output in zip(network.output_names, outputs, strict=True):
        output = output[:n] if output.ndim and len(output) > n and not network.batch_is_dynamic else output
        if np.issubdtype(output.dtype, np.floating) and np.isnan(output).any():
            where = f"for sample {seen + int(np.argwhere(np.isnan(output))[0][0])}" if output.ndim else ""
            raise ParityError(
                f"{run} gives NaN in output '{name}' {where}".rstrip(),
                hint="check the network on that sample; a range that overflows or a division by zero is usual",
            )
        cut.append(output)
    return cut


def _own(network: Network, bound: Mapping[str, Tensor], n: int) -> list[NDArray[Any]]:
    found = [tensor.detach().float().cpu().numpy() for tensor in network.run(dict(bound))]
    return [
        output[:n] if output.ndim and len(output) > n and not network.batch_is_dynamic else output for output in found
    ]


def scores_of(task: Task, network: Network, outputs: list[NDArray[Any]], labels: Any, n: int) -> Scores:
    tensors = [torch.from_numpy(np.array(output)) for output in outputs]
    structured = substitute(network.structure_out, dict(zip(network.output_names, tensors, strict=True)))
    if labels is None:
        raise DataError(
            f"the task '{task.name}' needs labels, but the data has none", hint="give (inputs, labels) batches"
        )
    if task.name == "classification":
        _check_classes(primary(structured), labels)
    try:
        with torch.no_grad():
            found = task.scores(structured, labels)
    except PenjingError:
        raise
    except Exception as error:  # whatever the user's or the task's arithmetic meets in outputs of another form
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(
            f"the outputs of {network.name} do not fit the task '{task.name}': {reason[:200]}",
            hint=f"the main output has the shape {_shape(primary(structured))}, the labels {_shape(labels)}",
        ) from error
    scores = torch.as_tensor(found).detach().double().reshape(-1).cpu().numpy()
    if len(scores) != n:
        raise DataError(
            f"the task '{task.name}' gave {len(scores)} scores for {n} samples",
            hint="Task.scores must give one score a sample, shape (n,)",
        )
    return scores


def _check_classes(logits: Tensor, labels: Any) -> None:
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() or labels.ndim != 1 or logits.ndim != 2 or not labels.numel():
        return
    classes = logits.shape[1]
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"the label {low if low < 0 else high} is out of range: the network's classes are 0 to {classes - 1}",
            hint="labels are class numbers from 0",
        )


def _shape(value: Any) -> str:
    return "×".join(map(str, value.shape)) if hasattr(value, "shape") else type(value).__name__


def _words(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
