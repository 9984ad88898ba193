"""Grids that are learned: operators that round on the way forward and give a gradient to what chooses the rounding.

They are torch operators of the namespace `penjing`, so that a flat graph may hold them as nodes and everything that
trains, looks at or cuts graphs goes on to work:

- `penjing.learned_step`: the nearest point of a grid whose step is learned (LSQ).
- `penjing.widest_step`: the step with which a grid covers all values, for grids with codes to spare.
- `penjing.learned_range`: the same with a learned lower end, for activations of both signs (LSQ+).
- `penjing.learned_levels`: the nearest of fixed levels, unevenly spaced, times a learned scale (APoT).
- `penjing.learned_sign`: one of two points, minus or plus a learned step (binary weights).
- `penjing.soft_round`: a point between the two neighbours on a fixed grid (AdaRound).

Values are computed by plain arithmetic: torch's own fused operators for learnable grids give the same numbers (the
tests hold that) but are not vectorised on CPUs and take about forty times as long.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from penjing.tensors.codebooks import nearest
from penjing.tensors.grids import grid_rows

#: Steps never fall below this: they are divided by.
_LEAST = 1e-8
#: What stands on the last point of a grid, as weights that were quantized before do, is inside in spite of rounding.
_EDGE = 1e-3
#: Binary weights further from zero than this many steps get no gradient: they would only drift.
_BINARY_REACH = 3.0
#: Ends of the stretched sigmoid (Louizos et al. 2018), so that 0 and 1 are reached.
_STRETCH = (-0.1, 1.1)

_LIBRARY: Any = torch.library.Library("penjing", "DEF")  # type: ignore[no-untyped-call]
# Tagged as pointwise: whatever cuts or follows a graph may treat them like an activation function.
_TAGS = (torch.Tag.pointwise,)
_LIBRARY.define(
    "learned_step(Tensor x, Tensor step, Tensor? zero_point, int? axis, int group, int low, int high,"
    " bool batched) -> Tensor",
    tags=_TAGS,
)
_LIBRARY.define("widest_step(Tensor x, int? axis, int group, float high) -> Tensor")
_LIBRARY.define("learned_range(Tensor x, Tensor step, Tensor offset, int levels) -> Tensor", tags=_TAGS)
_LIBRARY.define("learned_levels(Tensor x, Tensor scale, Tensor levels, int? axis) -> Tensor", tags=_TAGS)
_LIBRARY.define("learned_sign(Tensor x, Tensor step, int? axis, int group) -> Tensor", tags=_TAGS)
_LIBRARY.define(
    "soft_round(Tensor x, Tensor choice, Tensor step, Tensor? zero_point, int? axis, int group, int low, int high)"
    " -> Tensor",
    tags=_TAGS,
)


def spread(values: Tensor, x: Tensor, axis: int | None, group: int) -> Tensor:
    """One value a grid, in the layout of `Grid.scale` flattened, shaped to broadcast against `x`.

    With `group` there is a value for each run of `group` entries of each row of `x`, row after row.
    """
    if group:
        inner = x[0].numel()
        return values.view(x.shape[0], -1).repeat_interleave(group, 1)[:, :inner].reshape(x.shape)
    if axis is None:
        return values.reshape(())
    shape = [1] * x.ndim
    shape[axis] = -1
    return values.view(shape)


def gather(x: Tensor, like: Tensor, axis: int | None, group: int) -> Tensor:
    """The sums of `x` over what shares a grid, in the shape of `like`: what `spread` is the transpose of."""
    return grid_rows(x, axis, group)[0].sum(1, dtype=torch.float32).view(like.shape)


def gradient_scale(x: Tensor, step: Tensor, high: int, batched: bool) -> float:
    """1/√(N·Qp): makes a step's updates as large, relative to it, as those of the values (Esser et al. 2020, §2.2).

    N counts the values that share a step; with `batched`, those of one sample (the first dimension counts samples).
    """
    count = x.numel() // step.numel() // (len(x) if batched else 1)
    return 1.0 / math.sqrt(max(1, count) * max(1, high))


class _LearnedStep(torch.autograd.Function):
    """Esser et al. 2020, "Learned step size quantization", equations 1 to 5."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        zero: Tensor | None,
        axis: int | None,
        group: int,
        low: int,
        high: int,
        batched: bool,
    ) -> Tensor:
        scale = spread(step, x, axis, group).to(x.dtype).clamp_min(_LEAST)
        place = x * scale.reciprocal()
        shift = None if zero is None else spread(zero, x, axis, group).to(x.dtype).round()
        if shift is not None:
            place += shift
        ctx.save_for_backward(place, step, shift)
        ctx.limits, ctx.layout, ctx.slope = (low, high), (axis, group), gradient_scale(x, step, high, batched)
        codes = place.round().clamp_(low, high)
        return (codes if shift is None else codes.sub_(shift)).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, (place, step, shift) = grads[0], ctx.saved_tensors
        low, high = ctx.limits
        through = torch.ops.aten.hardtanh_backward(grad, place, low - _EDGE, high + _EDGE)
        if not ctx.needs_input_grad[1]:
            return through, *[None] * 7
        codes = place.round().clamp_(low, high)
        inside = (codes - place).mul_(through)
        outside = (grad - through).mul_(codes if shift is None else codes - shift)
        slope = gather(inside.add_(outside), step, *ctx.layout).mul_(ctx.slope)
        return through, slope, *[None] * 6


