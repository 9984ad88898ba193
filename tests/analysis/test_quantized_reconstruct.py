"""Rounding on a running network: against rounding to nearest, and against torch's own fake quantization."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from penjing.analysis.passes import fold_batch_norms
from penjing.analysis.quantized_reconstruct import Rounded, round_apart, round_layers
from penjing.errors import DataError
from penjing.network import MaskWeights, Network, QuantizeTensor, SetWeights, capture
from penjing.tensors.gptq import GridRule
from penjing.tensors.grids import Grid, affine_grid, fake_quantize

RULE = GridRule(-3, 3)


class Residual(nn.Module):
    """A stem, a residual block with a depthwise convolution, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.c, self.head = nn.Conv2d(12, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (self.c(self.b(self.a(x).relu()).relu()) + x).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture()
def network() -> Network:
    found = capture(Residual(), inputs=(torch.rand(2, 3, 8, 8),))
    return found.apply(fold_batch_norms(found))


def samples(network: Network, count: int = 4, seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [network.bind((torch.rand(32, 3, 8, 8, generator=generator),)) for _ in range(count)]


def weights(network: Network) -> dict[str, GridRule]:
    return {n: RULE for n in network.parameter_names if network.tensors()[n].ndim > 1}


def with_values(network: Network, values: dict[str, Tensor], more: Iterable[QuantizeTensor] = ()) -> Network:
    return network.apply([*(SetWeights(parameter=n, value=v) for n, v in values.items()), *more])


def to_nearest(network: Network, names: Iterable[str]) -> dict[str, Tensor]:
    tensors = network.tensors()
    rows = {n: tensors[n].detach().flatten(1) for n in names}
    return {n: fake_quantize(r, RULE.grid(r)).view(tensors[n].shape) for n, r in rows.items()}


def error(a: Network, b: Network) -> float:
    (inputs,) = samples(b, 1, seed=9)
    got, wanted = a.run(inputs)[0], b.run(inputs)[0]
    return float((got - wanted).square().mean() / wanted.var(0).mean())


def all_on_grid(found: Rounded) -> bool:
    return all(torch.equal(fake_quantize(v.flatten(1), found.grids[n]), v.flatten(1)) for n, v in found.values.items())


def test_outputs_come_nearer_than_by_nearest_rounding(network: Network) -> None:
    rules = weights(network)
    found = round_layers(network, rules, samples(network))
    assert set(found.values) == set(rules) == set(found.errors) and not found.nearest
    assert len(found.biases) == 5 and all_on_grid(found)
    plain = error(with_values(network, to_nearest(network, rules)), network)
    apart = round_layers(network, rules, samples(network), refit=False)
    sequential = error(with_values(network, found.values | found.biases), network)
    assert sequential < 0.2 * plain
    assert sequential < error(with_values(network, apart.values | apart.biases), network) < 0.4 * plain


def test_quantizers_act_as_they_will_in_the_network(network: Network) -> None:
    grid = affine_grid(torch.tensor(0.0), torch.tensor(1.5), 0, 7)
    nodes = {n.name: n for n in network.graph_module.graph.nodes}
    values = [n for n in nodes if n.startswith("relu")] + ["x"]
    quantizers: list[tuple[str, tuple[str, ...] | None, Grid]] = [(n, None, grid) for n in values]
    edits = [
        QuantizeTensor(
            tensor=n, scale=float(grid.scale), zero_point=int(grid.zero_point), dtype="int8", quant_min=0, quant_max=7
        )
        for n in values
    ]
    rules = weights(network)
    given = samples(network)
    found = round_layers(network, rules, given, quantizers=quantizers)
    blind = round_layers(network, rules, given)
    heeded, not_heeded = (error(with_values(network, f.values | f.biases, edits), network) for f in (found, blind))
    assert heeded < 0.9 * not_heeded
    # The last layer saw what it sees in the network made of it: its mean output is that of the float network.
    made = with_values(network, found.values | found.biases, edits)
    got, wanted = (torch.cat([n.run(b)[0] for b in given]).mean(0) for n in (made, network))
    assert torch.allclose(got, wanted, atol=1e-4)


def test_quantizers_of_some_users_only(network: Network) -> None:
    # The shortcut stays float, the branch reads a grid that holds nothing but zero: the sum must make up for it.
    dead = Grid(torch.tensor(1.0), torch.tensor(0), 0, 0)
    first = next(n for n in network.graph_module.graph.nodes if n.name.startswith("relu"))
    branch = next(u.name for u in first.users if "conv" in u.name)
    found = round_layers(network, weights(network), samples(network), quantizers=[(first.name, (branch,), dead)])
    assert found.errors["stem.weight"] < 0.1 < 0.3 < found.errors["a.weight"]


def test_masked_weights_stay_zero(network: Network) -> None:
    mask = torch.rand_like(network.tensors()["c.weight"]) > 0.5
    network = network.apply([MaskWeights(parameter="c.weight", mask=mask)])
    found = round_layers(network, weights(network), samples(network))
    assert not bool(found.values["c.weight"][~mask].any()) and bool(found.values["c.weight"].any())
    plain = error(with_values(network, to_nearest(network, weights(network))), network)
    assert error(with_values(network, found.values | found.biases), network) < 0.5 * plain


class Tied(nn.Module):
    """An embedding whose weight makes the logits too, around a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(20, 8), nn.LSTM(8, 8, batch_first=True)
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(self.rnn(self.embedding(x))[0])
        return nn.functional.linear(y, self.embedding.weight)


def test_shared_and_recurrent_weights() -> None:
    network = capture(Tied(), inputs=(torch.randint(0, 20, (2, 6)),))
    batches = [network.bind((torch.randint(0, 20, (32, 6)),)) for _ in range(3)]
    rules = {**weights(network), "rnn.weight_ih_l0": GridRule(0, 7, group=3, symmetric=False)}
    found = round_layers(network, rules, batches)
    assert set(found.nearest) == {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}
    assert set(found.values) == set(rules) and all_on_grid(found)
    name = "embedding.weight"
    assert not torch.equal(found.values[name], to_nearest(network, [name])[name])
    (x,) = batches[0].values()
    wanted = network.run((x,))[0]
    gptq, plain = (
        with_values(network, v).run((x,))[0] - wanted for v in ({name: found.values[name]}, to_nearest(network, [name]))
    )
    assert gptq.square().mean() < plain.square().mean()


def test_what_it_refuses_and_what_it_leaves(network: Network) -> None:
    with pytest.raises(DataError, match="needs samples"):
        round_layers(network, weights(network), [])
    # A batch norm that is not folded would undo what the layer was fitted to: it is rounded to nearest.
    unfolded = capture(Residual(), inputs=(torch.rand(2, 3, 8, 8),))
    found = round_layers(unfolded, {"stem.weight": RULE}, samples(unfolded))
    assert "batch norm" in found.nearest["stem.weight"] and not found.biases


def test_each_layer_apart(network: Network) -> None:
    """Alone in the float network: a rule does less harm than the nearest values, and the mean output stays right."""
    rules, given = weights(network), samples(network)
    nearest = to_nearest(network, rules)
    before = {n: t.clone() for n, t in network.tensors().items()}
    found = round_apart(network, {n: [nearest[n], rule] for n, rule in rules.items()}, given)
    assert all(torch.equal(before[n], t) for n, t in network.tensors().items())
    (inputs,) = samples(network, 1, seed=9)
    plain = network.run(inputs)[0]
    for name, (near, ruled) in found.items():
        assert set(near) == {name, name.replace("weight", "bias")} == set(ruled)
        assert torch.equal(near[name], nearest[name])
        only, best = (with_values(network, values).run(inputs)[0] for values in ({name: nearest[name]}, ruled))
        assert (best - plain).square().mean() < (only - plain).square().mean()
    heads = [with_values(network, way).run(b)[0] for way in found["head.weight"] for b in given]
    for way in (torch.cat(heads[: len(given)]), torch.cat(heads[len(given) :])):
        wanted = torch.cat([network.run(b)[0] for b in given])
        assert torch.allclose(way.mean(0), wanted.mean(0), atol=1e-4)


def test_channels_apart_spread_as_they_did(network: Network) -> None:
    given = samples(network)
    coarse = 0.7 * to_nearest(network, ["head.weight"])["head.weight"]
    found = round_apart(network, {"head.weight": [coarse]}, given, rescale=["head.weight"])["head.weight"][0]
    made = with_values(network, found)
    got, wanted = (torch.cat([n.run(b)[0] for b in given]) for n in (made, network))
    assert torch.allclose(got.var(0), wanted.var(0), rtol=1e-3)
    assert torch.allclose(got.mean(0), wanted.mean(0), atol=1e-4)


def test_layers_that_cannot_be_refitted_go_to_the_nearest_points() -> None:
    module = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False))
    plain = capture(module, inputs=(torch.rand(2, 3, 8, 8),))
    names = [n for n in plain.parameter_names if plain.tensors()[n].ndim > 1]
    found = round_apart(plain, {n: [RULE] for n in names}, samples(plain))
    assert [set(found[n][0]) for n in names] == [{n} for n in names]  # no bias that could be made right
    assert torch.equal(found[names[0]][0][names[0]], to_nearest(plain, names)[names[0]])
