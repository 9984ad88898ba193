"""Links: every factor put on them leaves the network's outputs as they are, and none is found where it would not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from penjing.analysis.channel_scales import Link, find_links, rescaled
from penjing.analysis.passes import fold_batch_norms
from penjing.network import Network, SetWeights, capture


class Written(nn.Module):
    """Layers by name, and a forward pass written as a function of them."""

    def __init__(self, forward: Callable[[nn.ModuleDict, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.written = nn.ModuleDict(layers), forward
        self.weight = nn.Parameter(torch.rand(12) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.written(self.layers, x)


class RootMeanSquare(nn.Module):
    """A norm written out, in front of a gated block."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(12) + 0.5)
        self.gate, self.up, self.down = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(16, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight
        return x + self.down(functional.silu(self.gate(n)) * self.up(n))


def picture() -> Tensor:
    return torch.rand(2, 3, 8, 8)


CASES: dict[str, tuple[nn.Module, Tensor, list[tuple[str, int]]]] = {
    "a chain with a depthwise convolution": (
        nn.Sequential(
            nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(12, 5, 1),
        ),
        picture(), [("0.weight", 1), ("2.weight", 1)],
    ),
    "pooling, flattening, two linear layers": (
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.LeakyReLU(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(16, 6), nn.ReLU(),
            nn.Linear(6, 2),
        ),
        picture(), [("0.weight", 1), ("4.weight", 1)],
    ),
    "transposed convolutions": (
        nn.Sequential(
            nn.ConvTranspose2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2), nn.ReLU(), nn.Conv2d(4, 1, 1)
        ),
        picture(), [("0.weight", 1), ("2.weight", 1)],
    ),
    "two readers, means and a transposition": (
        Written(
            lambda m, x: (lambda y: m["b"](y.mean((2, 3))) + m["c"](y.flatten(2).transpose(1, 2)).sum(1))(m["a"](x)),
            a=nn.Conv2d(3, 6, 3), b=nn.Linear(6, 2), c=nn.Linear(6, 2),
        ),
        picture(), [("layers.a.weight", 2)],
    ),
    "a layer called twice": (
        Written(lambda m, x: m["b"](m["a"](m["a"](x))), a=nn.Linear(12, 12), b=nn.Linear(12, 2)),
        torch.randn(2, 12), [],
    ),
    "squeeze and excitation": (
        Written(
            lambda m, x: (lambda y: m["c"](y * m["b"](y.mean((2, 3), keepdim=True)).sigmoid()))(m["a"](x).relu()),
            a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 6, 1), c=nn.Conv2d(6, 2, 3),
        ),
        picture(), [("layers.a.weight", 2)],
    ),
    "a norm and a gate": (RootMeanSquare(), torch.randn(2, 5, 12), [("weight", 2), ("up.weight", 1)]),
    "layer normalisation": (
        nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 3)),
        torch.randn(2, 5, 12), [("0.weight", 1)],
    ),
    "channels that meet themselves": (
        Written(lambda m, x: (lambda y: m["b"](y * y.relu()))(m["a"](x)), a=nn.Linear(12, 6), b=nn.Linear(6, 2)),
        torch.randn(2, 12), [],
    ),
    "a residual sum": (
        Written(lambda m, x: m["b"](m["a"](x).relu() + x), a=nn.Linear(12, 12), b=nn.Linear(12, 2)),
        torch.randn(2, 12), [],
    ),
    "a bounded activation": (nn.Sequential(nn.Linear(12, 6), nn.ReLU6(), nn.Linear(6, 2)), torch.randn(2, 12), []),
    "an output": (Written(lambda m, x: m["a"](x).relu(), a=nn.Linear(12, 6)), torch.randn(2, 12), []),
}  # fmt: skip


def scaled(network: Network, links: list[Link]) -> Network:
    tensors = dict(network.tensors())
    before = dict(tensors)
    for link in links:
        tensors.update(rescaled(link, torch.rand(link.channels) * 3 + 0.2, tensors))
    return network.apply([SetWeights(parameter=n, value=t.detach()) for n, t in tensors.items() if t is not before[n]])


@pytest.mark.parametrize("name", CASES)
def test_a_factor_leaves_the_outputs_as_they_are(name: str) -> None:
    model, x, wanted = CASES[name]
    network = capture(model, inputs=(x,))
    links = find_links(network)
    assert [(link.weight, len(link.readers)) for link in links] == wanted
    other = torch.randn_like(x)
    assert torch.allclose(scaled(network, links).run((other,))[0], network.run((other,))[0], atol=1e-5)


def test_batch_norms_stand_in_the_way_until_they_are_folded() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3))
    nn.init.normal_(model[1].bias)  # type: ignore[arg-type]
    network = capture(model, inputs=(picture(),))
    (norm,) = find_links(network)
    assert norm.weight == "1.weight" and not norm.layer
    folded = network.apply(fold_batch_norms(network))
    (link,) = find_links(folded)
    assert link.weight == "0.weight" and link.layer and len(link.tensors) == 2
    x = picture()
    assert torch.allclose(scaled(folded, [link]).run((x,))[0], network.run((x,))[0], atol=1e-5)
    assert torch.allclose(scaled(network, [norm]).run((x,))[0], network.run((x,))[0], atol=1e-5)
