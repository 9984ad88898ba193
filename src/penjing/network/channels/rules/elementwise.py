"""Elementwise operators, those that keep the shape, pooling, resizing and reductions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from penjing.network.channels.labels import FREE, Labels, Slots, along, core, free, is_free, varying
from penjing.network.channels.rules.base import Call, opaque, rule, spread, together
from penjing.network.channels.rules.contraction import mask_elements


@rule("pointwise::any", "masked_fill", "where", "addcmul", "addcdiv", "lerp", "clamp", "heaviside", "floor_divide")
def pointwise(call: Call) -> Labels:
    """Operands of an elementwise operator share their channels."""
    known = call.tensors()
    if call.static and any(isinstance(t, Slots) for t in known):
        return together(call, known)
    elements = [t for t in known if isinstance(t, Tensor) and not is_free(t)]
    widest = max(elements, key=lambda t: len(varying(t)), default=None)
    operands = [
        t if isinstance(t, Tensor) else mask_elements(call.tape, t, widest if widest is not None else free(()))
        for t in known
    ]
    return call.tape.combine(operands, call.shape, call.node.name, call.name, call.static)


@rule(
    "dropout",
    "dropout_",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    "native_dropout",
    "to",
    "_to_copy",
    "contiguous",
    "clone",
    "detach",
    "detach_",
    "alias",
    "lift_fresh",
    "lift_fresh_copy",
    "type_as",
    "float",
    "softmax",
    "_softmax",
    "log_softmax",
    "_log_softmax",
    "cumsum",
    "logcumsumexp",
    "cumprod",
    "quantized_decomposed::quantize_per_tensor",
    "relu6",
    "hardtanh",
    "rrelu",
    "rrelu_with_noise",
    "gumbel_softmax",
    "celu",
    "selu",
    "softplus",
    "hardswish",
    "positive",
    "view_as",
    "copy",
    "fill",
    "nan_to_num",
    "dropout2d",
    "bernoulli",
    "_safe_softmax",
    "softmin",
    "relu_",
    "set_grad",
)
def same(call: Call) -> Any:
    """The result has the first argument's shape and channels."""
    labels = next(iter(call.labels.values()))
    first = call.result[0] if isinstance(call.result, tuple) else call.result
    if isinstance(labels, Tensor) and "dim" in call.values and isinstance(call.values["dim"], int):
        if call.values["dim"] % max(1, labels.dim()) in varying(labels):
            call.tape.crossed(call.name, labels)
            call.tape.summed(call.name, labels)
    if isinstance(labels, Slots):
        result: Labels = Slots(tuple(first.shape), labels.layers)
    else:
        result = labels if labels.shape == first.shape else labels.reshape(first.shape)
    return tuple(result for _ in call.result) if isinstance(call.result, tuple) else result


@rule("quantized_decomposed::dequantize_per_tensor")
def dequantize(call: Call) -> Labels:
    """An identity; stored integers are weights."""
    node = call.nodes["input"]
    if getattr(node, "op", "") == "get_attr":
        slots = call.weights("input")
        return slots.layers[0] if len(slots.layers) == 1 else slots
    labels: Labels = call.labels["input"]
    return labels


@rule("quantized_decomposed::choose_qparams")
def range_of_values(call: Call) -> Any:
    """One scale and one zero point for everything: they follow no channel."""
    return spread(call.result, torch.zeros((), dtype=torch.int64))


@rule("quantized_decomposed::dequantize_per_channel")
def dequantize_channels(call: Call) -> Labels:
    """Stored integers are weights; scales and zero points follow their rows. Groups of a row's values stay whole."""
    if getattr(call.nodes["input"], "op", "") != "get_attr":
        pinned = call.tape.pin(free(()), "a weight quantized in groups", call.name)
        return torch.tensor(pinned).expand(call.shape)
    slots = call.weights("input")
    axis = int(call.values["axis"]) % max(1, len(slots.shape))
    rows = call.tape.axis(slots, axis)
    for name in ("scales", "zero_points"):
        if call.has(name) and call.values[name].numel() == rows.numel():
            call.tape.union(rows, call.vector(name))
    return slots.layers[0] if len(slots.layers) == 1 else slots


@rule(
    *(
        f"{kind}{n}d{more}"
        for n in (1, 2, 3)
        for kind in (
            "max_pool",
            "avg_pool",
            "adaptive_avg_pool",
            "adaptive_max_pool",
            "_adaptive_avg_pool",
            "reflection_pad",
            "replication_pad",
            "lp_pool",
            "fractional_max_pool",
        )
        for more in ("", "_with_indices")
    ),
    *(
        f"{kind}{n}"
        for n in (
            "linear1d",
            "bilinear2d",
            "bicubic2d",
            "trilinear3d",
            "nearest1d",
            "nearest2d",
            "nearest3d",
            "_nearest_exact1d",
            "_nearest_exact2d",
        )
        for kind in ("upsample_", "_upsample_")
    ),
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)
def spatial(call: Call) -> Any:
    """Pooling and resizing mix positions and keep channels."""
    name = call.name.replace("_with_indices", "").replace("_aa", "")
    count = int(name[name.rindex("d") - 1])
    source = call.label(next(iter(call.labels)))
    dims = range(source.dim() - count, source.dim())
    crossing = [d for d in dims if d in varying(source)]
    first = call.result[0] if isinstance(call.result, tuple) else call.result
    if crossing and len(crossing) == len(varying(source)):
        call.pin(source, f"{call.name} slides over channels")
        return spread(call.result, core(source).amax())
    labels = core(source)
    for d in crossing:
        labels = call.tape.join_along(labels, d)
    labels = labels.expand(first.shape)
    return tuple(labels for _ in call.result) if isinstance(call.result, tuple) else labels


