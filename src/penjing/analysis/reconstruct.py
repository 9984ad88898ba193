"""Refitting the layers that lost inputs: sequential, asymmetric least squares, without labels or gradients.

In the order of the graph every such layer gets the weights that carry *its inputs in the pruned network* to *its
outputs in the original network*, so that each layer also makes up for what the layers before it did wrong (Zhang et
al. 2016, "Accelerating very deep convolutional networks", §3.2: asymmetric reconstruction). Where a layer ends in a
batch norm and a residual sum, the target is the original's sum less the pruned network's shortcut.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from penjing.analysis.lane import Lane, View
from penjing.network.channels.groups import Group, kept_indices
from penjing.network.edits import RemoveChannels
from penjing.network.network import Network
from penjing.progress import SILENT, Progress
from penjing.tensors.least_squares import Moments, refit

aten = torch.ops.aten
_CONVOLUTIONS = (aten.conv2d.default, aten.conv1d.default)
_SUMS = (aten.add.Tensor, aten.add_.Tensor)
#: Products kept below about this many multiply-accumulates a layer: more rows than that add time, not knowledge.
_WORK = 4e9

Kept = Mapping[str, Mapping[int, Tensor]]  #: parameter → dimension → the indices that stayed


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer that can be refitted, and what follows it.

    `norm` is the batch norm behind it and `total` the residual sum behind that (or None), `shortcut` the sum's other
    side.
    """

    node: fx.Node
    weight: str
    bias: str | None
    norm: fx.Node | None = None
    total: fx.Node | None = None
    shortcut: fx.Node | None = None

    @property
    def convolution(self) -> bool:
        return self.node.target in _CONVOLUTIONS

    @property
    def groups(self) -> int:
        """Into how many independent parts a convolution falls."""
        return int(self.node.args[6]) if self.convolution and len(self.node.args) > 6 else 1  # type: ignore[arg-type]

    @property
    def end(self) -> fx.Node:
        """The last node that still is an affine map of this layer's inputs, the sum left aside."""
        return self.norm or self.node


