"""Activation grids that are found anew in every run: which layers gain by them, and the Edits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import fx

from penjing.analysis.operators import PRODUCTS, operator_name
from penjing.analysis.placement import Layer, Placement
from penjing.network.edits import Edit, QuantizeTensor

_LSTM = torch.ops.aten.lstm.input


def dynamic_layers(graph: fx.Graph, placement: Placement, types: Mapping[str, str], *, plain: bool) -> frozenset[str]:
    """The nodes that kernels run in integers with such inputs, where weights are of `types` by name.

    Linear layers whose weight has 8 bits or fewer, and LSTMs of which all weights have; these want a `plain` grid
    (symmetric, or one for the tensor). Convolutions are slower so than in float, and for GRUs there are no kernels.
    """
    weights = {name for name, dtype in types.items() if dtype != "int16"}
    linear = {x.node for x in placement.layers if x.kind == "linear" and x.parameter in weights}
    lstms = {n.name for n in graph.nodes if n.target is _LSTM and plain and _stored(n) <= weights}
    return frozenset(linear | lstms)


def _stored(node: fx.Node) -> set[str]:
    """The names of an LSTM's matrices; what is computed has a name that no parameter has."""
    _, _, given, biased, layers, _, _, bidirectional, _ = cast(tuple[Any, ...], node.args)
    each = len(given) // (layers * (2 if bidirectional else 1))
    if each != (4 if biased else 2):
        return {""}  # hidden states that are projected
    matrices = [tensor for i, tensor in enumerate(given) if i % each < 2]
    return {str(m.target) if m.op == "get_attr" else "" for m in matrices}


def dynamic_edits(graph: fx.Graph, nodes: Collection[str]) -> list[Edit]:
    """Grids found in every run for what the linear layers and LSTMs `nodes` read."""
    readers: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.name in nodes:
            source = cast(fx.Node, node.args[0 if node.target is _LSTM else PRODUCTS[operator_name(node)][0]])
            readers.setdefault(source.name, []).append(node.name)
    return [
        QuantizeTensor(tensor=value, scale=1.0, zero_point=0, dtype="uint8", users=tuple(users), dynamic=True)
        for value, users in readers.items()
    ]


def why_float(layer: Layer, *, dynamic: bool) -> str:
    """Why a layer is not computed in integers, in words; `dynamic`: although grids are found in every run."""
    if layer.parameter is None:
        return "a product of two activations: computed in float"
    inputs = "stored as integers, inputs stay float" if dynamic and layer.kind != "embedding" else "stored as integers"
    return f"{layer.kind}: {inputs}, computed in float"


__all__ = ["dynamic_edits", "dynamic_layers", "why_float"]
