"""MixPrecision: a width of its own for every layer, where a budget allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from penjing.analysis.footprint import footprint
from penjing.analysis.rounding_harm import expected_harms, measured_harms
from penjing.errors import DataError, RecipeError
from penjing.network import Network, QuantizeTensor
from penjing.recipe import Context, Plan, Reason, Step, step
from penjing.recipe.samples import bound_samples
from penjing.tensors import grids
from penjing.tensors.bit_allocation import least_harm
from penjing.tensors.grids import Grid

_CRITERIA = ("expected", "measured", "range")
_BATCH = 32
#: Fields of a Quantize that would move weights off their float values.
_PLAIN: dict[str, Any] = {"levels": "uniform", "symmetric": True}
#: Bits of a float factor of a bit operation.
_FLOAT = 32


@step
@dataclass(frozen=True, kw_only=True)
class MixPrecision(Step):
    """`quantize` (a Quantize) with a type of weights for each layer, out of `weights`, instead of one for all.

    The choice does the least harm that a budget allows, solved exactly as an integer programme (Yao et al. 2021,
    "HAWQ-V3", §3.4): `keep_bits` is the mean number of bits of a weight; `keep_bytes` the share of their bytes in
    float32 that all weights keep, scales included (above 1 their number); `keep_bops` the share of the bit operations
    (multiply-accumulates times bits of weight and activation) of float32. All that are given hold. Harm: `criterion`.

    - "expected": the change of the outputs to first order, from `probes` backward passes for all layers together, no
      labels (the Gauss-Newton matrix along the rounding itself; HAWQ-V2, Dong et al. 2020, takes its mean over all
      directions).
    - "measured": the change of the outputs with one layer rounded, one run of the network for each layer and type.
    - "range": no budget and no samples, a rule: the narrowest type for weights whose largest magnitude is at most
      `wide` times their standard deviation, the widest for the others.

    `samples` are looked at for the harms. What is chosen is quantized as `quantize` says.
    """

    quantize: Step
    weights: list[str] = field(default_factory=lambda: ["int8", "int4", "int2"])
    keep_bits: float | None = None
    keep_bytes: float | None = None
    keep_bops: float | None = None
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
        if self.where != "*":
            raise RecipeError(f"MixPrecision.where selects nothing, got {self.where!r}", hint="give it to quantize")
        if len(set(self.weights)) < 2:
            raise RecipeError(
                f"MixPrecision.weights must name at least two types, got {self.weights!r}",
                hint="for example [int8, int4]",
            )
        for dtype in self.weights:
            replace(self.quantize, **{"weights": dtype})  # raises for what quantize does not know
        self.require_between("keep_bits", 0, _FLOAT, open_low=True)
        self.require_between("keep_bytes", 0, float("inf"), open_low=True)
        self.require_between("keep_bops", 0, 1, open_low=True)
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
                hint="keep_bits: 4, keep_bytes: 0.15 or keep_bops: 0.02; or criterion: range",
            )

    @property
    def _budgets(self) -> list[str]:
        return [f for f in ("keep_bits", "keep_bytes", "keep_bops") if getattr(self, f) is not None]

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
        ways = [_way(network, self.quantize, dtype, context) for dtype in self.weights]
        # Weights of 16 bits that are only looked at stay as they are, but for the folding: the float network.
        plain = replace(self.quantize, **{f: v for f, v in _PLAIN.items() if hasattr(self.quantize, f)})
        folded = _way(network, plain, "int16", context).folded
        layers = [n for n in ways[0].grids if all(n in w.grids for w in ways)]
        if self.criterion == "range":
            chosen, harms = self._by_range(ways, folded, layers), None
        else:
            harms = self._harms(ways, folded, layers, context)
            chosen = self._by_budget(ways, layers, harms)
        types = {name: self.weights[i] for name, i in zip(layers, chosen, strict=True)}
        mixed: dict[str, Any] = {"weights": types}
        made = replace(self.quantize, **mixed).plan(network, context)
        sizes = [ways[0].tensors[n].numel() for n in layers]
        bits = sum(ways[i].bits(n) * s for n, i, s in zip(layers, chosen, sizes, strict=True)) / sum(sizes)
        counts = ", ".join(f"{chosen.count(i)} {dtype}" for i, dtype in enumerate(self.weights) if i in chosen)
        notes = (f"{counts}: {bits:.3g} bits a weight", *made.notes)
        reasons = made.reasons if harms is None else (*made.reasons, *_told(layers, self.weights, harms))
        return Plan(step=self, edits=made.edits, reasons=reasons, notes=notes)

    # ------------------------------------------------------------------------------------------------------ choosing
    def _by_range(self, ways: Sequence[_Way], folded: Network, layers: Sequence[str]) -> list[int]:
        widths = [max(w.bits(n) for n in layers) for w in ways]
        narrow, broad = widths.index(min(widths)), widths.index(max(widths))
        tensors, chosen = folded.tensors(), []
        for name in layers:
            weight = tensors[name].detach()
            spread = float(weight.abs().amax() / weight.std(correction=0).clamp(min=1e-12))
            chosen.append(broad if spread > self.wide else narrow)
        return chosen

    def _harms(
        self, ways: Sequence[_Way], folded: Network, layers: Sequence[str], context: Context
    ) -> list[list[float]]:
        batches = bound_samples(folded, context, footprint(folded), self.samples, [], _BATCH)
        rounded = {n: [w.rounded(n) for w in ways] for n in layers}
        if self.criterion == "measured":
            found = measured_harms(folded, rounded, batches, context.progress)
        else:
            found = expected_harms(
                folded, rounded, batches, probes=self.probes, seed=context.seed, progress=context.progress
            )
        return [found[n] for n in layers]

    def _by_budget(self, ways: Sequence[_Way], layers: Sequence[str], harms: Sequence[Sequence[float]]) -> list[int]:
        sizes = {n: ways[0].tensors[n].numel() for n in layers}
        costs: list[tuple[list[list[float]], float]] = []
        if self.keep_bits is not None:
            limit = self.keep_bits * sum(sizes.values())
            costs.append(([[w.bits(n) * sizes[n] for w in ways] for n in layers], limit))
        if self.keep_bytes is not None:
            whole = 4 * sum(sizes.values())
            limit = self.keep_bytes * (whole if self.keep_bytes <= 1 else 1)
            costs.append(([[w.bytes(n) for w in ways] for n in layers], limit))
        if self.keep_bops is not None:
            macs = footprint(ways[0].folded).by_weight
            wide = _FLOAT if getattr(self.quantize, "activations", None) is None else _activation_bits(self.quantize)
            limit = self.keep_bops * sum(macs.get(n, 0) for n in layers) * _FLOAT**2
            costs.append(([[w.bits(n) * macs.get(n, 0) * wide for w in ways] for n in layers], limit))
        chosen = least_harm(harms, costs)
        if chosen is None:
            least = [sum(min(row) for row in table) / max(1e-300, limit) for table, limit in costs]
            worst = max(range(len(costs)), key=least.__getitem__)
            name = self._budgets[worst]
            raise RecipeError(
                f"MixPrecision.{name}={getattr(self, name)} cannot be met by {', '.join(self.weights)}",
                hint=f"the least that can be reached is {getattr(self, name) * least[worst]:.4g}",
            )
        return chosen


@dataclass(frozen=True)
class _Way:
    """What a Step makes of all weights with one type: the network without its grids, and the grids."""

    folded: Network
    tensors: Mapping[str, Tensor]
    grids: Mapping[str, Grid]
    uneven: bool

    def rounded(self, name: str) -> Tensor:
        value = self.tensors[name].detach()
        return value if self.uneven else grids.fake_quantize(value, self.grids[name])

    def bits(self, name: str) -> float:
        """Bits of a code: the entropy of a code that may be anything, 1.58 for three."""
        grid = self.grids[name]
        codes = grid.quant_max - grid.quant_min + 1
        return 1.0 if codes == 3 and self._binary(name) else float(torch.log2(torch.tensor(float(codes))).item())

    def bytes(self, name: str) -> float:
        return self.bits(name) * self.tensors[name].numel() / 8 + 4 * self.grids[name].scale.numel()

    def _binary(self, name: str) -> bool:
        return not bool((self.rounded(name) == 0).any())


def _way(network: Network, quantize: Step, dtype: str, context: Context) -> _Way:
    """`quantize` with all weights of one type, rounded to nearest, without activations: enough to compare types."""
    plain: dict[str, Any] = {"weights": dtype}
    plain |= {f: v for f, v in (("rounding", "nearest"), ("activations", None)) if hasattr(quantize, f)}
    plan = replace(quantize, **plain).plan(network, context)
    found = {e.tensor: e for e in plan.edits if isinstance(e, QuantizeTensor)}
    before = [e for e in plan.edits if not isinstance(e, QuantizeTensor)]
    folded = network.apply(before) if before else network
    uneven = any(e.levels is not None for e in found.values())
    return _Way(folded, folded.tensors(), {n: _grid(e) for n, e in found.items()}, uneven)


def _grid(edit: QuantizeTensor) -> Grid:
    scale = torch.as_tensor(edit.scale, dtype=torch.float32)
    zero = torch.as_tensor(edit.zero_point).expand(scale.shape)
    return Grid(scale, zero, edit.quant_min, edit.quant_max, edit.axis, edit.group)


def _activation_bits(quantize: Step) -> int:
    kind = str(getattr(quantize, "activations", ""))
    return int(kind.removeprefix("int")) if kind.startswith("int") else 8  # "dynamic" ones have 8


def _told(layers: Sequence[str], types: Sequence[str], harms: Sequence[Sequence[float]]) -> list[Reason]:
    return [
        Reason(
            layer=name.removesuffix(".weight"),
            score=max(row),
            choice="harm of each type",
            why=", ".join(f"{t} {h:.3g}" for t, h in zip(types, row, strict=True)),
        )
        for name, row in zip(layers, harms, strict=True)
    ]


__all__ = ["MixPrecision"]
