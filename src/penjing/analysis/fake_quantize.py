"""Fake quantization: a float Network whose weights and activations pass through learned grids, and the way back.

The operators of tensors/learned_grids.py are put into the graph, and the steps of narrow grids become parameters of the
network, `<tensor>_step` (and `<value>_offset` where a lower end is learned), of one dimension or none. What trains a
Network trains this one too; afterwards `Simulated.weights` and `Simulated.activations` give the grids and the values on
them, for a float network that is then quantized in earnest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from penjing.analysis.level_grids import level_grid
from penjing.analysis.operators import operator_name
from penjing.analysis.placement import Placement, Quantizer
from penjing.analysis.weight_grids import limits
from penjing.network import graph as flat
from penjing.network.network import Network
from penjing.tensors import codebooks, grids
from penjing.tensors.grids import Grid, Ranges
from penjing.tensors.learned_grids import learned_levels, learned_range, learned_sign, learned_step, spread, widest_step

#: Wider grids cover all values: they have codes to spare, and with few weights a scale a step that learns runs away.
_LEARNED = 7
_TRANSPOSITIONS = ("aten::t", "aten::transpose", "aten::permute", "aten::numpy_T")


@dataclass(frozen=True)
class WeightGrid:
    """A weight's grid; with `binary`, of the two points minus and plus its scale, with `levels` (K,) of these times its
    scale. The scales of a `widest` grid follow the largest weights instead of being learned."""

    grid: Grid
    binary: bool = False
    widest: bool = False
    levels: Tensor | None = None

    @property
    def most(self) -> float:
        """How many times its scale the largest value is."""
        return self.grid.quant_max if self.levels is None else 1.0

    def rounded(self, x: Tensor) -> Tensor:
        """`x` on the grid: what the operators of tensors/learned_grids.py give."""
        scale = spread(self.grid.scale.flatten(), x, self.grid.axis, self.grid.group)
        if self.binary:
            return x.sign() * scale
        if self.levels is not None:
            return codebooks.nearest(x / scale, self.levels) * scale
        return grids.fake_quantize(x, self.grid)


def weight_grid(
    x: Tensor, dtype: str, *, axis: int | None, group: int = 0, ranges: Ranges = "mse", levels: str = "uniform"
) -> WeightGrid:
    """The grid to start from: of least squared error; for binary weights the mean magnitude (Rastegari et al. 2016).

    `levels` other than "uniform" are those of `level_grids`, without groups. Raises ValueError when `x` is empty or not
    finite.
    """
    low, high = limits(dtype, symmetric=True)
    if levels != "uniform":
        scaled, _, table = level_grid(x, levels, dtype, axis=axis)
        return WeightGrid(scaled, widest=high > _LEARNED, levels=table)
    ranges = ranges if high <= _LEARNED else "minmax"
    grid = grids.tensor_grid(x, low, high, axis=axis, group=group, ranges=ranges)
    if high > _LEARNED:
        return WeightGrid(grid, widest=True)
    if dtype != "binary":
        return WeightGrid(_refined(x, grid))
    ones = WeightGrid(replace(grid, scale=torch.ones_like(grid.scale)), True)
    return WeightGrid(_fitted(x, ones.rounded(x), grid), True)


def _refined(x: Tensor, grid: Grid) -> Grid:
    """A few turns of rounding and refitting the scale by least squares: each lowers the squared error."""
    if grid.zero_point.any():
        return grid
    for _ in range(4):
        grid = _fitted(x, grids.quantize(x, grid, torch.float32), grid)
    return grid


def _fitted(x: Tensor, integers: Tensor, grid: Grid) -> Grid:
    """The grid whose scale brings `integers` nearest to `x`; a scale without any integers but zero stays."""
    both = _sums(x * integers, grid), _sums(integers * integers, grid)
    scale = torch.where(both[1] > 0, both[0] / both[1].clamp_min(1e-12), grid.scale)
    return replace(grid, scale=torch.where(scale > 0, scale, grid.scale).to(torch.float32))


def _sums(x: Tensor, grid: Grid) -> Tensor:
    if grid.group:
        rows = x.reshape(len(x), -1)
        count = grid.scale.shape[1]
        return nn.functional.pad(rows, (0, count * grid.group - rows.shape[1])).view(len(x), count, -1).sum(2)
    return x.sum() if grid.axis is None else x.sum([d for d in range(x.ndim) if d != grid.axis])


@dataclass(frozen=True)
class Simulated:
    """A fake-quantized Network, the grids it started from, and by number the quantizers that share one."""

    network: Network
    started: Mapping[str, WeightGrid]
    quantizers: Mapping[int, tuple[str, Grid]]  # the name of the parameters, and the grid at the start

    def weights(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, WeightGrid]]:
        """By name, the weights among `tensors` on their grids, and these as they were learned. Zeros stay zero."""
        found = {}
        for name, start in self.started.items():
            latent, grid = tensors[name].detach(), start.grid
            if start.widest:
                step = widest_step(latent, None if grid.group else grid.axis, grid.group, start.most)
            else:
                step = tensors[f"{name}_step"].detach().clamp_min(1e-8)
            learned = replace(start, grid=replace(grid, scale=step.view(grid.scale.shape).clone()))
            found[name] = (learned.rounded(latent), learned)
        return found

    def activations(self, tensors: Mapping[str, Tensor]) -> dict[int, Grid]:
        """By number, the activation grids as they were learned."""
        found = {}
        for number, (name, start) in self.quantizers.items():
            step = tensors[f"{name}_step"].detach().clamp_min(1e-8).clone()
            zero = start.zero_point
            if f"{name}_offset" in tensors:
                levels = start.quant_max - start.quant_min + 1
                lowest = -(tensors[f"{name}_offset"].detach() / step).round().clamp(1 - levels, 0)
                zero = (start.quant_min + lowest).to(torch.int64)
            found[number] = replace(start, scale=step, zero_point=zero)
        return found


def simulate(
    network: Network,
    weights: Mapping[str, WeightGrid],
    quantizers: Collection[Quantizer] = (),
    activations: Mapping[int, Grid] | None = None,
) -> Simulated:
    """`network` with its `weights` (by name) and the values of `quantizers` on learned grids that start as given.

    `activations` are per-tensor grids by the quantizers' grid numbers; a number that is missing is not simulated.
    """
    module = flat.copy(network.graph_module)
    graph, tensors = module.graph, network.tensors()
    nodes = {n.name: n for n in graph.nodes}
    for name, weight in weights.items():
        reads = [n for n in graph.nodes if n.op == "get_attr" and n.target == name]
        if not weight.widest:
            tensors[f"{name}_step"] = nn.Parameter(weight.grid.scale.detach().flatten().clone())
        zero = weight.grid.zero_point
        if zero.any():
            tensors[f"{name}_zero"] = zero.flatten().float()
        if weight.levels is not None:
            tensors[f"{name}_levels"] = weight.levels
        for read in reads:
            _weight_node(graph, read, weight, bool(zero.any()))
    names: dict[int, tuple[str, Grid]] = {}
    for q in quantizers:
        if activations is None or q.grid not in activations:
            continue
        name, grid = names.setdefault(q.grid, (q.value, activations[q.grid]))
        tensors[f"{name}_step"] = nn.Parameter(grid.scale.detach().reshape(()).clone())
        if _signed(grid):
            lowest = (grid.quant_min - grid.zero_point) * grid.scale
            tensors[f"{name}_offset"] = nn.Parameter(lowest.detach().reshape(()).to(torch.float32))
        _activation_node(graph, nodes[q.value], q.users, name, grid)
    made = network.replace(graph_module=flat.build(graph, tensors))
    made.graph_module.graph.lint()
    return Simulated(made, dict(weights), names)


def simulated_value(node: fx.Node) -> fx.Node:
    """The value that `node` stands for: what is in front of it, if it puts an activation on a learned grid."""
    source = node.args[0] if node.target in (learned_step, learned_range) else None
    return source if isinstance(source, fx.Node) and source.op != "get_attr" else node


def _signed(grid: Grid) -> bool:
    return int(grid.zero_point) != grid.quant_min


def _weight_node(graph: fx.Graph, read: fx.Node, weight: WeightGrid, shifted: bool) -> None:
    # Right in front of its first user: where a graph is cut into blocks, a layer then stays in one piece.
    users, grid = list(read.users), weight.grid
    first = next(n for n in graph.nodes if n in read.users)
    axis = None if grid.group else grid.axis
    with graph.inserting_before(first):
        if weight.widest:
            step = graph.call_function(widest_step, (read, axis, grid.group, weight.most))
        else:
            step = graph.create_node("get_attr", f"{read.target}_step")
        if weight.binary:
            new = graph.call_function(learned_sign, (read, step, axis, grid.group))
        elif weight.levels is not None:
            levels = graph.create_node("get_attr", f"{read.target}_levels")
            new = graph.call_function(learned_levels, (read, step, levels, axis))
        else:
            zero = graph.create_node("get_attr", f"{read.target}_zero") if shifted else None
            limits = (grid.quant_min, grid.quant_max)
            new = graph.call_function(learned_step, (read, step, zero, axis, grid.group, *limits, False))
    for user in users:
        user.replace_input_with(read, new)  # not of what was made here: those were no users yet


def _activation_node(graph: fx.Graph, node: fx.Node, users: tuple[str, ...] | None, name: str, grid: Grid) -> None:
    chosen = [u for u in node.users if users is None or u.name in users]
    levels = grid.quant_max - grid.quant_min + 1
    place = [n for n in graph.nodes if n.op == "placeholder"][-1] if node.op == "placeholder" else node
    with graph.inserting_after(place):
        step = graph.create_node("get_attr", f"{name}_step")
    with graph.inserting_after(step):
        if _signed(grid):
            offset = graph.create_node("get_attr", f"{name}_offset")
            with graph.inserting_after(offset):
                new = graph.call_function(learned_range, (node, step, offset, levels))
        else:
            new = graph.call_function(learned_step, (node, step, None, None, 0, 0, levels - 1, True))
    for user in chosen:
        user.replace_input_with(node, new)


def weight_readers(graph: fx.Graph) -> dict[str, set[str]]:
    """The nodes that use each tensor, looked for behind transpositions."""
    found: dict[str, set[str]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            waiting = list(node.users)
            while waiting:
                user = waiting.pop()
                if operator_name(user) in _TRANSPOSITIONS:
                    waiting += list(user.users)
                else:
                    found.setdefault(str(node.target), set()).add(user.name)
    return found


def quantizable(network: Network, placement: Placement) -> dict[str, int | None]:
    """The weights that only layers of `placement` read, each with the axis of its output channels (None where its
    layers differ in it)."""
    readers: dict[str, set[str]] = {}
    axes: dict[str, set[int | None]] = {}
    for layer in placement.layers:
        if layer.parameter is not None:
            readers.setdefault(layer.parameter, set()).add(layer.node)
            axes.setdefault(layer.parameter, set()).add(layer.axis)
    used = weight_readers(network.graph_module.graph)
    return {
        name: next(iter(axes[name])) if len(axes[name]) == 1 else None
        for name, nodes in readers.items()
        if used[name] <= nodes
    }
