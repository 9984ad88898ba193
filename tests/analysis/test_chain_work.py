from __future__ import annotations

import torch
from torch import Tensor, nn

import penjing as pj
from penjing.analysis.chain_work import Work
from penjing.analysis.factorization import decompose, find_factorable, replacement
from penjing.analysis.footprint import footprint


class Kinds(nn.Module):
    """Layers of every kind, with strides, and a table that is multiplied with as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 12)
        self.stem, self.wide = nn.Conv2d(1, 8, (3, 5), stride=(1, 2), padding=1), nn.Conv2d(8, 12, 3, stride=2)
        self.point, self.up = nn.Conv2d(12, 16, 1, stride=2), nn.ConvTranspose2d(16, 10, 4, stride=3)
        self.line, self.inner = nn.Conv1d(10, 12, 3, stride=2), nn.Linear(12, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.up(self.point(self.wide(self.stem(self.table(tokens)[:, None]))))
        logits: Tensor = self.inner(self.line(x.flatten(2)).mT) @ self.table.weight.T
        return logits


def test_work_is_that_of_the_network_that_comes_out() -> None:
    model = pj.capture(Kinds().eval(), inputs=(torch.randint(0, 20, (2, 16)),))
    looked_up = pj.capture(nn.Embedding(20, 12), inputs=(torch.randint(0, 20, (2, 16)),))
    counted = 0
    for network in (model, looked_up):
        layers, _ = find_factorable(network)
        work, size = Work(network, layers), footprint(network)
        ways = decompose(network, layers, [], ("tucker2", "svd", "spatial", "cp"))
        for layer in layers:
            assert work.of_layer(layer.weight) == size.by_weight.get(layer.weight, 0)
            rest = size.macs - work.of_layer(layer.weight)
            for option in [o for d in ways[layer.weight].decompositions for o in d.options][::7]:
                edits, _ = replacement(layer, option, ways[layer.weight].factors(option), network.tensors())
                assert footprint(network.apply(edits)).macs - rest == work.of(layer.weight, option), option
                counted += 1
    assert counted > 30
