"""Recurrent networks, as layers and as cells."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from penjing.testing.networks.base import Made, entry


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], **more: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.rnn = kind(6, 8, batch_first=True, **more)
        self.head = nn.Linear(16 if more.get("bidirectional") else 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0][:, -1])


@entry("recurrent", quick=True)
def lstm() -> Made:
    return Recurrent(nn.LSTM, num_layers=2, bidirectional=True), (torch.randint(0, 20, (2, 5)),)


@entry("recurrent", quick=True)
def gru() -> Made:
    return Recurrent(nn.GRU), (torch.randint(0, 20, (2, 5)),)


@entry("recurrent", quick=True)
def rnn() -> Made:
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


@entry("recurrent", quick=True)
def recurrent_cells() -> Made:
    return Cells(), (torch.randn(2, 3, 4),)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.letters = nn.Embedding(20, 6), nn.Conv1d(6, 8, 3, padding=1)
        self.lstm = nn.LSTM(14, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        e = self.words(x)
        letters = torch.relu(self.letters(e.transpose(1, 2))).transpose(1, 2)
        return self.head(self.lstm(torch.cat([e, letters], -1))[0])


@entry("recurrent", quick=True)
def bilstm_tagger() -> Made:
    return Tagger(), (torch.randint(0, 20, (2, 5)),)


class Translator(nn.Module):
    """An encoder whose last state starts the decoder, and additive attention over what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(20, 6), nn.Embedding(20, 6)
        self.encoder, self.bridge = nn.GRU(6, 8, batch_first=True, bidirectional=True), nn.Linear(16, 10)
        self.decoder = nn.GRU(6, 10, batch_first=True)
        self.q, self.k, self.v = nn.Linear(10, 12), nn.Linear(16, 12), nn.Linear(12, 1)
        self.head = nn.Linear(26, 20)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        seen, last = self.encoder(self.source(x))
        start = torch.tanh(self.bridge(torch.cat([last[0], last[1]], 1)))[None]
        out, _ = self.decoder(self.target(y), start)
        scores = self.v(torch.tanh(self.q(out)[:, :, None] + self.k(seen)[:, None])).squeeze(-1)
        return self.head(torch.cat([out, scores.softmax(-1) @ seen], -1))


@entry("recurrent")
def seq2seq_attention() -> Made:
    return Translator(), (torch.randint(0, 20, (2, 5)), torch.randint(0, 20, (2, 4)))


class Temporal(nn.Module):
    """Causal dilated convolutions whose tail is cut off (TCN, WaveNet's gate)."""

    def __init__(self, c: int, dilation: int) -> None:
        super().__init__()
        self.cut = 2 * dilation
        self.a = nn.utils.parametrizations.weight_norm(nn.Conv1d(c, 2 * c, 3, padding=self.cut, dilation=dilation))
        self.b = nn.Conv1d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x)[:, :, : -self.cut].chunk(2, 1)
        return x + self.b(torch.tanh(a) * torch.sigmoid(b))


@entry("recurrent")
def tcn() -> Made:
    body = [nn.Conv1d(3, 8, 1), Temporal(8, 1), Temporal(8, 2), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(*body), (torch.randn(2, 3, 16),)


class Conv2Gru(nn.Module):
    """Deep Speech, CRNN: convolutions, then channels and heights together as steps of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Hardtanh(0, 20))
        self.gru, self.head = nn.GRU(32, 8, num_layers=2, bidirectional=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x = x.flatten(1, 2).permute(2, 0, 1)
        return self.head(self.gru(x)[0]).permute(1, 0, 2).log_softmax(-1)


@entry("recurrent")
def crnn() -> Made:
    return Conv2Gru(), (torch.randn(2, 1, 8, 12),)


class PointNet(nn.Module):
    """Points of a cloud, turned by a matrix that a small network predicts, and the largest value of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.ReLU())
        self.matrix = nn.Linear(8, 9)
        self.body = nn.Sequential(nn.Conv1d(3, 12, 1), nn.BatchNorm1d(12), nn.ReLU(), nn.Conv1d(12, 16, 1))
        self.head = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        turn = self.matrix(self.turn(x).amax(2)).view(-1, 3, 3) + torch.eye(3)
        return self.head(self.body(torch.bmm(turn, x)).max(2)[0])


@entry("points", quick=True)
def pointnet() -> Made:
    return PointNet(), (torch.randn(2, 3, 10),)


class Recommender(nn.Module):
    """Embeddings of categories, products of all pairs of them, and numbers beside (DLRM, factorization machines)."""

    rows: Tensor
    columns: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(10, 8) for _ in range(3))
        self.numbers = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 8))
        self.head = nn.Sequential(nn.Linear(8 + 6, 10), nn.ReLU(), nn.Linear(10, 1))
        self.register_buffer("rows", torch.tensor([1, 2, 2, 3, 3, 3]))
        self.register_buffer("columns", torch.tensor([0, 0, 1, 0, 1, 2]))

    def forward(self, numbers: Tensor, kinds: Tensor) -> Tensor:
        first = self.numbers(numbers)
        all_ = torch.stack([first, *(t(kinds[:, i]) for i, t in enumerate(self.tables))], 1)
        products = torch.bmm(all_, all_.transpose(1, 2))
        return self.head(torch.cat([first, products[:, self.rows, self.columns]], 1))


@entry("tables")
def dlrm() -> Made:
    return Recommender(), (torch.randn(2, 4), torch.randint(0, 10, (2, 3)))


class TextCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.parts = nn.ModuleList(nn.Conv1d(8, 6, k) for k in (2, 3, 4))
        self.head = nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        e = self.table(x).permute(0, 2, 1)
        return self.head(torch.cat([torch.relu(p(e)).max(-1).values for p in self.parts], 1))


@entry("text", quick=True)
def textcnn() -> Made:
    return TextCNN(), (torch.randint(0, 20, (2, 8)),)
