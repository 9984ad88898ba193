"""pack(layers=): the first layer is a network that runs, and samples say where its errors go."""

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.errors import InputError
from penjing.evaluation.layering import _doubts
from penjing.package import inspect
from penjing.package.contents import Rung
from penjing.progress import SILENT


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 96), nn.ReLU(), nn.Linear(96, 80), nn.ReLU(), nn.Linear(80, 5)).eval()
    return pj.capture(model, inputs=(torch.rand(2, 20),), name="net")


@pytest.fixture(scope="module")
def data(network):
    x = torch.rand(64, 20, generator=torch.Generator().manual_seed(1))
    return x, network(x).argmax(1)


@pytest.fixture(scope="module")
def coded(network):
    return pj.compress(network, pj.Recipe(pj.Quantize(activations=None)), data=None).network


@pytest.mark.parametrize("kind", ["float", "coded"])
def test_the_first_layer_runs(kind, network, coded, data, tmp_path):
    whole = network if kind == "float" else coded
    pj.pack(whole, tmp_path / "net.penjing", layers=2)
    first, again = (pj.unpack(tmp_path / "net.penjing", layers=n) for n in (1, 2))
    x = data[0]
    assert torch.equal(again(x), whole(x)) and again.state()[0] == whole.state()[0]
    assert not torch.equal(first(x), whole(x))
    assert (first(x) - whole(x)).norm() < 0.2 * whole(x).norm()
    assert [str(n.target) for n in first.graph_module.graph.nodes] == [
        str(n.target) for n in whole.graph_module.graph.nodes
    ]
    ladder = inspect(tmp_path / "net.penjing").ladder
    assert ladder[0].name == "SQNR" and ladder[0].value > 10 and ladder[-1].value is None


def test_samples_make_the_first_layer_no_worse(coded, data, tmp_path):
    errors = {}
    for name, samples in (("blind", None), ("seen", data)):
        pj.pack(coded, tmp_path / "net.penjing", layers=3, data=samples)
        first = pj.unpack(tmp_path / "net.penjing", layers=1)
        errors[name] = float((first(data[0]) - coded(data[0])).norm())
    assert errors["seen"] <= errors["blind"]


def test_the_metric_of_every_layer_is_kept(coded, data, tmp_path):
    pj.pack(coded, tmp_path / "net.penjing", layers=2, data=data, task="classification")
    ladder = inspect(tmp_path / "net.penjing").ladder
    x, y = data
    for rung in ladder:
        right = (pj.unpack(tmp_path / "net.penjing", layers=rung.layer)(x).argmax(1) == y).double().mean()
        assert (rung.name, rung.samples, rung.value) == ("accuracy", 64, pytest.approx(float(right)))
    assert "accuracy" in str(ladder[0]) and "on 64 samples" in str(ladder[0])


class Notes:
    """Progress that keeps what it is told."""

    def __init__(self):
        self.texts = []
        self.task = SILENT.task

    def note(self, text):
        self.texts.append(text)


def test_a_first_layer_that_is_large_is_told(coded, network, data, tmp_path):
    recipe = pj.Recipe(pj.PruneWeights(sparsity=0.9), pj.Quantize(activations=None))
    sparse = pj.compress(network, recipe, data=None).network
    for samples, task in ((None, None), (data, "classification")):
        notes = Notes()
        pj.pack(coded, tmp_path / "net.penjing", layers=2, data=samples, task=task, progress=notes)
        assert notes.texts == []
        pj.pack(sparse, tmp_path / "net.penjing", layers=2, data=samples, task=task, progress=notes)
        first = pj.unpack(tmp_path / "net.penjing", layers=1)
        assert (first(data[0]) - sparse(data[0])).norm() < 0.2 * sparse(data[0]).norm()
        (text,) = notes.texts
        assert text.startswith("the first layer is larger than usual") and "poor" not in text
        assert str(inspect(tmp_path / "net.penjing").ladder[0]) in text


@pytest.mark.parametrize(
    ("first", "last", "higher_is_better", "poor"),
    [
        ({"name": "SQNR", "unit": "dB", "value": 5.9}, {"name": "SQNR", "value": None}, True, True),
        ({"name": "SQNR", "unit": "dB", "value": 6.1}, {"name": "SQNR", "value": None}, True, False),
        ({"name": "SQNR", "value": None}, {"name": "SQNR", "value": None}, True, False),
        ({"name": "accuracy", "unit": "%", "value": 0.14}, {"name": "accuracy", "unit": "%", "value": 0.9}, True, True),
        ({"name": "accuracy", "unit": "%", "value": 0.8}, {"name": "accuracy", "unit": "%", "value": 0.9}, True, False),
        ({"name": "mse", "value": 0.9}, {"name": "mse", "value": 0.3}, False, True),
        ({"name": "mse", "value": 0.31}, {"name": "mse", "value": 0.3}, False, False),
    ],
)
def test_a_first_layer_that_is_poor_is_told(first, last, higher_is_better, poor):
    ladder = Rung(layer=1, bytes=50, share=0.5, **first), Rung(layer=2, bytes=100, share=1.0, **last)
    text = _doubts(ladder, higher_is_better=higher_is_better)
    assert text.startswith("the first layer is poor") if poor else not text


def test_codes_of_tables_are_never_cut(network, tmp_path):
    """Neighbouring codes of a table need not mean neighbouring values."""
    shared = pj.compress(network, pj.Recipe(pj.ShareWeights(codes=16)), data=None).network
    try:
        pj.pack(shared, tmp_path / "net.penjing", layers=2)
    except InputError as error:
        assert "nothing that can be cut" in error.message
        return
    first = pj.unpack(tmp_path / "net.penjing", layers=1)
    for name in shared.shared_levels():
        assert torch.equal(first.tensors()[name], shared.tensors()[name])


def test_bad_layers_are_refused(network, coded, tmp_path):
    for layers in (0, 9, -1):
        with pytest.raises(InputError, match="layers must be from 2 to 8"):
            pj.pack(coded, tmp_path / "x.penjing", layers=layers)
    tiny = pj.capture(nn.Linear(3, 4).eval(), inputs=(torch.rand(2, 3),))
    with pytest.raises(InputError, match="nothing that can be cut"):
        pj.pack(tiny, tmp_path / "x.penjing", layers=2)
    assert not (tmp_path / "x.penjing").exists()
    assert pj.pack(coded, tmp_path / "one.penjing", layers=1) == pj.pack(coded, tmp_path / "none.penjing")