@rule(
    "mean",
    "sum",
    "amax",
    "amin",
    "max",
    "min",
    "std",
    "var",
    "var_mean",
    "std_mean",
    "logsumexp",
    "norm",
    "linalg_vector_norm",
    "prod",
    "any",
    "all",
    "nansum",
    "median",
    "count_nonzero",
    "argmax",
    "argmin",
)
def reduction(call: Call) -> Any:
    """A reduction over channels frees the result of them, but its value depends on all."""
    if call.has("other"):
        return pointwise(call)
    labels = next(iter(call.labels.values()))
    if isinstance(labels, Slots):
        return _weight_reduction(call, labels)
    dims = _dims(call, labels.dim())
    crossing = [d for d in dims if d in varying(labels)]
    if crossing:
        if call.name in ("aten::argmax", "aten::argmin") or (
            isinstance(call.result, tuple) and "mean" not in call.name
        ):
            return opaque(call)  # the number of a channel is a result
        if call.name not in _SUMS or call.values.get("ord") not in (None, 1, 2):
            call.tape.crossed(call.name, labels)
        if call.name not in _COUNTED_ONCE:
            call.tape.summed(call.name, labels)
    reduced = call.tape.reduce(labels, dims)
    for d in sorted(dims, reverse=True):
        reduced = reduced.squeeze(d)
    first = call.result[0] if isinstance(call.result, tuple) else call.result
    if first.dim() == labels.dim() and dims:
        for d in sorted(dims):
            reduced = reduced.unsqueeze(d)
    reduced = reduced.expand(first.shape)
    return tuple(reduced for _ in call.result) if isinstance(call.result, tuple) else reduced


#: Reductions to which a zero adds nothing, and those to which a copy of every value adds nothing.
_SUMS = ("aten::sum", "aten::nansum", "aten::norm", "aten::linalg_vector_norm", "aten::any", "aten::count_nonzero")
_COUNTED_ONCE = ("aten::mean", "aten::amax", "aten::amin", "aten::max", "aten::min", "aten::any", "aten::all")


def _dims(call: Call, ndim: int) -> list[int]:
    given = call.values.get("dim")
    if given is None or given == []:
        return list(range(ndim))
    return [d % max(1, ndim) for d in (given if isinstance(given, list | tuple) else [given])]


def _weight_reduction(call: Call, slots: Slots) -> Any:
    dims = _dims(call, len(slots.shape))
    if isinstance(call.result, tuple):
        return opaque(call)
    keep = len(call.shape) == len(slots.shape)
    layers = []
    for d in range(len(slots.shape)):
        vector = call.tape.axis(slots, d)
        if d not in dims and vector.any():
            layers.append(along(vector, d if keep else d - sum(r < d for r in dims), call.shape))
        elif vector.any() and call.name != "aten::sum":
            call.tape.crossed(call.name, vector)
    return layers[0] if len(layers) == 1 else Slots(call.shape, tuple(layers))


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(call: Call) -> Any:
    """w = v · g / |v|: the gains follow the dimension they scale."""
    v, g = call.tape.as_slots(call.labels["v"]), call.tape.as_slots(call.labels["g"])
    for d in range(len(v.shape)):
        if g.shape[d] == v.shape[d]:
            call.tape.union(call.tape.axis(v, d), call.tape.axis(g, d))
        else:
            call.tape.crossed(call.name, call.tape.axis(v, d))
    return (v, g) if isinstance(call.result, tuple) else v


@rule("prelu")
def prelu(call: Call) -> Tensor:
    """One slope for all channels, or one a channel."""
    x, slopes = call.label("self"), call.label("weight")
    if slopes.numel() > 1:
        slopes = slopes.reshape(1, -1, *[1] * (x.dim() - 2))
    return call.tape.combine([x, slopes], call.shape, call.node.name, call.name)


@rule("glu")
def glu(call: Call) -> Tensor:
    """The two halves of a gate share their channels."""
    a, b = call.label("self").chunk(2, int(call.values["dim"]))
    return call.tape.combine([a, b], call.shape, call.node.name, call.name)


@rule("zeros_like", "empty_like")
def zeros(call: Call) -> Any:
    """Zeros get smaller with what they are like, and so does what reads them; what stays says nothing."""
    labels = call.label("self")
    pinned = {pin.label for pin in call.tape.pins}
    stays = set(labels.reshape(-1).tolist()) <= pinned | {FREE}
    return spread(call.result, torch.zeros((), dtype=torch.int64)) if stays else labels


@rule(
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "zeros",
    "ones",
    "sym_size",
)
def created(call: Call) -> Any:
    """New values that say nothing about channels."""
    return spread(call.result, torch.zeros((), dtype=torch.int64))
