"""Matrix products, einsum, attention and embeddings, all as one rule by letters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penjing.network.channels.labels import Heads, Labels, Slots, Tape, along, core, free, is_free, varying
from penjing.network.channels.rules.base import Call, rule, together


def contract(call: Call, x: Labels, xl: str, y: Labels, yl: str, out: str, shape: Sequence[int]) -> Labels:
    """Labels of a product of two values whose dimensions carry letters; letters missing in `out` are summed over."""
    if isinstance(x, Slots) and isinstance(y, Slots):
        return _both_weights(call.tape, x, xl, y, yl, out, shape)
    if isinstance(x, Slots):
        return _with_weights(call, call.tape.elements(y), yl, x, xl, out, shape)
    if isinstance(y, Slots):
        return _with_weights(call, x, xl, y, yl, out, shape)
    return _activations(call, x, xl, y, yl, out, shape)


def _both_weights(tape: Tape, x: Slots, xl: str, y: Slots, yl: str, out: str, shape: Sequence[int]) -> Slots:
    vectors: dict[str, Tensor] = {}
    for slots, letters in ((x, xl), (y, yl)):
        for dim, letter in enumerate(letters):
            vector = tape.axis(slots, dim)
            if letter in vectors:
                tape.union(vectors[letter], vector)
            vectors.setdefault(letter, vector)
    layers = tuple(along(vectors[c], d, shape) for d, c in enumerate(out) if vectors[c].any())
    for letter, vector in vectors.items():
        if letter not in out:
            tape.mark("consumer", vector)
    return Slots(tuple(shape), layers)


def _with_weights(call: Call, x: Tensor, xl: str, w: Slots, wl: str, out: str, shape: Sequence[int]) -> Tensor:
    tape = call.tape
    over = {xl[d] for d in varying(x)}
    summed = [c for c in wl if c in xl and c not in out]
    own = [c for c in wl if c in out and c not in xl]
    axes = {c: tape.axis(w, d) for d, c in enumerate(wl)}
    for c in wl:
        if c not in summed and c not in own:
            call.pin(axes[c], f"{call.name} uses this dimension for positions")
    for c in summed:
        vector = axes[c]
        if not vector.any():
            if c in over:
                call.pin(x, f"{call.name} with constant weights")
            continue
        tape.mark("consumer", vector)
        target = along(vector, xl.index(c), x.shape)
        if over == {c} or (c in over and len(summed) == 1):
            tape.union(x, target)
        elif c in over:
            tape.collapse(core(x), [d for d in varying(x) if xl[d] != c], core(target))
        elif over or is_free(x):
            call.pin(vector, f"{call.name} sums over positions or constants here")
        else:
            tape.union(core(x), core(target))
    if any(c in over for c in summed) and (len(summed) == 1 or over <= set(summed)):
        left: Tensor | None = None
    else:
        left = tape.reduce(x, [xl.index(c) for c in summed])
        left = left if varying(left) else None
    if left is not None:
        for c in own:
            call.pin(axes[c], f"{call.name} applies the same weights to every channel")
        order = [c for c in xl if c in out]
        kept = left.permute([xl.index(c) for c in order] + [xl.index(c) for c in xl if c not in out])
        kept = kept.reshape(kept.shape[: len(order)])
        full = kept[(...,) + (None,) * len(own)].permute([(order + own).index(c) for c in out])
        return full.expand(tuple(shape))
    for c in own:
        tape.mark("producer", axes[c])
    if len(own) == 1:
        return along(axes[own[0]], out.index(own[0]), shape)
    if not own:
        return free(shape)
    layers = tuple(along(axes[c], out.index(c), shape) for c in own if axes[c].any())
    return tape.elements(Slots(tuple(shape), layers))


def _align(labels: Tensor, letters: str, order: str) -> Tensor:
    present = [c for c in order if c in letters]
    labels = labels.permute([letters.index(c) for c in present])
    for d, c in enumerate(order):
        if c not in letters:
            labels = labels.unsqueeze(d)
    return labels


def _activations(call: Call, x: Tensor, xl: str, y: Tensor, yl: str, out: str, shape: Sequence[int]) -> Tensor:
    tape = call.tape
    order = out + "".join(dict.fromkeys(c for c in xl + yl if c not in out))
    x, y = _align(x, xl, order), _align(y, yl, order)
    over = {"x": {order[d] for d in varying(x)}, "y": {order[d] for d in varying(y)}}
    batch = [c for c in out if c in xl and c in yl]
    for labels, found in ((x, over["x"]), (y, over["y"])):
        mixed = [c for c in found if c in batch]
        other = [c for c in found if c not in batch]
        if mixed and other:
            dims = tuple(order.index(c) for c in mixed), tuple(order.index(c) for c in other)
            tape.heads.append(Heads(core(labels).numpy().copy(), *dims))
    for d in range(len(out), len(order)):
        c = order[d]
        if c in over["x"] and c in over["y"]:
            tape.union(core(x), core(y))
            tape.summed(call.name, x)
        elif c in over["x"] or c in over["y"]:
            call.pin(x if c in over["x"] else y, f"{call.name} sums over channels of one side only")
    summed = list(range(len(out), len(order)))
    left, right = tape.reduce(x, summed), tape.reduce(y, summed)
    for _ in summed:
        left, right = left.squeeze(-1), right.squeeze(-1)
    return tape.combine([left, right], shape, call.node.name, call.name)


@rule("linear", "addmm", "baddbmm", "matmul", "mm", "bmm", "mv", "dot")
def product(call: Call) -> Labels:
    """All products of two operands, with an optional bias."""
    short = call.name.removeprefix("aten::")
    names = {
        "linear": ("input", "weight"),
        "addmm": ("mat1", "mat2"),
        "baddbmm": ("batch1", "batch2"),
        "mm": ("self", "mat2"),
        "bmm": ("self", "mat2"),
        "mv": ("self", "vec"),
        "dot": ("self", "tensor"),
        "matmul": ("self", "other"),
    }[short]
    x, y = (call.labels[name] for name in names)
    nx, ny = (call.values[name].dim() for name in names)
    batch = "abcdefghij"[10 - max(nx, ny) + 2 :] if max(nx, ny) > 2 else ""
    if short == "linear":
        batch = "abcdefghij"[: nx - 1]
        xl, yl, out = batch + "k", "nk"[2 - ny :], batch + "n"[: ny - 1]
        if isinstance(y, Tensor) and ny == 2:
            y = call.tape.as_slots(y)
    else:
        xl = (batch[len(batch) - nx + 2 :] + "mk") if nx > 1 else "k"
        yl = (batch[len(batch) - ny + 2 :] + "kn") if ny > 1 else "k"
        out = batch + "m"[: nx - 1] + "n"[: ny - 1]
    x, xl = _unbroadcast(call, names[0], x, xl, yl, out)
    y, yl = _unbroadcast(call, names[1], y, yl, xl, out)
    result = contract(call, x, xl, y, yl, out, call.shape)
    bias = "bias" if short == "linear" else "self" if short in ("addmm", "baddbmm") else None
    if bias is not None and call.has(bias):
        added = call.labels[bias]
        if isinstance(result, Slots):
            return together(call, [result, added])
        return call.tape.combine([result, call.tape.elements(added)], call.shape, call.node.name, call.name)
    return result


def _unbroadcast(call: Call, name: str, labels: Labels, letters: str, others: str, out: str) -> tuple[Labels, str]:
    """Drop batch dimensions of size 1 that broadcast against a larger one, so that a letter has one size."""
    shape = call.values[name].shape
    gone = [d for d, c in enumerate(letters) if c in out and c in others and shape[d] == 1 != call.shape[out.index(c)]]
    if not gone:
        return labels, letters
    keep = [c for d, c in enumerate(letters) if d not in gone]
    size = [n for d, n in enumerate(shape) if d not in gone]
    if isinstance(labels, Slots):
        return Slots(tuple(size), tuple(layer.reshape(size) for layer in labels.layers)), "".join(keep)
    return labels.reshape(size), "".join(keep)


@rule("einsum")
def einsum(call: Call) -> Labels:
    """Two operands by letters; other forms are pinned and named."""
    equation = str(call.values["equation"]).replace(" ", "")
    inputs, _, out = equation.partition("->")
    terms = inputs.split(",")
    operands = call.labels["tensors"]
    repeated = any(len(set(t)) != len(t) for t in terms)
    if len(terms) != 2 or "." in equation or "->" not in equation or repeated:
        known = [t for t in call.tensors() if isinstance(t, Slots) or not is_free(t)]
        label = 0
        for labels in known:
            label = call.tape.pin(labels, f"no rule for this form of {call.name}", call.node.name, call.name)
        return torch.tensor(label).expand(call.shape)
    return contract(call, operands[0], terms[0], operands[1], terms[1], out, call.shape)


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Tensor:
    """softmax(q kᵀ + mask) v with one label a head for the scores."""
    q, k, v = (call.label(name) for name in ("query", "key", "value"))
    if call.values.get("enable_gqa"):
        times = q.shape[-3] // k.shape[-3]
        k, v = k.repeat_interleave(times, -3), v.repeat_interleave(q.shape[-3] // v.shape[-3], -3)
    k, v = (t.expand(*q.shape[:-2], *t.shape[-2:]) for t in (k, v))
    batch = "abcdefghij"[: q.dim() - 2]
    shape = (*call.shape[:-1], k.shape[-2])
    scores = contract(call, q, batch + "lk", k, batch + "sk", batch + "ls", shape)
    parts = [call.tape.elements(scores)]
    if call.has("attn_mask"):
        parts.append(mask_elements(call.tape, call.labels["attn_mask"], parts[0]))
    scores = call.tape.combine(parts, shape, call.node.name, call.name)
    if scores.dim() - 1 in varying(scores):
        call.tape.crossed(call.name, scores)
    result = contract(call, scores, batch + "ls", v, batch + "sn", batch + "ln", call.shape)
    return call.tape.elements(result)


def mask_elements(tape: Tape, mask: Labels, other: Tensor) -> Tensor:
    """Element labels of a parameter that meets an activation, following the one dimension the activation depends on."""
    if isinstance(mask, Tensor):
        return mask
    offset = other.dim() - len(mask.shape)
    over = [d - offset for d in varying(other) if d >= offset]
    if len(over) != 1 or len(varying(other)) != 1:
        return tape.elements(mask)
    vector = tape.axis(mask, over[0])
    for layer in mask.layers:
        if varying(layer) != over:
            tape.pin(layer, "positions of a parameter", "")
    tape.mark("other", vector)
    return along(vector, over[0], mask.shape)


@rule("embedding")
def embedding(call: Call) -> Tensor:
    """Rows of a table: its columns are channels, its rows are not."""
    weight = call.weights("weight")
    call.pin(call.tape.axis(weight, 0), "rows of an embedding are looked up by number")
    vector = call.tape.axis(weight, 1)
    call.tape.mark("producer", vector)
    return along(vector, len(call.shape) - 1, call.shape)
