"""Normalizations: per-channel parameters, and statistics that may cross channels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from penjing.network.channels.labels import Slots, along, core, varying
from penjing.network.channels.rules.base import Call, rule


@rule(
    "batch_norm",
    "instance_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "native_batch_norm",
    "cudnn_batch_norm",
    "_batch_norm_impl_index",
)
def per_channel(call: Call) -> Any:
    """Statistics of one channel over samples and positions; over weights, the standardization of their rows."""
    weights = call.labels["input"]
    if isinstance(weights, Slots):
        for layer in weights.layers:
            if varying(layer) != [1]:
                call.tape.crossed(f"{call.name} of weights", layer)
        return (weights, *(None for _ in call.result[1:])) if isinstance(call.result, tuple) else weights
    x = call.label("input")
    operands = [x]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.has(name):
            vector = call.vector(name)
            call.tape.mark("other", vector)
            operands.append(along(vector, 1, (1, vector.numel(), *[1] * (x.dim() - 2))))
    first = call.result[0] if isinstance(call.result, tuple) else call.result
    labels = call.tape.combine(operands, first.shape, call.node.name, call.name)
    return (labels, *(None for _ in call.result[1:])) if isinstance(call.result, tuple) else labels


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def over_last(call: Call) -> Any:
    """Statistics over the last dimensions; the parameters have those dimensions."""
    x = call.label("input")
    count = len(call.values["normalized_shape"])
    dims = range(x.dim() - count, x.dim())
    if any(d in varying(x) for d in dims):
        call.tape.crossed(call.name, x)
    operands = [x]
    for name in ("weight", "bias"):
        if call.has(name):
            labels = call.labels[name]
            operands.append(_like(call, labels, x) if isinstance(labels, Slots) else labels)
    first = call.result[0] if isinstance(call.result, tuple) else call.result
    labels = call.tape.combine(operands, first.shape, call.node.name, call.name)
    return (labels, *(None for _ in call.result[1:])) if isinstance(call.result, tuple) else labels


def _like(call: Call, labels: Slots, x: Tensor) -> Tensor:
    """A parameter over several dimensions (`LayerNorm([C, H, W])`) follows the one the input's channels are on."""
    offset = x.dim() - len(labels.shape)
    over = [d - offset for d in varying(x)]
    if len(over) != 1 or over[0] < 0:
        return call.tape.elements(labels)
    for d in range(len(labels.shape)):
        if d != over[0]:
            call.pin(call.tape.axis(labels, d), "positions of a normalization")
    vector = call.tape.axis(labels, over[0])
    call.tape.mark("other", vector)
    return along(vector, over[0], labels.shape)


@rule("group_norm", "native_group_norm")
def by_group(call: Call) -> Any:
    """Statistics over groups of channels: every group loses the same positions, or channels are groups of their own."""
    x = call.label("input")
    groups = int(call.values.get("num_groups") or call.values["group"])
    channels = x.shape[1]
    if [d for d in varying(x) if d != 1]:
        call.pin(x, f"{call.name} over channels in several dimensions")
    labels = core(x)
    if labels.shape[1] == channels and channels > groups:
        vector = (
            labels.reshape(-1)
            if labels.numel() == channels
            else labels.amax(tuple(d for d in range(x.dim()) if d != 1))
        )
        if groups > 1:
            call.tape.join_along(vector.reshape(groups, channels // groups), 0)
        call.tape.crossed(call.name, x)
    operands = [x]
    for name in ("weight", "bias"):
        if call.has(name):
            vector = call.vector(name)
            operands.append(along(vector, 1, (1, channels, *[1] * (x.dim() - 2))))
    first = call.result[0] if isinstance(call.result, tuple) else call.result
    result = call.tape.combine(operands, first.shape, call.node.name, call.name)
    return (result, *(None for _ in call.result[1:])) if isinstance(call.result, tuple) else result