#: What finds a layer's weights (G, O, D): given the layer, the moments of its inputs and targets, the weights it has
#: (as the norm behind scales them), and whether it has a constant (which is then returned as well).
Solve = Callable[[Layer, Moments, Tensor, bool], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Refit:
    """New `tensors` by name, and for each refitted weight its output error before and after, relative to the target."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)


def find_layers(network: Network) -> list[Layer]:
    """Every layer of `network` that `reconstruct` could refit, in the order of the graph.

    Left out: weights that several nodes read, quantized ones, transposed and three-dimensional convolutions.
    """
    trainable = set(network.parameter_names)
    readers: dict[str, int] = {}
    for node in network.graph_module.graph.nodes:
        if node.op == "get_attr":
            readers[str(node.target)] = readers.get(str(node.target), 0) + len(node.users)

    def own(argument: Any) -> str | None:
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            name = str(argument.target)
            return name if readers[name] == 1 else None
        return None

    layers = []
    for node in network.graph_module.graph.nodes:
        if node.op != "call_function" or node.target not in (*_CONVOLUTIONS, aten.linear.default):
            continue
        weight, bias = own(node.args[1]), node.args[2] if len(node.args) > 2 else None
        if weight is None or weight not in trainable or (bias is not None and own(bias) is None):
            continue
        norm = _batch_norm_behind(node, own)
        end = norm or node
        total = next(iter(end.users)) if len(end.users) == 1 else None
        shortcut = None
        if total is not None and total.target in _SUMS and total.kwargs.get("alpha", 1) == 1:
            shortcut = next((a for a in total.args[:2] if a is not end and isinstance(a, fx.Node)), None)
        if shortcut is None:
            total = None
        layers.append(Layer(node, weight, own(bias), norm, total, shortcut))
    return layers


def _batch_norm_behind(node: fx.Node, own: Callable[[Any], str | None]) -> fx.Node | None:
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if user is None or user.target is not aten.batch_norm.default or user.args[0] is not node:
        return None
    return user if all(own(a) is not None for a in user.args[1:5]) else None


@torch.no_grad()
def reconstruct(
    original: Network,
    pruned: Network,
    kept: Kept,
    batches: list[dict[str, Tensor]],
    *,
    only: Collection[str] | None = None,
    damping: float = 1e-3,
    solve: Solve | None = None,
    work: float = _WORK,
    views: Mapping[str, Sequence[View]] | None = None,
    stands: Mapping[str, str] | None = None,
    progress: Progress = SILENT,
) -> Refit:
    """Refit the layers of `pruned` whose weights are named in `only` (None: every layer) so that it answers as
    `original`.

    `kept` tells which indices of the original's tensors are left, `batches` are bound inputs. Nothing is changed: the
    new values are returned. `solve` finds the weights (None: damped least squares); `work` bounds the multiply-
    accumulates that go into a layer's moments. `views` change what the nodes of `pruned` read of each other's values.
    `stands` names, by weight, the original's node that a layer is to do the same as, where the graph is another.
    """
    solve = solve or (lambda layer, moments, start, bias: refit(moments, start, bias=bias, damping=damping))
    layers = [layer for layer in find_layers(pruned) if only is None or layer.weight in only]
    ancestors = _ancestors(pruned.graph_module.graph)
    originals = {n.name: n for n in original.graph_module.graph.nodes}
    places = {layer.node.name: (stands or {}).get(layer.weight, layer.node.name) for layer in layers}
    layers = [layer for layer in layers if places[layer.node.name] in originals]
    ends = {layer: places.get(layer.end.name, layer.end.name) for layer in layers}
    targets = {*ends.values(), *(layer.total.name for layer in layers if layer.total is not None)}
    wanted = Lane(original, batches, hold=targets)
    shortcuts = {layer.shortcut.name for layer in layers if layer.shortcut is not None}
    given = Lane(pruned, batches, hold=shortcuts, views=views)
    result = Refit()
    unfitted = {layer.node for layer in layers}
    with progress.task("reconstructing layers", len(layers)) as advance:
        for place, layer in enumerate(layers):
            unfitted.discard(layer.node)
            shortcut = layer.shortcut
            # A shortcut that is itself still to be fitted is no basis yet: that layer will see the whole sum instead.
            if shortcut is not None and (({shortcut} | ancestors[shortcut]) & (unfitted | {layer.node})):
                shortcut = None
            _fit(layer, shortcut, ends[layer], wanted, given, kept, result, solve, work)
            if layer.total is not None and all(other.total is not layer.total for other in layers[place + 1 :]):
                wanted.release(layer.total.name)
            advance(1)
    return result


def refit_readers(
    network: Network,
    pruned: Network,
    removals: Sequence[RemoveChannels],
    smaller: Iterable[Group],
    batches: list[dict[str, Tensor]],
    progress: Progress = SILENT,
) -> Refit:
    """Refit what reads the groups that got `smaller` by `removals`, which made `pruned` of `network`."""
    gone = [(e.parameter, e.dim, e.indices) for e in removals]
    kept = {
        name: {dim: torch.as_tensor(i) for dim, i in dims.items()}
        for name, dims in kept_indices(network.groups(), gone).items()
    }
    # Where single weights are pinned to zero, a dense fit would be cut to pieces: those layers stay as they are.
    readers = {m.parameter for group in smaller for m in group.consumers} - set(network.masks)
    return reconstruct(network, pruned, kept, batches, only=readers, progress=progress)


def _ancestors(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    found: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        found[node] = set().union(*({s} | found[s] for s in node.all_input_nodes)) if node.all_input_nodes else set()
    return found


def _fit(
    layer: Layer,
    shortcut: fx.Node | None,
    like: str,
    wanted: Lane,
    given: Lane,
    kept: Kept,
    result: Refit,
    solve: Solve,
    work: float,
) -> None:
    weight = given.tensors[layer.weight].detach()
    groups = layer.groups
    source = layer.node.args[0]
    if not isinstance(source, fx.Node):
        return
    rows_kept = kept.get(layer.weight, {}).get(0)
    end = layer.total if shortcut is not None and layer.total is not None else layer.end
    wants = wanted.value(like if end is layer.end else end.name)
    inputs = given.seen(source.name, layer.node.name)
    others = given.seen(shortcut.name, end.name) if shortcut is not None else [None] * len(inputs)
    axis = 1 if layer.convolution else -1
    moments = Moments(groups, weight[0].numel(), weight.shape[0] // groups)
    limit = rows_wanted(weight.shape, groups, work) // len(inputs) + 1
    generator = torch.Generator().manual_seed(0)
    for x, want, other in zip(inputs, wants, others, strict=True):
        target = want if rows_kept is None else want.index_select(axis, rows_kept)
        target = target if other is None else target - other
        moments.add(*as_rows(layer, weight.shape, x, target, groups, limit, generator))
    scale = norm_scale(layer, given.tensors)
    start = (weight.flatten(1).double() * scale[:, None]).view(groups, -1, weight[0].numel())
    fitted, constant = solve(layer, moments, start, layer.bias is not None or layer.norm is not None)
    result.errors[layer.weight] = (_relative_error(moments, start), _relative_error(moments, fitted))
    new = _tensors_of(layer, given, moments, fitted, constant, weight)
    result.tensors.update(new)
    given.tensors.update(new)
    wanted.release(like)


def rows_wanted(shape: torch.Size, groups: int, work: float = _WORK) -> int:
    """How many rows of inputs are enough to fit a weight of `shape`."""
    columns = shape[1:].numel()
    return max(16 * columns, int(work / (columns**2 * groups)))


def as_rows(
    layer: Layer,
    shape: torch.Size,
    x: Tensor,
    target: Tensor,
    groups: int,
    limit: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a layer with a weight of `shape` as (groups, rows, columns), at most `limit` rows, drawn at
    random."""
    if not layer.convolution:
        rows, goal = x.reshape(1, -1, x.shape[-1]), target.reshape(1, -1, target.shape[-1])
        if rows.shape[1] > limit:
            chosen = torch.randint(0, rows.shape[1], (limit,), generator=generator)
            rows, goal = rows[:, chosen], goal[:, chosen]
        return rows, goal
    stride, padding, dilation = (_pair(layer.node, i, d) for i, d in ((3, 1), (4, 0), (5, 1)))
    kernel: tuple[int, ...] = tuple(shape[2:])
    if x.ndim == 3:  # one-dimensional: a picture of height 1
        x, target, kernel = x[:, :, None], target[:, :, None], (1, *kernel)
    goal = target.flatten(2)
    count, _, positions = goal.shape
    if count * positions > limit and dilation == (1, 1):
        chosen = torch.randperm(positions, generator=generator)[: max(1, limit // count)]
        windows = functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        windows = windows.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])
        across = windows.shape[3]
        columns = windows[:, :, chosen // across, chosen % across].permute(0, 1, 3, 4, 2).flatten(1, 3)
        goal = goal.index_select(2, chosen)
    else:
        columns = functional.unfold(x, kernel, dilation=dilation, padding=padding, stride=stride)
    return _by_group(columns, groups), _by_group(goal, groups)


def _by_group(values: Tensor, groups: int) -> Tensor:
    """(samples, groups × columns, positions) → (groups, samples × positions, columns), the last two as a transposed
    view."""
    count, wide, positions = values.shape
    return values.reshape(count, groups, wide // groups, positions).permute(1, 2, 0, 3).flatten(2).mT


def _pair(node: fx.Node, position: int, default: int) -> tuple[int, int]:
    value = node.args[position] if len(node.args) > position else default
    values = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]  # type: ignore[arg-type]
    if node.target is aten.conv1d.default:
        return (default, values[0])
    return (values[0], values[-1])


def norm_scale(layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor:
    """The factor by which the batch norm behind a layer multiplies each channel (float64); ones without a batch
    norm."""
    if layer.norm is None:
        return torch.ones(tensors[layer.weight].shape[0], dtype=torch.float64)
    gamma, variance = (tensors[str(layer.norm.args[i].target)].detach().double() for i in (1, 4))  # type: ignore[union-attr]
    scale: Tensor = gamma / (variance + float(layer.norm.args[7])).sqrt()  # type: ignore[arg-type]
    return scale


def _tensors_of(
    layer: Layer, lane: Lane, moments: Moments, fitted: Tensor, constant: Tensor | None, weight: Tensor
) -> dict[str, Tensor]:
    """The fitted map as tensors of the graph. With a batch norm behind, its statistics are set to the true ones of the
    samples, so that the layer does the same in eval and, nearly, in training."""
    flat = fitted.reshape(weight.shape[0], -1)
    if layer.norm is None:
        new = {layer.weight: flat}
        if layer.bias is not None and constant is not None:
            new[layer.bias] = constant.flatten()
    else:
        scale = norm_scale(layer, lane.tensors)
        tiny = scale.abs() < 1e-3 * scale.abs().mean()
        back = torch.where(tiny, torch.ones_like(scale), 1 / torch.where(tiny, torch.ones_like(scale), scale))
        inner = flat * back[:, None]
        gram, _ = moments.centred()
        groups = gram.shape[0]
        by_group = inner.view(groups, -1, inner.shape[1])
        variance = ((by_group @ gram) * by_group).sum(-1).flatten().clamp_min(0) / max(moments.rows, 1)
        mean = (by_group @ (moments.sum_x / moments.rows)[..., None])[..., 0].flatten()
        names = [str(a.target) for a in layer.norm.args[1:5]]  # type: ignore[union-attr]
        bias = lane.tensors[layer.bias].double() if layer.bias is not None else torch.zeros_like(mean)
        gamma = (variance + float(layer.norm.args[7])).sqrt() / back  # type: ignore[arg-type]
        beta = (constant.flatten() if constant is not None else 0) + mean / back
        new = {layer.weight: inner, **dict(zip(names, (gamma, beta, mean + bias, variance), strict=True))}
    return {n: t.reshape(lane.tensors[n].shape).to(lane.tensors[n].dtype) for n, t in new.items()}


def _relative_error(moments: Moments, weight: Tensor) -> float:
    gram, cross = moments.centred()
    energy = moments.energy.sum()
    error = energy - 2 * (weight.mT * cross).sum() + ((weight @ gram) * weight).sum()
    return float((error / energy.clamp_min(1e-12)).clamp_min(0))
