"""Scores on sessions' outputs: alignment with the samples, fixed batches, and every sentence for impossible data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import penjing as pj
from penjing.data import Data
from penjing.errors import DataError, ParityError
from penjing.evaluation.describe import DataDigest
from penjing.evaluation.fidelity import compare_outputs
from penjing.evaluation.metric import fit_batch, score
from penjing.task import Task, get_task


@pytest.fixture(scope="module")
def network() -> pj.Network:
    torch.manual_seed(0)
    return pj.capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), inputs=(torch.rand(2, 4),))


@pytest.fixture(scope="module")
def fixed() -> pj.Network:
    """A network whose batch of four is part of its graph."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(4, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + torch.arange(4.0)[:, None] * 0) @ self.weight

    network = pj.capture(Fixed().eval(), inputs=(torch.rand(4, 4),))
    assert not network.batch_is_dynamic
    return network


def samples(n: int, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 4, generator=generator), torch.randint(0, classes, (n,), generator=generator)


def exact(network: pj.Network):
    name = network.inputs[0].name
    return lambda arrays: [t.numpy() for t in network.run({name: torch.from_numpy(arrays[name])})]


def test_scores_are_those_of_torch_whatever_the_batch(network: pj.Network) -> None:
    x, y = samples(50)
    expected = (network(x).argmax(1) == y).double().numpy()
    for batch in (1, 7, 64):
        found = score(
            {"net": exact(network)}, Data((x, y)), network=network, task=get_task("classification"), batch_size=batch
        )
        np.testing.assert_array_equal(found["net"].scores, expected)
        assert found["net"].fidelity.relative_error.max() == 0


def test_a_fixed_batch_is_padded_and_the_padding_is_not_scored(fixed: pj.Network) -> None:
    x, y = samples(10)
    seen: list[int] = []

    def run(arrays: dict) -> list:
        (array,) = arrays.values()
        seen.append(len(array))
        return exact(fixed)(arrays)

    weight = fixed.tensors()["weight"]
    expected = ((x @ weight).argmax(1) == y).double().numpy()
    for data in (Data((x, y)), Data([(x, y)])):  # batches of four, and one of ten
        seen.clear()
        found = score({"net": run}, data, network=fixed, task=get_task("classification"), batch_size=64)
        assert seen == [4, 4, 4]
        np.testing.assert_array_equal(found["net"].scores, expected)


def test_inputs_are_cut_or_repeated_to_the_batch_wanted(network: pj.Network, fixed: pj.Network) -> None:
    x, _ = samples(3)
    (name,) = [spec.name for spec in network.inputs]
    grown = fit_batch(network, network.bind(x), 8)[name]
    assert torch.equal(grown, torch.cat([x, x, x])[:8])
    assert torch.equal(fit_batch(network, network.bind(x), 1)[name], x[:1])
    (name,) = [spec.name for spec in fixed.inputs]
    assert fit_batch(fixed, fixed.bind(torch.rand(4, 4)), 64)[name].shape == (4, 4)


def test_fidelity_needs_no_labels_and_says_how_far(network: pj.Network) -> None:
    x, _ = samples(20)

    def scaled(arrays: dict) -> list:
        return [1.1 * output for output in exact(network)(arrays)]

    found = score({"base": exact(network), "net": scaled}, Data(x), network=network, task=None, reference="base")
    assert found["net"].scores is None
    np.testing.assert_allclose(found["net"].fidelity.relative_error, 0.1, rtol=1e-5)
    np.testing.assert_array_equal(found["net"].fidelity.agreement, 1.0)
    metric = found["net"].fidelity.metric()
    assert (metric.name, metric.value, metric.n) == ("agreement", 1.0, 20)


def test_fidelity_of_other_outputs_is_relative_error() -> None:
    images = np.random.default_rng(0).normal(size=(5, 3, 4, 4)).astype(np.float32)
    found = compare_outputs([images], [images + np.float32(0)])
    assert found.agreement is None
    assert found.metric().name == "relative_error"
    assert not found.metric().higher_is_better
    masked = np.array([[1.0, -np.inf], [2.0, -np.inf]], dtype=np.float32)
    assert compare_outputs([masked], [masked]).relative_error.max() == 0
    hidden, logits = images.reshape(5, -1), images.reshape(5, -1)[:, :4]
    found = compare_outputs([hidden, logits], [hidden, -logits], names=("hidden", "logits"))
    assert found.agreement.max() == 0
    assert compare_outputs([hidden, logits], [hidden, -logits]).agreement.min() == 1
    integers = compare_outputs([np.array([[1, 2], [3, 4]])], [np.array([[1, 2], [3, 5]])])
    np.testing.assert_array_equal(integers.agreement, [1.0, 0.5])


def test_nan_outputs_are_an_error_that_names_the_sample(network: pj.Network) -> None:
    x, y = samples(20)
    calls = []

    def broken(arrays: dict) -> list:
        outputs = exact(network)(arrays)
        calls.append(1)
        if len(calls) == 2:
            outputs[0][3, 0] = np.nan
        return outputs

    with pytest.raises(ParityError, match=r"the result gives NaN in output '.*' for sample 11"):
        score({"the result": broken}, Data((x, y)), network=network, task=None, batch_size=8)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.tensor([0, 1, 3, 0]), "label 3 is out of range|a label is 3"),
        (torch.tensor([0, -1, 2, 0]), "label -1 is out of range|a label is -1"),
        (torch.tensor([0, -100, 2, 0]), "label -100 is out of range"),
        (torch.rand(4), "integers"),
        (torch.zeros(4, 2, dtype=torch.long), r"\(n, classes, …\)"),
    ],
)
def test_impossible_labels_are_refused(network: pj.Network, labels: torch.Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        score(
            {"net": exact(network)},
            Data((torch.rand(4, 4), labels)),
            network=network,
            task=get_task("classification"),
        )


def test_missing_labels_and_tasks_that_do_not_fit_are_refused(network: pj.Network) -> None:
    with pytest.raises(DataError, match="needs labels"):
        score({"net": exact(network)}, Data(torch.rand(4, 4)), network=network, task=get_task("classification"))

    def failing(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return outputs @ labels.float()

    own = Task(name="own", loss=failing, scores=failing, metric="own")
    with pytest.raises(DataError, match="do not fit the task 'own'.*shapes cannot be multiplied|size mismatch"):
        score({"net": exact(network)}, Data(samples(4)), network=network, task=own)
    mean = Task(name="own", loss=failing, scores=lambda outputs, labels: outputs.mean(), metric="own")
    with pytest.raises(DataError, match="gave 1 scores for 4 samples"):
        score({"net": exact(network)}, Data(samples(4)), network=network, task=mean)


def test_the_digest_of_data_is_that_of_the_samples_not_of_the_batches() -> None:
    x, y = samples(30)

    def digest(batch: int, x: torch.Tensor = x) -> str:
        found = DataDigest()
        for start in range(0, 30, batch):
            found.update(x[start : start + batch], y[start : start + batch], len(x[start : start + batch]))
        assert found.samples == 30
        return found.to_dict()["sha256"]

    assert digest(4) == digest(30)
    changed = x.clone()
    changed[17, 2] += 1e-3
    assert digest(4, changed) != digest(4)
