"""Quantized training with batch norms in place: how what is learned on them carries over to the folded network.

A norm behind a layer scales each output channel, so folding it multiplies the scales of a weight's grid and leaves the
integers as they are, as long as every output channel has scales of its own and no norm turns a channel's sign.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, fx

from penjing.analysis.fake_quantize import WeightGrid, weight_readers
from penjing.analysis.operators import argument, convolution_form, operator_name
from penjing.analysis.passes import fold_batch_norms
from penjing.analysis.placement import Quantizer
from penjing.network.edits import Edit, ReplaceLayer, SetWeights
from penjing.network.network import Network
from penjing.tensors.grids import Grid


def in_front_of_folding(network: Network, folded: Network, quantizers: Iterable[Quantizer]) -> list[Quantizer]:
    """The quantizers of the `folded` network as they stand in `network`, whose norms are still there.

    The two graphs differ in the norms only: a folded layer stands for its layer and norm together.
    """
    gone = _folded_norms(network)
    calls = [n for n in network.graph_module.graph.nodes if n.op == "call_function" and n.name not in gone]
    names = {n.name: n.name for n in network.graph_module.graph.nodes if n.op == "placeholder"}
    ends, users = dict(names), dict(names)
    others = [n for n in folded.graph_module.graph.nodes if n.op == "call_function"]
    for old, new in zip(calls, others, strict=True):
        norm = next((u for u in old.users if u.name in gone), None)
        ends[new.name], users[new.name] = (norm or old).name, old.name
    return [
        replace(q, value=ends[q.value], users=None if q.users is None else tuple(users.get(u, u) for u in q.users))
        for q in quantizers
    ]


def positive_norms(network: Network) -> tuple[Edit, ...]:
    """Edits that make the weights of all norms that can be folded positive: the sign goes to the layer in front.

    Grids with one code more on the negative side (int2 is -2..1) would otherwise be the wrong way round once folded.
    """
    gone = _folded_norms(network)
    readers = weight_readers(network.graph_module.graph)
    tensors, edits = network.tensors(), []
    for node in network.graph_module.graph.nodes:
        if node.name not in gone:
            continue
        layer = node.args[0]
        names = [_name(n) for n in (layer.args[1], argument(layer, 2, "bias", None), node.args[1], node.args[3])]
        gamma = names[2]
        if gamma is None or not bool((tensors[gamma] < 0).any()) or not _plain(layer):
            continue
        if any(n is not None and len(readers[n]) > 1 for n in names):
            continue
        sign = torch.where(tensors[gamma].detach() < 0, -1.0, 1.0)
        for name in names:
            if name is not None:
                value = tensors[name].detach()
                edits.append(SetWeights(parameter=name, value=value * sign.view(-1, *[1] * (value.ndim - 1))))
    return tuple(edits)


def folded_scales(value: Tensor, folded: Tensor, weight: WeightGrid) -> tuple[Grid, int]:
    """The grid on which `folded`, the rounded `value` after folding, stands, and how many of its codes do not fit.

    Codes stay; scales change by what the norm multiplied the channel with. None fit worse unless a norm's weight turned
    negative while it was trained.
    """
    grid = weight.grid
    if torch.equal(value, folded):
        return grid, 0
    dims = [d for d in range(value.ndim) if d != (0 if grid.group else grid.axis or 0)]
    power = value.double().square().sum(dims)
    ratio = (value.double() * folded.double()).sum(dims) / power.clamp_min(1e-300)
    ratio = torch.where(power > 0, ratio.abs(), torch.ones_like(ratio)).clamp_min(1e-12)
    scale = (grid.scale.double() * (ratio.view(-1, 1) if grid.group else ratio)).to(torch.float32)
    moved = replace(grid, scale=scale)
    lost = int((replace(weight, grid=moved).rounded(folded) - folded).abs().gt(0.25 * float(scale.min())).sum())
    return moved, lost


def _folded_norms(network: Network) -> set[str]:
    """The norms that folding removes."""
    return {e.node for e in fold_batch_norms(network) if isinstance(e, ReplaceLayer) and not e.calls}


def _plain(layer: fx.Node) -> bool:
    """Whether the layer's output channels are the first axis of its weight."""
    return operator_name(layer) == "aten::linear" or not convolution_form(layer)[0]


def _name(node: object) -> str | None:
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None
