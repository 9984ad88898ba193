"""Signatures of packages that are many files or layers: they hold for every layout, not for what was changed."""

import json
import shutil

import numpy as np
import pytest

from penjing.errors import PackageError, SignatureError
from penjing.package import directory, join, keys, manifest, refining, save, signatures, split, write
from penjing.package.layered import Layered

TOPOLOGY = json.dumps({"name": "net", "history": [{"event": "capture", "torch": "2.13", "notes": []}]})


def arrays():
    rng = np.random.default_rng(0)
    grids = {f"w{i}": np.clip(rng.normal(0, 30, (300, 900)), -127, 127).astype(np.int8) for i in range(4)}
    return {**grids, "bias": rng.normal(size=700).astype(np.float32)}


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    key = tmp_path_factory.mktemp("ring") / "maker"
    keys.keygen(key)
    return key


@pytest.fixture(scope="module")
def layered():
    return Layered(TOPOLOGY, arrays(), layers=3).encode({"name": "net"})


@pytest.fixture
def signed(maker, layered, tmp_path):
    """A layered package in the directory layout, and its signature."""
    save(layered, tmp_path / "net", layout="directory")
    return tmp_path / "net", signatures.sign(tmp_path / "net", maker, release=5)


def public(maker):
    return [maker.with_name("maker.pub")]


def parts(folder):
    return sorted(f for f in folder.iterdir() if f.name != directory.MANIFEST)


def test_a_signature_holds_for_every_layout(signed, maker, layered, tmp_path):
    folder, place = signed
    assert place == tmp_path / "net.dsse.json" and len(parts(folder)) >= 4
    found = signatures.verify(folder, public(maker), at_least=5)
    assert list(found.files) == ["net"] and found.predicate["package"]["bytes"] == len(layered)
    (tmp_path / "one.penjing").write_bytes(layered)
    volumes = split(folder, tmp_path / "volumes", into=2)
    joined = join(reversed(volumes), tmp_path / "joined.penjing")
    for whole in (tmp_path / "one.penjing", joined):
        assert signatures.verify(whole, public(maker), signature=place) == found
    again = signatures.sign(joined, maker, release=5)
    assert signatures.verify(folder, public(maker), signature=again).predicate == found.predicate


def test_in_the_folder_itself(signed, maker, tmp_path, monkeypatch):
    folder, place = signed
    before = place.read_bytes()
    monkeypatch.chdir(folder)
    assert signatures.sign(".", maker, release=5) == place and place.read_bytes() == before
    assert signatures.verify(".", public(maker)).release == 5


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda f: parts(f)[0].write_bytes(parts(f)[0].read_bytes()[::-1]), PackageError, "does not match its SHA-256"),
        (lambda f: parts(f)[0].write_bytes(parts(f)[1].read_bytes()), PackageError, "does not match its SHA-256"),
        (lambda f: parts(f)[0].write_bytes(b""), PackageError, "does not match its SHA-256"),
        (lambda f: parts(f)[-1].unlink(), PackageError, r"1 of \d+ parts are missing"),
        (lambda f: (f / ("a" * 64)).write_bytes(b"x"), SignatureError, f"holds {'a' * 64}, which was not signed"),
        (lambda f: (f / "index.html").write_text("x"), SignatureError, "holds index.html, which was not signed"),
        (lambda f: (f / "manifest").write_bytes((f / "manifest").read_bytes()[:-1]), PackageError, "cut short|SHA-256"),
        (lambda f: shutil.rmtree(f) or f.mkdir(), PackageError, "is a folder"),
    ],
    ids=["reversed", "another's", "empty", "missing", "added", "added file", "manifest", "nothing"],
)
def test_what_is_not_as_it_was_signed(signed, maker, change, error, says):
    change(signed[0])
    with pytest.raises(error, match=says):
        signatures.verify(signed[0], public(maker))


def test_a_manifest_alone_is_verified_and_holds_what_comes_later(signed, maker, layered, tmp_path):
    """Of a pull under way: what was verified is what is read, though another package takes its place."""
    folder, place = signed
    underway = tmp_path / "net.pull"
    folder.rename(underway)
    last = manifest.parse(layered).parts[-1]
    (underway / directory.file_of(last)).unlink()
    arriving = refining.Refining(underway, layers=1)
    found = signatures.verify_manifest(arriving.manifest, underway, public(maker), at_least=5)
    assert found.release == 5 and found.predicate["package"]["bytes"] == len(layered)
    with pytest.raises(SignatureError, match="is release 5"):
        signatures.verify_manifest(arriving.manifest, underway, public(maker), at_least=6)
    other = arrays()
    other["w0"] = other["w0"][::-1]
    shutil.rmtree(underway)
    save(Layered(TOPOLOGY, other, layers=3).encode({"name": "net"}), underway, layout="directory")
    arriving.refresh()
    with pytest.raises(PackageError, match=r"\d of \d+ parts are missing"):
        arriving.require()
    with pytest.raises(SignatureError, match="is not what was signed"):
        signatures.verify_manifest(refining.Refining(underway).manifest, underway, public(maker), signature=place)


def test_other_packages_are_refused_in_its_place(signed, maker, tmp_path):
    """The same network at once, with fewer layers, or with one weight more: each has another digest."""
    folder, place = signed
    other = arrays()
    other["w0"][0, 0] += 1
    for data in (
        Layered(TOPOLOGY, arrays(), layers=2).encode({"name": "net"}),
        Layered(TOPOLOGY, other, layers=3).encode({"name": "net"}),
    ):
        shutil.rmtree(folder)
        save(data, folder, layout="directory")
        with pytest.raises(SignatureError, match="is not what was signed"):
            signatures.verify(folder, public(maker))
    write(tmp_path / "at once.penjing", TOPOLOGY, arrays(), metadata={"name": "net"})
    with pytest.raises(SignatureError, match="is not what was signed"):
        signatures.verify(tmp_path / "at once.penjing", public(maker), signature=place)


def test_a_bundles_signature_tells_of_its_own_package_alone(maker, tmp_path):
    """Another package that lies in the bundle is signed, too, but not as what the statement describes."""
    write(tmp_path / "b" / "network.penjing", TOPOLOGY, arrays())
    write(tmp_path / "b" / "teacher.penjing", TOPOLOGY, {"w": np.zeros(9, np.int8)})
    place = signatures.sign(tmp_path / "b", maker)
    signatures.verify(tmp_path / "b", public(maker))
    signatures.verify(tmp_path / "b" / "network.penjing", public(maker), signature=place)
    with pytest.raises(SignatureError, match=r"teacher.penjing is not what was signed"):
        signatures.verify(tmp_path / "b" / "teacher.penjing", public(maker), signature=place)


def test_what_is_told_is_of_the_bytes_that_are_signed(maker, tmp_path, monkeypatch):
    """A package that is replaced while it is signed: the signature fits what was looked at, or nothing."""
    path = tmp_path / "net.penjing"
    write(path, TOPOLOGY, arrays())
    first = path.read_bytes()
    load = signatures.archive.load

    def replaced(place):
        data = load(place)
        write(path, TOPOLOGY, {"w": np.zeros(9, np.int8)})
        return data

    monkeypatch.setattr(signatures.archive, "load", replaced)
    signatures.sign(path, maker)
    monkeypatch.undo()
    with pytest.raises(SignatureError, match="is not what was signed"):
        signatures.verify(path, public(maker))
    path.write_bytes(first)
    assert signatures.verify(path, public(maker)).predicate["package"]["bytes"] == len(first)
