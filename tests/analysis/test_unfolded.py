"""Training with batch norms in place: what carries over to the folded network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from penjing.analysis.fake_quantize import quantizable, weight_grid
from penjing.analysis.passes import fold_batch_norms
from penjing.analysis.placement import place
from penjing.analysis.unfolded import folded_scales, in_front_of_folding, positive_norms
from penjing.network import Network, SetWeights, capture
from penjing.tensors import grids

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Normed(nn.Module):
    """Norms of both signs behind a convolution with a bias, one without, a transposed one and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.an = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b, self.bn = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.c, self.cn = nn.ConvTranspose2d(6, 6, 2), nn.BatchNorm2d(6)
        self.d, self.dn = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.an(self.a(x)).relu()
        x = (x + self.bn(self.b(x))).relu()
        x = self.cn(self.c(x)).relu().mean((2, 3))
        return self.head(self.dn(self.d(x)).relu())


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    module = Normed()
    module(X)
    with torch.no_grad():
        for norm in (module.an, module.bn, module.cn, module.dn):
            norm.weight.copy_(torch.linspace(-1.5, 1.5, norm.num_features))
            norm.bias.copy_(torch.randn(norm.num_features))
    return capture(module.eval(), inputs=(X[:2],))


def test_signs_move_to_the_layers_in_front(network: Network) -> None:
    moved = network.apply(positive_norms(network))
    assert torch.allclose(moved.run((X,))[0], network.run((X,))[0], atol=1e-5)
    tensors = moved.tensors()
    assert all(bool((tensors[f"{n}.weight"] >= 0).all()) for n in ("an", "bn", "dn"))
    assert not torch.equal(tensors["a.bias"], network.tensors()["a.bias"])


@pytest.mark.parametrize("dtype", ["int2", "int4", "ternary", "binary"])
@pytest.mark.parametrize("name", ["a.weight", "b.weight", "d.weight"])
def test_folding_keeps_the_codes(network: Network, dtype: str, name: str) -> None:
    start = network.apply(positive_norms(network))
    weight = weight_grid(start.tensors()[name].detach(), dtype, axis=0)
    value = weight.rounded(start.tensors()[name].detach())
    rounded = start.apply([SetWeights(parameter=name, value=value)])
    folded = rounded.apply(fold_batch_norms(rounded)).tensors()[name].detach()
    grid, lost = folded_scales(value, folded, weight)
    assert lost == 0
    assert torch.equal(grids.quantize(folded, grid), grids.quantize(value, weight.grid))
    assert not torch.allclose(grid.scale, weight.grid.scale)


@pytest.mark.parametrize("levels", ["power-of-two", "additive-powers-of-two"])
def test_folding_keeps_uneven_levels_whatever_the_sign(network: Network, levels: str) -> None:
    weight = weight_grid(network.tensors()["a.weight"].detach(), "int4", axis=0, levels=levels)
    value = weight.rounded(network.tensors()["a.weight"].detach())
    rounded = network.apply([SetWeights(parameter="a.weight", value=value)])
    folded = rounded.apply(fold_batch_norms(rounded)).tensors()["a.weight"].detach()
    grid, lost = folded_scales(value, folded, weight)
    assert lost == 0
    assert torch.allclose(replace(weight, grid=grid).rounded(folded), folded, rtol=1e-5)


def test_codes_that_do_not_fit_are_counted(network: Network) -> None:
    """Without moving the signs first, -2 of int2 becomes 2, which is not there."""
    weight = weight_grid(network.tensors()["a.weight"].detach(), "int2", axis=0)
    value = weight.rounded(network.tensors()["a.weight"].detach())
    rounded = network.apply([SetWeights(parameter="a.weight", value=value)])
    folded = rounded.apply(fold_batch_norms(rounded)).tensors()["a.weight"].detach()
    negative = network.tensors()["an.weight"] < 0
    expected = int((grids.quantize(value, weight.grid)[negative] == -2).sum())
    assert expected > 0
    assert folded_scales(value, folded, weight)[1] == expected


def test_quantizers_stand_behind_the_norms(network: Network) -> None:
    folded = network.apply(fold_batch_norms(network))
    placement = place(folded.graph_module, floating=["x"], parameters=folded.parameter_names)
    moved = in_front_of_folding(network, folded, placement.quantizers)
    one, other = ({n.name: n for n in net.graph_module.graph.nodes} for net in (network, folded))

    def values(net: Network, names: list[str]) -> list[Tensor]:
        seen: dict[str, Tensor] = {}

        class Watch(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> object:
                seen[n.name] = value = super().run_node(n)
                return value

        with torch.no_grad():
            Watch(net.graph_module).run(X)
        return [seen[n] for n in names]

    assert len(moved) == len(placement.quantizers) > 4
    pairs = zip(
        values(network, [q.value for q in moved]), values(folded, [q.value for q in placement.quantizers]), strict=True
    )
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)
    for before, after in zip(placement.quantizers, moved, strict=True):
        assert after.grid == before.grid and (after.users is None) == (before.users is None)
        assert set(after.users or ()) <= set(one) and before.value in other
    assert quantizable(network, placement)
