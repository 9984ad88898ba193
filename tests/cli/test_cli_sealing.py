"""Who made it, and who may read it: the verbs on a real package, and what each refuses."""

import json
from datetime import UTC, datetime

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from penjing.package import signatures


@pytest.fixture
def net(penjing, desk):
    """A package, a maker's key and a reader's."""
    assert penjing("pack", "net.py:build", "net.penjing", "--input-shape", "1x1x8x8").code == 0
    assert penjing("keygen", "maker").code == 0
    assert penjing("keygen", "reader", "--kind", "age").code == 0
    return desk / "net.penjing"


def refused(done, *says):
    assert done.code == 2, done.err
    lines = done.err.strip().splitlines()
    assert lines[-2].startswith("error: ") and lines[-1].startswith("hint: ") and "Traceback" not in done.err
    assert all(s in done.err for s in says), done.err


def test_signed_and_verified(penjing, net):
    made = penjing("sign", "net.penjing", "--key", "maker", "--release", "3", "--expires", "2999-01-01", "--json")
    assert made.json == {"schema": 1, "signature": "net.penjing.dsse.json", "release": 3, "model_signing": None}
    done = penjing("verify", "net.penjing", "--key", "maker.pub", "--at-least", "3", "--json")
    assert done.code == 0 and done.json["release"] == 3 and done.json["expires"] == "2999-01-01T00:00:00+00:00"
    assert "release 3, signed by" in done.err and "until 2999-01-01" in done.err
    assert done.json["predicate"]["network"]["name"] == "build"
    refused(penjing("verify", "net.penjing", "--key", "maker.pub", "--at-least", "4"), "is release 3")
    assert penjing("keygen", "other").code == 0
    refused(penjing("verify", "net.penjing", "--key", "other.pub"), "by another key")
    refused(penjing("verify", "net.penjing"), "--key")
    refused(penjing("sign", "net.penjing", "--key", "maker", "--expires", "2020-01-01"), "'2020-01-01' is past")
    assert penjing("verify", "net.penjing", "--key", "maker.pub").code == 0  # the one that was there still is
    signatures.sign(net, net.with_name("maker"), expires=datetime(2020, 1, 1, tzinfo=UTC))
    refused(penjing("verify", "net.penjing", "--key", "maker.pub"), "expired on 2020-01-01")
    for date in ("soon", "9999-12-31T23:59-14:00"):
        refused(penjing("sign", "net.penjing", "--key", "maker", "--expires", date), f"'{date}' is no date")
    net.write_bytes(net.read_bytes() + b"x")
    refused(penjing("verify", "net.penjing", "--key", "maker.pub"), "follow the end of the package")


def test_a_signature_elsewhere(penjing, net, desk):
    assert penjing("sign", "net.penjing", "--key", "maker", "--out", "away/s.json", "--parent", "net.penjing").code == 0
    done = penjing("verify", "net.penjing", "--key", "maker.pub", "--signature", "away/s.json", "--json")
    assert [p["name"] for p in done.json["predicate"]["parents"]] == ["net.penjing"]
    refused(penjing("verify", "net.penjing", "--key", "maker.pub"), "there is no signature net.penjing.dsse.json")


def test_model_signing(penjing, net, desk):
    assert penjing("keygen", "curve", "--kind", "p256").code == 0
    done = penjing("sign", "net.penjing", "--key", "curve", "--model-signing", "--json")
    assert done.json["model_signing"] == "net.penjing.sig" and (desk / "net.penjing.sig").is_file()
    refused(penjing("sign", "net.penjing", "--key", "maker", "--model-signing"), "--kind p256")


def test_sealed_and_opened(penjing, net, desk):
    sealed = penjing("encrypt", "net.penjing", "s.penjing", "--to", "reader.pub", "--json")
    assert sealed.code == 0 and sealed.json["bytes"] == (desk / "s.penjing").stat().st_size
    shown = penjing("inspect", "s.penjing", "--json")
    assert shown.code == 0 and shown.json["package"]["tensors"] == [] and "sealed penjing package" in shown.err
    assert "body" not in shown.err + shown.out
    refused(penjing("inspect", "s.penjing", "--provenance"), "s.penjing is sealed")
    refused(penjing("unpack", "s.penjing", "x.safetensors"), "the package is sealed", "penjing decrypt")
    opened = penjing("decrypt", "s.penjing", "o.penjing", "--identity", "reader", "--json")
    assert opened.code == 0 and (desk / "o.penjing").read_bytes() == net.read_bytes()


