"""The tensors that a Step may put on grids of their own for a package."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx, nn

from penjing.analysis.fake_quantize import quantizable
from penjing.analysis.placement import place
from penjing.errors import RecipeError
from penjing.network import Network
from penjing.recipe.steps import Step, matches


def stored_weights(step: Step, network: Network) -> dict[str, list[str]]:
    """Weights of layers that `step.where` selects and that are not all zero, each with the biases that its layers alone
    read. Raises RecipeError if there are none. Batch norms are folded before."""
    placement = place(
        network.graph_module,
        floating=[i.name for i in network.inputs if i.dtype.is_floating_point],
        parameters=network.parameter_names,
        selected=lambda name: matches(step.where, name),
        activations=False,
    )
    names, tensors = quantizable(network, placement), network.tensors()
    nodes, found = {n.name: n for n in network.graph_module.graph.nodes}, dict[str, list[str]]()
    for layer in placement.layers:
        if layer.parameter in names and bool(tensors[layer.parameter].any()):
            found.setdefault(layer.parameter, []).extend(_biases(nodes[layer.node], tensors))
    if not found:
        raise RecipeError(
            f"{step.name} finds no weights in {network.name}",
            hint=f"where={step.where!r} selects no layer with weights of its own that are not all zero",
        )
    return found


def _biases(node: fx.Node, tensors: Mapping[str, Tensor]) -> list[str]:
    """The bias of a layer, if no other operator reads it."""
    read = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr" and len(a.users) == 1]
    return [
        str(a.target)
        for a in read
        if isinstance(tensors[str(a.target)], nn.Parameter) and tensors[str(a.target)].ndim == 1
    ]
