"""Counts against what the layers' own arithmetic says."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import nn

from penjing.analysis.footprint import footprint
from penjing.network import SetWeights, capture


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.fc = nn.Linear(4 * 16 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.up(self.grouped(self.conv(x)).relu()).flatten(1))


def test_layers_by_hand() -> None:
    network = capture(Mixed(), inputs=(torch.rand(2, 3, 16, 16),))
    got = footprint(network)
    wanted = {
        "conv": (8 * 27 + 8, 8 * 8 * 8 * 27),
        "grouped": (72, 8 * 8 * 8 * 9),
        "up": (8 * 4 * 4 + 4, 8 * 8 * 8 * 4 * 4),
        "fc": (4 * 256 * 10 + 10, 4 * 256 * 10),
    }
    assert got.by_layer == wanted
    assert got.macs == sum(m for _, m in wanted.values())
    assert got.parameters == sum(p.numel() for p in Mixed().parameters()) == network.parameter_count()
    assert got.by_weight["conv.weight"] == wanted["conv"][1]
    assert got.largest == 4 * 16 * 16


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 5, num_layers=2, batch_first=True)
        self.out = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.rnn(x)[0]
        return self.out(nn.functional.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None])[:, 0])


def test_recurrent_and_attention() -> None:
    got = footprint(capture(Sequences(), inputs=(torch.rand(2, 7, 6),)))
    recurrent = 7 * (4 * 5 * 6 + 3 * 4 * 5 * 5)
    attention, linear = 2 * 7 * 7 * 5, 7 * 5 * 3
    assert got.macs == recurrent + attention + linear
    assert got.by_layer["rnn"] == (4 * 5 * 6 + 3 * 4 * 5 * 5 + 2 * 2 * 4 * 5, recurrent)
    assert ("scaled_dot_product_attention", (0, attention)) in got.by_layer.items()


def test_zeros_count_in_full() -> None:
    network = capture(nn.Linear(4, 3), inputs=(torch.rand(2, 4),))
    zeroed = network.apply([SetWeights(parameter="weight", value=torch.zeros(3, 4))])
    assert footprint(zeroed) == footprint(network)


def test_a_published_count(hub: ModuleType) -> None:
    got = footprint(capture(hub.resnet56(), inputs=(torch.rand(2, 3, 32, 32),)))
    assert got.parameters == 853_018
    assert 125.4e6 < got.macs < 125.6e6  # He et al. 2016 and everybody since: 125.49 M
