"""MixPrecision: a width of its own for every layer, where a budget allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

from torch import Tensor

from penjing.analysis.footprint import footprint
from penjing.analysis.quantized_reconstruct import round_apart
from penjing.analysis.rounding_harm import expected_harms, harms_of, measured_changes, output_harm, together
from penjing.data import Data
from penjing.errors import DataError, RecipeError
from penjing.network import Network
from penjing.recipe import Context, Plan, Reason, Step, step
from penjing.recipe.samples import bound_samples
from penjing.recipe.widths import FLOAT, FLOAT_BITS, Cost, Width, Widths, corrects_biases, nearest
from penjing.runtimes import Target
from penjing.runtimes.layer_latency import WayLatency, latency_by_way
from penjing.task import class_dimension
from penjing.tensors.bit_allocation import Costs, exchanged, least_harm

_CRITERIA = ("expected", "measured", "range")
_BUDGETS = ("keep_bits", "keep_bytes", "keep_bops", "keep_latency")
_BATCH = 32
#: Whole networks that are timed for a budget of latency; the share of the limit that is aimed at when correcting, and
#: the least share with which one is content.
_ATTEMPTS, _AIM, _NEARLY = 5, 0.98, 0.95
#: A mixture that does not leave at least so little of one type's harm is no better on other samples.
_WORTH = 0.95
_SINGLE = "everywhere"


@step
@dataclass(frozen=True, kw_only=True)
class MixPrecision(Step):
    """`quantize` (a Quantize) with a type of weights for each layer, out of `weights`, instead of one for all.

    The choice does the least harm that a budget allows, solved exactly as an integer programme (Yao et al. 2021,
    "HAWQ-V3", §3.4): `keep_bits` is the mean number of bits of a weight; `keep_bytes` the share of their bytes in
    float32 that all weights keep, scales included (above 1 their number); `keep_bops` the share of the bit operations
    (multiply-accumulates times bits of weight and activation) of float32; `keep_latency` the share of the time for one
    sample on `target`, measured layer by layer in every type and on the whole (`penjing.runtimes.layer_latency`). All
    that are given hold. The type "float" leaves a layer alone, its inputs too. Harm, by `criterion`, is to class
    probabilities where the task has such, else to outputs as they are:

    - "expected": the change of the outputs to first order, from `probes` backward passes for all layers together, no
      labels (the Gauss-Newton matrix along the rounding itself; HAWQ-V2, Dong et al. 2020, takes its mean over all
      directions).
    - "measured": the change of the outputs with one layer rounded, one run of the network for each layer and type.
      These changes also tell which layers' errors go together, and a second choice heeds that.
    - "range": no budget and no samples, a rule: the narrowest type for weights whose largest magnitude is at most
      `wide` times their standard deviation, the widest for the others.

    Layers are rounded for that as `quantize` would round them alone ("gptq" stands for all roundings by outputs), with
    biases and scales corrected where it corrects them. `samples` are looked at for the harms, and for a last
    comparison: what was chosen and the widest single type that the budget allows are both quantized as `quantize` says,
    and the mixture is taken if its outputs are nearer to the float network's by a twentieth.
    """

    quantize: Step
    weights: list[str] = field(default_factory=lambda: ["int8", "int6", "int4", "int3", "int2"])
    keep_bits: float | None = None
    keep_bytes: float | None = None
    keep_bops: float | None = None
    keep_latency: float | None = None
    target: str | None = None
    criterion: str = "expected"
    wide: float = 8.0
    samples: int = 128
    probes: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.quantize, Step) or not hasattr(self.quantize, "weights"):
            got = self.quantize.name if isinstance(self.quantize, Step) else repr(self.quantize)
            raise RecipeError(
                f"MixPrecision.quantize must be a Step that quantizes weights, got {got}", hint="quantize: Quantize"
            )
        if not isinstance(self.quantize.weights, str) or self.quantize.learns:
            raise RecipeError(
                "MixPrecision.quantize must be a Quantize without types by pattern, since types are what is found",
                hint="quantize: {Quantize: {}}",
            )
        if self.where != "*":
            raise RecipeError(f"MixPrecision.where selects nothing, got {self.where!r}", hint="give it to quantize")
        if not isinstance(self.weights, list) or len(set(self.weights)) < 2:
            raise RecipeError(
                f"MixPrecision.weights must name at least two types, got {self.weights!r}",
                hint="for example [int8, int4]",
            )
        for dtype in self.weights:
            if dtype != FLOAT:
                replace(self.quantize, **{"weights": dtype})  # raises for what quantize does not know
        self.require_between("keep_bits", 0, FLOAT_BITS, open_low=True)
        self.require_between("keep_bytes", 0, float("inf"), open_low=True)
        self.require_between("keep_bops", 0, 1, open_low=True)
        self.require_between("keep_latency", 0, 1, open_low=True)
        self.require_one_of("criterion", _CRITERIA)
        self.require_between("wide", 0, float("inf"), open_low=True)
        self.require_whole("samples", 1)
        self.require_whole("probes", 1)
        if self.criterion == "range" and self._budgets:
            raise RecipeError(
                f"MixPrecision.{self._budgets[0]} is a budget, and criterion='range' is a rule without one",
                hint="criterion: expected",
            )
        if self.criterion != "range" and not self._budgets:
            raise RecipeError(
                "MixPrecision needs a budget",
                hint="keep_bits: 4, keep_bytes: 0.15, keep_bops: 0.02 or keep_latency: 0.8; or criterion: range",
            )
        if self.keep_latency is not None and self.target is None:
            raise RecipeError(
                "MixPrecision.keep_latency needs a target to measure on", hint="for example target='openvino'"
            )
        if self.target is not None:
            Target.parse(self.target)

    @property
    def _budgets(self) -> list[str]:
        return [f for f in _BUDGETS if getattr(self, f) is not None]

    def check(self, context: Context) -> None:
        """Harms need samples, and `quantize` what it needs."""
        if self.criterion != "range" and context.data is None:
            raise DataError(
                "MixPrecision needs samples to see what rounding does to the outputs",
                hint="give data (labels are not looked at), or use criterion='range'",
            )
        self.quantize.check(context)

    def plan(self, network: Network, context: Context) -> Plan:
        """Chooses types; the Plan is that of `quantize` with them."""
        self.check(context)
        widths = Widths.of(network, self.quantize, self.weights, context)
        if self.criterion == "range":
            chosen = widths.by_range(self.wide)
            made = widths.mixed(self.quantize, chosen)
            return self._told(widths, chosen, None if made is None else made.plan(network, context), (), ())
        return _Mixer(self, network, context, widths).plan()

    def _told(
        self,
        widths: Widths,
        chosen: Sequence[int],
        made: Plan | None,
        notes: Sequence[str],
        reasons: Sequence[Reason],
    ) -> Plan:
        """The plan of `quantize` as this Step's own."""
        types = [widths.options[n][i] for n, i in zip(widths.layers, chosen, strict=True)]
        sizes = [widths.size(n) for n in widths.layers]
        bits = sum(t.bits(n) * s for n, t, s in zip(widths.layers, types, sizes, strict=True)) / sum(sizes)
        names = [t.dtype for t in types]
        counts = ", ".join(f"{names.count(dtype)} {dtype}" for dtype in dict.fromkeys(self.weights) if dtype in names)
        said = (f"{counts}: {bits:.3g} bits a weight", *notes, *(made.notes if made else ()))
        edits, why = (made.edits, made.reasons) if made else ((), ())
        return Plan(step=self, edits=edits, reasons=(*why, *reasons), notes=said)


