"""Sealed packages: opened by their recipients and nobody else, part by part; what was changed or swapped is named."""

import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pyrage
import pytest

from penjing.errors import InputError, KeyFileError, PackageError, SealError
from penjing.package import archive, decode, encode, inspect, keys, layout, sealing, verify


@pytest.fixture(scope="module")
def plain(small):
    return encode(small[0], small[1], metadata={"name": "secret name"})


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Identities of two readers and a stranger."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ada", "bo", "stranger"):
        keys.keygen(folder / name, kind="age")
    return folder


@pytest.fixture(scope="module")
def sealed(plain, desk):
    return sealing.seal(plain, [str(desk / "ada.pub")])


def of(desk, name):
    return keys.identities(desk / name)


def fronts(data):
    """(place of the front, payloads) of a sealed package."""
    _, index, payloads = archive.open_bytes(data)
    return index, payloads


# -------------------------------------------------------------------------------------------------------- round trip
def test_what_is_opened_is_what_was_sealed(plain, sealed, desk):
    assert sealing.unseal(sealed, of(desk, "ada")) == plain


def test_files(plain, desk, tmp_path):
    (tmp_path / "a.penjing").write_bytes(plain)
    size = sealing.encrypt(
        tmp_path / "a.penjing", tmp_path / "s.penjing", [str(desk / "ada.pub"), str(desk / "bo.pub")]
    )
    assert size == (tmp_path / "s.penjing").stat().st_size
    for name in ("ada", "bo"):
        sealing.decrypt(tmp_path / "s.penjing", tmp_path / "b.penjing", desk / name)
        assert (tmp_path / "b.penjing").read_bytes() == plain


def test_nothing_of_the_inside_shows(plain, sealed, small):
    """Not a name, not the topology, not a part; and sealing twice gives other bytes."""
    for name in (*small[1], small[0], "secret name"):
        assert name.encode() not in sealed
    _, index, payloads = archive.open_bytes(plain)
    assert all(bytes(p) not in sealed for p in payloads)
    assert index.topology.digest not in sealed and all(p.digest not in sealed for p in index.parts)


def test_what_shows_without_a_key(sealed, tmp_path):
    (tmp_path / "s.penjing").write_bytes(sealed)
    verify(tmp_path / "s.penjing")
    contents = inspect(tmp_path / "s.penjing")
    assert contents.required_flags == layout.SEALED == 0b100
    assert contents.tensors == () and contents.metadata == {}
    assert contents.index_bytes + contents.sealed_bytes == contents.file_bytes == len(sealed)
    assert "sealed" in str(contents) and contents.to_dict()["sealed_bytes"] == contents.sealed_bytes
    with pytest.raises(PackageError, match="the package is sealed") as caught:
        decode(sealed)
    assert "penjing decrypt" in caught.value.hint


def test_parts_are_sealed_one_by_one(desk):
    """Many parts; each opens from its own bytes and the front alone, in any order, as a range read has them."""
    rng = np.random.default_rng(0)
    arrays = {f"w{i}": rng.normal(size=(300, 1000)).astype(np.float32) for i in range(4)}
    inside = encode("graph", arrays)
    sealed = sealing.seal(inside, [str(desk / "ada.pub")])
    head = layout.parse_header(sealed)
    front = sealed[: layout.HEADER_SIZE + head.index_size]
    index = layout.parse_index(front, front[layout.HEADER_SIZE :], None)
    at = [len(front)]
    for part in (index.topology, *index.parts):
        at.append(at[-1] + part.stored)
    opened = sealing.open_front(sealed[at[0] : at[1]], of(desk, "ada"))
    _, inner, payloads = archive.open_bytes(inside)
    assert opened.index == inner and len(payloads) >= 3
    for number in reversed(range(len(payloads))):
        assert opened.part(number, sealed[at[number + 1] : at[number + 2]]) == payloads[number]


