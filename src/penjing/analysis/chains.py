"""Layers that follow each other with nothing in between, and the one layer that computes the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from penjing.analysis.factorization import CONVOLUTIONS, TRANSPOSED, call_of, reference, sizes_of
from penjing.network.edits import Call, ReplaceLayer
from penjing.network.network import Network
from penjing.tensors.low_rank import merged

aten = torch.ops.aten
_NUMBERED = re.compile(r"(.+)\.(\d+)\.([^.]+)")


@dataclass(frozen=True)
class _Shape:
    """How a convolution moves over its input, by dimension; `extra` is the output padding of a transposed one."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    extra: tuple[int, ...] = ()

    @property
    def point(self) -> bool:
        """Whether it looks at one position and keeps every one."""
        plain = not self.transposed and self.groups == 1 and not any(self.padding)
        return plain and max((*self.kernel, *self.stride)) == 1


@dataclass(frozen=True)
class Chain:
    """Layers after one another, `nodes`, with their weights by name, and `shape`, how the one convolution that does the
    same moves (None: no convolution). Where the product is a table that rows are looked up in as well, `looking` are
    the nodes that do so."""

    nodes: tuple[fx.Node, ...]
    weights: tuple[str, ...]
    shape: _Shape | None = None
    looking: tuple[fx.Node, ...] = ()

    @property
    def name(self) -> str:
        """What the weight of the one layer is called: `layer.weight` where they are `layer.0.weight` and so on."""
        split = [_NUMBERED.fullmatch(w) for w in self.weights]
        parts = [(m[1], int(m[2]), m[3]) for m in split if m is not None]
        whole = [(parts[0][0], i, parts[0][2]) for i in range(len(split))] if parts else []
        return f"{parts[0][0]}.{parts[0][2]}" if parts and sorted(parts) == whole else self.weights[-1]

    @property
    def made(self) -> bool:
        """Whether it looks like what `Factorize` makes: factors named by number in the place of one weight."""
        return self.name not in self.weights


def find_chains(network: Network) -> list[Chain]:
    """The longest chains of `network`: linear layers, an embedding and linear layers, convolutions of which no two look
    at several positions along one dimension. Weights must be trainable, dense and read once, but for the two factors of
    a table that is looked up in and multiplied with."""
    tensors, free = network.tensors(), set(network.parameter_names) - set(network.masks)
    reads: dict[str, int] = {}
    for node in network.graph_module.graph.nodes:
        if node.op == "get_attr":
            reads[str(node.target)] = reads.get(str(node.target), 0) + len(node.users)
    ending: dict[fx.Node, Chain] = {}
    for node in network.graph_module.graph.nodes:
        single = _single(node, tensors)
        if single is None or single.weights[0] not in free or reads[single.weights[0]] > 1:
            continue
        before = node.args[0]
        chain = ending.get(before) if node.target is not aten.embedding.default else None
        joined = _joined(chain, single) if chain is not None and len(before.users) == 1 else None
        if joined is not None:
            del ending[before]
        ending[node] = joined or single
    return [*(chain for chain in ending.values() if len(chain.nodes) > 1), *_tables(network, free)]


def _tables(network: Network, free: set[str]) -> Iterator[Chain]:
    """Two factors of which both a table of rows and a linear layer are made."""
    readers: dict[str, list[fx.Node]] = {}
    for node in network.graph_module.graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(str(node.target), []).extend(node.users)
    for last in network.graph_module.graph.nodes:
        first = last.args[0] if last.target is aten.linear.default and not last.kwargs else None
        if not isinstance(first, fx.Node) or first.target is not aten.linear.default or first.kwargs:
            continue
        names = [str(n.args[1].target) for n in (first, last) if n.args[1].op == "get_attr"]  # type: ignore[union-attr]
        if len(names) < 2 or not free.issuperset(names) or _bias(first) is not None or len(first.users) > 1:
            continue
        (inner, outer) = ([n for n in readers[name] if n not in (first, last)] for name in names)
        if len(inner) != 1 or len(outer) != 1:
            continue
        product, rows = inner[0], outer[0]
        if rows.target is aten.embedding.default and product.target is aten.matmul.default and len(rows.users) == 1:
            if product.args[0] is rows and str(rows.args[0].target) == names[1]:  # type: ignore[union-attr]
                yield Chain((first, last), tuple(names), looking=(rows, product))


def _single(node: fx.Node, tensors: Mapping[str, Tensor]) -> Chain | None:
    looks = node.target is aten.embedding.default
    known = looks or node.target in (aten.linear.default, *CONVOLUTIONS, *TRANSPOSED)
    if not known or node.op != "call_function" or node.kwargs:
        return None
    weight, bias = node.args[0 if looks else 1], None if looks else _bias(node)
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    if isinstance(bias, fx.Node) and bias.op != "get_attr":
        return None
    name = str(weight.target)
    if looks or node.target is aten.linear.default:
        return Chain((node,), (name,)) if tensors[name].ndim == 2 else None
    transposed = node.target in TRANSPOSED
    kernel = tuple(tensors[name].shape[2:])
    stride, padding, dilation, extra = (
        tuple(sizes_of(node, place, len(kernel), default))
        for place, default in ((3, 1), (4, 0), (7 if transposed else 5, 1), (5, 0))
    )
    groups = int(node.args[6]) if len(node.args) > 6 else 1  # type: ignore[arg-type]
    shape = _Shape(kernel, stride, padding, dilation, groups, transposed, extra if transposed else ())
    return Chain((node,), (name,), shape) if groups == 1 or tensors[name].shape[:2] == (groups, 1) else None


