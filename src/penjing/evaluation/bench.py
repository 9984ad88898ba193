"""The bench of an evaluation: the result and its baseline side by side on one target after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from penjing.analysis.footprint import footprint
from penjing.data import Data
from penjing.errors import TargetError
from penjing.evaluation.describe import DataDigest, wire_bytes
from penjing.evaluation.intervals import mean_interval, paired_difference
from penjing.evaluation.latency import LatencySettings, Timings, compare, interleave
from penjing.evaluation.measurement import Measurement, Metric
from penjing.evaluation.memory import peak_memory
from penjing.evaluation.metric import Arrays, Scored, fit_batch, score
from penjing.evaluation.result import ArtifactFolder, TargetResult
from penjing.network import Network
from penjing.progress import Progress
from penjing.runtimes import RUNTIMES, Artifact, Session, Target, uncompressed_settings
from penjing.task import Task

_RESULT = "the result"
_THROUGHPUT = LatencySettings(warm_up=2, seconds=1.5, least_rounds=5, most_rounds=30)

Opened = Mapping[str, tuple[Session, Artifact, Target]]


class Bench:
    """What stays the same from target to target, and the files exported so far."""

    def __init__(
        self,
        *,
        network: Network,
        baseline: Network | None,
        samples: Data,
        first: Any,
        task: Task | None,
        seed: int,
        batch_size: int,
        limit: int | None,
        latency_batch: int,
        throughput_batch: int,
        latency: LatencySettings,
        memory: bool,
        progress: Progress,
    ) -> None:
        self.network, self.baseline, self.samples, self.task = network, baseline, samples, task
        self.seed, self.batch_size, self.limit, self.progress = seed, batch_size, limit, progress
        self.latency, self.memory = latency, memory
        self.files = ArtifactFolder()
        self.first = first
        self.seen_data = DataDigest()
        bound = network.bind(first)
        self.small = _arrays(fit_batch(network, bound, latency_batch))
        self.large = _arrays(fit_batch(network, bound, throughput_batch))
        self.small_batch = latency_batch if network.batch_is_dynamic else int(network.inputs[0].shape[0])
        self.large_batch = throughput_batch if network.batch_is_dynamic else self.small_batch
        self.sizes = {id(each): _sizes(each) for each in (network, baseline) if each is not None}
        self.exported: dict[tuple[int, str], Artifact] = {}

    def on(self, target: Target) -> TargetResult:
        """Everything about one target."""
        artifact = self._export(self.network, target.runtime, f"network-{target.runtime}")
        settings = uncompressed_settings(target) if self.baseline is not None else []
        plain = None
        opened: dict[str, tuple[Session, Artifact, Target]] = {}
        runtime = RUNTIMES.get(target.runtime)
        if self.baseline is not None:
            plain = self._export(self.baseline, target.runtime, f"baseline-{target.runtime}")
            for setting in settings:
                name = f"the baseline in {setting.precision or 'f32'}"
                opened[name] = (runtime.load(plain.path, setting), plain, setting)
        opened[_RESULT] = (runtime.load(artifact.path, target), artifact, target)
        references = [name for name in opened if name != _RESULT]
        self.seen_data = DataDigest()
        scored = self._score(opened, references[0] if references else None)
        timed = self._time(opened, self.small, self.latency, "latency")
        rated = self._time(opened, self.large, _faster(_THROUGHPUT, self.latency), "throughput")
        measured = {
            name: self._measurement(
                self.network if name == _RESULT else self.baseline or self.network,
                *opened[name],
                scored=scored[name],
                timed=timed[name],
                rated=rated[name],
            )
            for name in opened
        }
        executed = dict(Counter(each.precision for each in opened[_RESULT][0].executed()))
        in_float = runtime.in_float(self.network, artifact.path, opened[_RESULT][0])
        row = artifact.row()
        if not references:
            return TargetResult(
                target=str(target), result=measured[_RESULT], artifacts=(row,), executed=executed, in_float=in_float
            )
        fastest = min(references, key=lambda name: timed[name].p50)
        busiest = min(references, key=lambda name: rated[name].p50)
        change = _sizes_change(measured[_RESULT], measured[references[0]])
        change["latency"] = _speed(timed, fastest, measured)
        change["latency_to_baseline"] = _speed(timed, references[0], measured)
        change["throughput"] = _speed(rated, busiest, measured)
        change["metric"] = self._paired(scored[references[0]], scored[_RESULT])
        return TargetResult(
            target=str(target),
            result=measured[_RESULT],
            baseline=measured[references[0]],
            best_uncompressed=measured[fastest],
            uncompressed=tuple(measured[name] for name in references),
            change=change,
            artifacts=(row,),
            executed=executed,
            in_float=in_float,
        )

    def _export(self, network: Network, runtime: str, stem: str) -> Artifact:
        key = (id(network), runtime)
        if key not in self.exported:
            engine = RUNTIMES.get(runtime)
            path = self.files.path / f"{stem}{engine.suffix}"
            self.exported[key] = engine.export(network, path, samples=self.first, progress=self.progress)
        return self.exported[key]

    def _score(self, opened: Opened, reference: str | None) -> dict[str, Scored]:
        def run(session: Session) -> Any:
            return lambda arrays: session.run({name: arrays[name] for name in session.input_names})

        return score(
            {name: run(session) for name, (session, _, _) in opened.items()},
            self.samples,
            network=self.network,
            task=self.task,
            reference=reference,
            seen_data=self.seen_data,
            batch_size=self.batch_size,
            limit=self.limit,
            progress=self.progress,
        )

    def _time(
        self,
        opened: Opened,
        inputs: Arrays,
        settings: LatencySettings,
        what: str,
    ) -> dict[str, Timings]:
        def run(session: Session) -> Any:
            feed = {name: inputs[name] for name in session.input_names}
            return lambda: session.run(feed)

        runs = {name: run(session) for name, (session, _, _) in opened.items()}
        return interleave(runs, settings=settings, seed=self.seed, progress=self.progress)

    def _measurement(
        self,
        network: Network,
        session: Session,
        artifact: Artifact,
        target: Target,
        *,
        scored: Scored,
        timed: Timings,
        rated: Timings,
    ) -> Measurement:
        parameters, macs, wire = self.sizes[id(network)]
        memory = self._memory(session, artifact, target)
        return Measurement(
            runtime=target.runtime,
            device=target.device,
            threads=session.threads,
            precision=session.precision,
            metric=self._metric(scored),
            latency_ms=timed.to_dict(),
            latency_batch=self.small_batch,
            throughput_per_s=self.large_batch / rated.p50 * 1e3,
            throughput_batch=self.large_batch,
            peak_memory_bytes=memory.get("peak_bytes"),
            memory=memory,
            file_bytes=artifact.bytes,
            wire_bytes=wire,
            parameters=parameters,
            macs=macs,
            fidelity=scored.fidelity.to_dict(),
        )

    def _metric(self, scored: Scored) -> Metric:
        if self.task is None or scored.scores is None:
            return scored.fidelity.metric(seed=self.seed)
        return Metric.of(
            mean_interval(scored.scores, seed=self.seed),
            name=self.task.metric,
            unit=self.task.unit,
            higher_is_better=self.task.higher_is_better,
        )

    def _paired(self, before: Scored, after: Scored) -> dict[str, Any]:
        a = before.fidelity.scores if before.scores is None else before.scores
        b = after.fidelity.scores if after.scores is None else after.scores
        found = paired_difference(a, b, seed=self.seed)
        return {
            "difference": found.value,
            "ci95": [found.low, found.high],
            "p": found.p,
            "n": found.n,
            "method": found.method,
            "gained": found.gained,
            "lost": found.lost,
        }

    def _memory(self, session: Session, artifact: Artifact, target: Target) -> dict[str, Any]:
        if not self.memory:
            return {}
        feed = {name: self.small[name] for name in session.input_names}
        try:
            return peak_memory(
                artifact.path, feed, runtime=target.runtime, threads=session.threads, precision=target.precision
            ).to_dict()
        except TargetError as error:  # a report without this number is worth more than none
            self.progress.note(error.message)
            return {"error": error.message}


def _arrays(bound: Mapping[str, Any]) -> Arrays:
    return {name: np.ascontiguousarray(tensor.detach().cpu().numpy()) for name, tensor in bound.items()}


def _sizes(network: Network) -> tuple[int, int, int]:
    counted = footprint(network)
    return counted.parameters, counted.macs, wire_bytes(network)


def _faster(settings: LatencySettings, asked: LatencySettings) -> LatencySettings:
    """The throughput's own settings, never longer than what was asked for latency."""
    least = min(settings.least_rounds, asked.least_rounds)
    return replace(
        settings,
        seconds=min(settings.seconds, asked.seconds),
        least_rounds=least,
        most_rounds=max(least, min(settings.most_rounds, asked.most_rounds)),
    )


def _sizes_change(result: Measurement, baseline: Measurement) -> dict[str, Any]:
    pairs = {
        "file": (result.file_bytes, baseline.file_bytes),
        "wire": (result.wire_bytes, baseline.wire_bytes),
        "memory": (result.peak_memory_bytes, baseline.peak_memory_bytes),
        "parameters": (result.parameters, baseline.parameters),
        "macs": (result.macs, baseline.macs),
    }
    return {name: after / before if after is not None and before else None for name, (after, before) in pairs.items()}


def _speed(timed: Mapping[str, Timings], reference: str, measured: Mapping[str, Measurement]) -> dict[str, Any]:
    """How long the result takes beside ``reference``: below 1 is faster."""
    found = compare(timed[_RESULT], timed[reference])
    return {
        "ratio": found.value,
        "ci95": [found.low, found.high],
        "verdict": found.verdict,
        "reference": measured[reference].precision,
    }
