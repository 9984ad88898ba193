"""Graph passes: rewrites that keep the function and make it cheaper or easier to quantize.

They emit Edits and change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from penjing.analysis.operators import CONVOLUTIONS, argument, convolution_form, operator_name
from penjing.network import graph as flat
from penjing.network.codebooks import codebook_behind, looked_up
from penjing.network.edits import Call, Edit, MaskWeights, ReplaceLayer, SetWeights
from penjing.network.network import Network

#: Layers that take a batch norm in, with the positions of weight and bias.
_LINEAR = {"aten::linear": (1, 2)}
#: Products, with the positions of input, weight and bias.
_MATRIX = {"aten::addmm": (1, 2, 0), "aten::mm": (0, 1, None), "aten::matmul": (0, 1, None)}
#: Convolutions whose padding has a name, and those where it is a number for each dimension.
_NAMED = {
    torch.ops.aten.conv1d.padding: torch.ops.aten.conv1d.default,
    torch.ops.aten.conv2d.padding: torch.ops.aten.conv2d.default,
    torch.ops.aten.conv3d.padding: torch.ops.aten.conv3d.default,
}
_PADS = ("aten::pad", "aten::constant_pad_nd")


def fold_batch_norms(network: Network) -> tuple[Edit, ...]:
    """Edits that move every batch norm behind a convolution or linear layer into that layer's weight and bias.

    Exact in eval mode: w' = w · γ/√(σ² + ε), b' = (b - μ) · γ/√(σ² + ε) + β. A batch norm stays where its layer's
    result is also used elsewhere, where the weight is shared with another layer, or where no layer is in front of it.
    """
    folded: list[Edit] = []
    readers = _readers(network.graph_module.graph)
    for node in network.graph_module.graph.nodes:
        layer = node.args[0] if operator_name(node) == "aten::batch_norm" else None
        if not isinstance(layer, fx.Node) or len(layer.users) != 1:
            continue
        name = operator_name(layer)
        places = (1, 2) if name in CONVOLUTIONS else _LINEAR.get(name)
        if places is not None:
            folded += _fold(network, node, layer, places, readers)
    # Consecutive edits of one kind are applied together.
    return tuple(sorted(folded, key=lambda e: isinstance(e, SetWeights)))


def fold_pads(network: Network) -> tuple[Edit, ...]:
    """Edits that move zero padding into the convolutions behind it, where it is the same on both sides."""
    folded: list[Edit] = []
    for node in network.graph_module.graph.nodes:
        if operator_name(node) not in _PADS or not node.users:
            continue
        extra = _symmetric(node)
        users = list(node.users)
        if extra is None or not all(_takes_padding(u, node, len(extra)) for u in users):
            continue
        for user in users:
            sizes = len(extra)
            defaults: list[Any] = [None, [1] * sizes, [0] * sizes]  # bias, stride, padding
            arguments = [*user.args, *defaults[len(user.args) - 2 :]] if len(user.args) < 5 else list(user.args)
            held = [int(p) for p in arguments[4]]
            held = held * sizes if len(held) == 1 else held
            arguments[4] = [p + e for p, e in zip(held, extra, strict=True)]
            folded.append(_call_again(user, arguments))
        folded.append(ReplaceLayer(node=node.name))
    return tuple(folded)


def outputs_first(network: Network) -> tuple[Edit, ...]:
    """Edits that make linear layers of products whose weight is stored (inputs, outputs), as GPT-2's are, and that
    nothing else reads: the weight keeps its name and is stored (outputs, inputs), its mask as well."""
    tensors, readers = network.tensors(), _readers(network.graph_module.graph)
    turned: list[Edit] = []
    for node in network.graph_module.graph.nodes:
        places = _MATRIX.get(operator_name(node))
        if places is None or node.kwargs:
            continue
        x, weight = (node.args[i] for i in places[:2])
        bias = None if places[2] is None else node.args[places[2]]
        name, constant = _stored_name(weight), _stored_name(bias)
        if name not in network.parameter_names or readers[name] > 1 or tensors[name].ndim != 2:
            continue
        if not isinstance(x, fx.Node) or x.op == "get_attr":
            continue
        if bias is not None and (not constant or tensors[constant].ndim != 1):
            continue
        arguments = ("%", f"@{name}", f"@{constant}" if constant else None)
        call = Call(operator=flat.target_name(torch.ops.aten.linear.default), arguments=arguments)
        held = tensors[name]
        moved = torch.nn.Parameter(held.detach().T.contiguous(), requires_grad=held.requires_grad)
        turned.append(ReplaceLayer(node=node.name, calls=(call,), tensors={name: moved}, source=x.name))
        if name in network.masks:
            turned.append(MaskWeights(parameter=name, mask=network.masks[name].T.contiguous()))
    return tuple(sorted(turned, key=lambda e: isinstance(e, MaskWeights)))


def numbered_paddings(network: Network) -> tuple[ReplaceLayer, ...]:
    """Edits that write the padding "same" or "valid" of convolutions as numbers, with an operator of its own in front
    where one side gets more than the other."""
    found, tensors = [], network.tensors()
    for node in network.graph_module.graph.nodes:
        if node.target not in _NAMED or node.kwargs or not (weight := _stored_name(node.args[1])):
            continue
        kernel = tensors[weight].shape[2:]
        given = (argument(node, place, "", 1) for place in (3, 5))
        stride, dilation = ((list(v) if isinstance(v, list | tuple) else [v]) * len(kernel) for v in given)
        same = argument(node, 4, "padding", "valid") == "same"
        added = [d * (k - 1) if same else 0 for d, k in zip(dilation, kernel, strict=False)]
        bias = node.args[2] if len(node.args) > 2 else None
        calls = []
        if any(n % 2 for n in added):  # torch puts what is left over behind
            pads = [side for n in reversed(added) for side in (0, n % 2)]
            pad = flat.target_name(torch.ops.aten.constant_pad_nd.default)
            calls = [Call(operator=pad, arguments=("%", pads, 0.0))]
        constant = f"@{bias.target}" if isinstance(bias, fx.Node) else None
        numbers = (
            stride[: len(kernel)],
            [n // 2 for n in added],
            dilation[: len(kernel)],
            argument(node, 6, "groups", 1),
        )
        arguments = ("%", f"@{weight}", constant, *numbers)
        calls.append(Call(operator=flat.target_name(_NAMED[node.target]), arguments=arguments))
        found.append(ReplaceLayer(node=node.name, calls=tuple(calls), tensors={weight: tensors[weight]}))
    return tuple(found)


def _stored_name(node: Any) -> str:
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else ""


def own_weights(network: Network, selected: Callable[[str], bool]) -> tuple[Edit, ...]:
    """Edits that give the `selected` weights that share levels, or are coded by them, numbers of their own again."""
    tensors, done = network.tensors(), []
    for node in network.graph_module.graph.nodes:
        book = codebook_behind(node)
        if book is not None and selected(book.codes) and any(codebook_behind(u) is None for u in node.users):
            value = torch.nn.Parameter(looked_up(book, tensors).detach())
            done.append(ReplaceLayer(node=node.name, source=f"@{book.codes}", tensors={book.codes: value}))
    return tuple(done)


def simplified(network: Network, *passes: Callable[[Network], tuple[Edit, ...]]) -> tuple[Network, tuple[Edit, ...]]:
    """The network after passes, one after the other, and all their Edits."""
    made: tuple[Edit, ...] = ()
    for each in passes:
        found = each(network)
        network, made = (network.apply(found) if found else network), (*made, *found)
    return network, made


def _fold(
    network: Network, norm: fx.Node, layer: fx.Node, places: tuple[int, int], readers: dict[str, int]
) -> tuple[Edit, ...]:
    weight_node = layer.args[places[0]]
    bias_node = argument(layer, places[1], "bias", None)
    tensors = network.tensors()
    if not isinstance(weight_node, fx.Node) or weight_node.op != "get_attr" or readers[str(weight_node.target)] > 1:
        return ()
    if isinstance(bias_node, fx.Node) and bias_node.op != "get_attr":
        return ()
    constants = [_stored(network, argument(norm, i, "", None)) for i in (1, 2, 3, 4)]
    gamma, beta, mean, variance = constants
    weight = tensors[str(weight_node.target)]
    if mean is None or variance is None or not weight.is_floating_point():
        return ()  # it uses the batch's own statistics, or the layer is quantized already
    factor = torch.rsqrt(variance.double() + float(argument(norm, 7, "eps", 1e-5)))
    factor = factor if gamma is None else factor * gamma.double()
    bias = tensors[str(bias_node.target)].double() if isinstance(bias_node, fx.Node) else torch.zeros_like(factor)
    new_bias = ((bias - mean.double()) * factor + (0.0 if beta is None else beta.double())).to(weight.dtype)
    new_weight = (weight.detach().double() * _along(factor, weight, layer)).to(weight.dtype)
    edits: list[Edit] = [ReplaceLayer(node=norm.name), SetWeights(parameter=str(weight_node.target), value=new_weight)]
    if isinstance(bias_node, fx.Node) and readers[str(bias_node.target)] == 1:
        return (*edits, SetWeights(parameter=str(bias_node.target), value=new_bias))
    name = _free(str(weight_node.target), tensors)
    arguments: list[Any] = list(layer.args[: places[1]])
    arguments += ["@" + name, *layer.args[places[1] + 1 :]]
    return (*edits, _call_again(layer, arguments, {name: torch.nn.Parameter(new_bias.detach())}))


def _along(factor: Tensor, weight: Tensor, layer: fx.Node) -> Tensor:
    """`factor` (one value an output channel) shaped to multiply `weight`."""
    transposed, groups = convolution_form(layer) if operator_name(layer) in CONVOLUTIONS else (False, 1)
    if not transposed:
        return factor.view(-1, *[1] * (weight.ndim - 1))
    # (in, out / groups, …): rows belong to groups, and each group has output channels of its own.
    rows = factor.view(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1).reshape(weight.shape[0], -1)
    return rows.view(*rows.shape, *[1] * (weight.ndim - 2))


def _call_again(node: fx.Node, arguments: list[Any], tensors: dict[str, Tensor] | None = None) -> ReplaceLayer:
    """The same operator with other arguments; tensors are named, the first argument stays the layer's input."""

    def encode(value: Any) -> Any:
        if isinstance(value, fx.Node) and value.op == "get_attr":
            return "@" + str(value.target)
        return value if isinstance(value, str) and value.startswith("@") else flat.encode(value)

    call = Call(
        operator=flat.target_name(node.target),
        arguments=("%", *(encode(a) for a in arguments[1:])),
        keywords={k: encode(v) for k, v in node.kwargs.items() if k != "bias"},
    )
    return ReplaceLayer(node=node.name, calls=(call,), tensors=tensors or {})


