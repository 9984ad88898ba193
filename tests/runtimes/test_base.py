"""Targets, sessions and what they refuse."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import penjing as pj
from penjing.errors import InputError, MissingExtraError, OutputError, PenjingError, TargetError
from penjing.network import Network
from penjing.runtimes import RUNTIMES, Target, available_cores, load, uncompressed_settings


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return pj.capture(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (torch.randn(2, 6),), name="tiny")


@pytest.fixture(scope="module")
def files(network: Network, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {n: RUNTIMES.get(n).export(network, folder / f"{n}{RUNTIMES.get(n).suffix}").path for n in RUNTIMES.names()}


def test_the_runtimes() -> None:
    assert {"onnxruntime", "openvino", "torch"} <= set(RUNTIMES.names())  # examples in the documents add others


@pytest.mark.parametrize("text", ["openvino", "onnxruntime:threads=2", "openvino:threads=1,precision=f32"])
def test_target_texts_come_back(text: str) -> None:
    assert str(Target.parse(text)) == text
    assert Target.parse(f" {text} ") == Target.parse(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("openvin", "did you mean 'openvino'"),
        ("", "no runtime"),
        ("openvino:thread=2", "did you mean 'threads'"),
        ("openvino:threads", "not of the form key=value"),
        ("openvino:threads=", "not of the form key=value"),
        ("openvino:threads=two", "whole number"),
        ("openvino:threads=0", "from 1 to"),
        ("openvino:threads=-1", "whole number"),
        ("openvino:threads=1,threads=2", "given twice"),
        ("openvino:precision=int8", "must be one of f32, bf16, f16"),
        ("openvino:device=gpu", "must be cpu"),
    ],
)
def test_bad_target_texts(text: str, words: str) -> None:
    with pytest.raises(TargetError) as caught:
        Target.parse(text)
    assert words in str(caught.value)


def test_threads_default_to_the_cores_of_the_process() -> None:
    assert Target(runtime="torch").thread_count == available_cores() <= len(os.sched_getaffinity(0))
    assert Target(runtime="torch", threads=3).thread_count == 3


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "torch"])
def test_uncompressed_settings_run(name: str, files: dict[str, Path]) -> None:
    settings = uncompressed_settings(f"{name}:threads=1")
    assert settings[0] == Target(runtime=name, threads=1, precision="f32")
    for setting in settings:
        assert load(files[name], setting).precision == setting.precision


def test_precision_that_the_machine_lacks(files: dict[str, Path]) -> None:
    with pytest.raises(TargetError, match="onnxruntime cannot compute in bf16"):
        load(files["onnxruntime"], "onnxruntime:precision=bf16")
    has = {t.precision for t in uncompressed_settings("openvino")}
    for precision in {"bf16", "f16"} - has:
        with pytest.raises(TargetError, match="openvino cannot compute"):
            load(files["openvino"], f"openvino:precision={precision}")


def test_target_of_another_runtime(files: dict[str, Path]) -> None:
    with pytest.raises(TargetError, match="not one of the runtime 'torch'"):
        RUNTIMES.get("torch").load(files["torch"], "openvino")


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "torch"])
def test_inputs_that_do_not_fit(name: str, files: dict[str, Path], network: Network) -> None:
    session = load(files[name], f"{name}:threads=1")
    (key,) = session.input_names
    good = np.zeros((1, 6), np.float32)
    assert session.run({key: good})[0].shape == (1, 3)
    for inputs, words in [
        ({"inputs": good}, f"there is no input|'{key}' is missing"),
        ({key: good, "more": good}, "no input called 'more'"),
        ({}, f"'{key}' is missing"),
        ({key: good.astype(np.float64)}, "must be float32, got float64"),
        ({key: good[0]}, "must have the shape N×6, got 6"),
        ({key: np.zeros((1, 7), np.float32)}, "must have the shape N×6, got 1×7"),
        ({key: [[0.0] * 6]}, "must be a numpy array, got list"),
    ]:
        with pytest.raises(InputError, match=words):
            session.run(inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "torch"])
def test_files_that_cannot_be_opened(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    suffix = RUNTIMES.get(name).suffix
    with pytest.raises(InputError, match="there is no file"):
        load(tmp_path / f"none{suffix}", name)
    with pytest.raises(InputError):
        load(tmp_path, name)
    content = files[name].read_bytes()
    for spoiled in (b"", b"not a network", content[: len(content) // 2], os.urandom(500)):
        bad = tmp_path / f"bad{suffix}"
        bad.write_bytes(spoiled)
        with pytest.raises(PenjingError) as caught:
            load(bad, name)
        assert "bad" in caught.value.message and caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else False, reason="root may write everywhere")
def test_folder_that_cannot_be_written_as_user(network: Network, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError):
        RUNTIMES.get("torch").export(network, tmp_path / "a.pt2")


def test_folder_that_cannot_be_made(network: Network, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"):
        RUNTIMES.get("torch").export(network, tmp_path / "file" / "a.pt2")
    with pytest.raises(InputError, match=r"ends in \.pt2"):
        RUNTIMES.get("torch").export(network, tmp_path / "a.onnx")


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_missing_extra(name: str, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError) as caught:
        RUNTIMES.get(name).export(network, tmp_path / "a.onnx")
    assert f"pip install 'penjing[{name}]'" in (caught.value.hint or "")


def test_importing_runtimes_loads_none() -> None:
    import subprocess

    code = (
        "import penjing.runtimes, sys; print([m for m in ('onnxruntime', 'openvino', 'onnx_ir') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert importlib.import_module("penjing.runtimes").RUNTIMES is RUNTIMES
