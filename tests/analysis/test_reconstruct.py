from __future__ import annotations

import pytest
import torch
from torch import nn

from penjing.analysis.reconstruct import find_layers, reconstruct
from penjing.network import Network, RemoveChannels, SetWeights, capture
from penjing.network.channels.groups import kept_indices


class Residual(nn.Module):
    """A stem, two residual blocks, a head: convolutions with batch norms, shortcuts by identity."""

    def __init__(self, wide: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.ModuleList(nn.Conv2d(8, wide, 3, padding=1, bias=False) for _ in range(2))
        self.norm1 = nn.ModuleList(nn.BatchNorm2d(wide) for _ in range(2))
        self.second = nn.ModuleList(nn.Conv2d(wide, 8, 3, padding=1, bias=False) for _ in range(2))
        self.norm2 = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        for a, n, b, m in zip(self.first, self.norm1, self.second, self.norm2, strict=True):
            x = (m(b(n(a(x)).relu())) + x).relu()
        return self.head(x.mean((2, 3)))


def randomised(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


@pytest.fixture()
def network() -> Network:
    return capture(randomised(Residual()), inputs=(torch.rand(2, 3, 8, 8),))


def samples(network: Network, count: int = 6) -> list[dict[str, torch.Tensor]]:
    return [network.bind((torch.randn(32, 3, 8, 8),)) for _ in range(count)]


def error(a: Network, b: Network, inputs: dict[str, torch.Tensor]) -> float:
    got, wanted = a.run(inputs)[0], b.run(inputs)[0]
    return float((got - wanted).square().mean() / wanted.var())


def refitted(original: Network, removals: list[RemoveChannels], given: list[dict[str, torch.Tensor]]) -> Network:
    pruned = original.apply(removals)
    kept = kept_indices(original.groups(), [(e.parameter, e.dim, e.indices) for e in removals])
    indices = {n: {d: torch.as_tensor(i) for d, i in dims.items()} for n, dims in kept.items()}
    refit = reconstruct(original, pruned, indices, given)
    return pruned.apply([SetWeights(parameter=n, value=v) for n, v in refit.tensors.items()])


def test_layers_and_what_follows_them(network: Network) -> None:
    layers = {layer.weight: layer for layer in find_layers(network)}
    assert list(layers)[0] == "stem.weight" and layers["stem.weight"].norm is None
    assert layers["first.0.weight"].norm is not None and layers["first.0.weight"].total is None
    assert layers["second.0.weight"].total is not None and layers["second.0.weight"].shortcut is not None


def test_nothing_removed_changes_nothing(network: Network) -> None:
    given = samples(network, 2)
    same = refitted(network, [], given)
    assert error(same, network, given[0]) < 1e-9


@pytest.mark.parametrize("where", ["first.0.weight", "stem.weight"])
def test_channels_that_others_repeat_are_made_good_exactly(where: str) -> None:
    """Half of the channels are copies of the others: least squares must find the network again."""
    model = randomised(Residual())
    with torch.no_grad():
        if where == "first.0.weight":
            model.first[0].weight[6:] = model.first[0].weight[:6]
            for part in (model.norm1[0].weight, model.norm1[0].bias, model.norm1[0].running_mean):
                part[6:] = part[:6]
            model.norm1[0].running_var[6:] = model.norm1[0].running_var[:6]
            removal = RemoveChannels(parameter=where, dim=0, indices=tuple(range(6, 12)))
        else:
            model.stem.weight[4:] = model.stem.weight[:4]
            model.stem.bias[4:] = model.stem.bias[:4]
            for conv, norm in zip(model.second, model.norm2, strict=True):
                conv.weight[4:] = conv.weight[:4]
                for part in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                    part[4:] = part[:4]
            removal = RemoveChannels(parameter=where, dim=0, indices=(4, 5, 6, 7))
    original = capture(model, inputs=(torch.rand(2, 3, 8, 8),))
    given, held_out = samples(original), samples(original, 1)[0]
    plain = original.apply([removal])
    again = refitted(original, [removal], given)
    assert error(plain, original, held_out) > 1e-2
    assert error(again, original, held_out) < 1e-5


def test_refitting_helps_on_samples_it_never_saw(network: Network) -> None:
    removals = [RemoveChannels(parameter=f"first.{i}.weight", dim=0, indices=(1, 4, 5, 9, 11)) for i in range(2)]
    given, held_out = samples(network), samples(network, 1)[0]
    plain, again = network.apply(removals), refitted(network, removals, given)
    assert error(again, network, held_out) < 0.5 * error(plain, network, held_out)


def test_norms_keep_the_true_statistics(network: Network) -> None:
    """A refitted layer does nearly the same in training mode: its norm's statistics are those of the samples."""
    removals = [RemoveChannels(parameter="first.1.weight", dim=0, indices=(0, 2, 3))]
    given = samples(network)
    again = refitted(network, removals, given)
    name = next(layer.node.name for layer in find_layers(again) if layer.weight == "second.1.weight")
    seen = torch.fx.Interpreter(again.graph_module)
    found: list[torch.Tensor] = []
    original_run = seen.run_node

    def watch(node: torch.fx.Node) -> object:
        value = original_run(node)
        if node.name == name:
            found.append(value)
        return value

    seen.run_node = watch  # type: ignore[method-assign]
    with torch.no_grad():
        for batch in given:
            seen.run(*batch.values())
    values = torch.cat(found)
    held = again.tensors()
    assert torch.allclose(held["norm2.1.running_mean"], values.mean((0, 2, 3)), atol=1e-3)
    assert torch.allclose(held["norm2.1.running_var"], values.var((0, 2, 3)), rtol=2e-2)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(4, 8, 3), nn.Conv1d(8, 6, 3, groups=2, stride=2)
        self.c = nn.Linear(6, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x).relu()).relu().mean(2))


def test_one_dimensional_grouped_and_without_bias() -> None:
    network = capture(Grouped(), inputs=(torch.rand(2, 4, 16),))
    given = [network.bind((torch.randn(40, 4, 16),)) for _ in range(2)]
    refit = reconstruct(network, network, {}, given)
    assert set(refit.tensors) == {"a.weight", "a.bias", "b.weight", "b.bias", "c.weight"}
    assert all(after <= before + 1e-6 for before, after in refit.errors.values())
    same = network.apply([SetWeights(parameter=n, value=v) for n, v in refit.tensors.items()])
    assert error(same, network, given[0]) < 1e-8