def test_a_part_costs_little(desk):
    """Some hundred bytes for each of the age files, and 16 for each 64 KiB."""
    inside = encode("graph", {"w": np.random.default_rng(0).normal(size=(1000, 2000)).astype(np.float32)})
    sealed = sealing.seal(inside, [str(desk / "ada.pub")])
    _, index, payloads = archive.open_bytes(sealed)
    assert len(sealed) - len(inside) < 700 * (len(payloads) + 2) + 16 * (len(inside) // 65536 + len(payloads))


# -------------------------------------------------------------------------------------------------------- recipients
def test_recipients_are_added_without_touching_a_part(plain, sealed, desk):
    more = sealing.add(sealed, [str(desk / "bo.pub")], of(desk, "ada"))
    assert sealing.unseal(more, of(desk, "bo")) == sealing.unseal(more, of(desk, "ada")) == plain
    before, after = fronts(sealed), fronts(more)
    assert [p.digest for p in before[0].parts] == [p.digest for p in after[0].parts]
    assert before[0].topology.digest != after[0].topology.digest
    third = sealing.add(more, [str(desk / "stranger.pub")], of(desk, "bo"))
    assert sealing.unseal(third, of(desk, "stranger")) == plain


def test_only_a_recipient_adds_recipients(sealed, desk):
    with pytest.raises(SealError, match="sealed for other recipients"):
        sealing.add(sealed, [str(desk / "bo.pub")], of(desk, "bo"))


def test_a_stranger_opens_nothing(sealed, desk, tmp_path):
    with pytest.raises(SealError, match="sealed for other recipients"):
        sealing.unseal(sealed, of(desk, "stranger"))
    (tmp_path / "s.penjing").write_bytes(sealed)
    with pytest.raises(SealError):
        sealing.decrypt(tmp_path / "s.penjing", tmp_path / "out.penjing", desk / "stranger")
    assert [p.name for p in tmp_path.iterdir()] == ["s.penjing"]


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="ssh-keygen is not installed")
def test_ssh_keys(plain, tmp_path):
    for name, secret in (("open", ""), ("locked", "pw")):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", secret, "-f", str(tmp_path / name)], check=True)
    sealed = sealing.seal(plain, [(tmp_path / "open.pub").read_text().strip()])
    assert sealing.unseal(sealed, of(tmp_path, "open")) == plain
    with pytest.raises(KeyFileError, match="ssh key must be decrypted first"):
        of(tmp_path, "locked")


def test_an_identity_under_a_passphrase(plain, tmp_path):
    name = keys.keygen(tmp_path / "k", kind="age", passphrase="a b c")
    sealed = sealing.seal(plain, [name])
    assert sealing.unseal(sealed, keys.identities(tmp_path / "k", "a b c")) == plain
    with pytest.raises(KeyFileError, match="under a passphrase"):
        keys.identities(tmp_path / "k")
    with pytest.raises(KeyFileError, match="does not open"):
        keys.identities(tmp_path / "k", "a b")


@pytest.mark.parametrize(
    ("to", "says"),
    [
        ([], "nobody was named"),
        (["age1xyz"], "'age1xyz' is no recipient"),
        (["no such file"], "is no recipient, nor a file"),
        (["ada"], "is a private key"),
        (["empty"], "nobody was named"),
        (["lies"], "'hello' is no recipient"),
    ],
)
def test_who_is_no_recipient(plain, desk, monkeypatch, to, says):
    monkeypatch.chdir(desk)
    (desk / "empty").write_text("# nobody\n")
    (desk / "lies").write_text("hello\n")
    with pytest.raises((InputError, KeyFileError), match=says):
        sealing.seal(plain, to)


def test_sealed_once(plain, sealed, desk):
    with pytest.raises(InputError, match="sealed already"):
        sealing.seal(sealed, [str(desk / "bo.pub")])
    with pytest.raises(InputError, match="not sealed"):
        sealing.unseal(plain, of(desk, "ada"))


# ------------------------------------------------------------------------------------------------------------- lies
def assembled(sealed, change):
    """A sealed package by somebody who computes digests but has no key: [place, parts…] after `change`."""
    _, _, payloads = archive.open_bytes(sealed)
    frames = [bytes(p) for p in payloads]
    change(frames)
    place = frames[0]
    parts = tuple(sealing._part(p) for p in frames[1:])
    index = layout.Index(
        tensors=(), topology=sealing._part(place), topology_raw=len(place), parts=parts, models=(), metadata={}
    )
    return layout.pack(index, required=layout.SEALED) + b"".join(frames)


def flip(data, at):
    out = bytearray(data)
    out[at] ^= 1
    return bytes(out)


@pytest.mark.parametrize("at", [3, 9, 11, 30, 80, -1, -600])
def test_a_flipped_byte(sealed, desk, at):
    with pytest.raises(PackageError, match="SHA-256|not a .penjing|feature|version|cut short"):
        sealing.unseal(flip(sealed, at), of(desk, "ada"))


