"""Grids for few bytes: rate, distortion, and what a package of them takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.analysis.passes import fold_batch_norms, simplified
from penjing.analysis.rounding_harm import noise_harms
from penjing.data import digits
from penjing.errors import BudgetError, DataError, RecipeError
from penjing.network import Network, SetWeights
from penjing.recipe import Context
from penjing.task import Task, get_task
from penjing.tensors.gptq import StepRule, feedback_gain, gptq, gram_error
from penjing.tensors.grids import fake_quantize

TRAIN, TEST = digits("train"), digits("test")


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    start = pj.capture(nn.Sequential(*layers), inputs=(torch.rand(2, 1, 8, 8),))
    tune = pj.Finetune(epochs=8, lr=0.1, batch_size=32)
    return pj.compress(start, pj.Recipe(tune), data=TRAIN, task="classification").network


def coded(network: Network, file: Path, rate: float, data: object = TRAIN) -> tuple[int, float]:
    """Bytes of the package, and the relative error of what is unpacked from it."""
    size = pj.pack(network, file, rate=rate, data=data)
    x = TEST.tensors[0]
    before, after = network.run((x,))[0], pj.unpack(file).run((x,))[0]
    return size, float((after - before).square().sum() / before.square().sum())


def test_the_rate_trades_bytes_for_error(network: Network, tmp_path: Path) -> None:
    found = [coded(network, tmp_path / "a.penjing", rate) for rate in (0.001, 0.01, 0.1, 1.0)]
    assert [size for size, _ in found] == sorted((size for size, _ in found), reverse=True)
    assert [error for _, error in found] == sorted(error for _, error in found)
    assert found[0][1] < 0.001 and found[2][1] < 0.1
    assert 3 * found[2][0] < pj.pack(
        pj.compress(network, pj.Recipe(pj.Quantize(activations=None))).network, tmp_path / "b.penjing"
    )


def test_without_samples_rounding_does_the_harm_that_was_asked_for_to_each_weight(network: Network) -> None:
    plan = pj.CodeWeights(rate=0.02).plan(network, Context(original=network))
    tensors = simplified(network, fold_batch_norms)[0].tensors()
    after = {e.parameter: e.value for e in plan.edits if isinstance(e, SetWeights)}
    relative = [
        float((after[n] - tensors[n]).square().sum() / tensors[n].square().sum()) for n in after if n.endswith("weight")
    ]
    assert sum(relative) == pytest.approx(0.02, rel=0.15)


def test_samples_make_the_error_smaller_at_the_same_bytes(network: Network, tmp_path: Path) -> None:
    size, error = coded(network, tmp_path / "a.penjing", 0.01)
    blind = (coded(network, tmp_path / "b.penjing", rate, None) for rate in (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0))
    assert next(e for s, e in blind if s <= size) > 1.5 * error


def test_noise_does_the_harm_that_probes_foretell(network: Network) -> None:
    x = TRAIN.tensors[0][:400]
    batches = [network.bind(part) for part in x.split(40)]
    name = "6.weight"
    told = noise_harms(network, [name], batches * 8)[name]
    generator, plain, changes = torch.Generator().manual_seed(3), network.run((x,))[0], []
    weight = network.tensors()[name].detach()
    for _ in range(40):
        noise = 1e-3 * torch.randn(weight.shape, generator=generator)
        made = network.apply([SetWeights(parameter=name, value=weight + noise)])
        changes.append(float((made.run((x,))[0] - plain).square().sum() / plain.square().sum()) / 1e-6)
    assert told == pytest.approx(sum(changes) / 40, rel=0.25)


def test_the_step_grows_by_what_feedback_gains() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(4000, 24, generator=generator, dtype=torch.float64)
        @ torch.randn(24, 24, generator=generator).double()
    )
    hessian = (inputs.mT @ inputs / 4000)[None]
    weight = torch.randn(1, 200, 24, generator=generator)
    step = 0.01
    rule = StepRule(-32767, 32767, axis=None, step=step)
    rounded, grid = gptq(hessian, weight, rule, sweeps=0)
    gain = float(feedback_gain(hessian))
    assert gain < 0.7
    assert float(grid.scale) == pytest.approx(step * gain**-0.5, rel=1e-5)
    nearest = fake_quantize(weight[0], rule.grid(weight[0]))[None]
    errors = [float(gram_error(hessian, weight, v).sum()) for v in (rounded, nearest)]
    assert errors[0] == pytest.approx(errors[1], rel=0.1)


def test_the_fewest_bytes_that_keep_the_metric(network: Network, tmp_path: Path) -> None:
    file = tmp_path / "net.penjing"
    size = pj.pack(network, file, max_drop=1.0, data=TRAIN, task="classification")
    assert size < 0.2 * pj.pack(network, tmp_path / "whole.penjing")
    x, y = TEST.tensors
    before, after = (float((n.run((x,))[0].argmax(1) == y).double().mean()) for n in (network, pj.unpack(file)))
    assert after > before - 0.03


def test_what_cannot_be_is_said(network: Network, tmp_path: Path) -> None:
    file = tmp_path / "net.penjing"
    with pytest.raises(RecipeError, match="rate must be") as caught:
        pj.pack(network, file, rate=1.5)
    assert "%" not in str(caught.value)
    with pytest.raises(RecipeError, match="rate or max_drop"):
        pj.pack(network, file, rate=0.1, max_drop=1)
    with pytest.raises(RecipeError, match="max_drop must be above 0, got -1"):
        pj.pack(network, file, max_drop=-1, data=TRAIN, task="classification")
    with pytest.raises(RecipeError, match="needs a task"):
        pj.pack(network, file, max_drop=1, data=TRAIN)
    with pytest.raises(DataError, match="needs samples"):
        pj.pack(network, file, max_drop=1, task="classification")
    quantized = pj.compress(network, pj.Recipe(pj.Quantize(activations=None))).network
    with pytest.raises(RecipeError, match="needs a float network"):
        pj.pack(quantized, file, rate=0.1)
    few = [(TRAIN.tensors[0][:60], TRAIN.tensors[1][:60])]
    with pytest.raises(DataError, match="one of the 30 samples .* more than the 1 points"):
        pj.pack(network, file, max_drop=1, data=few, task="classification")
    with pytest.raises(BudgetError, match="no grids keep"):
        pj.pack(network, file, max_drop=1e-6, data=TRAIN, task=ever_worse())
    assert not file.exists()


def ever_worse() -> Task:
    """A task whose score falls with every look."""
    looks = iter(range(10_000))
    known = get_task("classification")
    assert known is not None
    return replace(known, unit="", scores=lambda outputs, labels: torch.full((len(labels),), -float(next(looks))))


def test_masks_hold_and_where_chooses(network: Network) -> None:
    recipe = pj.Recipe(pj.PruneWeights(sparsity=0.7), pj.CodeWeights(rate=0.05, where="6.*"))
    result = pj.compress(network, recipe, data=TRAIN)
    weight = result.network.tensors()["6.weight"]
    assert weight.dtype == torch.int8
    assert (weight == 0).float().mean() > 0.69
    assert result.network.tensors()["8.weight"].dtype == torch.float32
