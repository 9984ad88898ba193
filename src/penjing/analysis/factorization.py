"""Layers whose weights can be written as products: which, how well, and the layers that then stand in their place."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from penjing.analysis import operators
from penjing.analysis.lane import Lane
from penjing.analysis.operators import argument, convolution_form, operator_name
from penjing.analysis.reconstruct import Layer, as_rows, rows_wanted
from penjing.analysis.weights import Weight, find_weights
from penjing.errors import DataError
from penjing.network import graph as flat
from penjing.network.edits import Call, ReplaceLayer
from penjing.network.network import Network
from penjing.progress import SILENT, Progress
from penjing.tensors.least_squares import Moments, damped_hessian
from penjing.tensors.low_rank import FORMS, Decomposition, Option, Svd, dense

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
#: Convolutions whose inputs `as_rows` can lay out.
_WATCHED = (aten.conv1d.default, aten.conv2d.default, aten.linear.default)
_DAMPING = 1e-3


@dataclass(frozen=True)
class Factorable:
    """A weight that can be written as a product, and the nodes that read it."""

    weight: str
    nodes: tuple[fx.Node, ...]

    @property
    def tied(self) -> bool:
        """Whether rows are looked up in it and it multiplies as well."""
        return len({n.target is aten.embedding.default for n in self.nodes}) > 1

    @property
    def transposed(self) -> bool:
        """Whether it is stored inputs first."""
        return self.nodes[0].target in TRANSPOSED

    def outputs_first(self, tensor: Tensor) -> Tensor:
        """The weight as (O, I, *kernel); and back."""
        return tensor.transpose(0, 1) if self.transposed else tensor

    def forms(self, wanted: Sequence[str], tensor: Tensor) -> list[str]:
        """Those of the `wanted` forms that its shape allows; what has no kernel to speak of has two factors."""
        if tensor[0, 0].numel() == 1:
            return ["svd"]
        able = {"tucker2", "svd"} | ({"cp"} if not self.transposed else set())
        if tensor.ndim == 4 and min(tensor.shape[2:]) > 1 and not self.transposed:
            able.add("spatial")
        return [w for w in wanted if w in able] or ["tucker2"]


def find_factorable(network: Network) -> tuple[list[Factorable], dict[str, str]]:
    """Weights that can be written as products, in the order of the graph, and why others cannot."""
    known = find_weights(network)
    left = {name: why for name, why in known.left.items() if len(network.tensors()[name].shape) > 1}
    found = []
    for weight in known.found.values():
        why = _unfit(network, weight)
        if why:
            left[weight.name] = why
        else:
            found.append(Factorable(weight.name, tuple(r.node for r in weight.readers)))
    return found, left


def _unfit(network: Network, weight: Weight) -> str:
    if weight.name in network.masks:
        return "some of its weights are pinned to zero, factors are dense"
    source = weight.readers[0].source
    if any(r.through or r.source is not source for r in weight.readers) or len(source.users) > len(weight.readers):
        return "read in pieces or through views"
    for reader in weight.readers:
        node, name = reader.node, reader.operator
        if name in operators.CONVOLUTIONS:
            if convolution_form(node)[1] > 1:
                return "a grouped convolution, whose kernels have few inputs each"
            if len(weight.readers) > 1:
                return "several convolutions share it"
            if node.target not in (*CONVOLUTIONS, *TRANSPOSED) or node.kwargs:
                return "a convolution whose padding is given by name"
        elif node.target not in (aten.linear.default, aten.embedding.default) or node.kwargs:
            return f"{name.removeprefix('aten::')} cannot be written as a chain of layers"
    return ""


def decompose(
    network: Network,
    layers: Sequence[Factorable],
    batches: Sequence[Mapping[str, Tensor]],
    forms: Sequence[str],
    *,
    each: int = 1,
    progress: Progress = SILENT,
) -> dict[str, Ways]:
    """Ways to write the weights of `layers` as products, weighted by what the layers see in `batches` (bound inputs;
    none: not weighted).

    Inputs of layers that add a constant are taken about their mean. Rows of an embedding weigh as often as they are
    looked up, and once more. Of a table that is looked up in and multiplied with, the relative errors of both uses are
    summed, all rows counting alike. Three-dimensional and transposed convolutions are not weighted, only the mean of
    their outputs is kept.
    """
    found: dict[str, Ways] = {}
    tensors = network.tensors()
    readers = {node: layer for layer in layers for node in layer.nodes}
    unread = {layer.weight: len(layer.nodes) for layer in layers}
    seen: dict[str, _Seen] = {layer.weight: _Seen() for layer in layers}
    lane = Lane(network, batches)
    with progress.task("factorizing layers", len(layers)) as advance:
        for node in network.graph_module.graph.nodes:
            layer = readers.get(node)
            if layer is None:
                continue
            weight = layer.outputs_first(tensors[layer.weight].detach())
            if batches:
                seen[layer.weight].watch(lane, node, layer.weight, weight)
            unread[layer.weight] -= 1
            if not unread[layer.weight]:
                watched = seen.pop(layer.weight)
                gram, rows = watched.weighting(weight, layer.tied)
                if not all(torch.isfinite(t).all() for t in (weight, gram) if t is not None):
                    raise DataError(
                        f"{layer.weight} or what its layer sees holds NaN or infinite numbers",
                        hint="look at the weights and the samples",
                    )
                several = [
                    Svd(weight, gram, rows, each=each) if form == "svd" else FORMS[form](weight, gram, each=each)
                    for form in layer.forms(forms, weight)
                ]
                alone = len(layer.nodes) == 1
                found[layer.weight] = Ways(
                    layer, several, watched.mean if alone else None, _constant_of(node) if alone else None
                )
                advance(1)
    return found


@dataclass(frozen=True)
class Ways:
    """Ways to write one weight as a product; `mean` (D,) is that of the inputs that the layer saw, `constant` names the
    tensor that can make good for it, and whether the outputs grow with it."""

    layer: Factorable
    decompositions: Sequence[Decomposition]
    mean: Tensor | None = None
    constant: tuple[str, int] | None = None

    def factors(self, option: Option) -> tuple[Tensor, ...]:
        """The factors of an option of one of the decompositions."""
        return next(d for d in self.decompositions if any(o is option for o in d.options)).factors(option)

    def instead(self, factors: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of the weight and of the constant behind it that do what the factors do."""
        name, stored = self.layer.weight, tensors[self.layer.weight].detach()
        weight = self.layer.outputs_first(stored)
        other = dense(factors).reshape(weight.shape)
        return {name: self.layer.outputs_first(other).contiguous(), **self.shifted(weight - other, tensors)}

    def shifted(self, lost: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The constant with which the mean output is the same, though `lost` (O, I, *kernel) is gone of the weight."""
        if self.mean is None or self.constant is None:
            return {}
        name, sign = self.constant
        held = tensors[name].detach()
        return {name: held + sign * (lost.double().flatten(1) @ self.mean).to(held.dtype)}


def _constant_of(node: fx.Node) -> tuple[str, int] | None:
    """What adds to the outputs of a layer and nothing else: its bias, or the mean of the batch norm behind it."""
    if node.target is aten.embedding.default:
        return None
    bias = node.args[2] if len(node.args) > 2 else None
    if isinstance(bias, fx.Node):
        return (str(bias.target), 1) if bias.op == "get_attr" and len(bias.users) == 1 else None
    behind = next(iter(node.users)) if len(node.users) == 1 else None
    if behind is None or operator_name(behind) != "aten::batch_norm" or behind.args[0] is not node:
        return None
    mean = behind.args[3]
    known = isinstance(mean, fx.Node) and mean.op == "get_attr" and len(mean.users) == 1
    return (str(mean.target), -1) if known else None  # type: ignore[union-attr]


class _Seen:
    """What the layers that read one weight see: moments of inputs, rows looked up."""

    def __init__(self) -> None:
        self.gram: Tensor | None = None
        self.mean: Tensor | None = None
        self.counts: Tensor | None = None

    def watch(self, lane: Lane, node: fx.Node, name: str, weight: Tensor) -> None:
        if node.target is aten.embedding.default:
            index = node.args[1]
            values = lane.value(index.name) if isinstance(index, fx.Node) else []
            counts = torch.bincount(torch.cat([v.flatten() for v in values]), minlength=len(weight)).double()
            self.counts = counts if self.counts is None else self.counts + counts
            return
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return
        inputs = lane.value(source.name)
        if node.target not in _WATCHED:
            # By channel, borders aside; a tap of a transposed kernel falls on one in as many outputs as strides make.
            total = sum((x.double().movedim(1, 0).flatten(1).mean(1) * len(x) for x in inputs), torch.zeros(()))
            spread = math.prod(sizes_of(node, 3, weight.ndim - 2, 1)) if node.target in TRANSPOSED else 1
            mean = total / sum(map(len, inputs)) / spread
            self.mean = mean.repeat_interleave(weight[0, 0].numel())
            return
        layer = Layer(node, name, None)
        moments = Moments(1, weight[0].numel(), 0)
        limit = rows_wanted(weight.shape, 1) // len(inputs) + 1
        generator = torch.Generator().manual_seed(0)
        for x, out in zip(inputs, lane.value(node.name), strict=True):
            rows, target = as_rows(layer, weight.shape, x, out, 1, limit, generator)
            moments.add(rows, target[..., :0])
        gram = damped_hessian(moments, _constant_of(node) is not None, _DAMPING)[0]
        self.mean = moments.sum_x[0] / max(moments.rows, 1)
        flat_weight = weight.double().flatten(1)
        gram = gram / ((flat_weight @ gram) * flat_weight).sum().clamp_min(1e-300)
        self.gram = gram if self.gram is None else self.gram + gram

    def weighting(self, weight: Tensor, tied: bool) -> tuple[Tensor | None, Tensor | None]:
        """Moments of the inputs and weights of the rows."""
        if self.gram is not None and tied:
            return self.gram + torch.eye(len(self.gram)).double() / weight.double().square().sum(), None
        return self.gram, None if self.counts is None or tied else self.counts + 1


def factor_names(weight: str, count: int, taken: Mapping[str, Any]) -> list[str]:
    """`layer.weight` → `layer.0.weight`, `layer.1.weight`, …, numbered on from what is there already."""
    stem, _, leaf = weight.rpartition(".")
    numbered = (f"{stem}.{i}.{leaf}".lstrip(".") for i in itertools.count())
    return list(itertools.islice((name for name in numbered if name not in taken), count))


def replacement(
    layer: Factorable, option: Option, factors: Sequence[Tensor], taken: Mapping[str, Tensor]
) -> tuple[list[ReplaceLayer], list[str]]:
    """Edits that put the `factors` of `option` in the place of a weight wherever it is read, and the factors' names in
    the order in which an input meets them."""
    trains = taken[layer.weight].requires_grad
    looked_up = all(n.target is aten.embedding.default for n in layer.nodes)
    if layer.transposed:
        factors = [f.transpose(0, 1).contiguous() if i == option.core else f for i, f in enumerate(factors)]
    elif looked_up:
        factors = [factors[1], factors[0].mT.contiguous()]
    names = factor_names(layer.weight, len(factors), taken)
    held = {name: torch.nn.Parameter(f.detach(), requires_grad=trains) for name, f in zip(names, factors, strict=True)}
    edits = [ReplaceLayer(node=n.name, calls=_chain(n, option, names, layer.tied), tensors=held) for n in layer.nodes]
    return edits, names


def _chain(node: fx.Node, option: Option, names: Sequence[str], tied: bool) -> tuple[Call, ...]:
    if node.target is aten.embedding.default:
        rows, columns = (names[1], names[0]) if tied else (names[0], names[1])
        look = call_of(node.target, f"@{rows}", *(flat.encode(a) for a in node.args[1:]))
        return look, call_of(aten.matmul.default if tied else aten.linear.default, "%", f"@{columns}")
    bias = reference(node.args[2]) if len(node.args) > 2 else None
    if node.target is aten.linear.default:
        return call_of(node.target, "%", f"@{names[0]}"), call_of(node.target, "%", f"@{names[1]}", bias)
    return _convolutions(node, option, names, bias)


def _convolutions(node: fx.Node, option: Option, names: Sequence[str], bias: Any) -> tuple[Call, ...]:
    sizes = len(option.shapes[0]) - 2
    ones, zeros = [1] * sizes, [0] * sizes
    transposed = node.target in TRANSPOSED
    stride, padding = sizes_of(node, 3, sizes, 1), sizes_of(node, 4, sizes, 0)
    dilation = sizes_of(node, 7 if transposed else 5, sizes, 1)
    plain = CONVOLUTIONS[sizes - 1]
    if option.form == "spatial":
        steps = [
            ([stride[0], 1], [padding[0], 0], [dilation[0], 1], 1),
            ([1, stride[1]], [0, padding[1]], [1, dilation[1]], 1),
        ]
    else:
        steps = [(ones, zeros, ones, 1)] * len(names)
        steps[option.core] = (stride, padding, dilation, option.ranks[0] if option.form == "cp" else 1)
    calls = []
    for i, (name, (s, p, d, groups)) in enumerate(zip(names, steps, strict=True)):
        constant = bias if i == len(names) - 1 else None
        if transposed and i == option.core:
            extra = sizes_of(node, 5, sizes, 0)
            calls.append(call_of(node.target, "%", f"@{name}", constant, s, p, extra, groups, d))
        else:
            calls.append(call_of(plain, "%", f"@{name}", constant, s, p, d, groups))
    return tuple(calls)


def call_of(operator: Any, *arguments: Any) -> Call:
    return Call(operator=flat.target_name(operator), arguments=arguments)


def reference(value: Any) -> Any:
    """An argument of the graph as an argument of a `Call`."""
    return f"@{value.target}" if isinstance(value, fx.Node) and value.op == "get_attr" else flat.encode(value)


def sizes_of(node: fx.Node, position: int, sizes: int, default: int) -> list[int]:
    value = argument(node, position, "", default)
    values = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return values * sizes if len(values) == 1 else values
