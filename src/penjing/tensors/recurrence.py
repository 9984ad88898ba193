"""LSTMs step by step, for what fused operators hide: the products inside them and what these read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def lstm_by_steps(
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
    read: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """What `torch.lstm` gives in eval form, with `read` between every hidden state and the product that reads it.

    `read` also gets the inputs of every layer but the first: (steps, batch, channels), for both directions at once.
    Shapes: `x` (batch, steps, channels) or with `batch_first` off (steps, batch, channels); `state` two tensors (layers
    · directions, batch, hidden); `weights` in the order of `torch.lstm`, for each layer and direction w_ih (4 · hidden,
    channels), w_hh (4 · hidden, hidden) and with `biases` b_ih and b_hh. Raises ValueError for projected states.
    """
    directions = 2 if bidirectional else 1
    each = 4 if biases else 2
    if len(weights) != each * layers * directions:
        raise ValueError("LSTMs whose hidden states are projected are not run step by step")
    current = x.transpose(0, 1) if batch_first else x
    last: list[tuple[Tensor, Tensor]] = []
    for layer in range(layers):
        current = read(current) if layer else current
        sides = []
        for side in range(directions):
            place = layer * directions + side
            start = state[0][place], state[1][place]
            made, end = _one_way(current, start, weights[place * each :][:each], bool(side), read)
            sides.append(made)
            last.append(end)
        current = torch.cat(sides, -1)
    output = current.transpose(0, 1) if batch_first else current
    return output, torch.stack([h for h, _ in last]), torch.stack([c for _, c in last])


def _one_way(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    backwards: bool,
    read: Callable[[Tensor], Tensor],
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One layer in one direction: all hidden states in the order of `x`, and the last state."""
    w_ih, w_hh, *biases = weights
    fed = x @ w_ih.T + sum(biases)
    hidden, cell = state
    found = [hidden] * len(x)
    for step in reversed(range(len(x))) if backwards else range(len(x)):
        i, f, g, o = (fed[step] + read(hidden) @ w_hh.T).chunk(4, -1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        found[step] = hidden
    return torch.stack(found), (hidden, cell)
