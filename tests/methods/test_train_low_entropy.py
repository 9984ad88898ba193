"""TrainLowEntropy: bytes that were really packed, what the network still can, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import penjing as pj
from penjing import package
from penjing.data import Data
from penjing.errors import DataError, RecipeError
from penjing.methods import Finetune, PruneWeights, Quantize, TrainLowEntropy, TrainQuantized, train_low_entropy
from penjing.network import Network, RemoveChannels, capture
from penjing.recipe import Context, Plan, Step
from penjing.runtimes import RUNTIMES
from penjing.task import get_task
from penjing.training import checkpoint

X = torch.tensor(load_digits().images / 16, dtype=torch.float32)[:, None]
Y = torch.tensor(load_digits().target)


def trained(module: nn.Module, steps: int = 150) -> Network:
    optimizer = torch.optim.Adam(module.parameters(), lr=0.005)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(X), Y).backward()
        optimizer.step()
    return capture(module.eval(), inputs=(X[:2],))


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 10)]
    return trained(nn.Sequential(*layers))


def finetune(**fields: Any) -> Finetune:
    own = {"epochs": 6, "lr": 0.004, "batch_size": 32, "optimizer": "adamw", "weight_decay": 0.0}
    return Finetune(**{**own, "teacher": "original", "alpha": 1.0, "temperature": 2.0, **fields})


def planned(network: Network, step: Step, seed: int = 0) -> tuple[Plan, Network]:
    plan = step.plan(network, Context(original=network, data=Data((X, Y)), task=get_task("classification"), seed=seed))
    return plan, network.apply(plan.edits)


def accuracy(network: Network) -> float:
    return float((network.run((X,))[0].argmax(1) == Y).float().mean())


def packed(network: Network, folder: Path) -> int:
    """Bytes of the tensors in a real file; what comes back is the same network."""
    pj.pack(network, folder / "net.penjing")
    assert torch.equal(pj.unpack(folder / "net.penjing").run((X,))[0], network.run((X,))[0])
    return package.inspect(folder / "net.penjing").coded_bytes


@pytest.fixture(scope="module")
def made(network: Network) -> dict[float, tuple[Plan, Network]]:
    return {
        rate: planned(network, TrainLowEntropy(finetune=finetune(epochs=12), rate=rate)) for rate in (0.0, 0.003, 0.3)
    }


def test_without_a_rate_it_is_quantization_aware_training(network: Network, made: Any) -> None:
    aware = planned(network, TrainQuantized(finetune=finetune(), weights="int4", activations=None))[1]
    assert accuracy(network) > 0.97
    assert accuracy(made[0.0][1]) >= max(accuracy(network), accuracy(aware)) - 0.02


def test_a_greater_rate_gives_fewer_packed_bytes(made: Any, tmp_path: Path) -> None:
    sizes = [packed(network, tmp_path) for _, network in made.values()]
    assert sizes[1] < 0.7 * sizes[0] and sizes[2] < 0.75 * sizes[1]
    assert accuracy(made[0.003][1]) > 0.96 and accuracy(made[0.3][1]) > 0.93


def test_estimated_bytes_are_the_real_ones(made: Any, tmp_path: Path) -> None:
    for plan, network in made.values():
        told = [re.match(r"epoch (\d+): ([\d,]+) bytes of weights, accuracy ([\d.]+)%", n) for n in plan.notes]
        epochs = [m for m in told if m]
        assert [int(m[1]) for m in epochs] == list(range(1, 13))
        real = packed(network, tmp_path)
        assert int(epochs[-1][2].replace(",", "")) == pytest.approx(real, rel=0.1)
        assert float(epochs[-1][3]) / 100 == pytest.approx(accuracy(network), abs=1e-4)
        by_tensor = [int(r.choice.split()[0].replace(",", "")) for r in plan.reasons]
        assert sum(by_tensor) == pytest.approx(real, rel=0.1)


def test_the_same_seed_gives_the_same_network(network: Network) -> None:
    step = TrainLowEntropy(finetune=finetune(epochs=1), rate=0.1)
    first, again, other = (planned(network, step, seed)[1].tensors() for seed in (3, 3, 4))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(first[n].shape != other[n].shape or not torch.equal(first[n], other[n]) for n in first)


@pytest.mark.parametrize("at", [50, 97, "the end"])
def test_one_that_was_killed_says_what_one_that_was_not_says(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int | str
) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "_MOST", 0)
    recipe = pj.Recipe(TrainLowEntropy(finetune=finetune(epochs=3.5), rate=0.01))

    def run(folder: Path | None) -> pj.Result:
        return pj.compress(network, recipe, data=(X[:1024], Y[:1024]), task="classification", resume=folder)

    calls, penalty = [], train_low_entropy._Watch.penalty

    def cut(*given: Any) -> Any:
        calls.append(given)
        if at in (len(calls), "the end"):
            raise KeyboardInterrupt
        return penalty(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if at == "the end":
            patch.setattr(train_low_entropy, "unread_units", cut)
        else:
            patch.setattr(train_low_entropy._Watch, "penalty", cut)
        run(tmp_path)
    whole, again = run(None), run(tmp_path)
    assert again.plans[0].notes == whole.plans[0].notes
    assert sum(n.startswith("epoch") for n in again.plans[0].notes) == 4
    assert all(torch.equal(t, again.network.tensors()[n]) for n, t in whole.network.tensors().items())


def test_units_that_nothing_reads_are_gone(network: Network, made: Any) -> None:
    plan, result = made[0.3]
    assert any(isinstance(e, RemoveChannels) for e in plan.edits)
    held = {n: t for n, t in result.tensors().items() if n.endswith("weight")}
    assert held["1.weight"].shape[0] < 48 and held["1.weight"].dtype == torch.int8
    assert held["3.weight"].any(0).all() and held["5.weight"].any(0).all(), "every unit is read by something"


def test_convolutions_with_norms_and_masks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = trained(
        nn.Sequential(nn.Conv2d(1, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
                      nn.Flatten(), nn.Linear(108, 10)), 60
    )  # fmt: skip
    pruned = planned(start, PruneWeights(sparsity=0.5, where="5.weight"))[1]
    masked = pruned.masks["5.weight"]
    plan = TrainLowEntropy(finetune=finetune(epochs=2), rate=0.0).plan(
        pruned, Context(original=start, data=Data((X, Y)), task=get_task("classification"))
    )
    result = pruned.apply(plan.edits)
    codes = result.tensors()["5.weight"]
    assert codes.shape == masked.shape and not codes[~masked].any() and codes[masked].any()
    assert not any("batch_norm" in str(n.target) for n in result.graph_module.graph.nodes)
    assert accuracy(result) > accuracy(pruned) - 0.03


def test_what_is_not_selected_stays_float(network: Network) -> None:
    plan, result = planned(network, TrainLowEntropy(finetune=finetune(epochs=1), rate=0.05, where="3.*"))
    kinds = {n: t.dtype for n, t in result.tensors().items()}
    assert kinds["3.weight"] == kinds["3.bias"] == torch.int8 and kinds["1.weight"] == torch.float32
    assert {r.layer for r in plan.reasons} == {"3.weight", "3.bias"}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_runtimes_run_it(made: Any, tmp_path: Path, runtime: str) -> None:
    pytest.importorskip(runtime)
    result = made[0.003][1]
    bundle = pj.deploy(result, target=runtime, out=tmp_path / "bundle")
    assert bundle.artifacts[0]["parity"]["agreement"] == 1.0
    assert runtime in RUNTIMES.names()


def test_what_it_refuses(network: Network) -> None:
    with pytest.raises(RecipeError, match="must be a Step that trains, got Quantize"):
        TrainLowEntropy(finetune=Quantize())
    with pytest.raises(RecipeError, match="rate must be"):
        TrainLowEntropy(finetune=finetune(), rate=-1.0)
    with pytest.raises(RecipeError, match="keeps what measured best"):
        TrainLowEntropy(finetune=finetune(patience=2))
    step = TrainLowEntropy(finetune=finetune())
    with pytest.raises(DataError, match="needs samples"):
        step.plan(network, Context(original=network))
    quantized = planned(network, Quantize(weights="int8", activations=None))[1]
    with pytest.raises(RecipeError, match="already|is quantized"):
        planned(quantized, step)
    with pytest.raises(RecipeError, match="finds no weights"):
        planned(network, TrainLowEntropy(finetune=finetune(), where="nothing"))
