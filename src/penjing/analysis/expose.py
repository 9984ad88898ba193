"""Inner values as further outputs: what hints and comparisons of two networks look at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from penjing.network import Network
from penjing.network import graph as flat

_SUMS = {torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor}


def exposing(network: Network, values: Sequence[str]) -> Network:
    """`network` with outputs (its own, {name: value}) for the graph nodes named in `values`; tensors are shared."""
    module = flat.copy(network.graph_module)
    nodes = {n.name: n for n in module.graph.nodes}
    output = next(n for n in module.graph.nodes if n.op == "output")
    output.args = ((*output.args[0], *(nodes[v] for v in values)),)
    module.recompile()
    return network.replace(graph_module=module, structure_out=(network.structure_out, {v: v for v in values}))


@torch.no_grad()
def shared_sums(one: Network, other: Network) -> list[str]:
    """The sums of two activations (the residual stream) that both networks have under one name and in one shape."""
    names = [n.name for n in one.graph_module.graph.nodes if _is_sum(n)]
    also = {n.name for n in other.graph_module.graph.nodes if _is_sum(n)}
    names = [n for n in names if n in also]
    inputs = one.example(2)
    shapes = [
        [v.shape for v in exposing(network, names).run(inputs)[len(network.output_names) :]] for network in (one, other)
    ]
    return [n for n, a, b in zip(names, *shapes, strict=True) if a == b and len(a) > 1]


def _is_sum(node: fx.Node) -> bool:
    operands = node.args[:2]
    return node.target in _SUMS and all(isinstance(a, fx.Node) and a.op == "call_function" for a in operands)
