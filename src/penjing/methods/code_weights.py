"""CodeWeights: weights on grids chosen for few bytes in a package, after training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from penjing.analysis.footprint import footprint
from penjing.analysis.grid_edits import weight_edit
from penjing.analysis.passes import fold_batch_norms, outputs_first, simplified
from penjing.analysis.quantized_reconstruct import round_layers
from penjing.analysis.rounding_harm import noise_harms
from penjing.errors import RecipeError
from penjing.network import Edit, Network, SetWeights
from penjing.recipe import Context, Plan, Reason, Step, step
from penjing.recipe.samples import bound_samples
from penjing.recipe.stored_layers import stored_weights
from penjing.tensors.gptq import StepRule
from penjing.tensors.grids import Grid, fake_quantize, quantize, sqnr

_BATCH = 100
#: Batches whose gradients tell how much the outputs feel of each tensor.
_PROBES = 10
#: Multiply-accumulates that go into the moments of a layer: that columns make up for each other takes many positions.
_WORK = 1.6e10
#: Of these moments: weights that make up for much rounding follow the samples too closely with less.
_DAMPING = 3e-3
#: The largest codes of 8 and 16 bits. What rounding by outputs makes of weights is a little larger than they were.
_BYTE, _WORD, _ROOM = 127, 32767, 0.9


@step
@dataclass(frozen=True, kw_only=True)
class CodeWeights(Step):
    """Put weights and biases on grids for few bytes in a package: one knob, no labels, no training.

    Every tensor gets one scale. Coded by their entropy, all tensors together take
    the fewest bits for a given error of the outputs if the next bit is worth as much in each, which is so if each
    value's noise does the same harm (reverse water-filling; Cover & Thomas 2006, "Elements of information theory",
    §10.3). `rate` is the mean squared error of the outputs, relative to their mean square, that rounding to nearest
    would do: 0.01 can hardly be told from the original, 0.1 takes 2 to 4 bits a weight, 1 is about the most.

    With samples, how much the outputs feel of each tensor is taken from backward passes of random signs, and weights
    are rounded by the layers' outputs, each layer making up for those before it ("gptq", see
    analysis/quantized_reconstruct.py), which leaves a tenth to a half of that error; `samples` are looked at. Without,
    relative errors of all weights count alike, and they are rounded to nearest.

    Batch norms are folded first. Masked weights stay zero. Codes have 8 bits, or 16 where the scale asks for them;
    runtimes compute in float. For rounding that integer kernels run, there is `Quantize`.
    """

    amounts: ClassVar[Mapping[str, str]] = {"rate": "zero"}
    once: ClassVar[str] = "it needs a float network and leaves one on grids"

    rate: float = 0.1
    samples: int = 4000

    def __post_init__(self) -> None:
        self.require_between("rate", 0, 1, open_low=True, share=False)
        self.require_whole("samples", 1)

    def plan(self, network: Network, context: Context) -> Plan:
        """Folds, sets and quantizes; a reason for every tensor, with its SQNR in dB."""
        if network.is_quantized:
            raise RecipeError(
                "CodeWeights needs a float network, and this one is quantized",
                hint="leave steps that quantize away before it: they have chosen grids",
            )
        notes: list[str] = []
        turned = [outputs_first] if context.data is not None else []
        folded, folds = simplified(network, *turned, fold_batch_norms)
        biases = stored_weights(self, folded)
        tensors = {n: t.detach() for n, t in folded.tensors().items()}
        batches = bound_samples(folded, context, footprint(folded), self.samples, notes, _BATCH)
        steps = self._steps(folded, biases, batches, context)
        grids = {name: _grid(tensors[name], steps[name]) for name in biases}
        values: dict[str, Tensor] = {}
        if batches:
            rules = {n: StepRule(-g.quant_max, g.quant_max, axis=None, step=float(g.scale)) for n, g in grids.items()}
            found = round_layers(folded, rules, batches, damping=_DAMPING, work=_WORK, progress=context.progress)
            grids, values = found.grids, {**found.values, **found.biases}
            values = {n: v.to(tensors[n].dtype) for n, v in values.items()}
        for name in biases:
            values.setdefault(name, fake_quantize(tensors[name], grids[name]))
        for name in (b for several in biases.values() for b in several):
            value = values.get(name, tensors[name])
            if bool(value.any()):
                grids[name] = _grid(value, steps[name])
                values[name] = fake_quantize(value, grids[name])
        sets = [SetWeights(parameter=n, value=v) for n, v in values.items() if not torch.equal(v, tensors[n])]
        edits: list[Edit] = [*folds, *sets, *(weight_edit(n, g) for n, g in grids.items())]
        reasons = [_reason(n, tensors[n], values[n], g) for n, g in grids.items()]
        bits = sum(r.score * tensors[r.layer].numel() for r in reasons if r.score is not None)
        notes.append(f"about {bits / 8:,.0f} bytes of codes by their entropy")
        return Plan(step=self, edits=tuple(edits), reasons=tuple(reasons), notes=tuple(notes))

    def _steps(
        self, folded: Network, biases: Mapping[str, list[str]], batches: list[dict[str, Tensor]], context: Context
    ) -> dict[str, float]:
        """The step of each tensor, such that the noise of all rounding together does the harm `rate`."""
        tensors = {n: t.detach() for n, t in folded.tensors().items()}
        every = [*biases, *(b for several in biases.values() for b in several)]
        if batches:
            harms = noise_harms(folded, every, batches[:_PROBES], seed=context.seed, progress=context.progress)
        else:
            harms = {n: tensors[n].numel() / max(_square(tensors[n]), 1e-300) for n in biases}
            # What a bias of zeros, or a large one, may lose says nothing of its own size.
            harms |= {b: harms[n] for n, several in biases.items() for b in several}
        count = sum(tensors[n].numel() for n in biases)
        found = {}
        for name in every:
            share = 12 * self.rate * tensors[name].numel() / count  # a step's square is twelve times its noise
            largest = float(tensors[name].abs().max())
            step = math.sqrt(share / harms[name]) if harms[name] > 0 else math.inf
            found[name] = max(min(step, 2 * largest or 1.0), largest / (_ROOM * _WORD), 1e-30)
        return found


def _grid(values: Tensor, step: float) -> Grid:
    """The grid of that step, with codes of 8 bits if they do."""
    most = _BYTE if float(values.abs().max()) <= _ROOM * _BYTE * step else _WORD
    scale = torch.tensor(step, dtype=torch.float32)
    return Grid(scale=scale, zero_point=torch.tensor(0), quant_min=-most, quant_max=most, axis=None)


def _square(values: Tensor) -> float:
    return float(values.double().square().sum())


def _reason(name: str, before: Tensor, after: Tensor, grid: Grid) -> Reason:
    codes = quantize(after, grid, torch.int16)
    shares = torch.unique(codes, return_counts=True)[1].double() / codes.numel()
    bits = float(-(shares * shares.log2()).sum())
    zeros = 1 - int(codes.count_nonzero()) / codes.numel()
    why = f"weights {sqnr(before, after):.1f} dB, {zeros:.0%} zeros, codes up to {int(codes.abs().max())}"
    return Reason(layer=name, choice=f"steps of {float(grid.scale):.3g}", score=bits, why=why)


__all__ = ["CodeWeights"]