def test_somebody_more(penjing, net, desk):
    assert penjing("keygen", "second", "--kind", "age").code == 0
    assert penjing("encrypt", "net.penjing", "s.penjing", "--to", "reader.pub").code == 0
    refused(penjing("decrypt", "s.penjing", "o.penjing", "--identity", "second"), "sealed for other recipients")
    refused(penjing("encrypt", "s.penjing", "t.penjing", "--to", "second.pub"), "sealed already", "--identity")
    assert penjing("encrypt", "s.penjing", "s.penjing", "--to", "second.pub", "--identity", "reader").code == 0
    for who in ("second", "reader"):
        assert penjing("decrypt", "s.penjing", "o.penjing", "--identity", who).code == 0
        assert (desk / "o.penjing").read_bytes() == net.read_bytes()


def test_only_what_was_signed_is_unpacked(penjing, net, desk):
    assert penjing("keygen", "other").code == 0
    assert penjing("sign", "net.penjing", "--key", "maker", "--release", "3").code == 0
    done = penjing("unpack", "net.penjing", "a.safetensors", "--key", "maker.pub", "--at-least", "3")
    assert done.code == 0 and "release 3, signed by" in done.err
    assert penjing("unpack", "net.penjing", "b.safetensors").code == 0
    assert (desk / "a.safetensors").read_bytes() == (desk / "b.safetensors").read_bytes()
    client = ("net.py:build", "client.penjing", "--target", "onnxruntime", "--input-shape", "1x1x8x8")
    assert penjing("pack", *client).code == 0 and penjing("sign", "client.penjing", "--key", "maker").code == 0
    for place, more in (("a.onnx", ("--key", "maker.pub")), ("b.onnx", ())):
        assert penjing("unpack", "client.penjing", place, *more).code == 0
    assert (desk / "a.onnx").read_bytes() == (desk / "b.onnx").read_bytes()
    refused(penjing("unpack", "client.penjing", "x.onnx", "--key", "other.pub"), "by another key")
    to = ("unpack", "net.penjing", "x.safetensors")
    refused(penjing(*to, "--key", "maker.pub", "--at-least", "4"), "is release 3")
    refused(penjing(*to, "--key", "other.pub"), "by another key")
    refused(penjing(*to, "--at-least", "3"), "go with --key")
    assert penjing("pack", "net.py:build", "net.penjing", "--rate", "0.01", "--input-shape", "1x1x8x8").code == 0
    refused(penjing(*to, "--key", "maker.pub"), "net.penjing is not what was signed")
    assert not (desk / "x.safetensors").exists() and not (desk / "x.onnx").exists()


def test_passphrases(penjing, net, desk):
    (desk / "secret").write_text("some words\n")
    (desk / "wrong").write_text("other words\n")
    (desk / "nothing").write_text("\n")
    made = ("--passphrase-file", "secret")
    assert penjing("keygen", "own", *made).code == 0
    assert penjing("keygen", "mine", "--kind", "age", *made).code == 0
    assert penjing("sign", "net.penjing", "--key", "own", *made).code == 0
    refused(penjing("sign", "net.penjing", "--key", "own", "--passphrase-file", "wrong"), "does not open")
    refused(penjing("sign", "net.penjing", "--key", "own", "--passphrase-file", "nothing"), "is empty")
    refused(penjing("sign", "net.penjing", "--key", "own", "--passphrase-file", "missing"), "cannot be read")
    assert penjing("encrypt", "net.penjing", "s.penjing", "--to", "mine.pub").code == 0
    assert penjing("decrypt", "s.penjing", "o.penjing", "--identity", "mine", *made).code == 0
    # a passphrase for a key that needs none is not asked for, and does no harm
    assert penjing("sign", "net.penjing", "--key", "maker", *made).code == 0


