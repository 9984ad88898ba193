"""Convolutions: plain, grouped, depthwise, transposed, in one to three dimensions."""

from __future__ import annotations

from torch import Tensor

from penjing.network.channels.labels import along, core, is_free, varying
from penjing.network.channels.rules.base import Call, rule


@rule(
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "convolution",
    "_convolution",
)
def convolution(call: Call) -> Tensor:
    """The input's channels meet the weight's columns, its rows name the output's channels."""
    tape = call.tape
    x = call.label("input")
    weight = tape.as_slots(call.labels["weight"])
    groups = int(call.values.get("groups") or 1)
    transposed = "transpose" in call.name or bool(call.values.get("transposed"))
    channel = x.dim() - (len(weight.shape) - 1)
    inputs, outputs = x.shape[channel], call.shape[channel]
    for d in range(2, len(weight.shape)):
        call.pin(tape.axis(weight, d), "the extent of a kernel")
    spatial = [d for d in varying(x) if d > channel]
    if spatial and channel not in varying(x):
        for labels in (
            x,
            tape.axis(weight, 0),
            tape.axis(weight, 1),
            *([call.vector("bias")] if call.has("bias") else []),
        ):
            call.pin(labels, f"{call.name} slides over channels")
        return core(x).amax().expand(call.shape)
    for d in spatial:  # a channel has one label wherever it is looked at
        x = tape.join_along(x, d)
    into, out_of = tape.axis(weight, 0 if transposed else 1), tape.axis(weight, 1 if transposed else 0)
    arriving = core(x).movedim(channel, 0).reshape(core(x).shape[channel], -1)
    if arriving.shape[1] > 1:
        call.pin(x, f"{call.name} over channels in several dimensions")
    arriving = arriving.amax(1).expand(inputs).contiguous()
    each_in, each_out = inputs // groups, outputs // groups
    if groups > 1 and each_in == 1:
        rows = (out_of if not transposed else into).clone()
        if not transposed:
            rows = rows.reshape(groups, each_out)
            arriving_rows = arriving[:, None].expand(groups, each_out)
            _meet(call, arriving_rows, rows)
            leaving = rows.reshape(-1)
        else:
            _meet(call, arriving, rows)
            call.pin(out_of, "several outputs of every group")
            leaving = rows[:, None].expand(groups, each_out).reshape(-1)
        tape.mark("other", rows)
    else:
        if groups > 1:
            tape.join_along(arriving.reshape(groups, each_in), 0)
        columns = into if transposed else into.repeat(groups)
        _meet(call, arriving, columns)
        tape.mark("consumer", into)
        leaving = out_of.repeat(groups) if transposed else out_of
        if groups > 1:
            tape.join_along(leaving.reshape(groups, each_out), 0)
            if transposed:
                tape.join_along(columns.reshape(groups, each_in), 0)
        tape.mark("producer", out_of)
    if call.has("bias"):
        bias = call.vector("bias")
        if bias.numel() == leaving.numel():
            tape.union(leaving, bias)
    return along(leaving, channel, call.shape)


def _meet(call: Call, arriving: Tensor, columns: Tensor) -> None:
    unknown = columns[arriving == 0] if arriving.shape == columns.shape else columns
    if unknown.numel() and not is_free(unknown):
        call.pin(unknown.contiguous(), f"{call.name} reads constants here")
    call.tape.union(arriving, columns)
