"""What a Step that quantizes says about each layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from penjing.analysis.dynamic_grids import why_float
from penjing.analysis.operators import operator_name
from penjing.analysis.placement import Layer, Placement
from penjing.analysis.twin import Twin
from penjing.analysis.weight_grids import granularity, made_ternary, shifts
from penjing.analysis.weight_rounding import RoundedWeight
from penjing.network.network import Network
from penjing.recipe.plans import Reason
from penjing.tensors.grids import sqnr


def layer_reasons(
    settings: Any,
    placement: Placement,
    weights: Mapping[str, RoundedWeight],
    tensors: Mapping[str, Tensor],
    integer: Collection[str],
    twin: Twin | None,
) -> list[Reason]:
    """A Reason for each layer whose weight, if it has one, is among the rounded `weights`.

    `settings` is the Quantize; `tensors` holds the float weights by name; both factors of the layers in `integer`
    stand on grids. Scores are SQNRs in dB: of the output where a `twin` has seen it, else of the weight.
    """
    reasons, inputs = [], f"{settings.activations} inputs"
    for layer in placement.layers:
        if layer.parameter is not None and layer.parameter not in weights:
            continue
        both, words, score = layer.node in integer, [], None
        choice = inputs if both else "float32"
        if layer.parameter is not None:
            weight = weights[layer.parameter]
            score = sqnr(tensors[layer.parameter].detach(), weight.values)
            choice = f"{weight.dtype} weights per {weight.grid.granularity}" + (f", {inputs}" if both else "")
            words.append(f"weights {score:.1f} dB")
            words += _of_weight(settings, layer, weight)
        if twin is not None and layer.integer:
            seen = [twin.sqnr[s] for s in placement.sources.get(layer.node, ()) if s in twin.sqnr]
            words += [f"inputs {decibels:.1f} dB" for decibels in seen]
            score = twin.sqnr.get(layer.node, score)
            words.append(f"output {score:.1f} dB" if score is not None else "")
        elif not both:
            words.append(why_float(layer, dynamic=settings.activations == "dynamic"))
        name = layer.node if layer.parameter is None else layer.parameter.removesuffix(".weight")
        reasons.append(Reason(layer=name, choice=choice, score=score, why=", ".join(w for w in words if w)))
    return reasons


def _of_weight(settings: Any, layer: Layer, weight: RoundedWeight) -> list[str]:
    words = [made_ternary(weight.values, weight.dtype)]
    if settings.scales == "power-of-two":
        words.append(shifts(weight.grid))
    if weight.grid.group and layer.integer:
        words.append("groups: computed in float")
    elif not weight.grid.group and (granularity(settings.granularity) or (True, 0))[1]:
        words.append("rows no longer than a group")
    if weight.levels is not None:
        words.append(f"{settings.levels} levels: computed in float")
    return words


__all__ = ["layer_reasons"]


def unread(network: Network, placement: Placement, selected: Callable[[str], bool]) -> dict[str, str]:
    """Selected weights (two dimensions and more, no norm's) that nothing reads which could read integers, and why they
    stay."""
    named = {layer.parameter for layer in placement.layers} | {n.split("(")[-1].rstrip(")") for n in placement.left}
    tensors = network.tensors()
    reads = {str(n.target): n for n in network.graph_module.graph.nodes if n.op == "get_attr"}
    return {
        name: "no operator that quantizes reads it"
        for name in network.parameter_names
        if tensors[name].ndim > 1 and tensors[name].is_floating_point() and name not in named and selected(name)
        if not all("_norm" in operator_name(user) for user in reads[name].users)
    }
