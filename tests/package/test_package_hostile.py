"""The corrupt and hostile files of corrupt/, each refused with its sentence and hint."""

import hashlib
import json
import os
import resource
from pathlib import Path

import pytest

from penjing.errors import InputError, KeyFileError, OutputError, PenjingError
from penjing.package import (
    archive,
    bundles,
    contents,
    decode,
    delta,
    encode,
    join,
    keys,
    layout,
    sealing,
    signatures,
    zstd,
)
from penjing.testing.forging import Forge

CORRUPT = Path(__file__).parent / "corrupt"
GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((CORRUPT / "expected.json").read_text(encoding="utf8"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with keys of nobody."""
    folder = tmp_path_factory.mktemp("keys")
    keys.keygen(folder / "signer")
    keys.keygen(folder / "stranger", kind="age")
    return folder


def read(how, path, made, monkeypatch):
    if how == "decode-small":
        monkeypatch.setattr(layout, "_FREE", 1 << 10)
    if how.startswith("decode"):
        return decode(path.read_bytes())
    if how == "patch":
        return delta.decode(path.read_bytes(), archive.read(CORRUPT / "sound.penjing"))
    if how.startswith("unseal"):
        return sealing.unseal(
            path.read_bytes(), keys.identities(GOLDEN / "sealed.key" if how == "unseal" else made / "stranger")
        )
    if how == "verify":
        return signatures.verify(CORRUPT / "sound.penjing", [made / "signer.pub"], signature=path)
    if how == "join":
        return join(sorted(path.iterdir()), made / "joined.penjing")
    return archive.load(path)


@pytest.mark.parametrize("name", EXPECTED)
def test_each_file_has_its_sentence_and_hint(name, made, monkeypatch):
    told = EXPECTED[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PenjingError) as raised:
        read(told["read"], CORRUPT / name, made, monkeypatch)
    error = raised.value
    assert error.message.startswith(told["sentence"]) and error.hint == told["hint"]
    assert error.message.isprintable() and len(error.message.replace(str(CORRUPT), "")) < 200
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # in KB
    assert not (made / "joined.penjing").exists()


@pytest.mark.parametrize("name", [n for n, told in EXPECTED.items() if told["read"] == "decode"])
def test_inspect_refuses_what_lies_in_its_index(name):
    try:
        inside = contents.inspect(CORRUPT / name)
    except PenjingError:
        return
    assert EXPECTED[name]["sentence"].split(":")[0] != "the package's index makes no sense"
    assert str(inside)


def test_nothing_lies_there_that_is_not_expected():
    others = {"make.py", "expected.json", "sound.penjing", "__pycache__"}
    assert {p.name for p in CORRUPT.iterdir()} - others == set(EXPECTED)
    assert decode((CORRUPT / "sound.penjing").read_bytes())[1]["w"].shape == (6, 36)


def test_a_part_that_is_a_pipe_is_missing(tmp_path):
    from penjing.package import manifest, save

    save((CORRUPT / "sound.penjing").read_bytes(), tmp_path / "net", layout="directory")
    part = tmp_path / "net" / manifest.parse((CORRUPT / "sound.penjing").read_bytes()).parts[1].digest.hex()
    part.unlink()
    os.mkfifo(part)
    with pytest.raises(PenjingError, match=r"1 of 2 parts are missing: part 1 \(s, e\)"):
        archive.load(tmp_path / "net")


def test_a_bundle_with_a_pipe_and_a_signature_that_is_one(tmp_path, made):
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "network.penjing").write_bytes((CORRUPT / "sound.penjing").read_bytes())
    signatures.sign(tmp_path / "bundle" / "network.penjing", made / "signer", signature=tmp_path / "a.json")
    os.mkfifo(bundle / "pipe")
    with pytest.raises(PenjingError, match="pipe in .* cannot be read: it is no file"):
        signatures.verify(bundle, [made / "signer.pub"], signature=tmp_path / "a.json")
    os.mkfifo(tmp_path / "b.json")
    with pytest.raises(PenjingError, match="cannot be read"):
        signatures.verify(bundle, [made / "signer.pub"], signature=tmp_path / "b.json")


def test_a_path_in_a_signed_statement_leads_nowhere(tmp_path, made, monkeypatch):
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "network.penjing").write_bytes((CORRUPT / "sound.penjing").read_bytes())
    (tmp_path / "outside").write_text("secret")
    named = bundles.files
    monkeypatch.setattr(bundles, "files", lambda path: named(path) | {"../outside": "0" * 64})
    signatures.sign(bundle, made / "signer")
    monkeypatch.undo()
    with pytest.raises(PenjingError, match=r"\.\./outside in .* was signed, and is missing"):
        signatures.verify(bundle, [made / "signer.pub"])


def test_names_too_long_for_a_file(made):
    for attempt in (
        lambda: keys.recipients(["x" * 5000]),
        lambda: signatures.verify("x" * 5000, [made / "signer.pub"]),
        lambda: archive.load("x" * 5000),
    ):
        with pytest.raises(PenjingError):
            attempt()


ZEROS = zstd.compress(bytes(4 << 20))


def claiming(count):
    """The manifest of a package of `count` parts of 4 MiB, all of the same few bytes but for one that is elsewhere."""
    package = Forge.of((CORRUPT / "sound.penjing").read_bytes())
    rows = [[1, len(ZEROS), i << 22, (i + 1) << 22] for i in range(count)]
    rows[0][1] = 1 << 44
    package.front.update(names=["w"], types="b", shapes=[[count, 1 << 22]], parts=rows, metadata={})
    package.payloads[1:] = [b"far"] + [ZEROS] * (count - 1)
    return package.manifest()


def test_what_is_claimed_of_parts_elsewhere_takes_no_memory(tmp_path, monkeypatch):
    from penjing.package.refining import Refining

    folder = tmp_path / "net"
    folder.mkdir()
    (folder / "manifest").write_bytes(claiming(2000))  # 8 GB
    (folder / hashlib.sha256(ZEROS).hexdigest()).write_bytes(ZEROS)
    monkeypatch.setattr(layout, "_FREE", 16 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    arriving = Refining(folder)
    with pytest.raises(PenjingError, match="claims to hold [0-9]+ bytes in parts of"):
        arriving.refresh()
    with pytest.raises(PenjingError, match="the first layer is not here"):
        arriving.read()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000


def test_memory_that_is_not_there_is_said(monkeypatch):
    from penjing.package import assembly

    def none(*args, **more):
        raise MemoryError

    data = (CORRUPT / "sound.penjing").read_bytes()
    monkeypatch.setattr(assembly.np, "empty", none)
    with pytest.raises(PenjingError, match="no memory for the 216 bytes of tensor 'w'"):
        decode(data)


def test_what_readers_refuse_is_not_written(monkeypatch):
    import numpy as np

    deep = {}
    inner = deep
    for _ in range(150):
        inner["a"] = {}
        inner = inner["a"]
    with pytest.raises(InputError, match="nested too deep"):
        encode("", {}, metadata=deep)
    monkeypatch.setattr(layout, "_FREE", 1 << 10)
    with pytest.raises(InputError, match="too large for a package"):
        encode("", {"w": np.zeros(3)}, metadata={"a": [[]] * 30_000})


@pytest.mark.parametrize("digits", [20, 5000])
def test_a_servers_numbers_without_end(digits):
    import httpx2

    from penjing.package.sources import Answer, Passing

    many = "9" * digits
    with pytest.raises(Passing, match="another range"):
        Answer(httpx2.Response(206, headers={"Content-Range": f"bytes {many}-{many}/{many}"}), 0, 1.0)
    assert Answer(httpx2.Response(200, headers={"Content-Length": many}), 0, 1.0).total is None


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_pull_does_not_go_on_through_links_and_pipes(kind, tmp_path):
    from penjing.package import manifest
    from penjing.package.arrivals import Arrivals

    front = manifest.parse((CORRUPT / "sound.penjing").read_bytes())
    begun = tmp_path / (front.parts[0].digest.hex() + ".part")
    if kind == "pipe":
        os.mkfifo(begun)
    else:
        (tmp_path.parent / "mine").write_bytes(b"mine")
        begun.symlink_to(tmp_path.parent / "mine")
    with pytest.raises(OutputError, match="holds other files"):
        Arrivals(tmp_path, front, [0, 1])


@pytest.mark.parametrize(
    "change",
    [
        {"nodes": [["Gemm", ["w"], ["y"], {"alpha": {"float": 1e300}}]]},
        {"tensors": [["w", 3, [6, 36], "w", {"blocks": [[0] * 10_000] * 6}]]},  # a row ten thousand times
        {"nodes": [["Gemm", ["w"], ["y"], {"alpha": {"x" * 5000: 1}}]]},
    ],
    ids=["float", "rows", "words"],
)
def test_a_graph_that_lies(change):
    from penjing.package import onnx_model

    graph = {"ir": 8, "opsets": [], "inputs": [], "outputs": [], "nodes": [], "tensors": []}
    arrays = decode((CORRUPT / "sound.penjing").read_bytes())[1]
    assert onnx_model.assemble(json.dumps({"onnx": graph}), arrays)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PenjingError, match="graph is not understood") as raised:
        onnx_model.assemble(json.dumps({"onnx": graph | change}), arrays)
    assert len(raised.value.message) < 200
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_key_at_which_openssl_stumbles(tmp_path):
    """Found by benchmarks/fuzz.py: cryptography knows no name for what OpenSSL says of it."""
    text = "MC4CAQAwBQYDK2VxBCIEIPlQuLzEm7gl5H4IvY2J/euaEoxbWKAAgP9/gF5XNvFZ"
    (tmp_path / "key").write_text(f"-----BEGIN PRIVATE KEY-----\n{text}\n-----END PRIVATE KEY-----\n")
    with pytest.raises(KeyFileError, match="holds no private key to sign with"):
        keys.signing_key(tmp_path / "key")
