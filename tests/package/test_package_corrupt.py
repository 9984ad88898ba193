"""Every way in which a package can lie, each with the sentence that it gets."""

import json
import struct

import numpy as np
import pytest

from penjing.errors import PackageError
from penjing.package import decode, encode, inspect, layout, read, verify


@pytest.fixture(scope="module")
def good(small):
    return encode(small[0], small[1], metadata={"name": "tiny"})


def rebuilt(change):
    """A corruption that leaves lengths and digests right."""

    def corrupt(good, forge):
        package = forge.of(good)
        change(package)
        return package.build()

    return corrupt


def flip(data, at):
    out = bytearray(data)
    out[at] ^= 0x10
    return bytes(out)


def front(**changes):
    return rebuilt(lambda p: p.front.update(changes))


def part(number, *row):
    return rebuilt(lambda p: p.front["parts"].__setitem__(number, list(row)))


def payload(number, change):
    def apply(package):
        package.payloads[number] = change(package.payloads[number])
        package.resize()

    return rebuilt(apply)


def set_field(package, name, value):
    setattr(package, name, value)


def size_field(offset, value):
    return lambda good, forge: good[:offset] + struct.pack("<I", value) + good[offset + 4 :]


CASES = {
    # the transfer
    "nothing": (lambda good, forge: b"", "not a .penjing package"),
    "another file": (lambda good, forge: b"PK\x03\x04" + good, "not a .penjing package"),
    "text conversion": (lambda good, forge: good.replace(b"\r\n", b"\n"), "not a .penjing package"),
    "only magic": (lambda good, forge: good[:8], "cut short"),
    "half a header": (lambda good, forge: good[:40], "cut short"),
    "half an index": (lambda good, forge: good[:100], "cut short"),
    "half a part": (lambda good, forge: good[:-100], "cut short"),
    "one byte less": (lambda good, forge: good[:-1], "cut short"),
    "one byte more": (lambda good, forge: good + b"\0", "1 bytes follow the end"),
    "twice": (lambda good, forge: good + good, "follow the end"),
    "flipped header": (lambda good, forge: flip(good, 11), "index does not match its SHA-256"),
    "flipped digest": (lambda good, forge: flip(good, 30), "index does not match its SHA-256"),
    "flipped index": (lambda good, forge: flip(good, 80), "index does not match its SHA-256"),
    "flipped last byte": (lambda good, forge: flip(good, -1), r"part 1 .* does not match its SHA-256"),
    "swapped parts": (
        rebuilt(lambda p: set_field(p, "digests", [b"\0" * 32] * len(p.payloads))),
        "topology does not match its SHA-256",
    ),
    # the future
    "newer version": (rebuilt(lambda p: set_field(p, "version", 2)), "format version 2, this penjing reads up to 1"),
    "version 0": (rebuilt(lambda p: set_field(p, "version", 0)), "format version 0"),
    "unknown feature": (rebuilt(lambda p: set_field(p, "required", 0b110000)), "needs feature 4, 5"),
    "unknown codec": (part(0, 11, 10, 3), "uses codec 11"),
    # sizes
    "huge index": (size_field(13, 2**32 - 1), "absurd size"),
    "huge JSON": (size_field(21, 2**31), "absurd size"),
    "JSON longer than the index": (size_field(17, 2**20), "absurd size"),
    "JSON shorter than declared": (rebuilt(lambda p: set_field(p, "raw", 5000)), "zstd frame holds"),
    "JSON longer than declared": (rebuilt(lambda p: set_field(p, "raw", 50)), "zstd frame"),
    # the index
    "no JSON": (rebuilt(lambda p: set_field(p, "text", b"{")), "no JSON text"),
    "no UTF-8": (rebuilt(lambda p: set_field(p, "text", b'{"a": "\xff"}')), "no JSON text"),
    "deep JSON": (rebuilt(lambda p: set_field(p, "text", b"[" * 200_000)), "no JSON text"),
    "long number": (rebuilt(lambda p: set_field(p, "text", b"9" * 100_000)), "no JSON text"),
    "NaN": (rebuilt(lambda p: set_field(p, "text", b'{"names": NaN}')), "no JSON text"),
    "a list": (rebuilt(lambda p: set_field(p, "text", b"[]")), "no JSON object"),
    "nothing in it": (rebuilt(lambda p: set_field(p, "text", b"{}")), "'names' is missing"),
    "names no list": (front(names="abc"), "'names' is missing or of the wrong kind"),
    "too few names": (front(names=["a"]), "one name, type and shape"),
    "a name twice": (rebuilt(lambda p: p.front["names"].__setitem__(1, p.front["names"][0])), "share a name"),
    "a name no text": (rebuilt(lambda p: p.front["names"].__setitem__(1, [1])), "share a name"),
    "unknown type": (front(types="bfqbfB?eqfO"), "unknown element type"),
    "negative axis": (rebuilt(lambda p: p.front["shapes"].__setitem__(0, [-24, 16, -3, 3])), "no list of numbers"),
    "broken axis": (rebuilt(lambda p: p.front["shapes"].__setitem__(0, [24.0, 16, 3, 3])), "no list of numbers"),
    "true as axis": (rebuilt(lambda p: p.front["shapes"].__setitem__(8, [True])), "no list of numbers"),
    "33 axes": (rebuilt(lambda p: p.front["shapes"].__setitem__(8, [1] * 33)), "absurd shape"),
    "absurd shape": (rebuilt(lambda p: p.front["shapes"].__setitem__(0, [2**40, 2**40])), "absurd shape"),
    "absurd empty shape": (rebuilt(lambda p: p.front["shapes"].__setitem__(9, [0, 2**62])), "absurd shape"),
    "number of 400 digits": (rebuilt(lambda p: p.front["shapes"].__setitem__(8, [10**400])), "an absurd number"),
    "larger tensor": (rebuilt(lambda p: p.front["shapes"].__setitem__(0, [2**30, 1])), "holds more than"),
    "metadata a list": (front(metadata=[1]), "'metadata' is missing or of the wrong kind"),
    "topology not understood": (front(topology=[1, 2]), "'topology' is not understood"),
    "topology by another codec": (rebuilt(lambda p: p.front["topology"].__setitem__(0, 2)), "'topology' is not"),
    "huge topology": (rebuilt(lambda p: p.front["topology"].__setitem__(2, 2**40)), "claims to hold"),
    "longer topology": (rebuilt(lambda p: p.front["topology"].__setitem__(2, 99)), "topology has another length"),
    # the parts
    "fewer parts": (rebuilt(lambda p: (p.front["parts"].pop(), p.payloads.pop())), "without a part"),
    "more parts": (
        rebuilt(lambda p: (p.front["parts"].append([0, 1, 1]), p.payloads.append(b"x"))),
        "overlaps another or holds tensors that do not exist",
    ),
    "no digests": (front(parts=[[0, 0, 0]] * 1000), "fewer digests"),
    "row of text": (part(0, 2, "4000", 3), "no list of numbers"),
    "short row": (part(0, 2, 4000), "part 0 is not understood"),
    "negative part": (part(0, 2, -4000, 3), "no list of numbers"),
    "overlapping parts": (
        rebuilt(lambda p: p.front.update(parts=[[0, n, 0, 3000] for n in (len(p.payloads[1]), len(p.payloads[2]))])),
        "overlaps another",
    ),
    "gap between parts": (rebuilt(lambda p: p.front["parts"].__setitem__(0, [0, 9, 10, 3456])), "leaves a gap"),
    "part beyond its tensor": (rebuilt(lambda p: p.front["parts"].__setitem__(0, [0, 9, 0, 9999])), "goes beyond"),
    "empty range": (rebuilt(lambda p: p.front["parts"].__setitem__(0, [0, 9, 0, 0])), "goes beyond"),
    # the content, by a writer who computes digests
    "stored part too short": (rebuilt(lambda p: p.front["parts"][0].__setitem__(0, 0)), "stored part holds"),
    "zstd part that is none": (rebuilt(lambda p: p.front["parts"][0].__setitem__(0, 1)), "zstd frame cannot"),
    "floats as grids": (rebuilt(lambda p: p.front["parts"][1].__setitem__(0, 2)), "grids holds other tensors"),
    "grids as planes": (rebuilt(lambda p: p.front["parts"][0].__setitem__(0, 3)), "lossless part|zstd|stream|grids"),
    "grid cut off": (payload(1, lambda data: data[:-3]), "grids cannot be decoded"),
    "grid with a tail": (payload(1, lambda data: data + b"\0"), "grids cannot be decoded"),
    "grid without words": (payload(1, lambda data: b"\0\0\0\0" + data[4:]), "grids cannot|stream cannot"),
    "grid of nothing": (payload(1, lambda data: b""), "grids cannot be decoded"),
    "planes cut off": (payload(2, lambda data: data[:-1]), "lossless part cannot"),
    "planes with a tail": (payload(2, lambda data: data + b"\0"), "lossless part cannot"),
    "no models": (rebuilt(lambda p: set_field(p, "models", b"")), "grids cannot be decoded"),
    "models of nothing": (rebuilt(lambda p: set_field(p, "models", b"\0")), "symbol models cannot"),
    "models cut off": (rebuilt(lambda p: set_field(p, "models", p.models[:-4])), "cannot be decoded"),
    "models with a tail": (rebuilt(lambda p: set_field(p, "models", p.models + b"\1\0\0\0")), "cannot be decoded"),
    "too many models": (rebuilt(lambda p: set_field(p, "models", b"\xff" * 2000)), "symbol models cannot"),
    "topology no text": (
        rebuilt(lambda p: (p.payloads.__setitem__(0, b"\xff\xfe"), p.front.update(topology=[0, 2, 2]))),
        "topology is no text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(" ", "-"))
def test_each_corruption_has_its_sentence(case, good, forge, tmp_path):
    corrupt, words = CASES[case]
    data = corrupt(good, forge)
    assert data != good
    with pytest.raises(PackageError, match=words) as raised:
        decode(data)
    assert raised.value.hint and "\n" not in raised.value.message and len(raised.value.message) < 200
    path = tmp_path / "bad.penjing"
    path.write_bytes(data)
    with pytest.raises(PackageError, match=words):
        read(path)


def test_digests_are_what_verify_and_inspect_look_at(good, tmp_path):
    path = tmp_path / "bad.penjing"
    path.write_bytes(flip(good, -1))
    for look in (verify, inspect):
        with pytest.raises(PackageError, match=r"part 1 \(conv.weight_scale, conv.weight_zero_point and \d more\)"):
            look(path)


def test_a_forged_package_without_a_lie_is_read(good, forge, small, equal):
    assert equal(decode(forge.of(good).build())[1], small[1])  # so the refusals above are not the forge's fault


def test_unknown_optional_features_and_fields_are_ignored(good, forge, small, equal, tmp_path):
    package = forge.of(good)
    package.optional = 0x8001
    package.front["later"] = {"layers": 3}
    data = package.build()
    assert equal(decode(data)[1], small[1])
    path = tmp_path / "optional.penjing"
    path.write_bytes(data)
    assert inspect(path).optional_flags == 0x8001


def test_truth_values_are_zero_or_one(forge):
    package = forge.of(encode("", {"mask": np.array([True, False, True])}))
    assert package.front["parts"][0][0] == 0
    package.payloads[1] = b"\x01\x02\x00"
    with pytest.raises(PackageError, match="neither 0 nor 1"):
        decode(package.build())


def test_a_memory_bomb_is_refused_before_it_goes_off(forge):
    """A million parts of 4 MiB of zeros, in a file of some kilobytes, under a limit that would not bear them."""
    import resource

    package = forge.of(encode("", {"w": np.zeros((4, 1024, 1024), np.int8)}))
    count = 1000
    codec, stored = package.front["parts"][0][:2]
    package.front.update(shapes=[[4 * count, 1024, 1024]])
    package.front["parts"] = [[codec, stored, i * (2 << 20), (i + 1) * (2 << 20)] for i in range(2 * count)]
    package.payloads = [package.payloads[0]] + [package.payloads[1]] * (2 * count)
    data = package.build()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PackageError, match="claims to hold 4194304000 bytes"):
        decode(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_a_zstd_bomb_is_refused(forge):
    import zstandard

    package = forge.of(encode("t" * 100, {}))
    package.payloads[0] = zstandard.ZstdCompressor(level=3).compress(bytes(64 << 20))
    package.front["topology"] = [1, len(package.payloads[0]), 100]
    with pytest.raises(PackageError, match="holds 67108864 bytes instead of 100"):
        decode(package.build())


def test_the_header_is_checked_field_by_field():
    head = struct.Struct("<8sBHHIII").pack(layout.MAGIC, 1, 0, 0, 10, 20, 5) + bytes(32)
    with pytest.raises(PackageError, match="absurd size"):
        layout.parse_header(head)


def test_index_is_plain_json(good, forge):
    package = forge.of(good)
    assert set(package.front) == {"names", "types", "shapes", "topology", "parts", "metadata"}
    assert json.dumps(package.front)