@pytest.mark.parametrize("size", [0, 20, 100, 400, -1])
def test_cut_short(sealed, desk, size):
    with pytest.raises(PackageError, match="cut short|not a .penjing"):
        sealing.unseal(sealed[:size], of(desk, "ada"))


LIES = {
    "a changed part": (lambda f: f.__setitem__(2, flip(f[2], -1)), "part 1 of the sealed package cannot be decrypted"),
    "a part cut short": (lambda f: f.__setitem__(2, f[2][:-5]), "part 1 of the sealed package cannot be decrypted"),
    "an empty part": (lambda f: f.__setitem__(2, b""), "part 1 of the sealed package cannot be decrypted"),
    "a part that is no age": (lambda f: f.__setitem__(2, b"x" * 500), "part 1 of the sealed package cannot be"),
    "swapped parts": (lambda f: f.__setitem__(slice(1, 3), [f[2], f[1]]), "is not the one that belongs there"),
    "a part too few": (lambda f: f.pop(), r"has 2 parts of 3"),
    "a part too many": (lambda f: f.append(f[1]), r"has 4 parts of 3"),
    "a changed front": (lambda f: f.__setitem__(0, flip(f[0], -1)), "front of the sealed package cannot be decrypted"),
    "no front": (lambda f: f.__setitem__(0, b""), "front of the sealed package is cut short"),
    "no envelope": (lambda f: f.__setitem__(0, struct.pack("<I", 0) + f[0][4:]), "makes no sense"),
    "too many envelopes": (lambda f: f.__setitem__(0, struct.pack("<I", 2**32 - 1) + f[0][4:]), "cut short|no sense"),
    "an envelope beyond the end": (lambda f: f.__setitem__(0, f[0][:4] + b"\xff" * 4 + f[0][8:]), "makes no sense"),
    "a changed envelope": (lambda f: f.__setitem__(0, flip(f[0], 200)), "sealed for other recipients"),
}


@pytest.mark.parametrize("name", LIES)
def test_lies_of_one_without_a_key(sealed, desk, name):
    change, says = LIES[name]
    with pytest.raises(PackageError, match=says):
        sealing.unseal(assembled(sealed, change), of(desk, "ada"))


def test_parts_of_another_package_do_not_fit(plain, sealed, desk):
    """Both are for the same recipient, but each part belongs to its own package's key."""
    other = fronts(sealing.seal(plain, [str(desk / "ada.pub")]))[1]
    with pytest.raises(SealError, match="part 0 of the sealed package cannot be decrypted"):
        sealing.unseal(assembled(sealed, lambda f: f.__setitem__(1, bytes(other[1]))), of(desk, "ada"))


def test_lies_of_one_who_seals(plain, desk):
    """A sealed package in a sealed one, an envelope without a key: refused, not followed."""
    ada = pyrage.x25519.Recipient.from_str((desk / "ada.pub").read_text().strip())
    identity = pyrage.x25519.Identity.generate()
    own = identity.to_public()

    def place(secret, front):
        envelope = pyrage.encrypt(secret, [ada])
        return struct.pack("<II", 1, len(envelope)) + envelope + pyrage.encrypt(front, [own])

    inner = sealing.seal(plain, [str(desk / "ada.pub")])
    size = layout.HEADER_SIZE + layout.parse_header(inner).index_size
    with pytest.raises(SealError, match="makes no sense"):
        sealing.open_front(place(str(identity).encode(), inner[:size]), of(desk, "ada"))
    with pytest.raises(SealError, match="makes no sense"):
        sealing.open_front(place(str(identity).encode(), plain), of(desk, "ada"))
    with pytest.raises(SealError, match="holds no key"):
        sealing.open_front(place(b"hello", plain), of(desk, "ada"))
    with pytest.raises(PackageError, match="not a .penjing"):
        sealing.open_front(place(str(identity).encode(), b"hello"), of(desk, "ada"))


def test_random_damage_is_always_a_sentence(sealed, desk):
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(sealed)
        for at in rng.integers(0, len(data), 3):
            data[at] = rng.integers(256)
        if bytes(data) != sealed:
            with pytest.raises(PackageError):
                sealing.unseal(bytes(data[: rng.integers(len(data) // 2, len(data) + 1)]), of(desk, "ada"))


def test_without_the_library_the_error_says_what_to_install():
    code = "import sys; sys.modules['pyrage'] = None\nfrom penjing.package import sealing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert "MissingExtraError" in done.stderr and "pip install 'penjing[secure]'" in done.stderr