class _LearnedRange(torch.autograd.Function):
    """Bhalgat et al. 2020, "LSQ+", equations 5 to 8; the lower end is rounded so that zero is on the grid."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, offset: Tensor, levels: int) -> Tensor:
        scale = step.detach().clamp_min(_LEAST)
        zero_point = (offset.detach() / scale).round().neg_().clamp_(0, levels - 1).to(x.dtype)
        scale = scale.to(x.dtype)
        place = (x * scale.reciprocal()).add_(zero_point)
        ctx.save_for_backward(place, step)
        ctx.levels, ctx.slope = levels, gradient_scale(x, step, levels - 1, True)
        return place.round().clamp_(0, levels - 1).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, (place, step) = grads[0], ctx.saved_tensors
        through = torch.ops.aten.hardtanh_backward(grad, place, -_EDGE, ctx.levels - 1 + _EDGE)
        outside = grad - through
        codes = place.round().clamp_(0, ctx.levels - 1)
        slope = (codes - place).mul_(through).add_(codes.mul_(outside))
        shape = step.shape
        return (
            through,
            slope.sum(dtype=torch.float32).mul_(ctx.slope).view(shape),
            outside.sum(dtype=torch.float32).mul_(ctx.slope).view(shape),
            None,
        )


class _LearnedLevels(torch.autograd.Function):
    """Li, Dong & Wang 2020, "Additive powers-of-two quantization", equation 6, its updates as large as those of LSQ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, levels: Tensor, axis: int | None) -> Tensor:
        wide = spread(scale, x, axis, 0).to(x.dtype).clamp_min(_LEAST)
        place = x * wide.reciprocal()
        on = nearest(place, levels).to(x.dtype)
        ctx.save_for_backward(place, on, scale)
        # The scale is as long as all the steps of an even grid together: as many times longer, as much less steep.
        high = len(levels) // 2
        ctx.axis, ctx.slope = axis, gradient_scale(x, scale, high, False) * high**2
        return on * wide

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, (place, on, scale) = grads[0], ctx.saved_tensors
        through = torch.ops.aten.hardtanh_backward(grad, place, -1 - _EDGE, 1 + _EDGE)
        slope = gather(grad * on - through * place, scale, ctx.axis, 0).mul_(ctx.slope)
        return through, slope, None, None


