"""What a Step that quantizes weights makes of them with one type, for several types side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from penjing.analysis.footprint import footprint
from penjing.analysis.weight_rounding import rule_of
from penjing.network import Network, QuantizeTensor
from penjing.recipe.context import Context
from penjing.recipe.steps import Step
from penjing.tensors import grids
from penjing.tensors.gptq import GridRule
from penjing.tensors.grids import Grid

#: The type of what a Step leaves alone, and its bits.
FLOAT, FLOAT_BITS = "float", 32
#: What a quantizing Step would do beyond rounding, switched off where it has that field.
_PLAIN: dict[str, Any] = {"rounding": "nearest", "activations": None}


Cost = tuple[list[list[float]], float]  #: cost[layer][option], and the limit of their sum


@dataclass(frozen=True)
class Width:
    """All weights of a network with one type, rounded to nearest: their grids, none for floats; `uneven` levels stand
    in `values`, the weights that the grids belong to."""

    dtype: str
    values: Mapping[str, Tensor]
    grids: Mapping[str, Grid]
    uneven: bool = False

    def rounded(self, name: str) -> Tensor:
        """The weight as it is stored."""
        value = self.values[name].detach()
        return value if self.uneven or self.dtype == FLOAT else grids.fake_quantize(value, self.grids[name])

    def bits(self, name: str) -> float:
        """Bits of a code: the entropy of a code that may be anything, 1.58 for three."""
        if self.dtype == FLOAT:
            return FLOAT_BITS
        grid = self.grids[name]
        codes = grid.quant_max - grid.quant_min + 1
        if codes == 3 and bool((self.rounded(name) != 0).all()):
            return 1.0
        return float(torch.log2(torch.tensor(float(codes))).item())

    def bytes(self, name: str) -> float:
        """Bytes of the codes, and of the scales in float32."""
        scales = 0 if self.dtype == FLOAT else self.grids[name].scale.numel()
        return self.bits(name) * self.values[name].numel() / 8 + 4 * scales

    def way(self, name: str, quantize: Step) -> Tensor | GridRule:
        """How the weight comes to its grid: its rounded values, or the rule where `quantize` looks at outputs."""
        if self.dtype == FLOAT or self.uneven or getattr(quantize, "rounding", "nearest") == "nearest":
            return self.rounded(name)
        ranges: Any = getattr(quantize, "ranges", "auto")
        rule = rule_of(
            self.dtype,
            self.grids[name],
            ranges="mse" if ranges == "auto" else ranges,
            symmetric=getattr(quantize, "symmetric", True),
            shifts=getattr(quantize, "scales", "float") == "power-of-two",
        )
        return self.rounded(name) if rule is None else rule


@dataclass(frozen=True)
class Widths:
    """A float network as a quantizing Step prepares it (`folded`: batch norms gone), the `layers` by their weights, and
    for each its `options`, the types that it may have."""

    folded: Network
    layers: tuple[str, ...]
    options: Mapping[str, tuple[Width, ...]]

    @classmethod
    def of(cls, network: Network, quantize: Step, types: Sequence[str], context: Context) -> Widths:
        """`quantize` tried with each of `types`, without samples' help: enough to compare them."""
        made = [_width(network, quantize, t, context) for t in types if t != FLOAT]
        # Weights of 16 bits that are only looked at stay as they are, but for the folding: the float network.
        even: dict[str, Any] = {f: v for f, v in (("levels", "uniform"), ("symmetric", True)) if hasattr(quantize, f)}
        folded, wide = _with(network, replace(quantize, **even), "int16", context)
        layers = tuple(n for n in made[0].grids if all(n in w.grids for w in made))
        plain = Width(FLOAT, folded.tensors(), {})
        # A layer that has the same grid whatever is asked for has a type of its own (`edges`), which is left to it.
        others = [w.grids for w in made[1:]] or [{n: _grid(e) for n, e in wide.items()}]
        fixed = {n for n in layers if all(_codes(g[n]) == _codes(made[0].grids[n]) for g in others)}
        by_type = {w.dtype: w for w in made} | {FLOAT: plain}
        several = tuple(by_type[t] for t in types)
        return cls(folded, layers, {n: (made[0],) if n in fixed else several for n in layers})

    def size(self, name: str) -> int:
        """How many weights a layer has."""
        return self.options[name][0].values[name].numel()

    def rescaled(self, quantize: Step) -> list[str]:
        """The weights whose channels `quantize` scales so that outputs spread as they did."""
        free = getattr(quantize, "correct_scale", False) and getattr(quantize, "scales", "float") == "float"
        if not free or not _static(quantize):
            return []
        several = {n: [w.grids[n] for w in self.options[n] if w.dtype != FLOAT] for n in self.layers}
        return [n for n, held in several.items() if all(g.axis == 0 and not g.group for g in held)]

    def costs(
        self, quantize: Step, keep_bits: float | None, keep_bytes: float | None, keep_bops: float | None
    ) -> dict[str, Cost]:
        """By budget (as in MixPrecision) what every option of every layer costs, and the limit."""
        found: dict[str, Cost] = {}
        count = sum(self.size(n) for n in self.layers)
        if keep_bits is not None:
            found["keep_bits"] = self._table(lambda w, n: w.bits(n) * self.size(n)), keep_bits * count
        if keep_bytes is not None:
            limit = keep_bytes * (4 * count if keep_bytes <= 1 else 1)
            found["keep_bytes"] = self._table(lambda w, n: w.bytes(n)), limit
        if keep_bops is not None:
            macs = footprint(self.folded).by_weight
            given = _activation_bits(quantize)
            limit = keep_bops * sum(macs.get(n, 0) for n in self.layers) * FLOAT_BITS**2
            found["keep_bops"] = (
                self._table(lambda w, n: macs.get(n, 0) * w.bits(n) * (FLOAT_BITS if w.dtype == FLOAT else given)),
                limit,
            )
        return found

    def _table(self, cost: Callable[[Width, str], float]) -> list[list[float]]:
        return [[cost(w, n) for w in self.options[n]] for n in self.layers]

    def everywhere(self, dtype: str) -> list[int]:
        """The choice of one type for all layers, but those with a type of their own."""
        types = ([w.dtype for w in self.options[n]] for n in self.layers)
        return [t.index(dtype) if dtype in t else 0 for t in types]

    def by_range(self, wide: float) -> list[int]:
        """The narrowest type for weights whose largest magnitude is at most `wide` times their standard deviation, the
        widest for the others."""
        tensors, chosen = self.folded.tensors(), []
        for name in self.layers:
            weight, bits = tensors[name].detach(), [w.bits(name) for w in self.options[name]]
            spread = float(weight.abs().amax() / weight.std(correction=0).clamp(min=1e-12))
            chosen.append(bits.index(max(bits) if spread > wide else min(bits)))
        return chosen

    def mixed(self, quantize: Step, chosen: Sequence[int]) -> Step | None:
        """`quantize` with the type that each layer was given, by its number; None if all stay float."""
        types = {n: self.options[n][i].dtype for n, i in zip(self.layers, chosen, strict=True)}
        narrow = {n: t for n, t in types.items() if t != FLOAT}
        if not narrow:
            return None
        where = [quantize.where] if isinstance(quantize.where, str) else list(quantize.where)
        left = [f"!{n}" for n, t in types.items() if t == FLOAT]
        changed: dict[str, Any] = {"weights": narrow, **({"where": [*where, *left]} if left else {})}
        return replace(quantize, **changed)