class _Mixer:
    """One MixPrecision at work on one network."""

    def __init__(self, settings: MixPrecision, network: Network, context: Context, widths: Widths) -> None:
        self.settings, self.network, self.context, self.widths = settings, network, context, widths
        folded, self.classes = widths.folded, class_dimension(context.task, network.task)
        self.batches = bound_samples(folded, context, footprint(folded), settings.samples, [], _BATCH)
        self.options = [widths.options[n] for n in widths.layers]
        self.latency = self._latency() if settings.keep_latency is not None else None

    def plan(self) -> Plan:
        costs = self._costs()
        harms, exchange = self._harms()
        notes: list[str] = []
        candidates: dict[str, list[int]] = {}
        if self.latency is None:
            chosen = candidates["mixed"] = self._solve(harms, costs)
            if exchange is not None:
                candidates["mixed with errors taken together"] = exchange(chosen, list(costs.values()))
        elif (timed := self._within(harms, costs, self.latency, notes)) is not None:
            candidates["mixed"] = timed
        if (single := self._single(costs)) is not None:
            candidates[f"{single} {_SINGLE}"] = self.widths.everywhere(single)
        if not candidates:
            self._solve(harms, {b: c for b, c in costs.items() if b != "keep_latency"})  # raises if others are at fault
            raise self._out_of_reach("keep_latency", self._fastest())
        chosen, made = self._best(candidates, notes)
        return self.settings._told(self.widths, chosen, made, notes, self._reasons(harms))

    # ------------------------------------------------------------------------------------------------------ harms
    def _harms(self) -> tuple[list[list[float]], Callable[[Sequence[int], Costs], list[int]] | None]:
        """Harms by layer and option; and what makes a choice heed that errors go together, where that is known."""
        settings, widths, context = self.settings, self.widths, self.context
        asked = {n: [w.way(n, settings.quantize) for w in widths.options[n]] for n in widths.layers}
        rescaled = widths.rescaled(settings.quantize)
        if corrects_biases(settings.quantize) or rescaled:
            ways = round_apart(widths.folded, asked, self.batches, rescale=rescaled, progress=context.progress)
        else:  # no rule among them: rounding by outputs corrects biases
            ways = {n: [{n: cast(Tensor, w)} for w in several] for n, several in asked.items()}
        for name, options in widths.options.items():  # what stays float keeps its bias
            ways[name] = [{} if w.dtype == FLOAT else made for w, made in zip(options, ways[name], strict=True)]
        if settings.criterion == "measured":
            changes = measured_changes(widths.folded, ways, self.batches, context.progress, classes=self.classes)
            gram = together(changes, widths.layers).numpy()
            found = harms_of(changes)
            sizes = [len(o) for o in self.options]
            return [found[n] for n in widths.layers], partial(exchanged, gram, sizes)
        found = expected_harms(
            widths.folded,
            ways,
            self.batches,
            probes=settings.probes,
            seed=context.seed,
            progress=context.progress,
            classes=self.classes,
        )
        return [found[n] for n in widths.layers], None

    def _reasons(self, harms: Sequence[Sequence[float]]) -> list[Reason]:
        return [
            Reason(
                layer=name.removesuffix(".weight"),
                score=max(row),
                choice="harm of each type",
                why=", ".join(f"{w.dtype} {h:.3g}" for w, h in zip(self.widths.options[name], row, strict=True)),
            )
            for name, row in zip(self.widths.layers, harms, strict=True)
        ]

    # --------------------------------------------------------------------------------------------------- choosing
    def _costs(self) -> dict[str, Cost]:
        settings, latency = self.settings, self.latency
        costs = self.widths.costs(settings.quantize, settings.keep_bits, settings.keep_bytes, settings.keep_bops)
        if latency is not None:
            rows = [latency.layers.get(n, (0.0,) * len(settings.weights)) for n in self.widths.layers]
            table = [list(row[: len(o)]) for row, o in zip(rows, self.options, strict=True)]
            costs["keep_latency"] = table, self._limit(latency) - latency.constant
        return costs

    def _limit(self, latency: WayLatency) -> float:
        return cast(float, self.settings.keep_latency) * latency.whole

    def _solve(self, harms: Sequence[Sequence[float]], costs: Mapping[str, Cost]) -> list[int]:
        found = least_harm(harms, list(costs.values()))
        if found is not None:
            return found
        least = {f: sum(min(row) for row in table) / max(1e-300, limit) for f, (table, limit) in costs.items()}
        name = max(least, key=least.__getitem__)
        raise self._out_of_reach(name, getattr(self.settings, name) * least[name])

    def _out_of_reach(self, name: str, least: float) -> RecipeError:
        types = ", ".join(self.settings.weights)
        return RecipeError(
            f"MixPrecision.{name}={getattr(self.settings, name)} cannot be met by {types}",
            hint=f"the least that can be reached is {least:.4g}",
        )

    def _single(self, costs: Mapping[str, Cost]) -> str | None:
        """The widest type that all layers can have; None if there is none but float."""
        widest = sorted(
            (t for t in self.settings.weights if t != FLOAT),
            key=lambda t: sum(o[i].bits(n) * self.widths.size(n) for n, o, i in self._with(t)),
            reverse=True,
        )
        for dtype in widest:
            chosen = self.widths.everywhere(dtype)
            timed = self.latency is None or self._whole(self.latency, dtype) <= self._limit(self.latency)
            if timed and all(
                sum(row[i] for row, i in zip(table, chosen, strict=True)) <= limit
                for budget, (table, limit) in costs.items()
                if budget != "keep_latency"
            ):
                return dtype
        return None

    def _with(self, dtype: str) -> Iterator[tuple[str, Sequence[Width], int]]:
        return zip(self.widths.layers, self.options, self.widths.everywhere(dtype), strict=True)

    def _best(self, candidates: Mapping[str, Sequence[int]], notes: list[str]) -> tuple[list[int], Plan | None]:
        """The choice whose outputs are nearest to the float network's on samples, and its plan."""
        different: dict[tuple[int, ...], str] = {}
        for name, chosen in candidates.items():
            different.setdefault(tuple(chosen), name)
        plans = {chosen: self._planned(self.settings.quantize, chosen) for chosen in different}
        errors = dict.fromkeys(plans, 0.0)
        if len(plans) > 1:
            drawn = replace(self.context, seed=self.context.seed + 1)  # others than those that rounding looks at
            size = footprint(self.widths.folded)
            batches = bound_samples(self.network, drawn, size, self.settings.samples, [], _BATCH)
            for types, plan in plans.items():
                errors[types] = output_harm(self.network, self._applied(plan), batches, classes=self.classes)
            told = sorted(errors.items(), key=lambda item: item[1])
            notes.append("harm to the outputs: " + ", ".join(f"{different[c]} {e:.3g}" for c, e in told))
        best = min(errors, key=lambda types: errors[types] * (_WORTH if different[types].endswith(_SINGLE) else 1.0))
        return list(best), plans[best]

    def _planned(self, quantize: Step, chosen: Sequence[int]) -> Plan | None:
        made = self.widths.mixed(quantize, chosen)
        return None if made is None else made.plan(self.network, self.context)

    def _applied(self, plan: Plan | None) -> Network:
        return self.network if plan is None else self.network.apply(plan.edits)

    # ---------------------------------------------------------------------------------------------------- latency
    def _latency(self) -> WayLatency:
        """Times of the layers and of the whole network in every type; rounding to nearest takes as long as any."""
        types, quantize = self.settings.weights, self.settings.quantize
        wholes = [self._applied(self._planned(nearest(quantize), self.widths.everywhere(t))) for t in types]
        return latency_by_way(
            self.network,
            self.widths.folded,
            self.widths.layers,
            wholes,
            [partial(_alone, quantize, dtype) for dtype in types],
            Target.parse(cast(str, self.settings.target)),
            self.context.progress,
        )

    def _fastest(self) -> float:
        """The least share of the time that one type for all layers takes."""
        return 1.0 if self.latency is None else min(self.latency.wholes) / self.latency.whole

    def _whole(self, latency: WayLatency, dtype: str) -> float:
        return latency.wholes[self.settings.weights.index(dtype)]

    def _within(
        self, harms: Sequence[Sequence[float]], costs: Mapping[str, Cost], latency: WayLatency, notes: list[str]
    ) -> list[int] | None:
        """The least harm whose whole network keeps the limit when it is measured; None if no choice tried does.

        What the table is asked for is corrected by what came out.
        """
        limit = aim = self._limit(latency)
        table = costs["keep_latency"][0]
        tried: dict[tuple[int, ...], float] = {}
        best: tuple[float, list[int], str] | None = None
        for _ in range(2 * _ATTEMPTS):
            found = least_harm(harms, list({**costs, "keep_latency": (table, aim - latency.constant)}.values()))
            if found is None or len(tried) == _ATTEMPTS:
                break
            if tuple(found) in tried:
                if best is not None:
                    break
                aim *= 0.9
                continue
            predicted = latency.constant + sum(row[i] for row, i in zip(table, found, strict=True))
            made = self._planned(nearest(self.settings.quantize), found)
            taken = tried[tuple(found)] = latency.whole if made is None else latency.measure(self._applied(made))
            harm = sum(row[i] for row, i in zip(harms, found, strict=True))
            if taken <= limit and (best is None or harm < best[0]):
                shares = f"{taken / latency.whole:.1%} measured, {predicted / latency.whole:.1%} predicted"
                asked = f"at most {limit / latency.whole:.1%} was asked for"
                best = harm, found, f"latency on {self.settings.target} {shares}; {asked}"
            if _NEARLY * limit <= taken <= limit:
                break
            aim = predicted * _AIM * limit / taken
        if best is None:
            return None
        notes.append(best[2])
        return best[1]


def _alone(quantize: Step, dtype: str, layer: Network) -> Network:
    """A network of one layer with weights of one type."""
    if dtype == FLOAT:
        return layer
    fields: dict[str, Any] = {"where": "*", "weights": dtype, **({"edges": None} if hasattr(quantize, "edges") else {})}
    made = nearest(quantize, **fields)
    return layer.apply(made.plan(layer, Context(original=layer, data=Data([(layer.example(8), None)]))).edits)


__all__ = ["MixPrecision"]
