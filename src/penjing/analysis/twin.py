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

#: Where rounding left next to nothing of a channel, a larger factor would only make noise of it.
_MOST_GAIN = 2.0


class Twin:
    """Runs a float graph twice in one walk, as it is and with weights and activations on grids.

    `weights` maps parameters to their rounded values; `quantizers` are (value, its users or None for all, grid). At
    each layer in `correct` that has a bias of its own, the bias moves so that the mean of each output channel equals
    the float one before the next layer is computed; `biases` holds the new values, by name. At each layer in `rescale`
    (its name → its weight's, which no other layer reads) the weight is multiplied, too, so that each output channel
    spreads as the float one does; `gains` holds the factors, by weight. Together that is what taking a batch norm's
    statistics again would do (Sun et al. 2019, "Hybrid 8-bit floating point training", §4.2), once it is folded. `sqnr`
    holds, in dB, how well the quantized twin's value stands for the float one, at every quantizer (with its own
    rounding) and every layer in `layers` (None: those in `correct`).
    """

    def __init__(
        self,
        module: fx.GraphModule,
        weights: Mapping[str, Tensor],
        quantizers: Iterable[tuple[str, tuple[str, ...] | None, Grid]],
        correct: Collection[str],
        layers: Collection[str] | None = None,
        rescale: Mapping[str, str] | None = None,
    ) -> None:
        self.module, self.weights, self.correct, self.rescale = module, weights, set(correct), dict(rescale or {})
        self.layers = set(layers) if layers is not None else self.correct
        self.quantizers: dict[str, list[tuple[tuple[str, ...] | None, Grid]]] = {}
        for value, users, grid in quantizers:
            self.quantizers.setdefault(value, []).append((users, grid))
        self.sqnr: dict[str, float] = {}
        self.biases: dict[str, Tensor] = {}
        self.gains: dict[str, Tensor] = {}
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
        if node.name in self.correct or node.name in self.rescale:
            self._correct(node, plain, twin)
        if node.name in self.layers:
            self.sqnr[node.name] = sqnr(plain[node], twin[node])

    def _correct(self, node: fx.Node, plain: Mapping[fx.Node, Any], twin: dict[fx.Node, Any]) -> None:
        channel = 1 if operator_name(node) in CONVOLUTIONS else plain[node].ndim - 1
        if channel < 1 or len(plain[node]) < 2:
            return
        shape = [1] * plain[node].ndim
        shape[channel] = -1
        bias = self._own_bias(node)
        value = None if bias is None else self._tensor(bias)[1]
        if value is not None and value.shape != plain[node].shape[channel : channel + 1]:
            return
        own = value if value is not None else torch.zeros(len(plain[node].movedim(channel, 0)))
        (spread, mean), (found, have) = (_moments(x, channel) for x in (plain[node], twin[node]))
        gain = torch.ones_like(own)
        if node.name in self.rescale:
            gain = _gain(spread, found).to(own.dtype)
            self.gains[self.rescale[node.name]] = gain
        moved = own * (1 - gain)
        if bias is not None and node.name in self.correct:
            shift = _sure(mean - (have * gain + moved)).to(own.dtype)
            self.biases[bias] = own + shift
            moved = moved + shift
        twin[node] = torch.addcmul(moved.view(shape), twin[node], gain.view(shape))

    def _own_bias(self, node: fx.Node) -> str | None:
        bias = argument(node, 0 if operator_name(node) == "aten::addmm" else 2, "bias", None)
        if not isinstance(bias, fx.Node) or bias.op != "get_attr" or self._readers[str(bias.target)] > 1:
            return None
        return str(bias.target)

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


def _moments(values: Tensor, channel: int) -> tuple[Tensor, Tensor]:
    """What each sample (dimension 0) adds to each channel's variance, and its mean there, (samples, channels)."""
    others = [d for d in range(1, values.ndim) if d != channel]
    if others:
        mean = values.mean(others).double()
        square = torch.linalg.vector_norm(values, dim=others).double().square() / (
            values[0].numel() // values.shape[channel]
        )
        variance = square - mean.square()
        if (variance < 1e-3 * square).any():  # far from zero float32 squares are too coarse; this is slower by far
            variance = torch.var(values, others, correction=0).double()
    else:
        mean = values.double()
        variance = torch.zeros_like(mean)
    return variance + (mean - mean.mean(0)).square(), mean


def _gain(wanted: Tensor, found: Tensor) -> Tensor:
    """What each channel is to be multiplied by to have the variance `wanted` instead of the one `found` (samples,
    channels), as far as the samples agree on it; 1 where nothing varies."""
    return gain_between(found.mean(0) + _sure(wanted - found), found.mean(0))


def _sure(values: Tensor) -> Tensor:
    """The mean over the samples (dimension 0), less the more they disagree."""
    mean, doubt = values.mean(0), values.var(0) / len(values)
    # The errors of one sample go together: of what a few samples show, only what exceeds their own spread counts.
    return mean * (1.0 - doubt / mean.square().clamp(min=1e-300)).clamp(min=0.0)


def gain_between(wanted: Tensor, found: Tensor) -> Tensor:
    """What channels are to be multiplied by to have the variances `wanted` instead of those `found`, within limits."""
    known = (wanted > 0) & (found > 0)
    gain = torch.where(known, wanted, 1.0).div(torch.where(known, found, 1.0)).sqrt()
    return gain.clamp(1 / _MOST_GAIN, _MOST_GAIN)
