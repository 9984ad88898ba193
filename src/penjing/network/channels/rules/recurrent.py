"""LSTM, GRU and plain recurrent layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from penjing.network.channels.labels import along, core, is_free, varying
from penjing.network.channels.rules.base import Call, opaque, rule


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(call: Call) -> Any:
    """Every unit owns a row in each gate, a column of the recurrent weights and a place in the output, in all layers
    alike."""
    tape = call.tape
    if "params" not in call.values or "batch_sizes" in call.values:
        return opaque(call)
    params = [tape.as_slots(t) for t in call.labels["params"]]
    biased, layers, both = (
        bool(call.values["has_biases"]),
        int(call.values["num_layers"]),
        bool(call.values["bidirectional"]),
    )
    directions = 2 if both else 1
    each = len(params) // (layers * directions)
    if each != (4 if biased else 2):
        return opaque(call)  # projections
    shared = tape.axis(params[1], 1)
    size = params[1].shape[1]
    arriving = _last(call)
    for layer in range(layers):
        for direction in range(directions):
            start = (layer * directions + direction) * each
            into, back = params[start], params[start + 1]
            columns = tape.axis(into, 1)
            if is_free(arriving):
                call.pin(columns, f"{call.name} reads constants")
            tape.union(arriving.expand(columns.shape), columns)
            tape.union(shared, tape.axis(back, 1))
            tape.mark("consumer", columns)
            tape.mark("consumer", tape.axis(back, 1))
            for slots in params[start : start + each]:
                rows = tape.axis(slots, 0)
                tape.union(rows, shared.repeat(rows.numel() // size))
                if len(slots.shape) > 1:
                    tape.mark("producer", rows)
        arriving = shared.repeat(directions)
    states = call.labels["hx"] if isinstance(call.labels["hx"], list) else [call.labels["hx"]]
    for state in states:
        labels = tape.elements(state)
        if set(varying(labels)) - {labels.dim() - 1}:
            call.pin(labels, f"{call.name} starts from a state with channels in several dimensions")
        tape.union(core(labels), along(shared, labels.dim() - 1, core(labels).shape[:-1] + (size,)))
    output, *rest = call.result
    ends = tuple(along(shared, t.dim() - 1, t.shape) for t in rest)
    return (along(arriving, output.dim() - 1, output.shape), *ends)


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(call: Call) -> Any:
    """One step of a recurrent layer."""
    tape = call.tape
    into, back = tape.as_slots(call.labels["w_ih"]), tape.as_slots(call.labels["w_hh"])
    size = back.shape[1]
    shared, columns, arriving = tape.axis(back, 1), tape.axis(into, 1), _last(call)
    if is_free(arriving):
        call.pin(columns, f"{call.name} reads constants")
    tape.union(arriving.expand(columns.shape), columns)
    tape.mark("consumer", columns)
    tape.mark("consumer", shared)
    for name in ("w_ih", "w_hh", "b_ih", "b_hh"):
        if call.has(name):
            rows = tape.axis(tape.as_slots(call.labels[name]), 0)
            tape.union(rows, shared.repeat(rows.numel() // size))
            if name.startswith("w"):
                tape.mark("producer", rows)
    states = call.labels["hx"] if isinstance(call.labels["hx"], list) else [call.labels["hx"]]
    for state in states:
        labels = tape.elements(state)
        if set(varying(labels)) - {labels.dim() - 1}:
            call.pin(labels, f"{call.name} starts from a state with channels in several dimensions")
        tape.union(core(labels), along(shared, labels.dim() - 1, core(labels).shape[:-1] + (size,)))
    if isinstance(call.result, tuple):
        return tuple(along(shared, t.dim() - 1, t.shape) for t in call.result)
    return along(shared, call.result.dim() - 1, call.shape)


def _last(call: Call) -> Tensor:
    labels = call.label("input")
    if [d for d in varying(labels) if d != labels.dim() - 1]:
        call.pin(labels, f"{call.name} runs over channels")
    labels = core(labels)
    return labels.reshape(-1, labels.shape[-1]).amax(0) if labels.dim() else torch.zeros(1, dtype=torch.int64)
