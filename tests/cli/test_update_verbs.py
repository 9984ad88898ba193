"""pack --layers, pull --layers, unpack --layers, inspect, diff, patch: a network in steps, from the command line."""

import pytest
import torch

import penjing as pj

TUNED = """

def tuned():
    net = build()
    with torch.no_grad():
        net.head.weight {}
    return net
"""
SHAPE = ("--input-shape", "1x1x8x8")


@pytest.fixture
def layered(desk, penjing):
    (desk / "net.py").write_text(
        (desk / "net.py").read_text().replace("16, 3, 2, 1", "96, 3, 2, 1").replace("16, 4", "96, 4")
    )
    done = penjing("pack", "net.py:build", "net.penjing", "--layers", "2", *SHAPE)
    assert done.code == 0 and "layer 1: " in done.err
    return desk


@pytest.fixture
def url(layered, hosted):
    return hosted(layered)


def test_inspect_prints_the_ladder(layered, penjing):
    done = penjing("inspect", "net.penjing", "--json")
    ladder = done.json["package"]["ladder"]
    assert [r["layer"] for r in ladder] == [1, 2] and ladder[0]["name"] == "SQNR" and ladder[0]["value"] > 20
    assert ladder[0]["bytes"] < ladder[1]["bytes"] == (layered / "net.penjing").stat().st_size
    assert "layer 1: " in done.err and "weights exact" in done.err
    done = penjing(
        "pack",
        "net.py:build",
        "m.penjing",
        "--layers",
        "3",
        "--data",
        "net.py:samples",
        "--task",
        "classification",
        "--json",
    )
    assert [r["name"] for r in done.json["ladder"]] == ["accuracy"] * 3 and done.json["ladder"][0]["samples"] == 96


def test_a_pull_of_one_layer_runs_and_goes_on(layered, penjing, url, monkeypatch):
    assert penjing("split", "net.penjing", "--out", "net").code == 0
    done = penjing("pull", f"{url}/net", "-o", "early.penjing", "--layers", "1", "--json")
    assert done.code == 0 and not done.json["complete"] and "penjing unpack early.penjing.pull" in done.err
    assert done.json["here_bytes"] == penjing("inspect", "net.penjing", "--json").json["package"]["ladder"][0]["bytes"]
    assert penjing("unpack", "early.penjing.pull", "early.safetensors", "--layers", "1").code == 0
    assert penjing("inspect", "early.safetensors").code == 0
    done = penjing("unpack", "early.penjing.pull", "whole.safetensors", "--layers", "2")
    assert done.code == 2 and "1 of 2 parts are missing" in done.err
    assert penjing("pull", f"{url}/net", "-o", "early.penjing").code == 0
    assert (layered / "early.penjing").read_bytes() == (layered / "net.penjing").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("pack", "net.py:build", "x.penjing", "--layers", "9", *SHAPE), "layers must be from 2 to 8"),
        (("unpack", "net.penjing", "x.safetensors", "--layers", "0"), "greater than or equal to 1"),
        (("diff", "net.penjing", "net.penjing", "x.penjing", "--slack", "1"), "--slack goes with --onto-grids"),
        (("diff", "net.penjing", "net.py:build", "x.penjing", "--onto-grids", *SHAPE), "no integer grids"),
        (("diff", "nowhere.penjing", "net.penjing", "x.penjing"), "there is no file"),
        (("patch", "net.penjing", "net.penjing", "x.penjing"), "the package is no delta"),
    ],
)
def test_bad_usage_leaves_nothing(layered, penjing, arguments, words):
    done = penjing(*arguments)
    assert done.code == 2 and words in done.err and "hint:" in done.err
    assert not (layered / "x.penjing").exists() and not (layered / "x.safetensors").exists()


