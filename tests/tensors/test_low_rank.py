"""Products of smaller weights: nearest in their norm (oracle: singular values), exact at full rank, errors as told."""

import pytest
import torch
from torch import Tensor

from penjing.tensors.low_rank import FORMS, Svd, dense, merged, truncated_svd

G = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G)


def gram(size: int) -> Tensor:
    """Second moments of inputs that are not alike in all directions."""
    x = normal(4 * size, size) @ normal(size, size) * torch.linspace(0.1, 3, size)
    return (x.T @ x).double()


def lost(weight: Tensor, other: Tensor, moments: Tensor) -> float:
    off, flat = (other - weight).double().flatten(1), weight.double().flatten(1)
    return float((off @ moments * off).sum() / (flat @ moments * flat).sum())


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (9, 9)])
@pytest.mark.parametrize("weighted", [True, False])
def test_truncation_is_the_nearest_in_its_norm(shape: tuple[int, int], weighted: bool) -> None:
    weight, moments = normal(*shape).double(), gram(shape[1])
    left, right, energies = truncated_svd(weight, moments if weighted else None)
    assert torch.allclose(left @ right, weight, atol=1e-9)
    root = torch.linalg.cholesky(moments) if weighted else torch.eye(shape[1]).double()
    values = torch.linalg.svdvals(weight @ root).square()
    assert torch.allclose(energies[: len(values)], values, rtol=1e-6, atol=1e-8 * float(values[0]))
    for rank in (1, 5, 8):
        off = (left[:, :rank] @ right[:rank] - weight) @ root
        assert torch.isclose(off.square().sum(), values[rank:].sum(), rtol=1e-6)
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1))


def test_rows_that_count_more_are_kept_better() -> None:
    weight, rows = normal(40, 12).double(), torch.ones(40)
    rows[:10] = 100
    left, right, energies = truncated_svd(weight, None, rows)
    weighted = torch.linalg.svdvals(rows.sqrt()[:, None] * weight).square()
    assert torch.allclose(energies, weighted, rtol=1e-6)
    plain = truncated_svd(weight)
    off = [(a[:, :4] @ b[:4] - weight)[:10].square().sum() for a, b in ((left, right), plain[:2])]
    assert off[0] < off[1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weighted", [True, False])
def test_factors_have_the_shapes_and_the_error_that_the_options_say(form: str, weighted: bool) -> None:
    weight = normal(12, 10, 3, 3)
    moments = gram(90) if weighted else torch.eye(90).double()
    found = FORMS[form](weight, moments if weighted else None)
    for option in found.options[:: max(1, len(found.options) // 8)]:
        factors = found.factors(option)
        assert tuple(tuple(f.shape) for f in factors) == option.shapes
        assert option.parameters == sum(f.numel() for f in factors)
        assert lost(weight, dense(factors), moments) == pytest.approx(option.error, rel=1e-3, abs=1e-5)
    assert len(found.options) > 3


@pytest.mark.parametrize("form", ["tucker2", "svd"])
def test_nothing_is_lost_at_full_rank(form: str) -> None:
    weight = normal(12, 10, 3, 3)
    found = FORMS[form](weight, gram(90))
    full = max(found.options, key=lambda o: o.ranks)
    assert full.error == pytest.approx(0, abs=1e-9)
    assert torch.allclose(dense(found.factors(full)), weight, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_that_is_a_product_is_found(form: str) -> None:
    a, b = normal(3, 10, 1, 1), normal(12, 3, 1, 1)
    middle = {"tucker2": normal(3, 3, 3, 3), "cp": normal(3, 1, 3, 3), "spatial": normal(3, 3, 3, 1)}.get(form)
    if form == "svd":
        weight = merged(normal(3, 10, 3, 3), b)
    else:
        weight = dense((a, middle, normal(3, 3, 1, 3), b) if form == "spatial" else (a, middle, b))
    found = FORMS[form](weight)
    exact = [o for o in found.options if o.error < 1e-4]
    assert min(o.parameters for o in exact) < weight.numel() / 2


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_layers_after_one_another_are_one(dimensions: int) -> None:
    convolve = getattr(torch.nn.functional, f"conv{dimensions}d")
    x, ones = normal(2, 5, *[7] * dimensions), [1] * dimensions
    first, core, depthwise = normal(4, 5, *ones), normal(6, 4, *[3] * dimensions), normal(4, 1, *[3] * dimensions)
    y = convolve(x, first)
    assert torch.allclose(convolve(x, merged(first, core)), convolve(y, core), atol=1e-4)
    assert torch.allclose(convolve(x, merged(first, depthwise)), convolve(y, depthwise, groups=4), atol=1e-4)


def test_ranks_are_multiples() -> None:
    assert [o.ranks for o in Svd(normal(40, 50), each=16).options] == [(16,), (32,)]


def test_a_core_behind_few_inputs_has_as_many_outputs_as_it_can() -> None:
    """One input channel and nine taps cannot make more than nine directions, however many outputs there are."""
    weight = torch.randn(24, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    form = FORMS["tucker2"](weight)
    for option in form.options:
        made = form.factors(option)
        assert [tuple(f.shape) for f in made] == list(option.shapes)
        lost = float((dense(made) - weight).square().sum() / weight.square().sum())
        assert lost == pytest.approx(option.error, abs=1e-5)
    assert {o.ranks[1] for o in form.options if o.ranks[0] == 1} == {2, 4, 6, 8, 24}
