"""The verbs on real runtimes, on a network small enough to take a second; and what each refuses."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import yaml

from penjing.training import loop

SHAPE = ("--input-shape", "1x1x8x8")
DATA = ("--data", "net.py:samples")


def files(folder) -> set[str]:
    return {p.name for p in folder.iterdir() if p.name != "__pycache__"}


@pytest.fixture
def quantize(desk):
    (desk / "int8.yaml").write_text("steps:\n  - Quantize: {samples: 32}\n")
    return "int8.yaml"


# ------------------------------------------------------------------------------------------------- the journey
@pytest.mark.slow
def test_compress_then_everything_else(penjing, desk, quantize):
    measured = ("--test", "net.py:samples", "--task", "classification", "--target", "onnxruntime")
    done = penjing("compress", "net.py:build", *DATA, *measured, "--recipe", quantize, "--out", "small", "--json")
    assert done.code == 0, done.err
    report = done.json
    assert report["schema"] == 1 and report["out"] == "small"
    assert [s["name"] for s in report["steps"]] == ["Quantize"]
    assert report["result"]["precision"] == "int8" and report["baseline"]["precision"] == "f32"
    assert report["result"]["metric"]["n"] == 96
    written = files(desk / "small")
    assert {"report.json", "report.html", "report.md", "recipe.yaml", "provenance.json", "network.penjing"} <= written
    assert json.loads((desk / "small" / "report.json").read_text())["result"] == report["result"]
    assert yaml.safe_load((desk / "small" / "recipe.yaml").read_text())["steps"] == [{"Quantize": {"samples": 32}}]
    assert "Traceback" not in done.err and "Warning" not in done.err
    assert "before (f32)" in done.err and "after (int8)" in done.err

    shown = penjing("inspect", "small", "--json")
    assert shown.code == 0 and shown.json["report"]["result"] == report["result"]
    assert any(t["dtype"] == "int8" for t in shown.json["network"]["tensors"])

    packed = penjing("pack", "small", "again.penjing", "--json")
    assert packed.code == 0 and packed.json["bytes"] == (desk / "again.penjing").stat().st_size
    assert (desk / "again.penjing").read_bytes() == (desk / "small" / "network.penjing").read_bytes()

    unpacked = penjing("unpack", "again.penjing", "again.safetensors", "--json")
    assert unpacked.code == 0 and (desk / "again.safetensors").is_file()

    packed = penjing("pack", "small", "client.penjing", "--target", "openvino", "--json")
    assert packed.code == 0 and penjing("unpack", "client.penjing", "client.onnx", "--json").json["bytes"] > 0
    assert penjing("pack", "small", "x.penjing", "--target", "torch").err.startswith("error: a package holds no graph")
    refused = penjing("unpack", "again.penjing", "again.onnx")
    assert refused.code == 2 and "penjing pack --target" in refused.err and not (desk / "again.onnx").exists()

    deployed = penjing("deploy", "again.safetensors", "--target", "openvino", "--out", "ov", "--json")
    assert deployed.code == 0, deployed.err
    assert [a["runtime"] for a in deployed.json["artifacts"]] == ["openvino"]
    assert deployed.json["artifacts"][0]["parity"]["max_abs"] >= 0
    assert (desk / "ov" / deployed.json["artifacts"][0]["path"]).stat().st_size == deployed.json["artifacts"][0][
        "bytes"
    ]

    compared = penjing(
        "evaluate", "small", "again.penjing", *DATA, "--task", "classification", "--baseline", "net.py:build", "--json"
    )
    assert compared.code == 0, compared.err
    assert [r["model"] for r in compared.json["reports"]] == ["small", "again.penjing"]
    accuracies = {r["result"]["metric"]["value"] for r in compared.json["reports"]}
    assert accuracies == {report["result"]["metric"]["value"]}


@pytest.mark.slow
def test_a_teacher_of_another_name(penjing, desk):
    with (desk / "net.py").open("a") as file:
        file.write("\n\ndef small():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))\n")
    (desk / "recipe.yaml").write_text("steps:\n  - Distill: {teacher: big, epochs: 1}\n")
    asked = ("--recipe", "recipe.yaml", "--task", "classification", "--target", "onnxruntime", "--out", "taught")
    lacking = penjing("compress", "net.py:small", *DATA, *asked)
    assert lacking.code == 2 and "no network called 'big' was given" in lacking.err, lacking.err
    done = penjing("compress", "net.py:small", *DATA, *asked, "--teacher", "big=net.py:build", "--json")
    assert done.code in (0, 3), done.err
    assert [s["name"] for s in done.json["steps"]] == ["Distill"]
    assert done.json["steps"][0]["settings"] == {"teacher": "big", "epochs": 1}


@pytest.mark.slow
def test_deploy_says_what_runs_in_float_and_what_became_wider(penjing, desk):
    (desk / "mixed.yaml").write_text("steps:\n  - Quantize: {samples: 32, weights: {'*': int6, head: int16}}\n")
    done = penjing("compress", "net.py:build", *DATA, "--recipe", "mixed.yaml", "--out", "mixed")
    assert done.code == 0, done.err
    deployed = penjing("deploy", "mixed", "--target", "onnxruntime", "--out", "shipped", "--json")
    assert deployed.code == 0, deployed.err
    (artifact,) = deployed.json["artifacts"]
    assert artifact["in_float"] == {"head": "f32"}
    assert "On onnxruntime 1 layer on integer grids really ran in f32: head." in deployed.err
    assert "2 tensors of int6 as int8 (no int6 in the file): body.0.weight, body.3.weight." in deployed.err
    plain = penjing("deploy", "net.py:build", *SHAPE, "--out", "plain", "--json")
    assert plain.json["artifacts"][0]["in_float"] == {} and "On onnxruntime" not in plain.err


def test_default_recipe_says_what_it_does(penjing, desk):
    done = penjing("compress", "net.py:build", *DATA, "--json")
    assert done.code == 0, done.err
    assert [s["name"] for s in done.json["steps"]] == ["Quantize"]
    assert "no --recipe" in done.err and "no --test" in done.err
    assert done.json["out"] == "build-compressed" and (desk / "build-compressed" / "report.json").is_file()


def test_a_run_is_kept_and_goes_on(penjing, desk, quantize):
    arguments = (*COMPRESS, "--recipe", quantize, "--out", "small", "--resume", "run", "--json")
    first, again = penjing(*arguments), penjing(*arguments)
    assert first.code == again.code == 0, again.err
    assert {"run.json", "step-01.json", "step-01.safetensors"} == files(desk / "run")
    assert "step 1 (Quantize) is done: run holds its plan" in again.err and "is done" not in first.err
    assert first.json["result"]["metric"] == again.json["result"]["metric"]
    other = penjing(*arguments, "--seed", "1")
    assert other.code == 2 and "run holds another run, with other seed" in other.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_says_where_it_goes_on(penjing, desk, monkeypatch, number):
    """At the fourth step of a training: its checkpoint stays, and nobody says that nothing was written."""
    (desk / "tune.yaml").write_text("steps: [{Finetune: {epochs: 3, batch_size: 8}}]")
    arguments = ("compress", "net.py:build", *DATA, "--task", "classification", "--recipe", "tune.yaml", "--out", "o")
    learn = loop._Run.learn

    def struck(run, group):
        if run.step == 3:
            os.kill(os.getpid(), number)
        learn(run, group)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "learn", struck)
        kept = penjing(*arguments, "--resume", "run")
        assert kept.code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
        last = kept.err.splitlines()[-1]
        assert last.endswith("no bundle was written; the same command goes on from what run holds"), kept.err
        assert list((desk / "run" / "step-01").iterdir()) and not (desk / "o").exists()
        alone = penjing(*arguments)
        assert alone.err.splitlines()[-1].endswith("nothing was written") and not (desk / "o").exists()
    again = penjing(*arguments, "--resume", "run")
    assert again.code == 0 and "going on after step 4" in again.err


def test_a_network_without_baseline(penjing):
    done = penjing("evaluate", "net.py:build", *DATA, "--task", "classification")
    assert done.code == 0 and done.out == ""
    assert "measured (f32)" in done.err and "net.py:build, on ONNX Runtime" in done.err


def test_groups_are_shown(penjing):
    done = penjing("inspect", "net.py:build", *SHAPE, "--groups", "--json")
    assert done.code == 0
    first = done.json["groups"][0]
    assert "body.0.weight dim 0" in first and "body.3.weight dim 1" in first


# ------------------------------------------------------------------------------------------------- refusals
COMPRESS = ("compress", "net.py:build", *DATA)


@pytest.mark.parametrize(
    ("recipe", "error", "hint"),
    [
        ("steps: [{PruneChannels: {ratio: 1.5}}]", "PruneChannels.ratio must be between 0 and 1, got 1.5", ""),
        ("steps: [{PruneChannels: {ratoi: 0.5}}]", "PruneChannels has no field 'ratoi'", "did you mean 'ratio'?"),
        ("steps: [{PruneChanels: {ratio: 0.5}}]", "'PruneChanels'", "did you mean 'PruneChannels'?"),
        ("steps: [{Finetune: {epochs: many}}]", "Finetune.epochs must be", ""),
        ("steps: {", "not valid YAML", ""),
        ("- PruneChannels", "a recipe is a mapping", "steps"),
    ],
)
def test_bad_recipes(penjing, desk, recipe, error, hint):
    (desk / "recipe.yaml").write_text(recipe)
    before = files(desk)
    done = penjing(*COMPRESS, "--recipe", "recipe.yaml")
    lines = [line for line in done.err.splitlines() if line.startswith(("error:", "hint:"))]  # slow work says so
    assert done.code == 2 and done.out == "" and len(lines) == 2, done.err
    assert lines[0].startswith("error: ") and error in lines[0] and hint in lines[1]
    assert files(desk) == before


@pytest.mark.parametrize(
    ("args", "error", "hint"),
    [
        (("compress", "net.py:build", "--data", "net.py:wrong_shape"), "", ""),
        (("compress", "net.py:build", "--data", "net.py:empty"), "empty", ""),
        (("compress", "net.py:build", "--data", "net.py:not_samples"), "got int", "(inputs, labels)"),
        (("compress", "net.py:build", "--data", "net.py:raises"), "ValueError: the weights are on another disk", ""),
        (("compress", "net.py:build", "--data", "net.py:smples"), "'smples'", "did you mean 'samples'"),
        (("compress", "net.py:build", "--data", "nothing.npz"), "no file nothing.npz", ""),
        ((*COMPRESS, "--task", "clasification"), "'clasification'", "did you mean 'classification'?"),
        ((*COMPRESS, "--target", "openvin"), "'openvin'", "did you mean 'openvino'?"),
        ((*COMPRESS, "--target", "openvino:thread=2"), "'thread'", "did you mean 'threads'?"),
        ((*COMPRESS, "--target", "openvino:threads=0"), "threads", ""),
        ((*COMPRESS, "--recipe", "nothing.yaml"), "no recipe nothing.yaml", ""),
        ((*COMPRESS, "--teacher", "net.py:build"), "--teacher takes NAME=MODEL", "big=net.py:build"),
        ((*COMPRESS, "--teacher", "original=net.py:build"), "that is taken", "another name"),
        ((*COMPRESS, "--teacher", "big=net.py:bild"), "'bild'", "did you mean 'build'"),
        ((*COMPRESS, "--out", "net.py"), "not a folder", "--out"),
        ((*COMPRESS, "--out", "thesis"), "holds other files", "--out"),
        ((*COMPRESS, "--out", "net.py/out"), "not a folder", "another place"),
        ((*COMPRESS, "--out", "/proc/out"), "cannot write /proc/out", "another place"),
        (("evaluate", "net.py:build", "--data", "net.py:wrong_shape"), "", ""),
        (("evaluate", "net.py:build", *DATA, "--baseline", "net.py:bild"), "'bild'", "did you mean 'build'?"),
        (("evaluate", "net.py:build", "--data", "net.py:wrong_labels", "--task", "classification"), "label", ""),
        (("deploy", "net.py:build", *SHAPE, "--target", "tflite"), "'tflite'", "openvino"),
        (("deploy", "net.py:build", *SHAPE, "--out", "thesis"), "holds other files", "--out"),
        (("pack", "net.py:build", "net.zip", *SHAPE), "must end in .penjing", "net.penjing"),
        (("pack", "net.py:build", "thesis", *SHAPE), "is a folder", ""),
        (("unpack", "net.py", "net.safetensors"), "not a package", ".penjing"),
        (("unpack", "nothing.penjing", "net.safetensors"), "no file nothing.penjing", ""),
        (("unpack", "nothing.penjing", "net.pt"), "must end in .safetensors", ""),
        (("demo", "--out", "thesis"), "holds other files", "--out"),
        ((*COMPRESS, "--track", "tensorboard"), "", ""),
        ((*COMPRESS, "--resume", ""), "resume must name a folder", "resume='run'"),
        ((*COMPRESS, "--recipe", "fuse.yaml"), "no network called 'big' was given", "--teacher big=MODEL"),
        ((*COMPRESS, "--resume", "run", "--track", "tensorbord"), "'tensorbord'", "did you mean 'tensorboard'?"),
    ],
)
def test_bad_arguments(penjing, desk, quantize, args, error, hint):
    (desk / "thesis").mkdir()
    (desk / "thesis" / "chapter1.tex").write_text("years of work")
    with (desk / "net.py").open("a") as file:
        file.write("\n\ndef wrong_labels():\n    return TensorDataset(torch.rand(8, 1, 8, 8), torch.full((8,), 9))\n")
    (desk / "fuse.yaml").write_text("steps: [{FuseWeights: {source: big}}]")
    before = files(desk)
    if args[0] == "compress" and "--recipe" not in args:
        args = (*args, "--recipe", quantize)
    done = penjing(*args)
    lines = [line for line in done.err.splitlines() if line.startswith(("error:", "hint:"))]  # slow work says so
    assert done.code == 2 and done.out == "", done.err
    assert len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("hint: "), done.err
    assert error in lines[0] and hint in lines[1], done.err
    assert files(desk) == before and files(desk / "thesis") == {"chapter1.tex"}


def test_a_folder_that_may_not_be_written(penjing, desk):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (desk / "locked").mkdir(mode=0o500)
    done = penjing("pack", "net.py:build", "locked/net.penjing", *SHAPE)
    assert done.code == 2 and "cannot write locked/net.penjing: permission denied" in done.err


@pytest.mark.parametrize("args", [("pack", "net.py:build", "big.penjing"), ("deploy", "net.py:build", "--out", "big")])
def test_a_disk_that_fills_up_leaves_nothing(desk, args):
    """A limit on file size stands for the full disk: the same kind of error at the same place."""

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))

    command = [sys.executable, "-B", "-m", "penjing", *args, *SHAPE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=desk, preexec_fn=small_disk, timeout=300)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert done.stdout == "" and len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("hint: ")
    assert files(desk) == {"net.py", "samples.npz"}


def test_doctor_tries_every_runtime(penjing):
    done = penjing("doctor", "--json")
    assert done.code == 0, done.err
    checks = {c["name"]: c for c in done.json["checks"]}
    assert {"core", "torch", "onnxruntime", "openvino"} <= set(checks)
    assert all(c["ok"] for c in checks.values()), checks
    assert done.json["packages"]["torch"].startswith("2.13")


def test_doctor_names_the_command_for_what_is_missing(penjing, monkeypatch):
    from penjing.runtimes import RUNTIMES

    monkeypatch.setattr(type(RUNTIMES.get("openvino")), "available", classmethod(lambda cls: False))
    done = penjing("doctor")
    assert done.code == 0
    assert "openvino: not installed" in done.err and "pip install 'penjing[openvino]'" in done.err


def test_a_missing_runtime_is_told_before_the_work(penjing, desk, quantize, monkeypatch):
    from penjing.runtimes import RUNTIMES

    monkeypatch.setattr(type(RUNTIMES.get("openvino")), "requires", "no_such_package")
    done = penjing(*COMPRESS, "--recipe", quantize, "--target", "openvino")
    assert done.code == 2 and "not installed" in done.err and "pip install 'penjing[openvino]'" in done.err


@pytest.mark.slow
def test_demo(penjing, desk):
    done = penjing("demo", "--out", "show", "--json")
    assert done.code == 0, done.err
    report = done.json
    assert [t["result"]["runtime"] for t in report["targets"]] == ["onnxruntime", "openvino"]
    assert all(t["result"]["precision"] == "int8" for t in report["targets"])
    assert report["baseline"]["metric"]["value"] > 0.95 and report["result"]["metric"]["value"] > 0.94
    assert report["result"]["wire_bytes"] * 8 < report["baseline"]["wire_bytes"]
    assert files(desk / "show") == {"bundle", "digits.penjing", "original.penjing"}
    assert "What to try next" in done.err
    assert penjing("inspect", "show/digits.penjing").code == 0


def test_a_package_is_compared_with_tensors_that_there_are(penjing, desk):
    (desk / "none.py").write_text("from torch import nn\n\n\ndef build():\n    return nn.ReLU()\n")
    done = penjing("pack", "none.py:build", "none.penjing", "--input-shape", "1x4", "--json")
    assert done.code == 0 and done.json["tensor_bytes"] == 0
    assert "than the tensors" not in done.err and f"none.penjing: {done.json['bytes']} B\n" in done.err
    assert "than the tensors" in penjing("pack", "net.py:build", "net.penjing", *SHAPE).err
