"""Where a network comes from: the chain in its package is the chain of what really happened."""

import json

import numpy as np
import pytest
import torch
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from torch import nn

import penjing as pj
from penjing.errors import InputError, PackageError
from penjing.evaluation import describe, digest
from penjing.package import bom, keys, provenance, sealing, write

STEPS = (pj.PruneWeights(sparsity=0.5), pj.Quantize(activations=None))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """An original, what each of two steps gave, and the package of the last."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    original = pj.capture(model, inputs=(torch.rand(2, 8),), name="net")
    samples = [(torch.rand(4, 8), torch.tensor([0, 1, 2, 3]))]
    task = {"data": samples, "task": "classification"}
    middle = pj.compress(original, pj.Recipe(STEPS[0]), **task).network
    last = pj.compress(original, pj.Recipe(*STEPS), **task).network
    path = tmp_path_factory.mktemp("chain") / "net.penjing"
    pj.pack(last, path)
    return original, middle, last, path


def test_every_digest_is_that_of_the_network_itself(chain):
    original, middle, last, path = chain
    found = provenance.read(path)
    assert found.name == "net"
    assert found.original == digest(original)
    assert [link.name for link in found.links] == ["capture", "PruneWeights", "Quantize"]
    assert [link.after for link in found.links] == [digest(n) for n in (original, middle, last)]
    assert [link.before for link in found.links] == [None, digest(original), digest(middle)]
    assert found.links[1].settings == {"sparsity": 0.5} and found.links[1].seed == 0
    assert found.digest == digest(last) == describe(pj.unpack(path))["digest"]


def test_a_digest_stands_for_what_came_before(chain):
    """The same weights by another way have another name."""
    _, _, last, _ = chain
    events = [dict(e) for e in last.history]
    events[1]["settings"] = {"sparsity": 0.9}
    assert digest(last.replace(history=tuple(events))) != digest(last)


def test_printed(chain):
    original, middle, last, path = chain
    text = str(provenance.read(path))
    order = [
        "original",
        digest(original),
        "PruneWeights(sparsity=0.5), seed 0",
        digest(middle),
        "Quantize",
        digest(last),
    ]
    at = [text.index(word) for word in order]
    assert at == sorted(at)
    assert json.loads(json.dumps(provenance.read(path).to_dict()))["links"][2]["after"] == digest(last)


def test_what_was_put_on_grids_came_from_another(tmp_path):
    """diff --onto-grids is no step of a recipe, but changes a network all the same."""
    before, parent = "b" * 64, "c" * 64
    history = [{"event": "capture"}, {"event": "grids", "name": "onto_grids", "before": before, "parent": parent}]
    found = provenance.trace(json.dumps({"name": "n", "history": history}), "a" * 64)
    assert found.original == before and found.links[1].settings == {"parent": parent}
    assert [link.after for link in found.links] == [before, "a" * 64]


def test_without_a_step_the_network_is_the_original(chain, tmp_path):
    original = chain[0]
    pj.pack(original, tmp_path / "net.penjing")
    found = provenance.read(tmp_path / "net.penjing")
    assert found.original == found.digest == digest(original) and len(found.links) == 1


def test_histories_without_digests(tmp_path):
    """Packages of before: the steps are told, the digests are not known."""
    events = [{"event": "capture"}, {"event": "step", "name": "Quantize", "settings": {}, "seed": 1}]
    found = provenance.trace(json.dumps({"name": "old", "history": events}), "f" * 64)
    assert found.original is None and "not known" in str(found)
    assert [link.after for link in found.links] == [None, "f" * 64]


@pytest.mark.parametrize(
    ("topology", "says"),
    [
        ("", "no network's"),
        ("[]", "no network's"),
        ("[" * 100_000, "no network's"),
        ('{"history": {}}', "no history"),
        ('{"history": [1]}', "no history"),
    ],
)
def test_topologies_without_a_history(topology, says):
    with pytest.raises(PackageError, match=says):
        provenance.trace(topology, "0" * 64)


def test_what_a_file_says_does_not_reach_the_terminal_as_it_is():
    evil = "\x1b[2J\n\x9b2J\u202e\ud800net: provenance"
    events = [{"event": evil}, {"name": evil, "event": "step", "settings": {evil: evil}, "seed": evil, "before": evil}]
    text = str(provenance.trace(json.dumps({"name": evil, "history": events}), "0" * 64))
    assert text.isascii() and text.replace("\n", "").isprintable() and text.count("\n") == 5


# ------------------------------------------------------------------------------------------------ bill of materials
def errors_of(document):
    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(document))


def a_report(network):
    return {
        "network": {"digest": digest(network)},
        "result": {
            "runtime": "onnxruntime",
            "precision": "int8",
            "metric": {"name": "accuracy", "value": 0.5, "n": 4, "ci95": [0.25, 0.75]},
            "latency_ms": {"p50": 0.125},
            "wire_bytes": 100,
            "macs": None,
        },
    }


def test_the_document_is_valid_and_says_what_is_so(chain):
    original, _, last, path = chain
    document = bom.document(path, network=describe(last), report=a_report(last))
    assert errors_of(document) is None
    model = document["metadata"]["component"]
    assert model["type"] == "machine-learning-model" and model["name"] == "net"
    properties = {p["name"]: p["value"] for p in model["properties"]}
    assert properties["penjing:network:digest"] == digest(last)
    assert json.loads(properties["penjing:history:002"])["settings"] == {"sparsity": 0.5}
    (ancestor,) = model["pedigree"]["ancestors"]
    assert ancestor["properties"] == [{"name": "penjing:network:digest", "value": digest(original)}]
    card = model["modelCard"]
    assert card["modelParameters"]["inputs"] == [{"format": "input_1: N×8 float32"}]
    metrics = {m["type"]: m for m in card["quantitativeAnalysis"]["performanceMetrics"]}
    assert metrics["accuracy"]["confidenceInterval"] == {"lowerBound": "0.25", "upperBound": "0.75"}
    assert set(metrics) == {"accuracy", "latency_ms p50", "wire_bytes"}


def test_the_validator_would_object(chain):
    """An oracle that accepts everything is none."""
    document = bom.document(chain[3], network=describe(chain[2]))
    document["metadata"]["component"]["modelCard"]["unknown"] = 1
    assert errors_of(document) is not None


def test_the_same_package_gives_the_same_document(chain, tmp_path):
    path = chain[3]
    bom.write(tmp_path / "a.json", path)
    bom.write(tmp_path / "b.json", path)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert errors_of(json.loads((tmp_path / "a.json").read_text())) is None


def test_names_that_are_no_unicode(tmp_path):
    write(tmp_path / "net.penjing", '{"name": "\\ud800"}', {"w": np.zeros(3)})
    bom.write(tmp_path / "bom.json", tmp_path / "net.penjing")
    assert json.loads((tmp_path / "bom.json").read_text())["metadata"]["component"]["name"] == "\ud800"


def test_an_original_has_no_ancestor(chain, tmp_path):
    pj.pack(chain[0], tmp_path / "net.penjing")
    document = bom.document(tmp_path / "net.penjing")
    assert errors_of(document) is None
    assert not document["metadata"]["component"]["pedigree"].get("ancestors")


def test_what_has_no_bill(chain, tmp_path):
    with pytest.raises(InputError, match="report is of another network"):
        bom.document(chain[3], report=a_report(chain[0]))
    for report in ({}, {"network": "net"}, {**a_report(chain[2]), "result": [1]}):
        with pytest.raises(InputError, match=r"is no report\.json"):
            bom.document(chain[3], report=report)
    with pytest.raises(PackageError):
        bom.document(tmp_path / "nothing.penjing")
    write(tmp_path / "text.penjing", "hello", {"w": np.zeros(3)})
    with pytest.raises(PackageError, match="no network's"):
        bom.document(tmp_path / "text.penjing")
    sealing.encrypt(chain[3], tmp_path / "sealed.penjing", [keys.keygen(tmp_path / "k", kind="age")])
    with pytest.raises(PackageError, match="sealed"):
        bom.document(tmp_path / "sealed.penjing")
