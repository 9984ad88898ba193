"""Bundles: whole or not at all, what was measured is what ships, and nothing of anybody's is overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import penjing as pj
from penjing import deployment
from penjing.data import Data
from penjing.errors import InputError, OutputError, PackageError, TargetError
from penjing.evaluation import LatencySettings
from penjing.runtimes import RUNTIMES, Target

QUICK = LatencySettings(warm_up=1, seconds=0.01, least_rounds=3, most_rounds=3)


@pytest.fixture(scope="module")
def network() -> pj.Network:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    return pj.capture(model.eval(), inputs=(torch.rand(2, 6),), name="tiny")


@pytest.fixture(scope="module")
def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    return Data((torch.rand(40, 6, generator=generator), torch.randint(0, 3, (40,), generator=generator)))


@pytest.fixture(scope="module")
def report(network: pj.Network, data: Data) -> pj.Report:
    return pj.evaluate(network, data, baseline=network, task="classification", latency=QUICK, memory=False)


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make exporting impossible: whatever ships must have been there before."""

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("exported again")

    monkeypatch.setattr(type(RUNTIMES.get("onnxruntime")), "export", refuse)


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.usefixtures("no_export")
def test_what_was_measured_is_what_ships(network: pj.Network, data: Data, report: pj.Report, tmp_path: Path) -> None:
    recipe = pj.Recipe(pj.PruneChannels(ratio=0.5))
    bundle = pj.deploy(network, target="onnxruntime", out=tmp_path / "bundle", report=report, recipe=recipe, data=data)
    assert everything(tmp_path) == [
        "bundle",
        *(f"bundle/{name}" for name in ("network-onnxruntime.onnx", "network.penjing", "provenance.json")),
        *(f"bundle/{name}" for name in ("recipe.yaml", "report.html", "report.json", "report.md")),
    ]
    values = json.loads((bundle.path / "report.json").read_text())
    assert values["artifacts"][0]["sha256"] == report.artifacts[0]["sha256"] == bundle.artifacts[0]["sha256"]
    assert deployment._sha256(bundle.path / "network-onnxruntime.onnx") == report.artifacts[0]["sha256"]
    assert pj.Recipe.load(bundle.path / "recipe.yaml") == recipe
    assert values["headline"][1:] in (bundle.path / "report.md").read_text().replace("\\", "")


def test_provenance_says_what_went_in_and_nothing_of_the_machine(
    network: pj.Network, data: Data, report: pj.Report, tmp_path: Path
) -> None:
    grown = network.record({"event": "step", "name": "PruneChannels", "seed": 7})
    fresh = pj.evaluate(grown, data, task="classification", latency=QUICK, memory=False, seed=3)
    bundle = pj.deploy(grown, target="onnxruntime", out=tmp_path / "b", report=fresh, data=data)
    found = json.loads((bundle.path / "provenance.json").read_text())
    assert found["seeds"] == {"steps": [7], "evaluation": 3}
    assert found["inputs"]["measured_on"] == found["inputs"]["data"]
    assert found["inputs"]["data"]["samples"] == 40
    assert found["network"]["digest"] == fresh.network["digest"] != report.network["digest"]
    assert {"penjing", "torch", "onnxruntime"} <= set(found["environment"]["packages"])
    assert set(found["files"]) == set(everything(bundle.path)) - {"provenance.json"}
    text = json.dumps(found)
    assert str(tmp_path) not in text and str(Path.home()) not in text


def test_a_bundle_opens_runs_and_gives_its_network_back(network: pj.Network, data: Data, tmp_path: Path) -> None:
    written = pj.deploy(network, target=["onnxruntime", "openvino:threads=1"], out=tmp_path / "b")
    bundle = pj.Bundle.load(tmp_path / "b")
    assert bundle.artifacts == written.artifacts
    assert bundle.report is None
    (x, _) = next(data.batches(5))
    expected = network(x).numpy()
    assert torch.equal(bundle.network()(x), network(x))
    for runtime in ("onnxruntime", "openvino"):
        session = RUNTIMES.get(runtime).load(
            bundle.artifact(runtime), Target(runtime=runtime, threads=1, precision="f32")
        )
        (found,) = session.run({session.input_names[0]: x.numpy()})
        np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(InputError, match="has no file for torch"):
        bundle.artifact("torch")


@pytest.mark.usefixtures("no_export")
def test_a_bundle_is_replaced_by_a_new_one(network: pj.Network, report: pj.Report, tmp_path: Path) -> None:
    out = tmp_path / "b"
    out.mkdir()
    pj.deploy(network, target="onnxruntime", out=out, report=report, recipe=pj.Recipe(pj.PruneChannels(ratio=0.5)))
    pj.deploy(network, target="onnxruntime", out=out, report=report)
    assert not (out / "recipe.yaml").exists()
    assert everything(tmp_path) == ["b", *(f"b/{name}" for name in everything(out))]


