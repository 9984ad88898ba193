"""Makes the corrupt and hostile files beside this one, and expected.json: how each is read, and what is said of it.

    PYTHONPATH=src python tests/package/corrupt/make.py

`read` is what test_package_hostile.py does with a file. New cases are added here, with their sentence by hand.
"""

import json
import shutil
import struct
from pathlib import Path

import numpy as np

from penjing.package import delta, encode, manifest, volumes
from penjing.package.directory import file_of
from penjing.package.layered import Layered
from penjing.testing.forging import Forge

HERE = Path(__file__).parent
SEALED = (HERE.parent / "golden" / "sealed.penjing").read_bytes()
BAD = "the package's index makes no sense: "
HARM = "it is damaged or was made to harm"
AGAIN = "get the package again"
COMPLETE = "penjing pull and penjing join complete a package"
BROKE = "the transfer broke off: get it again"
RESEAL = "get the package again from who sealed it"
FAULTY = "the package was made by a faulty writer; get it again"
RNG = np.random.default_rng(0)
ARRAYS = {
    "w": np.clip(np.rint(RNG.normal(0, 20, (6, 36))), -127, 127).astype(np.int8),
    "s": RNG.random(6).astype(np.float32),
    "e": np.zeros((0, 4), np.float32),
}
SOUND = encode('{"nodes": []}', ARRAYS, metadata={"name": "net"})
LAYERED = Layered("{}", {"w": ARRAYS["w"], "s": ARRAYS["s"]}, layers=3, harms={"w": 1.0}).encode()
EMPTY = encode("", {"w": np.zeros((4, 64), np.int8)})
NEXT = {**ARRAYS, "s": ARRAYS["s"] + 1}
DELTA = delta.encode(('{"nodes": []}', ARRAYS, {}), ('{"nodes": [1]}', NEXT, {}))
HEAD, INDEX = 57, 57 + struct.unpack_from("<I", SOUND, 13)[0]


def forged(change, data=SOUND, resize=False):
    package = Forge.of(data)
    change(package)
    return (package.resize() if resize else package).build()


def bad(data, why, read="decode"):
    return data, read, BAD + why, HARM


def front(data=SOUND, **fields):
    return forged(lambda p: p.front.update(fields), data)


def text(new):
    return forged(lambda p: setattr(p, "text", new))


def payload(number, new, data=SOUND, codec=None):
    def change(package):
        package.payloads[number] = new(package.payloads[number])
        if codec is not None:
            package.front["parts"][number - 1][0] = codec

    return forged(change, data, resize=True)


def models(new, data=SOUND):
    return forged(lambda p: setattr(p, "models", new(p.models)), data)


def ladder(new):
    return forged(lambda p: p.front["ladders"].__setitem__(0, new), LAYERED)


def deep(levels):
    return json.loads("[" * levels + "]" * levels)


def words(more):
    """The grids' part with so many words more (zeros in front) or less."""

    def change(data):
        (count,) = struct.unpack_from("<I", data)
        kept = data[4 : 4 + 4 * count]
        return (
            struct.pack("<I", count + more)
            + (b"\1\0\0\0" * more + kept if more > 0 else kept[: 4 * more])
            + data[4 + 4 * count :]
        )

    return payload(1, change)


def rows_of_nothing():
    """A million rows of one value each, which three bytes and four words stand for."""

    def change(package):
        package.front.update(names=["w"], types="b", shapes=[[1 << 20, 1]], parts=[[4, 0, 1]])
        package.payloads[1:] = [bytes([1, 128, 1]) + struct.pack("<II", 5, 1 << 20)]

    return forged(change, EMPTY, resize=True)


