"""How much of each layer single-weight pruning takes, so that the network's outputs suffer least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from penjing.analysis.lane import Lane
from penjing.analysis.reconstruct import Layer, as_rows, norm_scale, rows_wanted
from penjing.analysis.tail import Tails
from penjing.network import Network
from penjing.progress import SILENT, Progress
from penjing.tensors.allocation import along_curves
from penjing.tensors.least_squares import Moments, damped_hessian
from penjing.tensors.sparse_reconstruction import sweep

_SHARES = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
_DAMPING = 1e-3
#: Samples that the outputs are looked at on, and multiply-accumulates that go into the moments of a layer.
_JUDGED, _WORK = 256, 2e9


@torch.no_grad()
def allocate(
    network: Network,
    layers: Sequence[Layer],
    batches: Sequence[Mapping[str, Tensor]],
    gone: int,
    progress: Progress = SILENT,
) -> dict[str, int]:
    """How many weights each of `layers` gives up, `gone` in all, those masked before included.

    For every layer alone: the error of its own outputs at several sparsities (one SparseGPT sweep each) gives the shape
    of a curve, the error of the network's outputs at one of them its height. The sum of the curves is made least.
    """
    tensors = network.tensors()
    total = sum(tensors[layer.weight].numel() for layer in layers)
    near = min(_SHARES, key=lambda share: abs(share - gone / max(total, 1)))
    curves: dict[str, list[tuple[int, float]]] = {}
    trials: dict[str, dict[str, Tensor]] = {}
    lane = Lane(network, batches)
    with progress.task("judging what layers can give up", 2 * len(layers)) as advance:
        for layer in layers:
            curves[layer.weight], trials[layer.weight] = _curve(network, lane, layer, near)
            advance(1)
        heights = _heights(network, trials, batches, advance)
    scaled = {}
    for name, curve in curves.items():
        at = next(error for count, error in curve if count >= round(near * tensors[name].numel()))
        held = int((~network.masks[name]).sum()) if name in network.masks else 0
        points = [(count, heights[name] * error / max(at, 1e-30)) for count, error in curve if count > held]
        scaled[name] = [(held, 0.0), *points]
    return along_curves(scaled, gone)


def _curve(
    network: Network, lane: Lane, layer: Layer, near: float
) -> tuple[list[tuple[int, float]], dict[str, Tensor]]:
    """(weights gone, squared output error) of a layer, and its tensors with the share `near` of its weights gone."""
    held = lane.tensors[layer.weight].detach()
    source = layer.node.args[0]
    moments = Moments(layer.groups, held[0].numel(), held.shape[0] // layer.groups)
    if not isinstance(source, fx.Node):
        return [(held.numel(), 0.0)], {}
    inputs = lane.value(source.name)  # before the outputs: they may be the last to read it
    limit = rows_wanted(held.shape, layer.groups, _WORK) // len(inputs) + 1
    generator = torch.Generator().manual_seed(0)
    for x, y in zip(inputs, lane.value(layer.node.name), strict=True):
        moments.add(*as_rows(layer, held.shape, x, y, layer.groups, limit, generator))
    constant = layer.bias is not None or layer.norm is not None
    hessian = damped_hessian(moments, constant, _DAMPING)
    scale = norm_scale(layer, lane.tensors)
    weight = (held.flatten(1).double() * scale[:, None]).view(layer.groups, -1, held[0].numel())
    alive = network.masks[layer.weight].view_as(weight) if layer.weight in network.masks else None
    curve, tensors = [], dict[str, Tensor]()
    for share in _SHARES:
        fitted, mask = sweep(hessian, weight, share, alive=alive)
        off = weight - fitted
        curve.append((int((~mask).sum()), float(((off @ hessian) * off).sum())))
        if share == near:
            tensors = _moved(layer, lane.tensors, moments, weight, fitted, scale)
    curve.append((held.numel(), float(((weight @ hessian) * weight).sum())))
    return curve, tensors


def _moved(
    layer: Layer, tensors: Mapping[str, Tensor], moments: Moments, weight: Tensor, fitted: Tensor, scale: Tensor
) -> dict[str, Tensor]:
    """The tensors of a layer with `fitted` in place of `weight`, both scaled by the norm behind; its constant follows
    the inputs' means."""
    old = tensors[layer.weight]
    plain = fitted.flatten(0, 1) / torch.where(scale == 0, torch.ones_like(scale), scale)[:, None]
    new = {layer.weight: plain.reshape(old.shape).to(old.dtype)}
    constant = str(layer.norm.args[2].target) if layer.norm is not None else layer.bias  # type: ignore[union-attr]
    if constant is not None:
        mean = moments.sum_x / max(moments.rows, 1)
        shift = ((weight - fitted) @ mean[..., None])[..., 0].flatten()
        new[constant] = (tensors[constant].double() + shift).to(tensors[constant].dtype)
    return new


def _heights(
    network: Network,
    trials: Mapping[str, Mapping[str, Tensor]],
    batches: Sequence[Mapping[str, Tensor]],
    advance: object,
) -> dict[str, float]:
    """What each trial, on its own, does to the network's outputs: mean squared error relative to their variance."""
    few, seen = [], 0
    for batch in batches:
        few.append(batch)
        seen += len(next(iter(batch.values())))
        if seen >= _JUDGED:
            break
    wanted = [network.run(dict(batch)) for batch in few]
    tails = Tails(network, few)
    heights = {}
    for name in sorted(trials, key=lambda name: tails.position(trials[name])):
        tail = tails.behind(trials[name])
        heights[name] = sum(
            float((a.float() - b.float()).square().mean() / b.float().var().clamp_min(1e-12))
            for number, answer in enumerate(wanted)
            for a, b in zip(tail.run(number, trials[name]), answer, strict=True)
            if b.is_floating_point()
        )
        advance(1)  # type: ignore[operator]
    return heights