def _bias(node: fx.Node) -> Any:
    return node.args[2] if len(node.args) > 2 and node.target is not aten.embedding.default else None


def _joined(chain: Chain, last: Chain) -> Chain | None:
    """The chain with one more layer, if one layer can do what both do."""
    a, b = chain.shape, last.shape
    both = chain.nodes + last.nodes, chain.weights + last.weights
    if a is None or b is None:
        return Chain(*both) if a is None and b is None else None
    if a.groups > 1 or len(a.kernel) != len(b.kernel):
        return None
    if any(_bias(node) is not None for node in chain.nodes) and (any(b.padding) or b.transposed):
        return None  # a constant that ends at the border
    if a.point and not (b.transposed and b.groups > 1):
        return Chain(*both, replace(b, groups=1))
    if b.point:
        return Chain(*both, a)
    if a.transposed or b.transposed or b.groups > 1:
        return None
    rows = []
    for one, other in zip(_by_dimension(a), _by_dimension(b), strict=True):
        still = (1, 1, 0)
        if one[:3] == still:
            rows.append(other)
        elif other[:3] == still:
            rows.append(one)
        else:
            return None
    kernel, stride, padding, dilation = (tuple(column) for column in zip(*rows, strict=True))
    return Chain(*both, _Shape(kernel, stride, padding, dilation))


def _by_dimension(s: _Shape) -> list[tuple[int, int, int, int]]:
    return list(zip(s.kernel, s.stride, s.padding, s.dilation, strict=True))


def as_one(network: Network, chain: Chain) -> tuple[ReplaceLayer, ...]:
    """The edits that put one layer in the place of a chain; worked out in float64."""
    tensors = network.tensors()
    weight, bias = _outputs_first(chain.nodes[0], tensors[chain.weights[0]]), _constant(chain.nodes[0], tensors)
    looks = chain.nodes[0].target is aten.embedding.default
    if looks:
        weight = weight.mT
    for node, name in zip(chain.nodes[1:], chain.weights[1:], strict=True):
        following = _outputs_first(node, tensors[name])
        own = _constant(node, tensors)
        if bias is not None:
            through = following.reshape(*following.shape[:2], -1).sum(2)
            bias = through[:, 0] * bias if following.shape[1] < len(bias) else through @ bias
        bias = own if bias is None else bias if own is None else bias + own
        weight = merged(weight, following)
    last = chain.nodes[-1]
    old = tensors[chain.weights[-1]]
    name = chain.name if chain.name in chain.weights or chain.name not in tensors else chain.weights[-1]
    if looks:
        weight = weight.mT if bias is None else weight.mT + bias
    held = {name: weight.transpose(0, 1) if chain.shape is not None and chain.shape.transposed else weight}
    constant = None if looks else reference(_bias(last))
    if bias is not None and not looks and any(_bias(node) is not None for node in chain.nodes[:-1]):
        constant = name.removesuffix("weight") + "bias"
        while constant in tensors:
            constant += "_merged"
        held[constant], constant = bias, f"@{constant}"
    parameters = {
        n: torch.nn.Parameter(t.to(old.dtype).contiguous(), requires_grad=old.requires_grad) for n, t in held.items()
    }
    edits = [ReplaceLayer(node=last.name, calls=(_one_call(chain, name, constant),), tensors=parameters)]
    if chain.looking:
        rows, product = chain.looking
        call = call_of(rows.target, f"@{name}", *(reference(a) for a in rows.args[1:]))
        edits.append(ReplaceLayer(node=product.name, calls=(call,), tensors=parameters))
    return tuple(edits)


def _one_call(chain: Chain, name: str, constant: Any) -> Call:
    first, s = chain.nodes[0], chain.shape
    if first.target is aten.embedding.default:
        return call_of(first.target, f"@{name}", *(reference(a) for a in first.args[1:]))
    start = reference(first.args[0]), f"@{name}", constant
    if s is None:
        return call_of(aten.linear.default, *start)
    rest = [list(s.stride), list(s.padding)]
    if s.transposed:
        return call_of(TRANSPOSED[len(s.kernel) - 1], *start, *rest, list(s.extra), 1, list(s.dilation))
    return call_of(CONVOLUTIONS[len(s.kernel) - 1], *start, *rest, list(s.dilation), 1)


def _outputs_first(node: fx.Node, tensor: Tensor) -> Tensor:
    weight = tensor.detach().double()
    return weight.transpose(0, 1) if node.target in TRANSPOSED else weight


def _constant(node: fx.Node, tensors: Mapping[str, Tensor]) -> Tensor | None:
    bias = _bias(node)
    return tensors[str(bias.target)].detach().double() if isinstance(bias, fx.Node) else None


def apart(single: Network, calls: Sequence[tuple[str, tuple[int, ...], tuple[Any, ...]]]) -> Network:
    """A network of one layer with a chain in its place, given as (operator, shape of the weight, arguments behind the
    bias) of each; random weights, for timing."""
    node = next(n for n in single.graph_module.graph.nodes if n.op == "call_function")
    tensors = {f"factor{i}": torch.nn.Parameter(torch.randn(shape)) for i, (_, shape, _) in enumerate(calls)}
    chain = tuple(
        Call(operator=operator, arguments=("%", f"@factor{i}", None, *rest))
        for i, (operator, _, rest) in enumerate(calls)
    )
    return single.apply([ReplaceLayer(node=node.name, calls=chain, tensors=tensors)])
