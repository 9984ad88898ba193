"""Deltas: small where little changed, exact always, and refused wherever they do not belong."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from penjing.errors import InputError, PackageError
from penjing.package import archive, decode, delta, encode, inspect, save
from penjing.package.layered import Layered

GOLDEN = Path(__file__).parent / "golden"
TOPOLOGY = '{"name":"n","history":[],"graph":[' + ",".join(f'["get_attr","layer_{i}_weight"]' for i in range(99)) + "]}"


def version(step=0):
    """A network, and the same after a little training."""
    rng = np.random.default_rng(0)
    arrays = {
        "w": np.clip(np.rint(rng.normal(0, 30, (200, 300))), -128, 127).astype(np.int8),
        "scale": rng.random(200).astype(np.float32),
        "bias": rng.normal(size=200).astype(np.float32),
        "table": rng.integers(0, 256, (20, 30)).astype(np.uint8),
        "mask": rng.random((6, 7)) < 0.5,
        "steps": np.array(3, dtype=np.int64),
        "half": rng.normal(size=40).astype(np.float16),
        "frozen": rng.normal(size=(90, 90)),
        "empty": np.zeros((0, 4), dtype=np.float32),
    }
    if step:
        rng = np.random.default_rng(step)
        w = arrays["w"].astype(int) + np.where(rng.random((200, 300)) < 0.05, rng.choice([-1, 1], (200, 300)), 0)
        arrays["w"] = w.astype(np.int8)  # 127 + 1 wraps round
        arrays["bias"] = (arrays["bias"] * np.float32(1 + step / 1000)).astype(np.float32)
        arrays["table"][3] += 200
        arrays["mask"][2] ^= True
        arrays["steps"] -= step
        arrays["half"] = -arrays["half"]
    return TOPOLOGY.replace("[]", f'[{{"step":{step}}}]' if step else "[]", 1), arrays, {"name": f"n{step}"}


@pytest.fixture(scope="module")
def made():
    return delta.encode(version(), version(1))


def test_patch_gives_the_very_network(made, equal):
    topology, arrays, metadata = delta.decode(made, version())
    new = version(1)
    assert topology == new[0] and equal(arrays, new[1]) and metadata == new[2]
    assert encode(topology, arrays, metadata=metadata) == encode(new[0], new[1], metadata=new[2])
    assert made == delta.encode(version(), version(1))


def test_a_delta_holds_only_what_changed(made):
    whole = len(encode(version(1)[0], version(1)[1]))
    _, index, _ = archive.open_bytes(made)
    assert {t.name for t in index.tensors} == {"w", "bias", "table", "mask", "steps", "half"}
    assert len(made) < 0.1 * whole
    nothing = delta.encode(version(), version())
    assert len(nothing) < 400 and archive.open_bytes(nothing)[1].tensors == ()
    assert delta.decode(nothing, version())[0] == TOPOLOGY


def test_the_topology_points_into_the_parents(made):
    _, index, _ = archive.open_bytes(made)
    assert index.topology.stored < 60


def test_another_parent_is_refused(made):
    for wrong in (version(1), version(2), (TOPOLOGY + " ", version()[1], {})):
        with pytest.raises(PackageError, match=r"changes the network [0-9a-f]{12}…, and this one is [0-9a-f]{12}…"):
            delta.decode(made, wrong)
    assert delta.decode(made, (*version()[:2], {"other": "metadata"}))  # the network is what counts


def test_a_delta_is_no_network(made, tmp_path):
    with pytest.raises(PackageError, match="only what changed"):
        decode(made)
    with pytest.raises(InputError, match="no delta"):
        delta.decode(encode("", {}), version())
    save(made, tmp_path / "d.penjing")
    contents = inspect(tmp_path / "d.penjing")
    assert (
        contents.delta is not None and set(contents.delta) == {"parent", "child"} and "penjing delta" in str(contents)
    )


def test_a_changed_topology_is_carried_whole(equal):
    rng = np.random.default_rng(9)
    new = {
        "bias": version()[1]["bias"],  # another order, another shape, another type, one more
        "w": rng.integers(-9, 9, (20, 30)).astype(np.int8),
        "steps": np.array(3.5),
        "fresh": rng.random(5).astype(np.float32),
    }
    coded = delta.encode(version(), ("another graph", new, {}))
    topology, arrays, _ = delta.decode(coded, version())
    assert topology == "another graph" and list(arrays) == list(new) and equal(arrays, new)


def test_what_changed_wholly_costs_no_more_than_itself(equal):
    rng = np.random.default_rng(4)
    new = {k: rng.permutation(a.reshape(-1)).reshape(a.shape) for k, a in version()[1].items()}
    coded = delta.encode(version(), (TOPOLOGY, new, {}))
    assert len(coded) < 1.02 * len(encode(TOPOLOGY, new)) + 200
    assert equal(delta.decode(coded, version())[1], new)


@pytest.mark.parametrize("dtype", ["?", "b", "B", "h", "H", "i", "I", "q", "Q", "e", "f", "d"])
def test_every_type_comes_back(dtype, equal):
    bits = np.random.default_rng(1).integers(0, 256, (2, 240)).astype(np.uint8)
    old, new = ({"t": (b & 1).astype(bool) if dtype == "?" else b.view(dtype)} for b in bits)
    near = {"t": new["t"].copy()}
    near["t"][3:] = old["t"][3:]
    for changed in (new, near):
        assert equal(delta.decode(delta.encode(("", old, {}), ("", changed, {})), ("", old, {}))[1], changed)


def test_files_and_layouts(tmp_path):
    for name, step in (("old", 0), ("new", 1)):
        topology, arrays, metadata = version(step)
        save(encode(topology, arrays, metadata=metadata), tmp_path / f"{name}.penjing")
    old, new, out = (tmp_path / f"{n}.penjing" for n in ("old", "new", "out"))
    size = delta.diff(old, new, tmp_path / "d", layout="directory")
    assert size == sum(f.stat().st_size for f in (tmp_path / "d").iterdir())
    assert delta.patch(old, tmp_path / "d", out) == new.stat().st_size
    assert out.read_bytes() == new.read_bytes()
    with pytest.raises(PackageError):
        delta.patch(new, tmp_path / "d", tmp_path / "never.penjing")
    assert not (tmp_path / "never.penjing").exists()


def test_layered_parents_and_children(equal):
    """The digest is of the network, however it is packed."""
    topology, arrays, metadata = version()
    layered = decode(Layered(topology, arrays, layers=2).encode(metadata | {"ladder": {"name": "x"}}))
    coded = delta.encode(layered, version(1))
    assert equal(delta.decode(coded, version())[1], version(1)[1])
    assert "ladder" not in delta.decode(delta.encode(version(1), layered), version(1))[2]


# ---------------------------------------------------------------------------------------------------------- bad ones
def told(**changes):
    return lambda p: p.front["delta"].update(changes)


def kinds(change):
    return lambda p: p.front["delta"].update(kinds=change(p.front["delta"]["kinds"]))


LIES = {
    "no record": (lambda p: p.front.pop("delta"), "'delta' is missing"),
    "a record of nothing": (lambda p: p.front.update(delta={}), "'parent' is missing"),
    "a digest no digest": (told(parent="xyz"), "a digest of the delta is none"),
    "a digest no text": (told(child=7), "'child' is missing or of the wrong kind"),
    "another child": (told(child="0" * 64), "does not give the network that it names"),
    "kinds too few": (kinds(lambda k: k[1:]), "does not say what each tensor is"),
    "kinds unknown": (kinds(lambda k: "x" + k[1:]), "does not say what each tensor is"),
    "a difference as it is": (kinds(lambda k: k.replace("d", "w")), "does not give the network"),
    "a mask as a difference": (kinds(lambda k: "d" * len(k)), "'mask' in a way that does not fit"),
    "names no list": (told(names="w"), "'names' is missing or of the wrong kind"),
    "names no texts": (told(names=[1]), "two tensors share a name"),
    "names twice": (told(names=["w", "w"]), "two tensors share a name"),
    "names of nothing": (told(names=["w", "bias", "table", "mask", "steps", "half", "nowhere"]), "that are nowhere"),
    "names too few": (told(names=["w"]), "that are nowhere"),
    "another shape": (lambda p: p.front["shapes"].__setitem__(0, [300, 200]), "'w' in a way that does not fit"),
    "a huge topology": (lambda p: p.front["topology"].__setitem__(2, 2**40), "claims to hold"),
    "a longer topology": (lambda p: p.front["topology"].__setitem__(2, p.front["topology"][2] + 1), "zstd frame"),
    "the topology of another": (lambda p: p.front["topology"].__setitem__(0, 1), "zstd frame|topology"),
    "a part by the codec of topologies": (lambda p: p.front["parts"][0].__setitem__(0, 7), "where it cannot be"),
    "no feature": (lambda p: setattr(p, "required", 0), "'topology' is not understood"),
}


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.replace(" ", "-"))
def test_each_lie_has_its_sentence(lie, made, forge):
    change, words = LIES[lie]
    package = forge.of(made)
    change(package)
    with pytest.raises((PackageError, InputError), match=words) as raised:
        delta.decode(package.build(), version())
    assert raised.value.hint and "\n" not in raised.value.message and len(raised.value.message) < 200


def test_flipped_bits_never_give_another_network(made, forge):
    rng = np.random.default_rng(0)
    for number in rng.integers(0, len(forge.of(made).payloads), 60):
        broken = forge.of(made)
        body = bytearray(broken.payloads[number])
        body[rng.integers(len(body))] ^= 1 << int(rng.integers(8))
        broken.payloads[number] = bytes(body)
        with pytest.raises(PackageError):
            delta.decode(broken.build(), version())


def test_old_readers_refuse(made, monkeypatch):
    monkeypatch.setattr("penjing.package.layout.KNOWN_REQUIRED", 0b100)
    with pytest.raises(PackageError, match="needs feature 1 that this penjing does not have"):
        decode(made)


def golden():
    """Two versions made by arithmetic alone."""
    noise = np.frombuffer(hashlib.shake_256(b"deltas").digest(8000), dtype=np.uint8).astype(np.int64)
    old = {"w": (noise[:4000] // 4 - 32).reshape(40, 100).astype(np.int8), "s": (noise[:40] / 64).astype(np.float32)}
    new = {"w": (old["w"] + (noise[4000:] < 12).reshape(40, 100)).astype(np.int8), "s": old["s"] * np.float32(1.25)}
    return (json.dumps({"graph": [1]}), old, {}), (json.dumps({"graph": [1, 2]}), new, {"name": "golden"})


def test_the_golden_delta_is_read(equal):
    data = (GOLDEN / "delta.penjing").read_bytes()
    assert hashlib.sha256(data).hexdigest() == (GOLDEN / "delta.sha256").read_text().strip()
    old, new = golden()
    got = delta.decode(data, old)
    assert got[0] == new[0] and equal(got[1], new[1]) and got[2] == new[2]
