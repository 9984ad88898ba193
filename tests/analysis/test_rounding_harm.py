"""Harms of rounding: measured ones against whole networks, expected ones against measured ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import penjing as pj
from penjing.analysis.rounding_harm import expected_harms, harms_of, measured_changes, output_harm, together
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


def test_harm_to_classes_is_their_divergence(network: pj.Network) -> None:
    """To second order, measured and (over many probes) expected; exactly between two networks."""
    rounded = ways(network, (0.02, 0.05))
    batches = [network.bind(part) for part in X.split(16)]
    found = harms_of(measured_changes(network, rounded, batches, classes=1))
    guessed = expected_harms(network, rounded, batches, probes=2000, classes=1)
    plain = network(X).double().log_softmax(1)
    for name, values in rounded.items():
        for way, value in enumerate(values):
            other = network.apply([SetWeights(parameter=n, value=v) for n, v in value.items()])
            given = other(X).double().log_softmax(1)
            wanted = float(torch.nn.functional.kl_div(given, plain, reduction="batchmean", log_target=True))
            assert found[name][way] == pytest.approx(wanted, rel=0.03)
            assert guessed[name][way] == pytest.approx(wanted, rel=0.15)
            assert output_harm(network, other, batches, classes=1) == pytest.approx(wanted, rel=1e-3)


def test_harms_of_all_together(network: pj.Network) -> None:
    """Rows and columns of a choice sum up to what the whole network does with all of it, for small changes."""
    rounded = ways(network, (1e-3, 2e-3))
    batches = [network.bind(part) for part in X.split(16)]
    gram = together(measured_changes(network, rounded, batches), rounded)
    choice = (0, 1, 0)
    edits = [
        SetWeights(parameter=n, value=v)
        for several, i in zip(rounded.values(), choice, strict=True)
        for n, v in several[i].items()
    ]
    at = [2 * layer + i for layer, i in enumerate(choice)]
    assert float(gram[at][:, at].sum()) == pytest.approx(output_harm(network, network.apply(edits), batches), rel=0.02)
    assert float(gram[at, at].sum()) != pytest.approx(float(gram[at][:, at].sum()), rel=0.02)


def test_many_outputs_are_sketched() -> None:
    """Sums of squares stay what they are, products nearly."""
    torch.manual_seed(0)
    wide = pj.capture(nn.Sequential(nn.Linear(8, 1024), nn.Linear(1024, 1024)), (X[:2].flatten(1)[:, :8],))
    batches = [wide.bind(X.flatten(1)[:32, :8])]
    rounded = ways(wide, (1e-3, 2e-3))
    found = measured_changes(wide, rounded, batches)
    assert {tuple(rows.shape) for rows in found.values()} == {(2, 4096)}
    for name, several in rounded.items():
        for value, harm in zip(several, harms_of(found)[name], strict=True):
            other = wide.apply([SetWeights(parameter=n, value=v) for n, v in value.items()])
            assert harm == pytest.approx(output_harm(wide, other, batches), rel=1e-4)
    first, second = found.values()
    assert float((first[0] * second[0]).sum().abs()) < 0.1 * float(first[0].norm() * second[0].norm())


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