def corrects_biases(quantize: Step) -> bool:
    """Whether `quantize` makes the mean outputs of layers right again."""
    by_outputs = getattr(quantize, "rounding", "nearest") != "nearest"
    return by_outputs or (_static(quantize) and bool(getattr(quantize, "correct_bias", True)))


def _static(quantize: Step) -> bool:
    return getattr(quantize, "activations", None) not in (None, "dynamic")


def nearest(quantize: Step, **fields: Any) -> Step:
    """`quantize` rounding to nearest, with other `fields`."""
    return replace(quantize, **({"rounding": "nearest"} if hasattr(quantize, "rounding") else {}), **fields)


def _width(network: Network, quantize: Step, dtype: str, context: Context) -> Width:
    folded, found = _with(network, quantize, dtype, context)
    uneven = any(e.levels is not None for e in found.values())
    return Width(dtype, folded.tensors(), {n: _grid(e) for n, e in found.items()}, uneven)


def _with(network: Network, quantize: Step, dtype: str, context: Context) -> tuple[Network, dict[str, QuantizeTensor]]:
    """`network` as it stands before its weights are put on grids of one type, and those grids."""
    plain = {"weights": dtype, **{f: v for f, v in _PLAIN.items() if hasattr(quantize, f)}}
    plan = replace(quantize, **plain).plan(network, context)
    before = [e for e in plan.edits if not isinstance(e, QuantizeTensor)]
    found = {e.tensor: e for e in plan.edits if isinstance(e, QuantizeTensor)}
    return (network.apply(before) if before else network), found


def _grid(edit: QuantizeTensor) -> Grid:
    scale = torch.as_tensor(edit.scale, dtype=torch.float32)
    zero = torch.as_tensor(edit.zero_point).expand(scale.shape)
    return Grid(scale, zero, edit.quant_min, edit.quant_max, edit.axis, edit.group)


def _activation_bits(quantize: Step) -> int:
    kind = getattr(quantize, "activations", None)
    if kind is None:
        return FLOAT_BITS
    return int(kind.removeprefix("int")) if kind.startswith("int") else 8  # "dynamic" ones have 8


def _codes(grid: Grid) -> tuple[int, int]:
    return grid.quant_min, grid.quant_max
