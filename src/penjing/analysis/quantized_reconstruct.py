"""Putting weights on grids layer by layer, on a running network, without labels or gradients.

In the order of the graph every layer first gets the dense weights that carry *its inputs in the network as quantized so
far* to *its outputs in the float network*, less the quantized network's shortcut where a residual sum follows
(`penjing.analysis.reconstruct`). These are then rounded in the metric of those inputs (`penjing.tensors.gptq`), and the
bias makes the mean output right. So every layer also makes up for what the layers before it did wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, fx
from torch.nn import functional

from penjing.analysis.lane import Lane, View
from penjing.analysis.operators import operator_name
from penjing.analysis.reconstruct import Layer, find_layers, reconstruct
from penjing.analysis.twin import gain_between
from penjing.errors import DataError
from penjing.network import Network, SetWeights
from penjing.progress import SILENT, Progress
from penjing.tensors.gptq import GridRule, Order, gptq, gram_error
from penjing.tensors.grids import Grid, fake_quantize
from penjing.tensors.least_squares import Moments, constant_of, optimum
from penjing.tensors.sparse_reconstruction import on_support

#: Multiply-accumulates that go into the moments of a layer.
_WORK = 4e9
#: What an embedding counts beside a linear layer that shares its weight, whose inputs have a mean square of one.
_EMBEDDING = 0.3


@dataclass(frozen=True)
class Rounded:
    """`values` on their `grids`, by parameter; new `biases`, by name; for each layer that could be refitted its output
    error after, relative to the target (`errors`). Parameters in `nearest` were rounded to nearest, with the reason."""

    grids: dict[str, Grid] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    nearest: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def round_layers(
    network: Network,
    rules: Mapping[str, GridRule],
    batches: list[dict[str, Tensor]],
    *,
    quantizers: Iterable[tuple[str, tuple[str, ...] | None, Grid]] = (),
    others: Mapping[str, Tensor] | None = None,
    damping: float = 1e-3,
    order: Order = "ascending",
    refit: bool = True,
    work: float = _WORK,
    progress: Progress = SILENT,
) -> Rounded:
    """Values on a grid for every parameter in `rules`, and biases that go with them.

    `network` is the float network, its batch norms folded; `batches` are bound inputs (1000 to 2000 samples). The
    `quantizers` (value, its users or None for all, grid) act on activations as they will in the quantized network.
    `others` are parameters that are on grids already. With `refit` off the float weights themselves are rounded.
    Weights that are masked stay zero. Before anything else come those that `find_layers` leaves out: a weight shared by
    linear layers and embeddings is rounded in the metric of all of them, in the float network; others (recurrent or
    transposed ones) go to the nearest points of their grids. Rows are the first dimension of a weight: one whose output
    channels are elsewhere is better rounded by the caller and given in `others`. Raises DataError without batches.
    """
    if not batches:
        raise DataError("rounding by the layers' outputs needs samples", hint="a thousand without labels are enough")
    tensors = network.tensors()
    layers = {layer.weight: layer for layer in find_layers(network)}
    result = Rounded()
    for name in rules:
        if name not in layers:
            _before_the_others(network, name, rules[name], batches, order, result)
        elif layers[name].norm is not None:
            _to_nearest(name, rules[name], tensors[name].detach(), result, "a batch norm behind it is not folded")
    held = {**(others or {}), **result.values}
    start = network.apply([SetWeights(parameter=n, value=v) for n, v in held.items()]) if held else network

    def solve(layer: Layer, moments: Moments, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
        hessian, dense = optimum(moments, weight, bias=bias, damping=damping)
        dense = dense if refit else weight
        alive = None
        if layer.weight in network.masks:
            alive = network.masks[layer.weight].view_as(weight)
            dense = on_support(hessian, dense, alive)
        rounded, grid = gptq(hessian, dense, rules[layer.weight], alive=alive, order=order)
        result.grids[layer.weight] = grid
        return rounded, constant_of(moments, rounded) if bias else None

    views: dict[str, list[View]] = {}
    for value, users, grid in quantizers:
        views.setdefault(value, []).append((users, partial(fake_quantize, grid=grid)))
    wanted = [name for name in rules if name not in result.values]
    found = reconstruct(
        network, start, {}, batches, only=wanted, solve=solve, work=work, views=views, progress=progress
    )
    for parameter, tensor in found.tensors.items():
        (result.values if parameter in rules else result.biases)[parameter] = tensor
    result.errors.update({parameter: error for parameter, (_, error) in found.errors.items()})
    return result


@torch.no_grad()
def round_apart(
    network: Network,
    ways: Mapping[str, Sequence[Tensor | GridRule]],
    batches: list[dict[str, Tensor]],
    *,
    rescale: Collection[str] = (),
    work: float = _WORK,
    progress: Progress = SILENT,
) -> dict[str, list[dict[str, Tensor]]]:
    """What several ways of rounding make of each weight of the float `network`, everything else left as it is: by
    weight, for each way the new values of the weight and of its layer's bias, which makes the mean output right.

    A way is a tensor (values found already) or a rule, by which `gptq` rounds in the metric of the layer's inputs.
    Tensors of the weights in `rescale` are multiplied so that each output channel spreads as in the float network. Of
    weights that `find_layers` leaves out there are the tensors, and the nearest points of the rules' grids.
    """
    tensors, found = network.tensors(), dict[str, list[dict[str, Tensor]]]()
    for name, several in ways.items():
        plain = Rounded()
        for way in several:
            if isinstance(way, Tensor):
                plain.values[name] = way
            else:
                _to_nearest(name, way, tensors[name].detach(), plain, "")
            found.setdefault(name, []).append({name: plain.values[name]})

    def solve(layer: Layer, moments: Moments, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
        shape, kind = tensors[layer.weight].shape, tensors[layer.weight].dtype
        hessian, _ = optimum(moments, weight, bias=bias)
        alive = network.masks[layer.weight].view_as(weight) if layer.weight in network.masks else None
        for changed, way in zip(found[layer.weight], ways[layer.weight], strict=True):
            if isinstance(way, GridRule):
                changed[layer.weight] = gptq(hessian, weight, way, alive=alive)[0].view(shape).to(kind)
            elif layer.weight in rescale:
                value, covariance = way.double().view_as(weight), moments.centred()[0]
                spread = [gram_error(covariance, v, torch.zeros_like(v)) for v in (weight, value)]
                gain = gain_between(*spread)
                changed[layer.weight] = (value * gain[..., None]).view(shape).to(kind)
            if layer.bias is not None:
                constant = constant_of(moments, changed[layer.weight].double().view_as(weight))
                changed[layer.bias] = constant.flatten().to(kind)
        return weight, None

    wanted = [layer.weight for layer in find_layers(network) if layer.weight in ways and layer.norm is None]
    reconstruct(network, network, {}, batches, only=wanted, solve=solve, work=work, progress=progress)
    return found


def _before_the_others(
    network: Network, name: str, rule: GridRule, batches: list[dict[str, Tensor]], order: Order, result: Rounded
) -> None:
    weight = network.tensors()[name].detach()
    hessian = _shared_hessian(network, name, batches)
    if hessian is None:
        _to_nearest(name, rule, weight, result, "neither of a plain convolution nor of linear layers")
        return
    alive = network.masks[name][None] if name in network.masks else None
    rounded, grid = gptq(hessian, weight[None], rule, alive=alive, order=order)
    result.grids[name], result.values[name] = grid, rounded[0].to(weight.dtype)


def _shared_hessian(network: Network, name: str, batches: list[dict[str, Tensor]]) -> Tensor | None:
    """What all readers of a weight (O, D) together mind when it changes (1, D, D); None if others than linear layers
    and embeddings read it."""
    readers = [u for n in network.graph_module.graph.nodes if n.op == "get_attr" and n.target == name for u in n.users]
    linear = [u for u in readers if operator_name(u) == "aten::linear" and _reads(u.args[1], name)]
    embeddings = [u for u in readers if operator_name(u) == "aten::embedding" and _reads(u.args[0], name)]
    if not linear or len(linear) + len(embeddings) < len(readers):
        return None
    columns = network.tensors()[name].shape[1]
    sources = [u.args[0].name for u in linear if isinstance(u.args[0], fx.Node)]
    lane = Lane(network, batches, hold=sources)
    total = torch.zeros(columns, columns, dtype=torch.float64)
    for source in sources:
        gram = torch.zeros_like(total)
        for x in lane.value(source):
            rows = x.reshape(-1, columns)
            gram += (rows.mT @ rows).double()
        total += gram / gram.diagonal().mean().clamp_min(1e-30)
    # An embedding gives out whole rows: all columns count alike there.
    share = _EMBEDDING if embeddings else 1e-3
    return (total + share * torch.eye(columns, dtype=torch.float64))[None]


def _reads(argument: object, name: str) -> bool:
    return isinstance(argument, fx.Node) and argument.op == "get_attr" and argument.target == name


def _to_nearest(name: str, rule: GridRule, weight: Tensor, result: Rounded, reason: str) -> None:
    rows = weight.flatten(1) if weight.ndim > 1 else weight[:, None]
    grid = rule.grid(rows)
    result.grids[name] = grid
    result.values[name] = _nearest(rows, rule, grid).view(weight.shape)
    result.nearest[name] = reason


def _nearest(rows: Tensor, rule: GridRule, grid: Grid) -> Tensor:
    """Rows on their grid; a rule's own rounding knows one scale a row only, so groups become rows."""
    columns = rows.shape[1]
    if grid.group:
        wide = functional.pad(rows, (0, -columns % grid.group)).reshape(-1, grid.group)
        plain = replace(grid, scale=grid.scale.flatten(), zero_point=grid.zero_point.flatten(), group=0)
        return rule.nearest(wide, plain).view(len(rows), -1)[:, :columns]
    return rule.nearest(rows, grid)