def test_asked_for_on_a_terminal_only(penjing, net, monkeypatch):
    answers = iter(["a b", "a c", "a b", "a b", "a b"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("getpass.getpass", lambda question, stream: next(answers))
    refused(penjing("keygen", "own", "--passphrase"), "the two passphrases differ")
    assert penjing("keygen", "own", "--passphrase").code == 0
    assert penjing("sign", "net.penjing", "--key", "own").code == 0
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    refused(penjing("sign", "net.penjing", "--key", "own"), "no terminal to ask on", "--passphrase-file")


def test_keys_are_never_overwritten(penjing, net, desk):
    before = (desk / "maker").read_bytes()
    refused(penjing("keygen", "maker"), "never overwritten")
    refused(penjing("keygen", "new", "--kind", "rsa"), "no kind of key")
    assert (desk / "maker").read_bytes() == before and not (desk / "new").exists()


def test_provenance_and_bill(penjing, net, desk):
    done = penjing("inspect", "net.penjing", "--provenance", "--bom", "bom.json", "--json")
    assert done.code == 0, done.err
    chain = done.json["provenance"]
    assert chain["original"] == chain["digest"] and [link["name"] for link in chain["links"]] == ["capture"]
    assert f"original  {chain['original']}" in done.err
    text = (desk / "bom.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert json.loads(text)["metadata"]["component"]["modelCard"]["modelParameters"]["inputs"]
    assert penjing("split", "net.penjing", "--out", "folder").code == 0
    assert penjing("inspect", "folder", "--bom", "same.json").code == 0
    assert (desk / "same.json").read_text() == text
    of_code = penjing("inspect", "net.py:build", "--input-shape", "1x1x8x8", "--provenance", "--json")
    assert of_code.json["provenance"]["digest"] == chain["digest"]
    refused(
        penjing("inspect", "net.py:build", "--input-shape", "1x1x8x8", "--bom", "b.json"), "is no package or bundle"
    )
    refused(penjing("inspect", "net.penjing", "--bom", "bom.xml"), "must end in .json")


@pytest.mark.parametrize(
    "args",
    [
        ("sign", "nothing.penjing", "--key", "maker"),
        ("sign", "net.py", "--key", "maker"),
        ("sign", ".", "--key", "maker"),
        ("sign", "net.penjing", "--key", "nothing"),
        ("sign", "net.penjing", "--key", "reader"),
        ("verify", "nothing.penjing", "--key", "maker.pub"),
        ("verify", "net.penjing", "--key", "maker"),
        ("encrypt", "net.py", "s.penjing", "--to", "reader.pub"),
        ("encrypt", "net.penjing", "s.zip", "--to", "reader.pub"),
        ("encrypt", "net.penjing", "s.penjing", "--to", "reader"),
        ("decrypt", "net.penjing", "o.penjing", "--identity", "reader"),
        ("decrypt", "nothing.penjing", "o.penjing", "--identity", "reader"),
        ("decrypt", "net.penjing", "o.penjing", "--identity", "maker.pub"),
    ],
)
def test_what_is_refused_writes_nothing(penjing, net, desk, args):
    before = {p.name for p in desk.iterdir()}
    refused(penjing(*args))
    assert {p.name for p in desk.iterdir()} - {"__pycache__"} == before - {"__pycache__"}


@pytest.mark.slow
def test_a_bundle(penjing, desk):
    assert (
        penjing("deploy", "net.py:build", "--input-shape", "1x1x8x8", "--target", "onnxruntime", "--out", "b").code == 0
    )
    assert penjing("keygen", "maker").code == 0 and penjing("sign", "b", "--key", "maker").code == 0
    done = penjing("verify", "b", "--key", "maker.pub", "--json")
    assert set(done.json["files"]) == {p.name for p in (desk / "b").iterdir()}
    assert penjing("inspect", "b", "--bom", "bom.json").code == 0
    (desk / "b" / "network-onnxruntime.onnx").write_bytes(b"another")
    refused(penjing("verify", "b", "--key", "maker.pub"), "network-onnxruntime.onnx in b is not what was signed")
