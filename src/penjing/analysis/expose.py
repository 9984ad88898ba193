"""Inner values as further outputs: what hints and comparisons of two networks look at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, fx

from penjing.network import Network
from penjing.network import graph as flat

#: Least mean correlation of channels that are taken for the same.
_LIKENESS = 0.5
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
def shared_sums(one: Network, other: Network, inputs: Any, *, most: int) -> dict[str, tuple[int, Tensor] | None]:
    """The sums of two activations (the residual stream) that both networks have under one name; if there are more
    than `most`, that many or fewer, evenly spread, the last among them.

    None for those of one shape. Where `one` has fewer channels, (dimension, the channels of `other` that are most like
    its own on `inputs`): by correlation, each taken once. Left out is what has no such likeness.
    """
    names = [n.name for n in one.graph_module.graph.nodes if is_sum(n)]
    also = {n.name for n in other.graph_module.graph.nodes if is_sum(n)}
    names = [n for n in names if n in also]
    values = [exposing(network, names).run(inputs)[len(network.output_names) :] for network in (one, other)]
    found: dict[str, tuple[int, Tensor] | None] = {}
    for name, a, b in zip(names, *values, strict=True):
        if a.shape == b.shape and a.ndim > 1:
            found[name] = None
        elif a.ndim == b.ndim and (alike := _alike(a, b)) is not None:
            found[name] = alike
    every = max(1, math.ceil(len(found) / most))
    return {name: found[name] for name in list(found)[::-1][::every][::-1]}


def _alike(a: Tensor, b: Tensor) -> tuple[int, Tensor] | None:
    """The dimension along which `a` has fewer channels than `b`, and which of `b` they are most like."""
    dims = [d for d in range(a.ndim) if a.shape[d] != b.shape[d]]
    if len(dims) != 1 or dims[0] == 0 or a.shape[dims[0]] > b.shape[dims[0]]:
        return None
    chosen = most_alike(correlations(a, b, dims[0]))
    return None if chosen is None else (dims[0], chosen)


def correlations(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Of each channel (along `dim`) of `a` with each of `b`, which have all other sizes in common."""
    rows = [x.movedim(dim, 0).flatten(1).double() for x in (a, b)]
    rows = [r - r.mean(1, keepdim=True) for r in rows]
    rows = [r / r.norm(dim=1, keepdim=True).clamp_min(1e-12) for r in rows]
    return rows[0] @ rows[1].T


def most_alike(likeness: Tensor) -> Tensor | None:
    """For each row its column, each taken once, so that they are most alike together; None if they are not."""
    mine, theirs = linear_sum_assignment(likeness.numpy(), maximize=True)
    return None if float(likeness[mine, theirs].mean()) < _LIKENESS else torch.as_tensor(theirs)


def is_sum(node: fx.Node) -> bool:
    """Whether a value is the sum of two activations, as in a residual stream."""
    operands = node.args[:2]
    return node.target in _SUMS and all(isinstance(a, fx.Node) and a.op == "call_function" for a in operands)
