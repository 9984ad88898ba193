"""Harms of rounding: measured ones against whole networks, expected ones against measured ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import penjing as pj
from penjing.analysis.rounding_harm import expected_harms, harms_of, measured_changes, output_harm
from penjing.network import SetWeights

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network() -> pj.Network:
    torch.manual_seed(0)
    return pj.capture(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, groups=3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(6 * 36, 5),
        ),
        (X[:2],),
    )


def ways(network: pj.Network, sizes: tuple[float, ...]) -> dict[str, list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    names = [n for n, t in network.tensors().items() if t.ndim > 1]
    tensors = network.tensors()
    return {
        n: [{n: tensors[n] + s * torch.randn(tensors[n].shape, generator=generator) * tensors[n].std()} for s in sizes]
        for n in names
    }


def test_measured_harms_are_those_of_the_whole_network(network: pj.Network) -> None:
    rounded = ways(network, (0.1, 0.5))
    batches = [network.bind(part) for part in X.split(16)]
    found = harms_of(measured_changes(network, rounded, batches))
    plain = network(X)
    for name, values in rounded.items():
        for value, harm in zip(values, found[name], strict=True):
            other = network.apply([SetWeights(parameter=n, value=v) for n, v in value.items()])
            wanted = float((other(X) - plain).square().sum() / plain.square().sum())
            assert harm == pytest.approx(wanted, rel=1e-4)
            assert output_harm(network, other, batches) == pytest.approx(wanted, rel=1e-4)


def test_expected_harms_come_near_for_small_changes(network: pj.Network) -> None:
    rounded = ways(network, (1e-3, 1e-2))
    batches = [network.bind(part) for part in X.split(16)]
    measured = harms_of(measured_changes(network, rounded, batches))
    expected = expected_harms(network, rounded, batches, probes=400)
    for name in rounded:
        assert expected[name] == pytest.approx(measured[name], rel=0.3)
    assert expected == expected_harms(network, rounded, batches, probes=400)
    assert expected != expected_harms(network, rounded, batches, probes=400, seed=1)


def test_what_is_not_changed_does_no_harm(network: pj.Network) -> None:
    tensors = network.tensors()
    rounded = {n: [{n: tensors[n]}, {}] for n in tensors if tensors[n].ndim > 1}
    batches = [network.bind(X[:8])]
    assert set(map(tuple, harms_of(measured_changes(network, rounded, batches)).values())) == {(0.0, 0.0)}
    assert set(map(tuple, expected_harms(network, rounded, batches, probes=2).values())) == {(0.0, 0.0)}
