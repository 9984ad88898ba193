"""One package in two layouts, divided and put together again: always the same bytes, and what is missing is named."""

import os

import numpy as np
import pytest

from penjing import package
from penjing.errors import InputError, OutputError, PackageError
from penjing.package import manifest, volumes
from penjing.package.directory import MANIFEST, file_of, is_package


def large():
    """Several parts of each kind, and tensors of equal bytes."""
    rng = np.random.default_rng(1)
    grid = rng.normal(0, 20, (1024, 1024)).clip(-127, 127).astype(np.int8)
    arrays = {"first.weight": grid, "first.bias": rng.random(7).astype(np.float32)}
    arrays |= {f"{i}.weight": rng.integers(-127, 128, (700, 1500)).astype(np.int8) for i in range(3)}
    arrays |= {"table": rng.normal(size=(900, 700)).astype(np.float32), "table.bias": np.zeros(700, np.float32)}
    arrays |= {"twin.a": np.arange(300_000, dtype=np.uint64), "twin.b": np.arange(300_000, dtype=np.uint64)}
    return package.encode("a topology", arrays, metadata={"name": "large"}), arrays


@pytest.fixture(scope="module")
def data():
    return large()[0]


@pytest.fixture
def file(data, tmp_path):
    package.save(data, tmp_path / "net.penjing")
    return tmp_path / "net.penjing"


def names(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_a_directory_holds_the_manifest_and_parts_named_by_digest(data, tmp_path):
    size = package.save(data, tmp_path / "net", layout="directory")
    files = names(tmp_path / "net")
    assert data.startswith(files.pop(MANIFEST))
    front = manifest.parse(data)
    assert set(files) == {file_of(p) for p in front.parts}
    assert len(files) < len(front.parts)  # the twins share a file
    assert size == sum(map(len, files.values())) + len(front.data) < len(data)
    assert all(len(b) <= 4 << 20 for b in files.values())


def test_both_layouts_read_the_same(data, tmp_path, equal):
    package.save(data, tmp_path / "net", layout="directory")
    topology, arrays, metadata = package.read(tmp_path / "net")
    assert (topology, metadata) == ("a topology", {"name": "large"}) and equal(arrays, large()[1])
    package.verify(tmp_path / "net")
    assert package.inspect(tmp_path / "net").file_bytes == len(data)


def test_parts_are_worth_a_request_each():
    """Small tensors between large ones do not make small parts; each kind has one remainder at most."""
    rng = np.random.default_rng(0)
    arrays = {}
    for i in range(6):
        arrays[f"{i}.weight"] = rng.normal(size=(800, 700 + i)).astype(np.float32)
        arrays[f"{i}.bias"] = rng.random(900).astype(np.float32)
        arrays[f"{i}.grid"] = rng.integers(-127, 128, (1500, 1000 + 300 * i)).astype(np.int8)
        arrays[f"{i}.tiny"] = rng.integers(-127, 128, (8, 8)).astype(np.int8)
    parts = manifest.parse(package.encode("", arrays)).parts
    sizes = [p.stored for p in parts]
    assert len(sizes) > 8 and sum(s < 64 << 10 for s in sizes) <= 2 and max(sizes) <= 4 << 20


@pytest.mark.parametrize("start", ["file", "directory"])
def test_converted_and_back(data, file, tmp_path, start):
    package.split(file, tmp_path / "net")
    assert is_package(tmp_path / "net")
    source = file if start == "file" else tmp_path / "net"
    package.join([source], tmp_path / "other", layout="directory")
    package.join([tmp_path / "other"], tmp_path / "again.penjing")
    assert names(tmp_path / "net") == names(tmp_path / "other")
    assert (tmp_path / "again.penjing").read_bytes() == data


@pytest.mark.parametrize("how", [{"into": 1}, {"into": 3}, {"size": 2_600_000}, {"into": 4, "layout": "directory"}])
def test_volumes_join_in_any_order(data, file, tmp_path, how):
    made = package.split(file, tmp_path / "volumes", **how)
    assert len(made) > 1 or how == {"into": 1}
    assert all(v.stat().st_size <= how.get("size", len(data) + volumes.HEAD_SIZE) for v in made if v.is_file())
    package.join([*made[1::2], *made[::-2]] if len(made) % 2 else reversed(made), tmp_path / "again.penjing")
    assert (tmp_path / "again.penjing").read_bytes() == data
    again = package.split(file, tmp_path / "more", **how)
    assert [v.name for v in again] == [v.name for v in made]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(again, made, strict=True) if a.is_file())


def test_kinds_of_volumes_mix(data, file, tmp_path):
    one = package.split(file, tmp_path / "a", into=3)
    two = package.split(file, tmp_path / "b", into=3, layout="directory")
    package.join([two[2], one[0], two[1]], tmp_path / "again", layout="directory")
    assert package.read(tmp_path / "again")[0] == "a topology"


def test_volumes_are_about_even(file, tmp_path):
    sizes = [v.stat().st_size for v in package.split(file, tmp_path / "volumes", into=2)]
    assert max(sizes) < 1.5 * min(sizes)


def test_what_is_missing_is_named(file, tmp_path):
    made = package.split(file, tmp_path / "volumes", into=3)
    with pytest.raises(PackageError, match=r"of \d+ parts are missing: part 0 \(first.weight\)"):
        package.join(made[1:], tmp_path / "again.penjing")
    assert not (tmp_path / "again.penjing").exists()
    package.split(file, tmp_path / "net")
    front = manifest.parse(file.read_bytes())
    (tmp_path / "net" / file_of(front.parts[-1])).unlink()
    with pytest.raises(PackageError, match=r"2 of \d+ parts are missing: .*twin.b"):
        package.read(tmp_path / "net")


