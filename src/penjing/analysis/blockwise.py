"""Block-wise optimisation: each block of a pruned network learns to give what the original's block gives.

A block is a part of the graph that a single value enters and a single value leaves: a residual block, an attention or
a feed-forward part, one or two layers of a chain. In the order of the graph all tensors of a block are trained so that,
*on its inputs in the pruned network*, it gives the *original's* value behind it; so each block also makes up for what
is wrong before it. No labels, and gradients never leave the block (Nagel et al. 2020 and Li et al. 2021, "BRECQ", do so
for rounding; Luo et al. 2017, "ThiNet", layer by layer for pruning).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from penjing.analysis.lane import Lane
from penjing.analysis.reconstruct import Refit
from penjing.network import graph as flat
from penjing.network.network import Network
from penjing.progress import SILENT, Progress
from penjing.tensors.distillation import matching
from penjing.training import Training, train

#: A chain of layers is cut after this many with weights of two or more dimensions.
_LAYERS = 2
_FOLLOWING = (torch.ops.aten.batch_norm.default, torch.ops.aten.dropout.default)


@dataclass(frozen=True)
class Block:
    """Nodes between two cuts: what they read from `outside` (in this order), what they give (`ends`), and their
    `weights`, the tensors that may be trained."""

    nodes: tuple[fx.Node, ...]
    outside: tuple[fx.Node, ...]
    ends: tuple[fx.Node, ...]
    weights: tuple[str, ...]


def find_blocks(network: Network) -> list[Block]:
    """The blocks of a network, in the order of the graph; every trainable parameter that a single block reads is in
    its `weights`."""
    graph = network.graph_module.graph
    output = next(n for n in graph.nodes if n.op == "output")
    trainable = set(network.parameter_names)
    # Masks, positions and sizes may be read anywhere: only what was learned counts where the graph is cut.
    learned: set[fx.Node] = set()
    sizes: set[fx.Node] = set()
    for node in graph.nodes:
        own = node.op == "get_attr" and str(node.target) in trainable
        numbers = node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload)
        if node.target is torch.ops.aten.sym_size.int or (numbers and all(n in sizes for n in node.all_input_nodes)):
            sizes.add(node)
        elif own or any(source in learned for source in node.all_input_nodes):
            learned.add(node)
    last_use = {n: i for i, node in enumerate(graph.nodes) for n in node.all_input_nodes}
    live: set[fx.Node] = set()
    parts: list[tuple[list[fx.Node], tuple[fx.Node, ...]]] = []
    current: list[fx.Node] = []
    for place, node in enumerate(graph.nodes):
        if node.op == "output":
            ends = tuple(dict.fromkeys(n for n in output.all_input_nodes if n in learned and n.op == "call_function"))
            if ends:
                parts.append((current, ends))
            break
        if node.op != "call_function":
            continue
        current.append(node)
        live = {n for n in live | {node} if last_use.get(n, -1) > place and n in learned}
        if live == {node} and not any(user.target is operator.getitem for user in node.users):
            parts.append((current, (node,)))
            current = []
    return _blocks(_grouped(parts, trainable), trainable)


def _grouped(
    parts: Sequence[tuple[list[fx.Node], tuple[fx.Node, ...]]], trainable: set[str]
) -> list[tuple[list[fx.Node], tuple[fx.Node, ...]]]:
    """Parts joined until each has enough layers. What follows a layer entry by entry (norm, activation) stays with it;
    anything else without a layer (pooling, reshaping) goes with what comes next, so that targets keep all they tell."""

    def layers(nodes: Sequence[fx.Node]) -> int:
        return sum(
            any(a.op == "get_attr" and str(a.target) in trainable and _is_matrix(a) for a in n.all_input_nodes)
            for n in nodes
        )

    joined: list[tuple[list[fx.Node], tuple[fx.Node, ...]]] = []
    for nodes, ends in parts:
        here, before = layers(nodes), layers(joined[-1][0]) if joined else 0
        behind = not here and all(_follows(n) for n in nodes)
        if joined and (before == 0 or behind or 0 < here < _LAYERS and before < _LAYERS):
            joined[-1] = [*joined[-1][0], *nodes], ends
        else:
            joined.append((list(nodes), ends))
    if len(joined) > 1 and not layers(joined[-1][0]):
        nodes, ends = joined.pop()
        joined[-1] = [*joined[-1][0], *nodes], ends
    return joined


def _follows(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or node.target in _FOLLOWING


def _is_matrix(node: fx.Node) -> bool:
    return flat.get_tensor(node.graph.owning_module, str(node.target)).ndim > 1  # type: ignore[arg-type]


def _blocks(parts: Sequence[tuple[list[fx.Node], tuple[fx.Node, ...]]], trainable: set[str]) -> list[Block]:
    reads = [
        {str(a.target) for n in nodes for a in n.all_input_nodes if a.op == "get_attr"} & trainable
        for nodes, _ in parts
    ]
    blocks = []
    for (nodes, ends), own in zip(parts, reads, strict=True):
        inside = set(nodes)
        sources = (a for n in nodes for a in n.all_input_nodes)
        outside = tuple(dict.fromkeys(a for a in sources if a not in inside and a.op != "get_attr"))
        single = sorted(name for name in own if sum(name in other for other in reads) == 1)
        blocks.append(Block(tuple(nodes), outside, ends, tuple(single)))
    return blocks


def optimise_blocks(
    original: Network,
    pruned: Network,
    kept: Mapping[str, tuple[int, Tensor]],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    steps: int = 200,
    lr: float = 4e-4,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Refit:
    """New values for the tensors of `pruned`, trained block by block towards the values of `original`.

    `kept` tells for each value (node) of the original that lost channels the dimension and the indices that are left;
    `batches` are bound inputs. Each block takes `steps` steps of Adam at the rate `lr`, one batch each; a block that
    is not nearer to its target afterwards, over all batches, keeps its tensors. Masked weights stay zero.
    `errors` of the result are relative mean squared errors at the blocks' ends, by the name of the end.
    """
    blocks = [b for b in find_blocks(pruned) if b.weights]
    names = {n.name for n in original.graph_module.graph.nodes}
    blocks = [b for b in blocks if all(e.name in names for e in b.ends)]
    wanted = Lane(original, batches, hold={e.name for b in blocks for e in b.ends})
    given = Lane(pruned, batches, hold={n.name for b in blocks for n in b.outside})
    result = Refit()
    with progress.task("optimising blocks", len(blocks)) as advance:
        for block in blocks:
            targets = [wanted.value(e.name) for e in block.ends]
            cuts = [kept.get(e.name) for e in block.ends]
            samples = [
                (
                    tuple(given.value(n.name)[i] for n in block.outside),
                    tuple(
                        t[i] if cut is None else t[i].index_select(cut[0], cut[1])
                        for t, cut in zip(targets, cuts, strict=True)
                    ),
                )
                for i in range(len(batches))
            ]
            new, before, after = _optimise(block, given.tensors, samples, pruned.masks, steps, lr, seed)
            result.errors[block.ends[0].name] = (before, after)
            result.tensors.update(new)
            given.tensors.update(new)
            for node in block.ends:
                wanted.release(node.name)
            advance(1)
    return result


def _optimise(
    block: Block,
    tensors: Mapping[str, Tensor],
    samples: Sequence[tuple[tuple[Any, ...], tuple[Tensor, ...]]],
    masks: Mapping[str, Tensor],
    steps: int,
    lr: float,
    seed: int,
) -> tuple[dict[str, Tensor], float, float]:
    """New tensors of one block (none if they would be no better), and its error before and after."""
    module = _module(block, tensors)
    before = _error(module, samples)
    if not math.isfinite(before) or before < 1e-12:
        return {}, before, before

    def shuffled(epoch: int) -> Iterator[Any]:
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed * 7919 + epoch))
        for i in order.tolist():
            yield samples[i]

    train(
        module,
        shuffled,
        lambda m, batch: _distance(m(*batch[0]), batch[1]),
        Training(epochs=steps / len(samples), lr=lr, optimizer="adamw", weight_decay=0.0, seed=seed),
        steps_per_epoch=len(samples),
        alone=True,
        keep={n: m for n, m in masks.items() if n in block.weights},
        frozen=lambda name: name not in block.weights,
    )
    after = _error(module, samples)
    if not after < before:
        return {}, before, before
    return {name: flat.get_tensor(module, name).detach().clone() for name in block.weights}, before, after


def _module(block: Block, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """A block as a module of its own, with copies of its weights."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for source in block.outside:
        copies[source] = graph.placeholder(source.name)
    for node in block.nodes:
        for source in node.all_input_nodes:
            if source not in copies and source.op == "get_attr":
                copies[source] = graph.get_attr(str(source.target))
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[e] for e in block.ends))
    own = {
        name: nn.Parameter(tensor.detach().clone()) if name in block.weights else tensor.detach()
        for name, tensor in tensors.items()
    }
    return flat.build(graph, own)


def _distance(got: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    parts = [matching(g, t) for g, t in zip(got, targets, strict=True) if t.is_floating_point()]
    return torch.stack(parts).mean()


@torch.no_grad()
def _error(module: nn.Module, samples: Sequence[tuple[tuple[Any, ...], tuple[Tensor, ...]]]) -> float:
    return sum(float(_distance(module(*x), t)) for x, t in samples) / len(samples)
