"""A float network and its quantized twin, run side by side."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from penjing.analysis.operators import CONVOLUTIONS, argument, operator_name
from penjing.tensors.grids import Grid, fake_quantize, sqnr


class Twin:
    """Runs a float graph twice in one walk, as it is and with weights and activations on grids.

    `weights` maps parameters to their rounded values; `quantizers` are (value, its users or None for all, grid). At
    each layer in `correct` that has a bias of its own, the bias moves so that the mean of each output channel equals
    the float one before the next layer is computed; `biases` holds the new values, by name. `sqnr` holds, in dB, how
    well the quantized twin's value stands for the float one, at every quantizer (with its own rounding) and every layer
    in `correct`.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        weights: Mapping[str, Tensor],
        quantizers: Iterable[tuple[str, tuple[str, ...] | None, Grid]],
        correct: Collection[str],
        layers: Collection[str] | None = None,
    ) -> None:
        self.module, self.weights, self.correct = module, weights, set(correct)
        self.layers = set(layers) if layers is not None else self.correct
        self.quantizers: dict[str, list[tuple[tuple[str, ...] | None, Grid]]] = {}
        for value, users, grid in quantizers:
            self.quantizers.setdefault(value, []).append((users, grid))
        self.sqnr: dict[str, float] = {}
        self.biases: dict[str, Tensor] = {}
        self._tensors: dict[str, tuple[Tensor, Tensor]] = {}
        self._readers: dict[str, int] = {}
        for node in module.graph.nodes:
            if node.op == "get_attr":
                self._readers[str(node.target)] = self._readers.get(str(node.target), 0) + len(node.users)

    @torch.no_grad()
    def run(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The flat outputs of the float network and of its quantized twin."""
        plain: dict[fx.Node, Any] = {}
        twin: dict[fx.Node, Any] = {}
        rounded: dict[tuple[fx.Node, str], Tensor] = {}  # what single users see instead
        waiting = iter(inputs)
        uses = {node: len(node.users) for node in self.module.graph.nodes}
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                plain[node] = twin[node] = next(waiting)
            elif node.op == "get_attr":
                plain[node], twin[node] = self._tensor(str(node.target))
            elif node.op == "output":
                return pytree.tree_map(plain.get, node.args[0]), pytree.tree_map(twin.get, node.args[0])
            else:
                self._call(node, plain, twin, rounded)
            self._round(node, plain, twin, rounded)
            for source in node.all_input_nodes:
                uses[source] -= 1
                if uses[source] == 0:
                    plain.pop(source)
                    twin.pop(source)
                    for key in [k for k in rounded if k[0] is source]:
                        del rounded[key]
        raise ValueError("the graph has no output")

    def _call(
        self,
        node: fx.Node,
        plain: dict[fx.Node, Any],
        twin: dict[fx.Node, Any],
        rounded: Mapping[tuple[fx.Node, str], Tensor],
    ) -> None:
        target: Any = node.target
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: plain[n])
        plain[node] = target(*args, **kwargs)
        seen = {n: rounded.get((n, node.name), twin[n]) for n in node.all_input_nodes}
        if all(seen[n] is plain[n] for n in seen):
            twin[node] = plain[node]
            return
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: seen[n])
        twin[node] = target(*args, **kwargs)
        if node.name in self.correct:
            self._correct(node, plain, twin)
        if node.name in self.layers:
            self.sqnr[node.name] = sqnr(plain[node], twin[node])

    def _correct(self, node: fx.Node, plain: Mapping[fx.Node, Any], twin: dict[fx.Node, Any]) -> None:
        name = operator_name(node)
        bias = argument(node, 0 if name == "aten::addmm" else 2, "bias", None)
        if not isinstance(bias, fx.Node) or bias.op != "get_attr" or self._readers[str(bias.target)] > 1:
            return
        parameter = str(bias.target)
        value = self._tensor(parameter)[1]
        channel = 1 if name in CONVOLUTIONS else plain[node].ndim - 1
        others = [d for d in range(1, plain[node].ndim) if d != channel]
        missing = plain[node] - twin[node]
        missing = missing.mean(others, dtype=torch.float64) if others else missing.double()
        if missing.ndim != 2 or len(missing) < 2:
            return
        shift, doubt = missing.mean(0), missing.var(0) / len(missing)
        # The errors of one sample go together: of what a few samples show, only what exceeds their own spread is bias.
        shift = (shift * (1.0 - doubt / shift.square().clamp(min=1e-300)).clamp(min=0.0)).to(value.dtype)
        if value.ndim != 1 or shift.shape != value.shape:
            return
        shape = [1] * plain[node].ndim
        shape[channel] = -1
        twin[node] = twin[node] + shift.view(shape)
        self.biases[parameter] = value + shift

    def _round(
        self,
        node: fx.Node,
        plain: Mapping[fx.Node, Any],
        twin: dict[fx.Node, Any],
        rounded: dict[tuple[fx.Node, str], Tensor],
    ) -> None:
        for users, grid in self.quantizers.get(node.name, ()):
            value = fake_quantize(twin[node], grid)
            if node.name not in self.layers:
                self.sqnr[node.name] = sqnr(plain[node], value)
            if users is None:
                twin[node] = value
            else:
                rounded |= {(node, user): value for user in users}

    def _tensor(self, name: str) -> tuple[Tensor, Tensor]:
        if name not in self._tensors:
            holder: Any = self.module
            for part in name.split("."):
                holder = getattr(holder, part)
            value = holder.detach()
            self._tensors[name] = (value, self.weights.get(name, value))
        return self._tensors[name]