FILES = {  # name: (bytes, how it is read, beginning of the sentence, hint)
    # ends too early, at each border and in between
    "cut-header.penjing": (SOUND[:HEAD], "decode", "the package is cut short: 57 bytes of at least", BROKE),
    "cut-index.penjing": (
        SOUND[:INDEX],
        "decode",
        f"the package is cut short: {INDEX} bytes of at least {len(SOUND)}",
        BROKE,
    ),
    "cut-last-part.penjing": (SOUND[:-9], "decode", f"the package is cut short: {len(SOUND) - 9} bytes of", BROKE),
    "longer.penjing": (
        SOUND + b"\0" * 7,
        "decode",
        "7 bytes follow the end of the package",
        "something was appended to it: get it again",
    ),
    # made later
    "version-2.penjing": (
        forged(lambda p: setattr(p, "version", 2)),
        "decode",
        "the package has format version 2, this penjing reads up to 1",
        "update penjing, or pack the network with an older one",
    ),
    "feature-7.penjing": (
        forged(lambda p: setattr(p, "required", 1 << 7)),
        "decode",
        "the package needs feature 7 that",
        "update penjing to read it",
    ),
    # digests
    "index-digest.penjing": (
        SOUND[:30] + b"\0" + SOUND[31:],
        "decode",
        "the package's index does not match its SHA-256",
        "it is damaged: get it again",
    ),
    "part-digest.penjing": (
        SOUND[:-1] + bytes([SOUND[-1] ^ 1]),
        "decode",
        "part 1 (s, e) does not match its SHA-256",
        "the package is damaged: get it again",
    ),
    # sizes
    "huge-index.penjing": bad(SOUND[:13] + b"\xff" * 4 + SOUND[17:], "it declares an absurd size for its index"),
    "json-of-many-values.penjing": bad(
        text(b'{"a":[' + b"[]," * 300_000 + b"[]]}"), "it declares an absurd size for its index", "decode-small"
    ),
    "huge-shape.penjing": bad(
        forged(lambda p: p.front["shapes"].__setitem__(0, [1 << 40, 1 << 30])), "tensor 'w' has an absurd shape"
    ),
    "huge-empty-shape.penjing": bad(
        forged(lambda p: p.front["shapes"].__setitem__(2, [0, 1 << 50])), "tensor 'e' has an absurd shape"
    ),
    "number-of-4000-digits.penjing": bad(
        forged(lambda p: p.front["parts"].__setitem__(0, [2, int("9" * 4000), 1])), "part 0 holds an absurd number"
    ),
    "bomb.penjing": bad(
        forged(
            lambda p: (
                p.front.update(shapes=[[2000, 1024, 1024]], parts=[[0, 4, i << 22, i + 1 << 22] for i in range(500)]),
                p.payloads.__setitem__(slice(1, None), [b"bomb"] * 500),
            ),
            EMPTY,
        ),
        "it claims to hold 2097152000 bytes in a file of",
    ),
    "huge-topology.penjing": bad(
        forged(lambda p: p.front["topology"].__setitem__(2, 1 << 40)),
        "it claims to hold 1099511627776 bytes of topology in",
    ),
    "rows-of-nothing.penjing": (
        rows_of_nothing(),
        "decode",
        "a part with sparse integer grids has more rows than its bytes can tell of",
        "it was made to harm",
    ),
    "zstd-longer.penjing": (
        payload(2, lambda data: bytes.fromhex("28b52ffd2000") + b"\1\0\0", codec=1),
        "decode",
        "a zstd frame holds",
        AGAIN,
    ),
    # the index
    "not-utf8.penjing": bad(text(b'{"names": ["\xff"]}'), "it is no JSON text"),
    "half-a-character.penjing": bad(
        forged(lambda p: p.front["names"].__setitem__(0, "\ud800")), "a tensor's name is no valid Unicode"
    ),
    "depth-100000.penjing": (text(b"[" * 100_000), "decode", BAD, HARM),
    "deep-metadata.penjing": bad(front(metadata={"a": deep(120)}), "its metadata are nested too deep"),
    "nan.penjing": bad(text(b'{"names": NaN}'), "it is no JSON text"),
    "infinite.penjing": bad(
        forged(lambda p: setattr(p, "text", json.dumps(p.front)[:-1].encode() + b', "metadata": {"a": 1e999}}')),
        "it is no JSON text",
    ),
    "same-name.penjing": bad(forged(lambda p: p.front["names"].__setitem__(1, "w")), "two tensors share a name"),
    "overlap.penjing": bad(
        forged(lambda p: p.front["parts"].__setitem__(1, [3, len(p.payloads[2]), 0, 3])),
        "it leaves tensors without a part",
    ),
    "part-left-out.penjing": bad(
        forged(lambda p: (p.front["parts"].pop(), p.payloads.pop())), "it leaves tensors without a part"
    ),
    "name-for-terminals.penjing": bad(
        front(names=["\x1b[2Jw", "s", "e"], shapes=[[1 << 50], [6], [0, 4]]), "tensor '\\u001b[2Jw' has an absurd shape"
    ),
    # models, words
    "model-precision.penjing": (
        models(lambda data: data[:1] + b"\xf8" + data[2:]),
        "decode",
        "the table of symbol models cannot be decoded",
        FAULTY,
    ),
    "model-start.penjing": (
        models(lambda data: data[:2] + b"\xff\xff" + data[4:]),
        "decode",
        "the table of symbol models cannot be decoded",
        FAULTY,
    ),
    "words-too-few.penjing": (words(-2), "decode", "an entropy-coded stream cannot be decoded", FAULTY),
    "words-too-many.penjing": (words(2), "decode", "an entropy-coded stream cannot be decoded", FAULTY),
    # layers
    "ladder-not-nested.penjing": bad(ladder([[64, 128], [65, 128]]), "the bins of a ladder are not nested"),
    "ladder-descends.penjing": bad(ladder([[128, 64]]), "the cuts of a ladder do not ascend"),
    "ladder-of-floats.penjing": bad(ladder([2, 2]), "the ladder of tensor 'w' is one for other types"),
    "layer-before-another.penjing": bad(
        forged(
            lambda p: (p.front["parts"].reverse(), p.payloads.__setitem__(slice(1, None), p.payloads[:0:-1])), LAYERED
        ),
        "a part of the first layer stands behind others",
    ),
    # deltas
    "delta-alone.penjing": (
        DELTA,
        "decode",
        "the package holds only what changed in a network",
        "penjing patch OLD DELTA NEW gives the new one",
    ),
    "delta-of-another.penjing": (
        forged(lambda p: p.front["delta"].update(parent="0" * 64), DELTA),
        "patch",
        "the delta changes the network 000000000000…, and this one is",
        "name the very version that the delta was made from",
    ),
    "delta-to-another.penjing": (
        forged(lambda p: p.front["delta"].update(child="0" * 64), DELTA),
        "patch",
        "the delta does not give the network that it names",
        "it was made by a faulty writer; get it again",
    ),
    "delta-of-nothing.penjing": bad(
        forged(lambda p: p.front["delta"].update(names=["w", "x"]), DELTA), "it names tensors that are nowhere", "patch"
    ),
    # sealed
    "sealed.penjing": (
        SEALED,
        "unseal-wrong",
        "the package is sealed for other recipients",
        "give the identity of one of them",
    ),
    "sealed-cut.penjing": (
        forged(lambda p: p.payloads.__setitem__(1, p.payloads[1][:-1]), SEALED, resize=True),
        "unseal",
        "part 0 of the sealed package cannot be decrypted: it was changed or cut short",
        RESEAL,
    ),
    "sealed-swapped.penjing": (
        forged(lambda p: p.payloads.__setitem__(slice(1, 3), p.payloads[2:0:-1]), SEALED, resize=True),
        "unseal",
        "part 0 of the sealed package is not the one that belongs there",
        RESEAL,
    ),
    "sealed-million-envelopes.penjing": (
        forged(lambda p: p.payloads.__setitem__(0, struct.pack("<I", 10**6) + bytes(8000)), SEALED, resize=True),
        "unseal",
        "the front of the sealed package makes no sense",
        RESEAL,
    ),
    # envelopes of signatures
    "envelope-keyid.dsse.json": (
        b'{"payload": "e30=", "payloadType": "a", "signatures": [{"keyid": 5, "sig": "AAAA"}]}',
        "verify",
        "",
        "it is damaged, or no signature: get it again",
    ),
    "envelope-deep.dsse.json": (b"[" * 100_000, "verify", "", "it is damaged, or no signature: get it again"),
}