def _readers(graph: fx.Graph) -> dict[str, int]:
    """How many nodes use each tensor."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            found[str(node.target)] = found.get(str(node.target), 0) + len(node.users)
    return found


def _stored(network: Network, node: Any) -> Tensor | None:
    return network.tensors()[str(node.target)].detach() if isinstance(node, fx.Node) and node.op == "get_attr" else None


def _free(weight: str, taken: dict[str, Tensor]) -> str:
    stem = weight.removesuffix("weight")
    name = f"{stem}bias" if stem != weight else f"{weight}_bias"
    while name in taken:
        name += "_folded"
    return name


def _symmetric(node: fx.Node) -> list[int] | None:
    """The padding by dimension, first dimension first, if it is of zeros and the same on both sides."""
    pads = node.args[1]
    if operator_name(node) == "aten::pad" and argument(node, 2, "mode", "constant") != "constant":
        return None
    if argument(node, 3 if operator_name(node) == "aten::pad" else 2, "value", None):
        return None
    if not isinstance(pads, list | tuple) or not all(isinstance(p, int) and p >= 0 for p in pads):
        return None
    sides: list[Any] = list(pads)
    return sides[::2][::-1] if sides[::2] == sides[1::2] else None


def _takes_padding(user: fx.Node, pad: fx.Node, dimensions: int) -> bool:
    spatial: dict[str, int] = {"aten::conv1d": 1, "aten::conv2d": 2, "aten::conv3d": 3}
    if spatial.get(operator_name(user)) != dimensions or user.args[0] is not pad or user.kwargs:
        return False
    return len(user.args) < 5 or isinstance(user.args[4], list | tuple)


PASSES: dict[str, Callable[[Network], tuple[Edit, ...]]] = {
    "pads": fold_pads,
    "outputs_first": outputs_first,
    "batch_norms": fold_batch_norms,
}