def test_diff_and_patch(desk, penjing):
    text = (desk / "net.py").read_text()
    (desk / "net.py").write_text(text + TUNED.format("*= 1.01"))
    assert penjing("pack", "net.py:build", "old.penjing", *SHAPE).code == 0
    assert penjing("pack", "net.py:tuned", "new.penjing", *SHAPE).code == 0
    done = penjing("diff", "old.penjing", "new.penjing", "d.penjing", "--json")
    assert done.code == 0 and done.json["bytes"] == (desk / "d.penjing").stat().st_size < done.json["whole_bytes"]
    assert penjing("diff", "old.penjing", "net.py:tuned", "e.penjing", *SHAPE).code == 0
    assert penjing("patch", "old.penjing", "d.penjing", "again.penjing").code == 0
    assert (desk / "again.penjing").read_bytes() == (desk / "new.penjing").read_bytes()
    wrong = penjing("patch", "new.penjing", "d.penjing", "x.penjing")
    assert wrong.code == 2 and "changes the network" in wrong.err and not (desk / "x.penjing").exists()
    told = penjing("inspect", "d.penjing", "--json")
    assert told.code == 0 and set(told.json["package"]["delta"]) == {"parent", "child"} and "network" not in told.json
    assert penjing("inspect", "d.penjing", "--provenance").code == 2
    assert "penjing patch" in penjing("unpack", "d.penjing", "x.safetensors").err


def test_a_layered_version_stays_layered(layered, penjing):
    """patch --layers gives the very bytes that pack --layers gives, with samples and without."""
    (layered / "next.py").write_text((layered / "net.py").read_text() + TUNED.format("*= 1.01"))
    judged = ("--data", "net.py:samples", "--task", "classification")
    for more in ((), judged, (*SHAPE, "--target", "onnxruntime")):
        asked = judged if more == judged else ()
        made = penjing("pack", "next.py:tuned", "new.penjing", "--layers", "3", *(more or SHAPE))
        assert made.code == 0, made.err
        assert penjing("diff", "net.penjing", "new.penjing", "d.penjing").code == 0
        done = penjing("patch", "net.penjing", "d.penjing", "again.penjing", "--layers", "3", *asked, "--json")
        assert done.code == 0, done.err
        assert (layered / "again.penjing").read_bytes() == (layered / "new.penjing").read_bytes()
        assert done.json["bytes"] == (layered / "new.penjing").stat().st_size
        assert [r["name"] for r in done.json["ladder"]] == ["accuracy" if asked else "SQNR"] * 3
        assert "layer 3: " in done.err
    assert penjing("unpack", "again.penjing", "again.onnx", "--layers", "1").code == 0
    assert penjing("patch", "net.penjing", "d.penjing", "net", "--layers", "2", "--layout", "directory").code == 0
    assert penjing("unpack", "net", "coarse.safetensors", "--layers", "1").code == 0
    wrong = penjing("patch", "net.penjing", "d.penjing", "x.penjing", *judged)
    assert wrong.code == 2 and "go with --layers" in wrong.err and not (layered / "x.penjing").exists()


def test_a_float_network_is_put_on_the_parents_grids(desk, penjing):
    text = (desk / "net.py").read_text()
    (desk / "net.py").write_text(text + TUNED.format("+= 0.002"))
    base = pj.capture(str(desk / "net.py") + ":build", inputs=(pj_example(),))
    old = pj.compress(base, pj.Recipe(pj.Quantize(activations=None, correct_bias=False)), data=None).network
    pj.pack(old, desk / "old.penjing")
    done = penjing("diff", "old.penjing", "net.py:tuned", "d.penjing", "--onto-grids", "--new", "new.penjing", *SHAPE)
    assert done.code == 0 and "codes changed" in done.err
    assert penjing("patch", "old.penjing", "d.penjing", "again.penjing").code == 0
    assert (desk / "again.penjing").read_bytes() == (desk / "new.penjing").read_bytes()
    new = pj.unpack(desk / "new.penjing")
    assert new.code_kinds() == old.code_kinds()
    assert penjing("inspect", "new.penjing", "--provenance").code == 0


def pj_example():
    return torch.rand(2, 1, 8, 8)