@pytest.mark.parametrize("kind", ["folder", "file", "forged", "link"])
def test_other_peoples_things_are_refused(network: pj.Network, report: pj.Report, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        out.symlink_to(tmp_path / "elsewhere")
    else:
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
        if kind == "forged":
            (out / "provenance.json").write_text('{"kind": "something else"}')
    before = everything(tmp_path)
    with pytest.raises(OutputError, match="holds other files" if kind in ("folder", "forged") else "not a folder"):
        pj.deploy(network, target="onnxruntime", out=out, report=report)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("disk"), OSError(28, "No space left on device")])
@pytest.mark.parametrize("earlier", [False, True])
def test_nothing_is_left_of_a_failure(
    network: pj.Network,
    report: pj.Report,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    earlier: bool,
) -> None:
    out = tmp_path / "b"
    if earlier:
        pj.deploy(network, target="onnxruntime", out=out, report=report)
    before = {name: (tmp_path / name).is_dir() or (tmp_path / name).read_bytes() for name in everything(tmp_path)}

    def fail(*_: Any) -> str:
        raise failure

    monkeypatch.setattr(deployment, "render_markdown", fail)
    expected = OutputError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected):
        pj.deploy(network, target="onnxruntime", out=out, report=report)
    after = {name: (tmp_path / name).is_dir() or (tmp_path / name).read_bytes() for name in everything(tmp_path)}
    assert after == before


def test_a_report_of_another_network_is_refused(network: pj.Network, report: pj.Report, tmp_path: Path) -> None:
    other = network.record({"event": "changed"})
    with pytest.raises(InputError, match="another network"):
        pj.deploy(other, target="onnxruntime", out=tmp_path / "b", report=report)
    with pytest.raises(TargetError, match="no target"):
        pj.deploy(network, target=[], out=tmp_path / "b")
    assert everything(tmp_path) == []


@pytest.mark.parametrize("change", ["edited", "missing", "escape", "newer", "empty"])
def test_a_bundle_that_was_touched_is_refused(
    network: pj.Network, report: pj.Report, tmp_path: Path, change: str
) -> None:
    bundle = pj.deploy(network, target="onnxruntime", out=tmp_path / "b", report=report)
    provenance = bundle.path / "provenance.json"
    found = json.loads(provenance.read_text())
    words = {
        "edited": "not the file that was written",
        "missing": "lacks its file network.penjing",
        "escape": "outside of itself",
        "newer": "version 99",
        "empty": "is not a bundle",
    }
    if change == "edited":
        file = bundle.path / "network-onnxruntime.onnx"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif change == "missing":
        (bundle.path / "network.penjing").unlink()
    elif change == "empty":
        provenance.write_text("[]")
    else:
        found["files" if change == "escape" else "version"] = {"../b/report.md": "0"} if change == "escape" else 99
        provenance.write_text(json.dumps(found))
    with pytest.raises(InputError, match=words[change]):
        pj.Bundle.load(bundle.path)


def test_pack_and_unpack_are_bit_exact_and_name_what_is_wrong(network: pj.Network, tmp_path: Path) -> None:
    size = pj.pack(network, tmp_path / "deep" / "net.penjing")
    assert size == (tmp_path / "deep" / "net.penjing").stat().st_size
    again = pj.unpack(tmp_path / "deep" / "net.penjing")
    topology, arrays = network.state()
    same_topology, same_arrays = again.state()
    assert same_topology == topology
    for name, array in arrays.items():
        assert same_arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(same_arrays[name], array)
    with pytest.raises(OutputError, match="is a folder"):
        pj.pack(network, tmp_path)
    with pytest.raises(InputError, match="there is no file"):
        pj.unpack(tmp_path / "nowhere.penjing")
    (tmp_path / "bad.penjing").write_bytes(b"not a package")
    with pytest.raises(PackageError):
        pj.unpack(tmp_path / "bad.penjing")


@pytest.mark.parametrize("layers", [0, 9, -1, 2.5, "2", True])
def test_a_number_of_layers_that_cannot_be_is_named(network: pj.Network, tmp_path: Path, layers: Any) -> None:
    """Before the network, which is too small to be cut."""
    with pytest.raises(InputError, match=f"layers must be from 2 to 8, got {layers!r}"):
        pj.pack(network, tmp_path / "net.penjing", layers=layers)
    assert not list(tmp_path.iterdir())
    pj.pack(network, tmp_path / "net.penjing", layers=1)
    if layers != 9:
        with pytest.raises(InputError, match=f"layers must be at least 1, got {layers!r}"):
            pj.unpack(tmp_path / "net.penjing", layers=layers)


@pytest.mark.parametrize("path", [None, b"net.penjing", 7])
def test_what_is_no_network_and_no_path_is_named(network: pj.Network, tmp_path: Path, path: Any) -> None:
    with pytest.raises(InputError, match=f"a path is a str or a Path, got {type(path).__name__}"):
        pj.pack(network, path)
    with pytest.raises(InputError, match=f"got {type(path).__name__}"):
        pj.unpack(path)
    other: Any = nn.Linear(2, 2) if path is None else path
    with pytest.raises(InputError, match=f"pack takes a Network, got {type(other).__name__}"):
        pj.pack(other, tmp_path / "net.penjing")
