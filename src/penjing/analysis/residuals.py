"""Residual blocks: the sums x + f(x) of a graph, what each adds, and what would go with it."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from penjing.analysis.footprint import layer_of
from penjing.analysis.lane import Lane
from penjing.analysis.reconstruct import find_layers, norm_scale
from penjing.network.edits import ReplaceLayer
from penjing.network.network import Network
from penjing.progress import SILENT, Progress

_SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@dataclass(frozen=True)
class Residual:
    """A block x + f(x).

    `name` is what the paths of its weights have in common, `total` the node of the sum, `source` the node of x,
    `weights` the matrices and kernels that f reads, `last` those after which no other follows in f.
    """

    name: str
    total: str
    source: str
    weights: tuple[str, ...]
    last: tuple[str, ...]


@torch.no_grad()
def find_residuals(network: Network) -> list[Residual]:
    """The residual blocks of `network` in the order of the graph.

    A sum counts if one side was made from the other (or from what was summed up into the other: blocks side by side),
    both have one shape, and what is added reads a matrix or kernel. Of blocks inside one another only the innermost
    count.
    """
    nodes = list(network.graph_module.graph.nodes)
    shapes = _shapes(network, [n for n in nodes if _is_sum(n)])
    reads = _reads(network)
    place = {node: 1 << i for i, node in enumerate(nodes)}  # sets of nodes as bits: there are many large ones
    before: dict[fx.Node, int] = {}
    stream: dict[fx.Node, int] = {}
    inside: dict[fx.Node, set[fx.Node]] = {}
    found: list[Residual] = []
    for node in nodes:
        before[node] = functools.reduce(operator.or_, (place[s] | before[s] for s in node.all_input_nodes), 0)
        if not shapes.get(node.name):
            continue
        for source, branch in (node.args[:2], node.args[1::-1]):
            carried = stream.get(source, place[source])
            if place[branch] & carried or not before[branch] & carried:
                continue
            gone = _without(nodes, node, source)
            weights = tuple(dict.fromkeys(w for n in nodes if n in gone for w in reads[n]))
            if weights:
                stream[node], inside[node] = place[node] | carried, gone
                last = _last(branch, reads, gone)
                found.append(Residual(_common(weights), node.name, source.name, weights, last))
                break
    sums = {n.name: n for n in inside}
    inner = [r for r in found if not any(other in inside[sums[r.total]] for other in inside)]
    return _numbered(inner)


def without_blocks(blocks: Sequence[Residual], gone: Iterable[Residual]) -> tuple[ReplaceLayer, ...]:
    """Edits that replace each of `gone`, some of `blocks`, by its input."""
    chosen = {r.total for r in gone}
    stands: dict[str, str] = {}
    edits = []
    for block in blocks:
        if block.total in chosen:
            # The block before may have gone, too: then this one's input is what stands for that one.
            stands[block.total] = stands.get(block.source, block.source)
            edits.append(ReplaceLayer(node=block.total, source=stands[block.total]))
    return tuple(edits)


@torch.no_grad()
def turning(
    network: Network,
    blocks: Sequence[Residual],
    batches: Sequence[Mapping[str, Tensor]],
    progress: Progress = SILENT,
) -> dict[str, float]:
    """By block, how far it turns what passes: one less the mean cosine between its input and output, from 0 to 2.

    Men et al. 2024, "ShortGPT" (block influence); Gromov et al. 2024, "The unreasonable ineffectiveness of the deeper
    layers" take the angle itself. Vectors are the last dimension of tokens, and all of a sample's entries of maps.
    """
    sums, count = dict.fromkeys((b.total for b in blocks), 0.0), dict.fromkeys((b.total for b in blocks), 0)
    with progress.task("comparing blocks' inputs and outputs", len(batches)) as advance:
        for batch in batches:
            lane = Lane(network, [batch], hold={b.source for b in blocks} | {b.total for b in blocks})
            for block in blocks:
                (x,), (y,) = lane.value(block.source), lane.value(block.total)
                shape = (len(x), -1) if x.ndim > 3 else (-1, x.shape[-1])
                cosine = torch.cosine_similarity(x.reshape(shape).double(), y.reshape(shape).double(), dim=1)
                sums[block.total] += float(cosine.sum())
                count[block.total] += len(cosine)
            advance(1)
    return {b.name: max(0.0, 1 - sums[b.total] / max(count[b.total], 1)) for b in blocks}


@torch.no_grad()
def last_norms(network: Network, blocks: Sequence[Residual]) -> dict[str, float]:
    """By block, the Euclidean norm of the last weights before the sum, as a batch norm behind them scales them."""
    tensors = network.tensors()
    layers = {layer.weight: layer for layer in find_layers(network)}

    def size(name: str) -> float:
        weight = tensors[name].detach().double()
        if name in layers:
            weight = weight.flatten(1) * norm_scale(layers[name], tensors)[:, None]
        return float(weight.square().sum())

    return {b.name: sum(map(size, b.last)) ** 0.5 for b in blocks}


def choose(
    blocks: Sequence[Residual], count: int, harm: Callable[[Sequence[Residual]], float], progress: Progress = SILENT
) -> tuple[list[Residual], dict[str, float]]:
    """`count` blocks, taken one after the other so that each time the harm of all that are gone is least; and for every
    block the harm when it was last looked at."""
    gone: list[Residual] = []
    seen: dict[str, float] = {}
    with progress.task("trying without blocks", count) as advance:
        for _ in range(count):
            now = {b.name: harm([*gone, b]) for b in blocks if b not in gone}
            gone.append(min((b for b in blocks if b not in gone), key=lambda b: now[b.name]))
            seen |= now
            advance(1)
    return gone, seen


def _is_sum(node: fx.Node) -> bool:
    moving = all(isinstance(a, fx.Node) and a.op in ("call_function", "placeholder") for a in node.args[:2])
    return node.target in _SUMS and moving and bool(node.kwargs.get("alpha", 1) == 1)


def _shapes(network: Network, sums: Sequence[fx.Node]) -> dict[str, bool]:
    """For every sum whether both sides are of floating point and have one shape."""
    sides = [a.name for n in sums for a in n.args[:2] if isinstance(a, fx.Node)]
    lane = Lane(network, [network.bind(network.example(2))], hold=sides)
    values = {name: lane.value(name)[0] for name in sides}
    pairs = {n.name: [values[a.name] for a in n.args[:2] if isinstance(a, fx.Node)] for n in sums}
    return {
        name: isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point() and a.shape == b.shape
        for name, (a, b) in pairs.items()
    }


def _without(nodes: Sequence[fx.Node], total: fx.Node, source: fx.Node) -> set[fx.Node]:
    """What nothing reads any more once `total` is replaced by `source`."""
    needed: set[fx.Node] = set()
    stack = [n for n in nodes if n.op == "output"]
    while stack:
        node = source if (top := stack.pop()) is total else top
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return {n for n in nodes if n.op == "call_function" and n not in needed} - {total}


def _reads(network: Network) -> dict[fx.Node, tuple[str, ...]]:
    """The trainable matrices and kernels that each node multiplies with, also by way of a transpose or the like."""
    tensors, trainable = network.tensors(), set(network.parameter_names)
    moving: set[fx.Node] = set()  # depends on the inputs
    names: dict[fx.Node, tuple[str, ...]] = {}
    for node in network.graph_module.graph.nodes:
        if node.op == "placeholder" or any(s in moving for s in node.all_input_nodes):
            moving.add(node)
        if node.op == "get_attr":
            held = str(node.target)
            names[node] = (held,) if held in trainable and _is_matrix(tensors[held]) else ()
        else:
            names[node] = tuple(w for s in node.all_input_nodes if s not in moving for w in names[s])
    return names


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.ndim > 1 and tensor.numel() > max(tensor.shape)


def _last(branch: fx.Node, reads: Mapping[fx.Node, tuple[str, ...]], gone: set[fx.Node]) -> tuple[str, ...]:
    """The first matrices on every way back from the sum."""
    found: dict[str, None] = {}
    stack, seen = [branch], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in seen or node not in gone:
            continue
        seen.add(node)
        found.update(dict.fromkeys(reads[node]))
        if not reads[node]:
            stack.extend(node.all_input_nodes)
    return tuple(found)


def _common(weights: Iterable[str]) -> str:
    """What the paths of the weights' layers begin with alike."""
    paths = [layer_of(w).split(".") for w in weights]
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in same) or ".".join(paths[0])


def _numbered(blocks: Sequence[Residual]) -> list[Residual]:
    used: dict[str, int] = {}
    result = []
    for b in blocks:
        used[b.name] = used.get(b.name, 0) + 1
        name = b.name if used[b.name] == 1 else f"{b.name}#{used[b.name]}"
        result.append(Residual(name, b.total, b.source, b.weights, b.last))
    return result
