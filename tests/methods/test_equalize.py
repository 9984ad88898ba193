"""Equalize: the float network stays as it is, and each criterion does what it is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from penjing.analysis.channel_scales import find_links
from penjing.analysis.lane import Lane
from penjing.analysis.passes import fold_batch_norms
from penjing.data import Data
from penjing.errors import DataError, RecipeError
from penjing.methods import Equalize, Quantize
from penjing.network import MaskWeights, Network, SetWeights, capture
from penjing.recipe import Context
from penjing.tensors.grids import fake_quantize, tensor_grid


class Separable(nn.Module):
    """Convolutions and depthwise ones between them, with channels of very different size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.b = nn.Conv2d(16, 16, 3, groups=16)
        self.c, self.head = nn.Conv2d(16, 24, 1), nn.Linear(24, 4)
        with torch.no_grad():
            nn.init.uniform_(self.na.running_var, 0.5, 2)
            self.a.weight.mul_(torch.logspace(-1.5, 1.5, 16).view(-1, 1, 1, 1))
            self.b.weight.div_(torch.logspace(-1.5, 1.5, 16).view(-1, 1, 1, 1))
            self.c.weight.mul_(torch.logspace(1, -1, 24).view(-1, 1, 1, 1))
            self.head.weight.div_(torch.logspace(1, -1, 24))

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.b(self.na(self.a(x)).relu()).relu()).relu()
        return self.head(x.mean((2, 3)))


class Feedforward(nn.Module):
    """A norm with outliers in front of a gated block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        with torch.no_grad():
            self.norm.weight[3] = 40.0

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return x + self.down(functional.silu(self.gate(n)) * self.up(n))


IMAGES, ROWS = torch.rand(64, 3, 8, 8), torch.randn(64, 6, 16)


def network_of(model: nn.Module, x: Tensor) -> Network:
    return capture(model.eval(), inputs=(x[:2],))


def equalized(network: Network, x: Tensor | None, **fields: Any) -> Network:
    context = Context(original=network, data=None if x is None else Data(x))
    return network.apply(Equalize(**fields).plan(network, context).edits)


def context_of(network: Network, x: Tensor = ROWS) -> Context:
    return Context(original=network, data=Data(x))


def rounded(network: Network, **rule: Any) -> Network:
    """All weights of layers on grids of 4 bits."""
    held = {n: network.tensors()[n].detach() for n in network.parameter_names}
    grids = {n: tensor_grid(t.flatten(1), -7, 7, **rule) for n, t in held.items() if t.ndim > 1}
    values = {n: fake_quantize(held[n].flatten(1), g).view(held[n].shape) for n, g in grids.items()}
    return network.apply([SetWeights(parameter=n, value=v) for n, v in values.items()])


def error(a: Network, b: Network, x: Tensor) -> float:
    return float((a.run((x,))[0] - b.run((x,))[0]).square().mean())


CASES = [
    (Separable, IMAGES, {"criterion": "weights"}),
    (Separable, IMAGES, {"criterion": "smooth"}),
    (Separable, IMAGES, {"criterion": "awq"}),
    (Feedforward, ROWS, {"criterion": "weights"}),
    (Feedforward, ROWS, {"criterion": "smooth", "alpha": 0.7}),
    (Feedforward, ROWS, {"criterion": "awq", "granularity": "group:8"}),
    (Feedforward, ROWS, {"criterion": "awq", "alpha": 0.5, "granularity": "channel", "symmetric": False}),
]


@pytest.mark.parametrize(("kind", "x", "fields"), CASES, ids=lambda v: str(v) if isinstance(v, dict) else None)
def test_the_float_network_stays_as_it_is(kind: type[nn.Module], x: Tensor, fields: dict[str, Any]) -> None:
    network = network_of(kind(), x)
    changed = equalized(network, x, **fields)
    assert torch.allclose(changed.run((x,))[0], network.run((x,))[0], atol=2e-5, rtol=1e-4)
    before, after = network.tensors(), changed.tensors()
    assert any(not torch.equal(after[n], before[n]) for n in network.parameter_names if n in after)


def test_weights_on_both_sides_get_the_same_range() -> None:
    network = network_of(Separable(), IMAGES)
    changed = equalized(network, None)
    tensors = changed.tensors()
    for link in find_links(changed):
        made = tensors[link.weight].abs().flatten(1).amax(1)
        (reader,) = link.readers
        read = tensors[reader.weight].abs().movedim(reader.axis, 0).flatten(1).amax(1)
        assert torch.allclose(made, read, rtol=2e-3)
    folded = network.apply(fold_batch_norms(network))
    before, after = (error(rounded(n), network, IMAGES) for n in (folded, changed))
    assert after < 0.2 * before


def test_smooth_takes_outliers_from_activations() -> None:
    network = network_of(Feedforward(), ROWS)
    changed = equalized(network, ROWS, criterion="smooth")
    name = next(n.name for n in network.graph_module.graph.nodes if "layer_norm" in n.name)

    def spread(of: Network) -> float:
        (values,) = Lane(of, [of.bind((ROWS,))]).value(name)
        largest = values.abs().flatten(0, 1).amax(0)
        return float(largest.max() / largest.median())

    assert spread(changed) < 0.4 * spread(network)
    # Half of the size goes into the weights: both sides are in the same proportion then (equation 4 with alpha 0.5).
    changed = equalized(network, ROWS, criterion="smooth", where=["*", "!down"])
    (values,) = Lane(changed, [changed.bind((ROWS,))]).value(name)
    columns = torch.maximum(*(changed.tensors()[f"{n}.weight"].abs().amax(0) for n in ("gate", "up")))
    ratio = values.abs().flatten(0, 1).amax(0) / columns
    assert torch.allclose(ratio, ratio.mean().expand_as(ratio), rtol=1e-3)


class Outlying(nn.Module):
    """Convolutions that linear, strided, depthwise and transposed ones read; one channel in eight is 60 times wider."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.c, self.d = nn.Conv2d(16, 16, 3, groups=16), nn.ConvTranspose2d(16, 16, 2)
        self.head = nn.Linear(16, 4)
        with torch.no_grad():
            for maker, reader, axis in (("a", "b", 1), ("b", "c", 0), ("c", "d", 0), ("d", "head", 1)):
                made, read = self.get_submodule(maker), self.get_submodule(reader)
                axes = made.weight.movedim(int(maker == "d"), 0)
                axes[::8] *= 60
                made.bias[::8] *= 60
                read.weight.movedim(axis, 0)[::8] /= 60  # the same function as without

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.b(self.a(x).relu()).relu()).relu()
        return self.head(self.d(x).relu().mean((2, 3)))