def test_a_damaged_part_is_named_or_taken_from_another(data, file, tmp_path):
    package.split(file, tmp_path / "net")
    front = manifest.parse(data)
    bad = tmp_path / "net" / file_of(front.parts[2])
    bad.write_bytes(bad.read_bytes()[:-1] + b"!")
    for act in (
        lambda: package.read(tmp_path / "net"),
        lambda: package.join([tmp_path / "net"], tmp_path / "again.penjing"),
    ):
        with pytest.raises(PackageError, match=r"part 2 \(.*\) does not match its SHA-256"):
            act()
    assert not (tmp_path / "again.penjing").exists()
    package.join([tmp_path / "net", file], tmp_path / "again.penjing")
    assert (tmp_path / "again.penjing").read_bytes() == data


def test_every_cut_and_flip_of_a_volume_is_refused(small, tmp_path):
    package.write(tmp_path / "tiny.penjing", small[0], small[1])
    (volume, *_) = package.split(tmp_path / "tiny.penjing", tmp_path / "v", into=1)
    whole = volume.read_bytes()
    for at in [*range(0, volumes.HEAD_SIZE + 60), *range(volumes.HEAD_SIZE + 60, len(whole), 97)]:
        for wrong in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :]):
            volume.write_bytes(wrong)
            with pytest.raises(PackageError):
                package.join([volume], tmp_path / "again.penjing")
    assert not (tmp_path / "again.penjing").exists()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"into": 0}, "cannot be split into 0"),
        ({"into": 999}, "parts cannot be split into 999"),
        ({"size": 1000}, "no volume of 1000 bytes"),
        ({"into": 2, "size": 10**7}, "not both"),
        ({"into": 2, "layout": "zip"}, "layout must be file or directory, got 'zip'"),
    ],
)
def test_divisions_that_cannot_be(file, tmp_path, how, says):
    with pytest.raises(InputError, match=says):
        package.split(file, tmp_path / "volumes", **how)
    assert not (tmp_path / "volumes").exists()


def test_sources_that_cannot_be(file, tmp_path, small):
    package.write(tmp_path / "other.penjing", small[0], small[1])
    (tmp_path / "text").write_text("hello")
    for sources, says in (
        ([file, tmp_path / "other.penjing"], "belongs to another package"),
        ([tmp_path / "text"], "not a .penjing package"),
        ([tmp_path / "none"], "does not exist"),
        ([tmp_path], "folder without a manifest"),
    ):
        with pytest.raises(PackageError, match=says):
            package.join(sources, tmp_path / "again.penjing")
    with pytest.raises(InputError, match="nothing to join"):
        package.join([], tmp_path / "again.penjing")


def test_only_packages_are_replaced(data, tmp_path):
    package.save(data, tmp_path / "net", layout="directory")
    package.save(data, tmp_path / "net", layout="directory")
    (tmp_path / "net" / "thesis.txt").write_text("hello")
    with pytest.raises(OutputError, match="holds other files"):
        package.save(data, tmp_path / "net", layout="directory")
    assert (tmp_path / "net" / "thesis.txt").read_text() == "hello"


def test_a_manifest_that_is_too_long(data, tmp_path):
    package.save(data, tmp_path / "net", layout="directory")
    with (tmp_path / "net" / MANIFEST).open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(PackageError, match="4 bytes too many"):
        package.read(tmp_path / "net")


def test_seals_and_signatures_hold_in_every_layout(file, data, tmp_path):
    pytest.importorskip("pyrage")
    from penjing.package import keys, sealing

    keys.keygen(tmp_path / "reader", kind="age")
    sealing.encrypt(file, tmp_path / "sealed.penjing", [str(tmp_path / "reader.pub")])
    hosts = package.split(tmp_path / "sealed.penjing", tmp_path / "hosts", into=2, layout="directory")
    with pytest.raises(PackageError, match=r"parts are missing: part 0 \(sealed\)"):
        package.join(hosts[1:], tmp_path / "joined")
    package.join(hosts, tmp_path / "joined", layout="directory")
    sealing.decrypt(tmp_path / "joined", tmp_path / "opened.penjing", tmp_path / "reader")
    assert (tmp_path / "opened.penjing").read_bytes() == data


@pytest.mark.parametrize("kind", ["endless", "pipe", "folder"])
def test_a_part_that_is_no_ordinary_file_is_not_read(data, tmp_path, kind):
    """A folder from elsewhere may hold anything under a part's name."""
    package.save(data, tmp_path / "net", layout="directory")
    file = tmp_path / "net" / file_of(manifest.parse(data).parts[1])
    file.unlink()
    if kind == "endless":
        with file.open("wb") as stream:
            stream.truncate(1 << 40)
    else:
        os.mkfifo(file) if kind == "pipe" else file.mkdir()
    says = "does not match its SHA-256" if kind == "endless" else r"1 of \d+ parts are missing: part 1"
    for read in (package.read, package.verify):
        with pytest.raises(PackageError, match=says):
            read(tmp_path / "net")
    with pytest.raises(PackageError, match="part 1"):
        package.join([tmp_path / "net"], tmp_path / "whole.penjing")
    assert not (tmp_path / "whole.penjing").exists()
