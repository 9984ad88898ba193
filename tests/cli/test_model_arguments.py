"""Every way to name a network, and every way to get it wrong: exit code, both lines, an empty standard output."""

import numpy as np
import pytest
import torch

import penjing as pj

SHAPE = ("--input-shape", "1x1x8x8")


@pytest.fixture
def net(desk, penjing):
    """net.safetensors, net.penjing and net.pt2 in the folder, written by penjing and torch themselves."""
    assert penjing("pack", "net.py:build", "net.penjing", *SHAPE).code == 0
    assert penjing("unpack", "net.penjing", "net.safetensors").code == 0
    module = pj.Network.load("net.safetensors").module()
    batch = {"x": {0: torch.export.Dim.AUTO}}
    torch.export.save(torch.export.export(module, (torch.rand(2, 1, 8, 8),), dynamic_shapes=(batch["x"],)), "net.pt2")
    return desk


@pytest.mark.parametrize(
    "model", ["net.py:build", "net.py:Net", "net:build", "net.safetensors", "net.penjing", "net.pt2"]
)
def test_every_form_gives_the_same_network(net, penjing, model):
    done = penjing("inspect", model, *SHAPE, "--json")
    assert done.code == 0, done.err
    found = done.json["network"]
    assert found["parameters"] == 1332
    assert [i["shape"] for i in found["inputs"]] == [["N", 1, 8, 8]]


def test_example_inputs_come_from_the_data(penjing):
    done = penjing("inspect", "net.py:build", "--data", "samples.npz", "--json")
    assert done.code == 0 and done.json["network"]["inputs"][0]["shape"] == ["N", 1, 8, 8]


def test_what_the_person_prints_does_not_spoil_the_object(penjing):
    done = penjing("inspect", "net.py:chatty", *SHAPE, "--json")
    assert done.json["network"]["name"] == "chatty"
    assert "loading the weights" in done.err


@pytest.mark.parametrize(
    ("args", "error", "hint"),
    [
        (("nett.py:build",), "no file nett.py", ""),
        (("net.py:bild",), "'bild'", "did you mean 'build'?"),
        (("net.py",), "no function in it", "net.py:Net"),
        (("net.py:build",), "needs example inputs", "--input-shape 1x3x32x32"),
        (
            ("net.py:raises", *SHAPE),
            "ValueError: the weights are on another disk",
            ": raise ValueError",
        ),
        (("net.py:leaves", *SHAPE), "sys.exit(3)", ""),
        (("net.py:number", *SHAPE), "returned an int, not an nn.Module", "returns the module"),
        (("net.py:nan", *SHAPE), "head.weight hold NaN", ""),
        (("net.py:branches", *SHAPE), "net.py, line", "torch.where"),
        (("net.py:build", "--input-shape", "1x3x8x8"), "fails on the example inputs", ""),
        (("net.py:build", "--input-shape", "1x1x8"), "fails on the example inputs", ""),
        (("net.py:build", "--input-shape", "8by8"), "'8by8' is not a shape", "1x3x32x32"),
        (("net.py:build", "--input-shape", "1x1x8x8:floaty"), "'1x1x8x8:floaty' is not a shape", "1x128:int64"),
        (("net.py:build", "--input-shape", "1x0x8x8"), "is not a shape", "above 0"),
        (("net.py:build", *SHAPE, *SHAPE), "fails on the example inputs", ""),
        (("no.such.module:build", *SHAPE), "no module called 'no'", "installed"),
        (("elsewhere",), "no file elsewhere", "file.py:callable"),
        (("samples.np",), "no file samples.np", "did you mean samples.npz?"),
        (("samples.npz",), "no network that penjing can read", "file.py:callable"),
        (("net.onnx",), "ONNX files cannot be read yet", "file.py:callable"),
        (("net.keras",), "Keras files cannot be read yet", "file.py:callable"),
        (("broken.py:build", *SHAPE), "broken.py", "broken.py, line 1"),
        (("weights.pth",), "is a pickle", "file.py:function"),
        (("transformer",), "transformers folder", "from_pretrained"),
        (("folder",), "not a bundle", "penjing"),
        (("short.penjing",), "", ""),
        (("text.penjing",), "", ""),
        (("text.pt2",), "not a readable .pt2 file", ""),
        (("text.safetensors",), "", ""),
        (("nan.safetensors",), "", ""),
    ],
)
def test_bad_models(desk, penjing, args, error, hint):
    (desk / "broken.py").write_text("def build(:\n")
    (desk / "weights.pth").write_bytes(b"\x80\x02")
    (desk / "transformer").mkdir()
    (desk / "transformer" / "config.json").write_text("{}")
    (desk / "folder").mkdir()
    (desk / "short.penjing").write_bytes(b"")
    for name in ("text.penjing", "text.pt2", "text.safetensors"):
        (desk / name).write_text("this is text, not a network\n" * 40)
    if args[0] == "nan.safetensors":
        network = pj.capture("net.py:build", inputs=(torch.rand(2, 1, 8, 8),))
        topology, arrays = network.state()
        arrays = {n: np.full_like(a, np.nan) if n == "head.weight" else a for n, a in arrays.items()}
        pj.Network.from_state(topology, arrays).save("nan.safetensors")
    before = sorted(p.name for p in desk.iterdir() if p.name != "__pycache__")
    done = penjing("inspect", *args)
    lines = done.err.splitlines()
    assert done.code == 2 and done.out == "", done.err
    assert len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("hint: "), done.err
    assert error in lines[0] and hint in lines[1], done.err
    assert "Traceback" not in done.err
    assert sorted(p.name for p in desk.iterdir() if p.name != "__pycache__") == before


def test_every_cut_of_a_package_is_refused(net, penjing):
    whole = (net / "net.penjing").read_bytes()
    for length in (0, 3, len(whole) // 3, len(whole) - 1):
        (net / "cut.penjing").write_bytes(whole[:length])
        done = penjing("unpack", "cut.penjing", "out.safetensors")
        assert done.code == 2 and done.err.startswith("error: ") and len(done.err.splitlines()) == 2
        assert not (net / "out.safetensors").exists()


def test_a_flipped_byte_is_found(net, penjing):
    whole = bytearray((net / "net.penjing").read_bytes())
    whole[len(whole) // 2] ^= 0x10
    (net / "flipped.penjing").write_bytes(whole)
    done = penjing("inspect", "flipped.penjing", "--json")
    assert done.code == 2 and set(done.json) == {"error", "hint"}
