"""evaluate as a whole: on the real runtimes, and on a runtime of our own whose numbers are known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import penjing as pj
from penjing.data import Data, digits
from penjing.errors import BudgetError, DataError, InputError, TargetError
from penjing.evaluation import LatencySettings, assemble, bench, digest
from penjing.evaluation.latency import Timings
from penjing.recipe import Plan, Reason
from penjing.runtimes import Artifact, Executed, Parity, Target
from penjing.task import get_task

QUICK = LatencySettings(warm_up=1, seconds=0.01, least_rounds=3, most_rounds=3)
M = {
    *("runtime", "device", "threads", "precision", "metric", "latency_ms", "throughput_per_s", "peak_memory_bytes"),
    *("file_bytes", "wire_bytes", "parameters", "macs"),
}


def classifier(width: int, seed: int) -> pj.Network:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(4 * width, 10)
    )
    return pj.capture(model.eval(), inputs=(torch.rand(2, 1, 8, 8),), name=f"net{width}")


@pytest.fixture(scope="module")
def big() -> pj.Network:
    return classifier(16, 0)


@pytest.fixture(scope="module")
def small() -> pj.Network:
    return classifier(4, 1)


@pytest.fixture(scope="module")
def test_data() -> Data:
    return Data(digits("test"))


@pytest.fixture(scope="module")
def report(big: pj.Network, small: pj.Network, test_data: Data) -> pj.Report:
    """Both runtimes, with everything."""
    return pj.evaluate(
        small,
        test_data,
        baseline=big,
        target=["onnxruntime:threads=1", "openvino:threads=1"],
        task="classification",
        constraints="macs<=0.5x, accuracy>=+50%",
        latency=QUICK,
    )


def accuracy(network: pj.Network, data: Data) -> float:
    right = [network(x).argmax(1) == y for x, y in data.batches(64)]
    return float(torch.cat(right).double().mean())


def test_the_json_has_every_key_of_version_1(report: pj.Report) -> None:
    values = json.loads(report.to_json())
    assert values["schema"] == 1
    keys = {"schema", "network", "baseline", "result", "steps", "verdict", "artifacts", "environment"}
    assert keys <= set(values)
    for measured in (values["baseline"], values["result"], values["best_uncompressed"]):
        assert set(measured) >= M
        assert set(measured["metric"]) >= {"name", "value", "n", "ci95"}
        assert set(measured["latency_ms"]) == {"p50", "p95", "n"}
        assert all(measured[key] is not None for key in M)
        assert measured["latency_ms"]["p50"] <= measured["latency_ms"]["p95"]
    assert [set(row) for row in values["verdict"]["constraints"]] == [{"text", "value", "limit", "met"}] * 2
    for row in values["artifacts"]:
        assert set(row) >= {"path", "runtime", "bytes", "sha256", "parity"}
        assert set(row["parity"]) >= {"max_abs", "agreement"}


def test_the_metric_is_that_of_the_network_on_these_samples(
    report: pj.Report, big: pj.Network, small: pj.Network, test_data: Data
) -> None:
    for target in report.targets:
        assert target.result.metric.value == pytest.approx(accuracy(small, test_data), abs=1 / 360)
        assert target.baseline.metric.value == pytest.approx(accuracy(big, test_data), abs=1 / 360)
        assert target.result.metric.n == 360
        low, high = target.result.metric.ci95
        assert 0 < low < target.result.metric.value < high < 1
        change = target.change["metric"]
        assert change["difference"] == pytest.approx(target.result.metric.value - target.baseline.metric.value)
        assert change["gained"] - change["lost"] == round(360 * change["difference"])


def test_sizes_and_counts_are_those_of_the_files(report: pj.Report, small: pj.Network, tmp_path: Path) -> None:
    assert report.result.wire_bytes == pj.pack(small, tmp_path / "n.penjing") == (tmp_path / "n.penjing").stat().st_size
    assert report.result.parameters == small.parameter_count() == 4 * 9 + 4 + 16 * 10 + 10
    assert report.result.macs == 64 * 4 * 9 + 160
    assert report.baseline.macs == 64 * 16 * 9 + 640
    assert report.targets[0].change["macs"] == pytest.approx(report.result.macs / report.baseline.macs)
    for row in report.artifacts:
        assert report.files.copy(row["path"], tmp_path / "file")
        content = (tmp_path / "file").read_bytes()
        assert row["bytes"] == len(content) == report.result.file_bytes
        assert row["sha256"] == hashlib.sha256(content).hexdigest()


def test_the_verdict_follows_from_the_numbers(report: pj.Report) -> None:
    macs, gain = report.verdict["constraints"]
    assert (macs["met"], gain["met"], report.met) == (True, False, False)
    assert macs["value"] == pytest.approx(report.result.macs / report.baseline.macs)


def test_what_it_was_measured_with_is_recorded(report: pj.Report, big: pj.Network, small: pj.Network) -> None:
    values = report.to_dict()
    assert values["network"]["digest"] == digest(small) != digest(big) == values["network"]["baseline_digest"]
    assert values["data"]["samples"] == 360
    assert values["environment"]["packages"]["torch"] == torch.__version__
    assert [target["result"]["runtime"] for target in values["targets"]] == ["onnxruntime", "openvino"]
    assert {target["result"]["threads"] for target in values["targets"]} == {1}
    assert values["targets"][0]["result"] == values["result"]
    text = report.to_json()
    assert str(Path.home()) not in text and "/tmp" not in text


def test_without_baseline_labels_or_task(small: pj.Network, test_data: Data, tmp_path: Path) -> None:
    pj.pack(small, tmp_path / "net.penjing")
    inputs = [x for x, _ in test_data.batches(40, limit=80)]
    found = pj.evaluate(
        tmp_path / "net.penjing",
        inputs,
        target=Target(runtime="onnxruntime"),
        constraints="size<=1MB",
        latency=QUICK,
        memory=False,
    )
    values = found.to_dict()
    assert values["baseline"] is None and values["best_uncompressed"] is None
    assert values["result"]["metric"]["name"] == "agreement"
    assert values["result"]["metric"]["value"] == 1.0
    assert values["result"]["peak_memory_bytes"] is None
    assert found.met
    assert "on the wire" in found.headline


def test_a_recorded_task_is_used_and_another_overrides_it(small: pj.Network, test_data: Data) -> None:
    recorded = small.replace(task="classification")
    found = pj.evaluate(recorded, test_data, limit=50, latency=QUICK, memory=False)
    assert (found.result.metric.name, found.result.metric.n) == ("accuracy", 50)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"constraints": "latency<=0.5x"}, BudgetError, "there is none"),
        ({"constraints": "latency=5"}, BudgetError, "must use <= or >="),
        ({"target": []}, TargetError, "no target"),
        ({"target": "onnxruntme"}, TargetError, "onnxruntime"),
        ({"batch_size": 0}, InputError, "batch_size must be a whole number above 0, got 0"),
        ({"latency_batch": True}, InputError, "latency_batch"),
        ({"baseline": "nowhere.penjing"}, InputError, "there is no file"),
        ({"data": []}, DataError, "empty"),
        ({"data": [(torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))]}, DataError, "must have the shape"),
        ({"data": [(torch.rand(4, 1, 8, 8), torch.full((4,), 10))], "task": "classification"}, DataError, "10"),
    ],
)
def test_bad_input_is_one_sentence(
    small: pj.Network, test_data: Data, settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    given = {"data": test_data, "latency": QUICK, "memory": False, **settings}
    with pytest.raises(error, match=words):
        pj.evaluate(small, given.pop("data"), **given)


# ------------------------------------------------------------------------------------------------ a runtime of our own
class FakeSession:
    """Gives fixed logits, whatever the network would say: only what the session says may count."""

    input_names: tuple[str, ...] = ()

    def __init__(self, precision: str, right: float) -> None:
        self.precision, self.threads, self.right = precision, 1, right

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        n = len(next(iter(inputs.values())))
        logits = np.zeros((n, 10), np.float32)
        wrong = round((1 - self.right) * n)
        logits[:wrong, 1] = 1
        logits[wrong:, 0] = 1
        return [logits]

    def executed(self) -> list[Executed]:
        return [Executed(op="Conv", name="c", precision=self.precision)] * 3


class FakeRuntime:
    """Two uncompressed settings; int8 is what the result runs in."""

    suffix, name = ".fake", "fake"

    def need(self) -> None:
        return None

    def export(self, network: pj.Network, path: Path, **_: Any) -> Any:
        path.write_bytes(network.name.encode())
        parity = Parity(
            max_abs=0.0,
            max_rel=0.0,
            rms_rel=0.0,
            agreement=1.0,
            tolerance=1.0,
            measure="max_rel",
            worst_output="0",
            n=1,
        )
        return Artifact(path=path, runtime="fake", bytes=4, sha256="0", parity=parity)

    def in_float(self, network: pj.Network, path: Path, session: FakeSession) -> dict[str, str]:
        return {}

    def load(self, path: Path, target: Target) -> FakeSession:
        result = "network" in path.name
        return FakeSession("int8" if result else str(target.precision), 0.5 if result else 0.75)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, small: pj.Network, big: pj.Network) -> Any:
    """Evaluate on the fake runtime with scripted milliseconds for f32, bf16 and the result."""
    runtimes = {"fake": FakeRuntime()}

    class Runtimes:
        @staticmethod
        def get(name: str) -> FakeRuntime:
            return runtimes[name]

    monkeypatch.setattr(bench, "RUNTIMES", Runtimes)
    monkeypatch.setattr(assemble, "RUNTIMES", Runtimes)
    settings = [Target(runtime="fake", precision=p) for p in ("f32", "bf16")]
    monkeypatch.setattr(bench, "uncompressed_settings", lambda target: settings)
    monkeypatch.setattr(FakeSession, "input_names", (small.inputs[0].name,))

    def evaluate(f32: float, bf16: float, result: float, **more: Any) -> pj.Report:
        scripted = {"the baseline in f32": f32, "the baseline in bf16": bf16, "the result": result}

        def interleave(runs: Mapping[str, Any], **_: Any) -> dict[str, Timings]:
            noise = 1 + 0.01 * np.sin(np.arange(30))
            return {name: Timings(scripted[name] * noise, scripted[name] * noise) for name in runs}

        monkeypatch.setattr(bench, "interleave", interleave)
        data = Data((torch.rand(64, 1, 8, 8), torch.zeros(64, dtype=torch.long)))
        return pj.evaluate(
            small,
            data,
            baseline=big,
            target=Target(runtime="fake"),
            task=get_task("classification"),
            memory=False,
            **more,
        )

    return evaluate


def test_only_what_the_session_says_counts(fake: Any) -> None:
    found = fake(4.0, 3.0, 1.0)
    assert found.baseline.metric.value == 0.75
    assert found.result.metric.value == 0.5
    assert found.result.precision == "int8"
    assert found.targets[0].executed == {"int8": 3}
    assert found.targets[0].change["metric"]["lost"] == 16


def test_speed_is_held_against_the_best_uncompressed_setting(fake: Any) -> None:
    found = fake(4.0, 2.0, 1.5, constraints="latency<=0.5x")
    assert found.best_uncompressed.precision == "bf16"
    assert [each.precision for each in found.targets[0].uncompressed] == ["f32", "bf16"]
    assert found.targets[0].change["latency"]["ratio"] == pytest.approx(0.75)
    assert found.targets[0].change["latency_to_baseline"]["ratio"] == pytest.approx(0.375)
    assert found.verdict["constraints"][0]["value"] == pytest.approx(0.75)
    assert not found.met
    assert "1.33× faster than the best uncompressed setting (fake, bf16)" in found.headline


def test_faster_than_f32_but_slower_than_the_best_is_a_regression(fake: Any) -> None:
    found = fake(4.0, 2.0, 3.0)
    assert "1.50× slower than the best uncompressed setting" in found.headline
    assert any(
        text.startswith("Regression: on fake the result is 1.50× slower") for text in found.to_dict()["warnings"]
    )


def test_a_difference_within_the_noise_is_no_difference(fake: Any) -> None:
    found = fake(4.0, 4.0, 4.0)
    assert "no measurable difference in speed" in found.headline
    assert any("only saves space" in text for text in found.to_dict()["warnings"])


def test_steps_carry_the_reasons_of_their_plans(fake: Any) -> None:
    reasons = (Reason(layer="0", choice="keep", score=0.5, why="largest"),)
    plan = Plan(step=pj.PruneChannels(ratio=0.5), reasons=reasons, notes=("one note",))
    found = fake(1.0, 1.0, 1.0, steps=[{"name": "PruneChannels", "settings": {"ratio": 0.5}}], plans=[plan])
    assert found.steps[0]["reasons"] == [{"layer": "0", "choice": "keep", "score": 0.5, "why": "largest"}]
    assert found.steps[0]["notes"] == ["one note"]
    with pytest.raises(InputError, match="1 steps but 2 plans"):
        fake(1.0, 1.0, 1.0, steps=[{"name": "PruneChannels"}], plans=[plan, plan])