class _LearnedSign(torch.autograd.Function):
    """Rastegari et al. 2016, "XNOR-Net", §3.1, its scale learned as in LSQ instead of recomputed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, axis: int | None, group: int) -> Tensor:
        scale = spread(step, x, axis, group).to(x.dtype).clamp_min(_LEAST)
        ctx.save_for_backward(x, scale, step)
        ctx.layout, ctx.slope = (axis, group), gradient_scale(x, step, 1, False)
        return x.sign() * scale  # a weight that is exactly zero was masked: it stays so

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, (x, scale, step) = grads[0], ctx.saved_tensors
        through = grad * (x.abs() <= _BINARY_REACH * scale)
        return through, gather(grad * x.sign(), step, *ctx.layout).mul_(ctx.slope), None, None


def _learned_step(
    x: Tensor, step: Tensor, zero_point: Tensor | None, axis: int | None, group: int, low: int, high: int, batched: bool
) -> Tensor:
    result: Tensor = _LearnedStep.apply(x, step, zero_point, axis, group, low, high, batched)  # type: ignore[no-untyped-call]
    return result


def _widest_step(x: Tensor, axis: int | None, group: int, high: float) -> Tensor:
    rows, _ = grid_rows(x, axis, group)
    most = rows.detach().abs().amax(1) / high
    return torch.where(most < _LEAST, torch.ones_like(most), most)


def _learned_range(x: Tensor, step: Tensor, offset: Tensor, levels: int) -> Tensor:
    result: Tensor = _LearnedRange.apply(x, step, offset, levels)  # type: ignore[no-untyped-call]
    return result


def _learned_levels(x: Tensor, scale: Tensor, levels: Tensor, axis: int | None) -> Tensor:
    result: Tensor = _LearnedLevels.apply(x, scale, levels, axis)  # type: ignore[no-untyped-call]
    return result


def _learned_sign(x: Tensor, step: Tensor, axis: int | None, group: int) -> Tensor:
    result: Tensor = _LearnedSign.apply(x, step, axis, group)  # type: ignore[no-untyped-call]
    return result


def _soft_round(
    x: Tensor,
    choice: Tensor,
    step: Tensor,
    zero_point: Tensor | None,
    axis: int | None,
    group: int,
    low: int,
    high: int,
) -> Tensor:
    scale = spread(step, x, axis, group)
    shift = 0.0 if zero_point is None else spread(zero_point, x, axis, group)
    up = rectified(choice) * (x != 0)  # a weight that is exactly zero was masked: it stays so
    return (torch.clamp(torch.floor(x / scale) + shift + up, low, high) - shift) * scale


for _name, _function in (
    ("learned_step", _learned_step),
    ("widest_step", _widest_step),
    ("learned_range", _learned_range),
    ("learned_levels", _learned_levels),
    ("learned_sign", _learned_sign),
    ("soft_round", _soft_round),
):
    _LIBRARY.impl(_name, _function, "CompositeImplicitAutograd")

#: `learned_step(x, step, zero_point, axis, group, low, high, batched)`: `x` on the nearest points of a grid,
#: with gradients for `x` (straight through inside the range) and `step` (one value a grid, flattened; scaled by
#: `gradient_scale`).
learned_step = torch.ops.penjing.learned_step.default
#: `widest_step(x, axis, group, high)`: the largest magnitude of what shares a grid, divided by `high`; no gradient.
widest_step = torch.ops.penjing.widest_step.default
#: `learned_range(x, step, offset, levels)`: `x` on `levels` points from about `offset` upwards, one of them zero.
learned_range = torch.ops.penjing.learned_range.default
#: `learned_levels(x, scale, levels, axis)`: `x` on the nearest of ascending `levels` (K,) from -1 to 1 times its scale.
learned_levels = torch.ops.penjing.learned_levels.default
#: `learned_sign(x, step, axis, group)`: minus or plus `step`; exact zeros stay.
learned_sign = torch.ops.penjing.learned_sign.default
#: `soft_round(x, choice, step, zero_point, axis, group, low, high)`: `x` between the grid points next to it, as far up
#: as `rectified(choice)` says (Nagel et al. 2020, "Up or down? Adaptive rounding", equation 22).
soft_round = torch.ops.penjing.soft_round.default
OPERATORS = (learned_step, learned_range, learned_levels, learned_sign, soft_round)


def rectified(choice: Tensor) -> Tensor:
    """How far up, 0 to 1, a `choice` (any number) rounds: the rectified sigmoid (Nagel et al. 2020, equation 23)."""
    low, high = _STRETCH
    return torch.clamp(torch.sigmoid(choice) * (high - low) + low, 0.0, 1.0)


def choice_for(x: Tensor, step: Tensor, axis: int | None, group: int) -> Tensor:
    """The `choice` with which `soft_round` gives `x` back unchanged (inside the grid's range); `x`'s shape."""
    low, high = _STRETCH
    place = x / spread(step, x, axis, group)
    share = (place - torch.floor(place)).clamp(1e-4, 1 - 1e-4)
    return torch.logit((share - low) / (high - low))


def undecided(choice: Tensor, beta: float) -> Tensor:
    """The sum of 1 - |2h - 1|^beta over the shares h: zero when every weight is at one of its two neighbours.

    A large `beta` leaves shares in the middle free, a small one pulls all to an end (Nagel et al. 2020, equation 24).
    """
    return (1.0 - (2.0 * rectified(choice) - 1.0).abs().pow(beta)).sum()


def annealed(done: float, *, warmup: float = 0.2, start: float = 20.0, end: float = 2.0) -> float | None:
    """`undecided`'s beta when the share `done` of the steps is behind: along half a cosine; None during the warm-up."""
    if done < warmup:
        return None
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * (done - warmup) / (1.0 - warmup)))


def drop_rounding(plain: Tensor, rounded: Tensor, probability: float) -> Tensor:
    """`rounded`, but every element is the `plain` one with `probability`: what is learned behind it then fits a whole
    neighbourhood of the rounding (Wei et al. 2022, "QDrop"). Both of one shape, gradients flow to both."""
    return torch.where(torch.rand_like(plain) < probability, plain, rounded)
