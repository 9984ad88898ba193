"""Units that nothing reads go, and the outputs stay what they were."""

from __future__ import annotations

import torch
from torch import nn

from penjing.analysis.unread import unread_units
from penjing.network import Network, capture

X = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.Sigmoid(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(72, 20), nn.Tanh(), nn.Linear(20, 4),
    )  # fmt: skip


def network(module: nn.Module) -> Network:
    return capture(module.eval(), inputs=(X[:2],))


@torch.no_grad()
def test_what_is_not_read_goes_layer_after_layer() -> None:
    module = made()
    module[8].weight[:, :15] = 0  # fifteen units of the linear layer in front are not read …
    module[6].weight[15:, 9:27] = 0  # … by the others, two whole channels of the convolution are not …
    module[2].weight[[0, 3, 4, 5, 6, 7], 5] = 0  # … and those two are all that read one of the first.
    start = network(module)
    edits, small = unread_units(start)
    shapes = {n: tuple(t.shape) for n, t in small.tensors().items()}
    assert shapes["0.weight"] == (5, 1, 3, 3) and shapes["2.weight"] == (6, 5, 3, 3)
    assert shapes["6.weight"] == (5, 54) and shapes["8.weight"] == (4, 5)
    torch.testing.assert_close(small.run((X,))[0], start.run((X,))[0], rtol=1e-5, atol=1e-6)
    again = start.apply(edits)
    assert torch.equal(again.run((X,))[0], small.run((X,))[0])


@torch.no_grad()
def test_one_unit_stays_and_a_single_weight_keeps_a_channel() -> None:
    module = made()
    module[8].weight.zero_()
    module[2].weight[1:, 2] = 0
    _, small = unread_units(network(module))
    shapes = {n: tuple(t.shape) for n, t in small.tensors().items()}
    assert shapes["8.weight"] == (4, 1) and shapes["0.weight"] == (6, 1, 3, 3)


def test_nothing_to_do() -> None:
    start = network(made())
    edits, same = unread_units(start)
    assert edits == () and same is start
