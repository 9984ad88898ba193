"""evaluate: a network measured beside its baseline on the runtimes that will run it.

The order of work on one target: export both (parity gate), open the result and the baseline at every float precision
the machine really has, walk all of them over the samples together, time them interleaved, measure each one's memory
in a process of its own. Nothing here runs on PyTorch unless PyTorch is the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from penjing import package
from penjing.budget import Constraint, parse_constraints, verdict
from penjing.data import Data
from penjing.errors import DataError, InputError
from penjing.evaluation.bench import Bench
from penjing.evaluation.curves import Sensitivity
from penjing.evaluation.describe import describe, digest
from penjing.evaluation.environment import environment
from penjing.evaluation.kept import kept_of
from penjing.evaluation.latency import LatencySettings
from penjing.evaluation.result import Report, TargetResult
from penjing.network import Network
from penjing.progress import SILENT, Progress
from penjing.runtimes import RUNTIMES, Target
from penjing.task import Task, get_task

_PARITY_SAMPLES = 32

Targets = str | Target | Sequence[str | Target]


def evaluate(
    network: Network | str | Path,
    data: Any,
    *,
    baseline: Network | str | Path | None = None,
    target: Targets = "onnxruntime",
    task: str | Task | None = None,
    steps: Sequence[Mapping[str, Any]] = (),
    plans: Sequence[Any] = (),
    sensitivity: Sensitivity | None = None,
    constraints: str | Sequence[Constraint] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    limit: int | None = None,
    latency_batch: int = 1,
    throughput_batch: int = 64,
    latency: LatencySettings | None = None,
    memory: bool = True,
    progress: Progress = SILENT,
) -> Report:
    """Measure a network on real runtimes, beside its baseline.

    Args:
        network: a Network, or the path of a ``.penjing`` or ``.safetensors`` file that holds one.
        data: samples to measure on: Data or whatever ``Data`` takes, batches of (inputs, labels).
        baseline: the uncompressed network; None reports the network alone.
        target: one target or several, as ``"openvino:threads=2"``; the first is the main one.
        task: what the metric is; None takes the network's own, and without one fidelity to the baseline (no labels
            needed).
        steps: rows for the step-by-step table, as ``compress`` gives them.
        plans: the Plans of those steps; their reasons are shown with them.
        sensitivity: the curves of the baseline (of ``network``, where there is none), drawn in the report with what was
            kept of each group.
        constraints: ``"latency<=0.5x, accuracy>=-1%"``, judged on the main target.
        seed: of the bootstrap and the order of timing.
        batch_size: samples at a time for the metric.
        limit: measure the metric on at most so many samples.
        latency_batch: samples at a time for latency; throughput_batch: for throughput. A network captured with a fixed
            batch keeps that one for both, and the report says so.
        latency: how long to time.
        memory: whether to measure peak memory (about a second for each session).
        progress: told what is going on.

    Raises:
        InputError, DataError, TargetError, BudgetError, ExportError, ParityError, MissingExtraError: see each.
    """
    network, base = _network(network), None if baseline is None else _network(baseline)
    wanted = _targets(target)
    limits = parse_constraints(constraints) if isinstance(constraints, str) else tuple(constraints or ())
    if base is None and any(each.relative for each in limits):
        verdict(limits, {}, None)
    for name, value in (
        ("batch_size", batch_size),
        ("latency_batch", latency_batch),
        ("throughput_batch", throughput_batch),
    ):
        if type(value) is not int or value < 1:
            raise InputError(f"{name} must be a whole number above 0, got {value!r}")
    goal = get_task(task if task is not None else network.task)
    kept = {} if sensitivity is None else kept_of(sensitivity, network, base)
    samples = data if isinstance(data, Data) else Data(data)
    first = _first(samples)
    bench = Bench(
        network=network,
        baseline=base,
        samples=samples,
        first=first,
        task=goal,
        seed=seed,
        batch_size=batch_size,
        limit=limit,
        latency_batch=latency_batch,
        throughput_batch=throughput_batch,
        latency=latency or LatencySettings(),
        memory=memory,
        progress=progress,
    )
    results = tuple(bench.on(each) for each in wanted)
    main = results[0].to_dict()
    best = _best_of_both(results[0])
    return Report(
        network={**describe(network), "baseline_digest": None if base is None else digest(base)},
        data=bench.seen_data.to_dict(),
        targets=results,
        verdict=verdict(limits, main["result"], main["baseline"], best),
        environment=environment(seed=seed),
        steps=_with_reasons(steps, plans),
        sensitivity=sensitivity,
        kept=kept,
        files=bench.files,
    )


def _network(given: Network | str | Path) -> Network:
    if isinstance(given, Network):
        return given
    path = Path(given)
    if not path.is_file():
        raise InputError(f"there is no file {path}", hint="give a Network, or a .penjing or .safetensors file")
    if path.suffix == ".penjing":
        topology, arrays, _ = package.read(path)
        return Network.from_state(topology, arrays)
    return Network.load(path)


def _targets(given: Targets) -> tuple[Target, ...]:
    found = Target.several(given)
    for each in found:
        RUNTIMES.get(each.runtime).need()
    return found


def _first(samples: Data) -> Any:
    for inputs, _ in samples.batches(_PARITY_SAMPLES, limit=_PARITY_SAMPLES):
        return inputs
    raise DataError("there is not one sample to measure on", hint="give data with at least one batch")


def _best_of_both(target: TargetResult) -> dict[str, Any] | None:
    """The best uncompressed setting for the verdict: the fastest one's numbers, with the highest throughput of any."""
    if target.best_uncompressed is None:
        return None
    highest = max((each.throughput_per_s or 0.0) for each in target.uncompressed)
    return {**target.best_uncompressed.to_dict(), "throughput_per_s": highest}


def _with_reasons(steps: Sequence[Mapping[str, Any]], plans: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    rows = [dict(step) for step in steps]
    if plans and not rows:
        rows = [{"name": plan.step.name, "settings": plan.step.settings()} for plan in plans]
    if plans and len(plans) != len(rows):
        raise InputError(f"there are {len(rows)} steps but {len(plans)} plans", hint="give both of the same Result")
    for row, plan in zip(rows, plans, strict=False):
        row.setdefault("reasons", [asdict(reason) for reason in plan.reasons])
        row.setdefault("notes", list(plan.notes))
    return tuple(rows)