def test_smooth_takes_outliers_from_what_convolutions_read() -> None:
    torch.manual_seed(0)
    network = network_of(Outlying(), IMAGES)
    changed = equalized(network, IMAGES, criterion="smooth", alpha=0.8)
    assert torch.allclose(changed.run((IMAGES,))[0], network.run((IMAGES,))[0], atol=1e-5)
    errors = []
    for start in (network, changed):
        plan = Quantize().plan(start, context_of(start, IMAGES))
        errors.append(error(start.apply(plan.edits), network, IMAGES))
    assert errors[1] < 0.02 * errors[0]
    links = find_links(changed)
    assert [r.weight for link in links for r in link.readers] == ["b.weight", "c.weight", "d.weight", "head.weight"]
    for link in links:
        (values,) = Lane(changed, [changed.bind((IMAGES,))]).value(link.readers[0].source.name)
        largest = values.abs().transpose(0, 1).flatten(1).amax(1) if values.ndim == 4 else values.abs().amax(0)
        assert float(largest.max() / largest[largest > 0].median()) < 10  # relu leaves some channels at zero


def test_awq_makes_rounded_layers_better() -> None:
    network = network_of(Feedforward(), ROWS)
    changed = equalized(network, ROWS, criterion="awq", granularity="channel")
    assert error(rounded(changed, axis=0), network, ROWS) < 0.7 * error(rounded(network, axis=0), network, ROWS)
    # Where inputs are alike nothing can be gained by their size: those channels stay.
    even = network_of(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 4)), ROWS)
    plan = Equalize(criterion="awq", granularity="channel", alpha=1.0).plan(even, context_of(even))
    assert plan.reasons[0].score is not None and plan.reasons[0].score < 1.5


def test_masks_and_quantize_compose() -> None:
    network = network_of(Separable(), IMAGES)
    mask = torch.rand_like(network.tensors()["c.weight"]) > 0.5
    network = network.apply([MaskWeights(parameter="c.weight", mask=mask)])
    changed = equalized(network, None)
    assert not bool(changed.tensors()["c.weight"][~mask].any())
    context = Context(original=network, data=Data(IMAGES))
    plan = Quantize(granularity="tensor").plan(changed, context)
    quantized = changed.apply(plan.edits)
    plain = network.apply(Quantize(granularity="tensor").plan(network, context).edits)
    assert error(quantized, network, IMAGES) < error(plain, network, IMAGES)
    with pytest.raises(RecipeError, match="already quantized"):
        Equalize().plan(quantized, context)


def test_where_and_what_cannot_be_scaled() -> None:
    network = network_of(Separable(), IMAGES)
    plan = Equalize(where=["*", "!head"]).plan(network, Context(original=network))
    assert [r.layer for r in plan.reasons] == ["a", "b"]
    with pytest.raises(RecipeError, match="finds no channels .* scaled by 'weights'") as error:
        Equalize(where="head").plan(network, Context(original=network))
    assert "where='head' selects none" in str(error.value.hint)
    bounded = network_of(nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2)), torch.rand(2, 4))
    with pytest.raises(RecipeError, match="finds no channels"):
        Equalize().plan(bounded, Context(original=bounded))
    with pytest.raises(DataError, match="needs samples"):
        Equalize(criterion="smooth").check(Context(original=network))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"criterion": "aqw"}, "must be one of weights, smooth, awq"),
        ({"alpha": 1.5}, "alpha must be between 0 and 1"),
        ({"weights": "float4"}, "integer type"),
        ({"weights": "int1"}, "2 to 16 bits"),
        ({"granularity": "group:x"}, "'channel', 'tensor' or 'group:N'"),
        ({"samples": 0}, "samples"),
        ({"symmetric": "yes"}, "symmetric"),
    ],
)
def test_bad_fields(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Equalize(**fields)
