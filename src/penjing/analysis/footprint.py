"""Parameters and multiply-accumulates of a Network, counted on a real run of its graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from penjing.network.integers import stored_behind

if TYPE_CHECKING:
    from penjing.network.network import Network


@dataclass(frozen=True)
class Footprint:
    """`parameters`: trained numbers (a weight stored as integers counts like the float one it replaced);
    `macs`: multiply-accumulates of one sample; `by_layer`: layer path → (parameters, macs), layers without
    parameters under their graph node's name; `by_weight`: weight tensor → the macs it takes part in; `largest`: entries
    of the largest value computed on the way."""

    parameters: int
    macs: int
    by_layer: dict[str, tuple[int, int]]
    by_weight: dict[str, int] = field(default_factory=dict, repr=False)
    largest: int = 0

    def __str__(self) -> str:
        return f"{self.parameters:,} parameters, {self.macs:,} multiply-accumulates a sample"


def footprint(network: Network) -> Footprint:
    """Count `network` by running it once on two made-up samples.

    Counted are convolutions (also transposed), linear layers, matrix products, attention and recurrent layers; what is
    pointwise, a norm or pooling is not, as is usual for MACs. Zeros of masked weights count in full.
    """
    bound = network.bind(network.example(batch=2))
    batch = next((t.shape[0] for t in bound.values() if t.ndim), 1)
    counter = _Counter(network.graph_module)
    with torch.no_grad():
        counter.run(*bound.values(), enable_io_processing=False)
    parameters = {name: tensor.numel() for name, tensor in counted_tensors(network).items()}
    by_layer: dict[str, tuple[int, int]] = {}
    for name, count in parameters.items():
        _add(by_layer, layer_of(name), count, 0)
    by_weight: dict[str, int] = {}
    total = 0
    for node, macs in counter.macs.items():
        total += macs
        weights = counter.weights[node]
        if not weights:
            _add(by_layer, node, 0, macs // batch)
        for name, share in weights.items():
            by_weight[name] = by_weight.get(name, 0) + share // batch
            _add(by_layer, layer_of(name), 0, share // batch)
    return Footprint(sum(parameters.values()), total // batch, by_layer, by_weight, counter.largest // batch)


def counted_tensors(network: Network) -> dict[str, Tensor]:
    """The tensors that count as parameters: the trainable ones and the integer form of those already quantized."""
    return {name: tensor for name, tensor in network.tensors().items() if network.is_weight(name)}


def layer_of(parameter: str) -> str:
    """`layer1.0.conv1.weight` → `layer1.0.conv1`; a parameter of the network itself is its own layer."""
    return parameter.rpartition(".")[0] or parameter


def source_name(node: object) -> str | None:
    """Name of the stored tensor that `node` is, looking through its dequantization; None if it is computed."""
    stored = stored_behind(node)
    return str(stored.target) if stored is not None else None


def _add(by_layer: dict[str, tuple[int, int]], layer: str, parameters: int, macs: int) -> None:
    before = by_layer.get(layer, (0, 0))
    by_layer[layer] = (before[0] + parameters, before[1] + macs)


class _Counter(fx.Interpreter):
    """Runs a graph and notes the multiply-accumulates of every node that has any."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.macs: dict[str, int] = {}
        self.weights: dict[str, dict[str, int]] = {}
        self.largest = 0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "call_function":
            return result
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        count = _COUNTS.get(_base_name(n.target))
        if count is None:
            return result
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        macs = count(args, kwargs, result)
        self.macs[n.name] = macs
        named = _weight_arguments(n)
        sizes = {name: tensor.numel() for name in named if (tensor := self.fetch_attr(name)).ndim >= 2}
        whole = sum(sizes.values())
        self.weights[n.name] = {name: macs * size // whole for name, size in sizes.items()} if whole else {}
        return result


def _base_name(target: object) -> str:
    """`torch.ops.aten.conv2d.default` → `conv2d`."""
    return str(getattr(target, "__name__", target)).split(".")[0] if "aten" in str(target) else ""


def _weight_arguments(node: fx.Node) -> list[str]:
    names = []
    for argument in node.all_input_nodes:
        name = source_name(argument)
        if name is not None:
            names.append(name)
    return names


def _convolution(args: Sequence[Any], kwargs: dict[str, Any], result: Tensor) -> int:
    weight = args[1]  # (out, in / groups, *kernel): every output position of every channel reads in/groups × kernel
    return int(result.numel() * math.prod(weight.shape[1:]))


def _transposed_convolution(args: Sequence[Any], kwargs: dict[str, Any], result: Tensor) -> int:
    return int(args[0].numel() * math.prod(args[1].shape[1:]))  # every input position feeds out/groups × kernel


def _any_convolution(args: Sequence[Any], kwargs: dict[str, Any], result: Tensor) -> int:
    transposed = args[6] if len(args) > 6 else kwargs.get("transposed", False)
    return (_transposed_convolution if transposed else _convolution)(args, kwargs, result)


def _product(left: int) -> Callable[[Sequence[Any], dict[str, Any], Tensor], int]:
    def count(args: Sequence[Any], kwargs: dict[str, Any], result: Tensor) -> int:
        return int(result.numel() * args[left].shape[-1])

    return count


def _attention(args: Sequence[Any], kwargs: dict[str, Any], result: Tensor) -> int:
    query, key = args[0], args[1]
    return int(query.numel() * key.shape[-2] + result.numel() * key.shape[-2])


def _recurrent(args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> int:
    inputs, parameters = args[0], args[2]
    features = inputs.shape[-1]
    return int(sum(p.numel() for p in parameters if p.ndim == 2) * (inputs.numel() // features))


def _contraction(args: Sequence[Any], kwargs: dict[str, Any], result: Tensor) -> int:
    equation, operands = args[0], args[1]
    sizes: dict[str, int] = {}
    for letters, operand in zip(equation.replace(" ", "").split("->")[0].split(","), operands, strict=True):
        if "." in letters:
            return 0
        sizes.update(zip(letters, operand.shape, strict=True))
    return math.prod(sizes.values())


_COUNTS: dict[str, Callable[[Sequence[Any], dict[str, Any], Any], int]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed_convolution),
    "convolution": _any_convolution,
    **dict.fromkeys(("linear", "matmul", "mm", "bmm"), _product(0)),
    **dict.fromkeys(("addmm", "baddbmm"), _product(1)),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    "einsum": _contraction,
}


def shrinkage(before: Footprint, after: Footprint) -> list[str]:
    """In words, what became of parameters and multiply-accumulates."""
    return [
        f"parameters {before.parameters:,} → {after.parameters:,} ({after.parameters / max(before.parameters, 1):.1%})",
        f"multiply-accumulates {before.macs:,} → {after.macs:,} ({after.macs / max(before.macs, 1):.1%})",
    ]