def folders(name):
    """The layouts of several files, each with one lie."""
    place = HERE / name
    front = manifest.parse(SOUND)
    place.mkdir()
    (place / "manifest").write_bytes(front.data)
    for part, at in zip(front.parts, front.offsets, strict=False):
        (place / file_of(part)).write_bytes(SOUND[at : at + part.stored])
    return place, front


def directories():
    place, front = folders("directory-part-missing")
    (place / file_of(front.parts[1])).rename(place / "elsewhere")
    yield place, "load", "1 of 2 parts are missing: part 1 (s, e)", COMPLETE
    place, front = folders("directory-part-longer")
    (place / file_of(front.parts[0])).write_bytes(b"\0" * 1000)
    yield place, "load", "part 0 (w) does not match its SHA-256", "the package is damaged: get it again"
    place, front = folders("directory-part-a-link")
    (place / file_of(front.parts[0])).unlink()
    (place / file_of(front.parts[0])).symlink_to("/dev/zero")
    yield place, "load", "1 of 2 parts are missing: part 0 (w)", COMPLETE
    place, front = folders("directory-part-huge")
    lying = forged(lambda p: p.front["parts"].__setitem__(1, [3, 1 << 62, 2]))
    (place / "manifest").write_bytes(lying[: manifest.extent(lying)])
    yield place, "load", "part 1 (s, e) does not match its SHA-256", "the package is damaged: get it again"
    place, front = folders("directory-one-part-for-all")
    rows, held = [[0, 8192, i << 22, (i + 1) << 22] for i in range(500)], bytes(8192)
    lying = forged(
        lambda p: (
            p.front.update(shapes=[[2000, 1024, 1024]], parts=rows),
            p.payloads.__setitem__(slice(1, None), [held] * 500),
        ),
        EMPTY,
    )
    (place / "manifest").write_bytes(lying[: len(lying) - 500 * 8192])
    yield place, "load", BAD + "it claims to hold 2097152000 bytes in parts of", HARM
    place, front = folders("volumes-two-manifests")
    shutil.rmtree(place)
    place.mkdir()
    for number, package in enumerate((SOUND, encode("another", ARRAYS))):
        front = manifest.parse(package)
        head = volumes._HEAD.pack(volumes.MAGIC, 1, number, 1, len(front.data))
        at = front.offsets[number]
        part = package[at : at + front.parts[number].stored]
        (place / f"net-{number + 1}of2.pjv").write_bytes(head + front.data + part)
    yield place, "join", "", "name volumes of one package"


def main():
    for old in HERE.iterdir():
        if old.name != "make.py" and old.name != "__pycache__":
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    (HERE / "sound.penjing").write_bytes(SOUND)
    expected = {}
    for name, (data, *how) in FILES.items():
        (HERE / name).write_bytes(data)
        expected[name] = how
    for place, *how in directories():
        expected[place.name] = how
    rows = {name: dict(zip(("read", "sentence", "hint"), how, strict=True)) for name, how in expected.items()}
    (HERE / "expected.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
