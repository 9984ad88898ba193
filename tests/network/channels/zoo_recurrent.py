"""Recurrent networks, as layers and as cells."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from zoo_base import entry


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], **more: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.rnn = kind(6, 8, batch_first=True, **more)
        self.head = nn.Linear(16 if more.get("bidirectional") else 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0][:, -1])


@entry
def lstm():
    return Recurrent(nn.LSTM, num_layers=2, bidirectional=True), (torch.randint(0, 20, (2, 5)),)


@entry
def gru():
    return Recurrent(nn.GRU), (torch.randint(0, 20, (2, 5)),)


@entry
def rnn():
    return Recurrent(nn.RNN), (torch.randint(0, 20, (2, 5)),)


class Cells(nn.Module):
    """Recurrent cells unrolled by hand, with slopes a channel and a maximum of two halves behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(4, 8), nn.GRUCell(8, 12)
        self.slope, self.head = nn.PReLU(12), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, c, g = (x.new_zeros(x.shape[0], n) for n in (8, 8, 12))
        for t in range(3):
            h, c = self.lstm(x[:, t], (h, c))
            g = self.gru(h, g)
        g = self.slope(g)
        return self.head(torch.maximum(g[:, :6], g[:, 6:]))


@entry
def recurrent_cells():
    return Cells(), (torch.randn(2, 3, 4),)
