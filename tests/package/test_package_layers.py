"""Packages in layers: the first runs, all are exact, and together they cost what one costs."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest

from penjing.errors import InputError, PackageError
from penjing.package import archive, decode, encode, ladders, read, save, split
from penjing.package.contents import describe
from penjing.package.ladders import Bins, Planes
from penjing.package.layered import Layered
from penjing.package.refining import Refining
from penjing.package.refining import read as read_layers

FILE = Path(__file__).parent / "golden" / "layered.penjing"


def network(seed=0, scale=1):
    rng = np.random.default_rng(seed)
    wide = np.clip(
        np.rint(rng.normal(0, 25, (64 * scale, 32, 3, 3)) * rng.uniform(0.5, 1.5, (64 * scale, 1, 1, 1))), -127, 127
    )
    sparse = np.where(rng.random((90, 300)) < 0.85, 0, np.rint(rng.normal(0, 30, (90, 300)))).clip(-127, 127)
    floats = rng.normal(size=(40, 60)).astype(np.float32)
    floats[0, :5] = [0.0, -0.0, np.inf, -np.inf, np.nan]
    return "topology", {
        "wide": wide.astype(np.int8),
        "wide_scale": rng.random(64 * scale).astype(np.float32),
        "sparse": sparse.astype(np.int8),
        "floats": floats,
        "small": rng.integers(-9, 9, (3, 4)).astype(np.int8),
        "bias": rng.integers(-300, 300, 64).astype(np.int16),
        "empty": np.zeros((0, 5), dtype=np.int8),
    }  # fmt: skip


@pytest.fixture(scope="module", params=[2, 3, 5])
def made(request):
    return Layered(*network(), layers=request.param)


def test_all_layers_are_the_network_bit_for_bit(made, equal):
    topology, arrays = network()
    got = decode(made.encode({"name": "n"}))
    assert got[0] == topology and equal(got[1], arrays) and got[2] == {"name": "n"}
    assert made.encode() == Layered(*network(), layers=made.layers).encode()  # the same bytes every time


def test_layers_cost_next_to_nothing():
    topology, arrays = network(scale=8)
    single = len(encode(topology, arrays))
    for layers in (2, 4):
        assert len(Layered(topology, arrays, layers=layers).encode()) <= 1.01 * single


def test_every_layer_is_nearer(made):
    exact, before = network()[1], math.inf
    for layer in range(1, made.layers + 1):
        got = decode(made.encode(), layers=layer)[1]
        assert [(k, a.shape, a.dtype) for k, a in got.items()] == [(k, a.shape, a.dtype) for k, a in exact.items()]
        error = float(((got["wide"].astype(float) - exact["wide"]) ** 2).sum())
        assert error < before
        before = error
        for name in ("wide_scale", "small", "bias"):
            assert got[name].tobytes() == exact[name].tobytes()
    assert before == 0


def test_the_first_layer_has_about_half_of_the_bytes(made):
    rungs = describe(made.encode()).ladder
    assert [r.layer for r in rungs] == list(range(1, made.layers + 1)) and rungs[-1].share == 1
    assert 0.4 < rungs[0].share <= 0.55 and made.sqnr(1) > 10 and made.sqnr(made.layers) == math.inf


def test_zeros_stay_zeros_and_floats_stay_finite(made):
    exact, got = network()[1], made.arrays(1)
    assert not got["sparse"][exact["sparse"] == 0].any()
    assert got["floats"][0, :4].tobytes() == exact["floats"][0, :4].tobytes() and np.isnan(got["floats"][0, 4])
    rest = exact["floats"][1:]
    assert np.abs(got["floats"][1:] / rest - 1).max() < 2**-8


def test_the_sum_of_signs_does_not_drift():
    """A coarse layer whose bins lean to one side would move every channel's mean."""
    exact, got = network(scale=4)[1]["wide"].astype(float), Layered(*network(scale=4), layers=2).arrays(1)["wide"]
    assert abs((got - exact).mean()) < 0.02 * np.abs(exact).mean()


def pruned(seed=0):
    """Matrices of which four in five values are zero: where the others are is most of what they hold."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in (("a", (64, 256)), ("b", (256, 256)), ("c", (256, 16))):
        values = np.where(rng.random(shape) < 0.8, 0, np.rint(rng.normal(0, 30, shape)))
        arrays |= {name: values.clip(-127, 127).astype(np.int8), f"{name}_scale": rng.random(shape[1]).astype("f")}
    return "topology", arrays


def test_the_first_layer_of_a_sparse_network_has_its_weights(equal):
    topology, arrays = pruned()
    for layers in (2, 4):
        made = Layered(topology, arrays, layers=layers)
        coarse, coded = made.arrays(1), made.encode()
        for name in "abc":
            assert np.array_equal(np.sign(coarse[name]), np.sign(arrays[name]))
        assert made.sqnr(1) >= 20 and describe(coded).ladder[0].share < 0.85
        assert len(coded) <= (1.01 if layers == 2 else 1.03) * len(encode(topology, arrays))
        assert equal(decode(coded)[1], arrays)


def test_a_sparse_tensor_among_dense_ones_is_not_lost():
    topology, arrays = network(scale=4)
    rng = np.random.default_rng(2)
    arrays = {"wide": arrays["wide"], "few": np.where(rng.random((300, 300)) < 0.99, 0, 90).astype(np.int8)}
    few = Layered(topology, arrays, layers=2, harms={"wide": 1.0, "few": 1e-4}).arrays(1)["few"]
    assert np.array_equal(few > 0, arrays["few"] > 0)


def test_ternary_weights_are_whole_in_the_first_layer(equal):
    arrays = {"w": np.random.default_rng(0).choice([-1, 0, 1], (200, 300), p=[0.1, 0.8, 0.1]).astype(np.int8)}
    made = Layered("", arrays, layers=3)
    assert equal(made.arrays(1), arrays) and equal(decode(made.encode())[1], arrays)


def test_dense_networks_have_the_first_layer_they_had():
    """0.54 of the bytes, the cuts that are the optimal ones for them: nothing is raised."""
    topology, arrays = network()
    wide = {"wide": arrays["wide"], "wide_scale": arrays["wide_scale"]}
    made = Layered(topology, wide, layers=2)
    assert made.first == 0.54 and 0.5 < describe(made.encode()).ladder[0].share < 0.55
    coarse = made.arrays(1)["wide"]
    assert not coarse[np.abs(wide["wide"]) == 1].any()  # so a bin reaches over zero


def test_harms_say_where_errors_go():
    topology, arrays = network()
    rng = np.random.default_rng(5)
    arrays["other"] = np.clip(np.rint(rng.normal(0, 25, (64, 288))), -127, 127).astype(np.int8)
    even = Layered(topology, arrays, layers=2, harms={"wide": 1.0, "other": 1.0}).arrays(1)
    told = Layered(topology, arrays, layers=2, harms={"wide": 1.0, "other": 64.0}).arrays(1)

    def error(found, name):
        return float(((found[name].astype(float) - arrays[name]) ** 2).mean())

    assert error(told, "other") < 0.3 * error(even, "other") and error(told, "wide") > error(even, "wide")
    assert told["sparse"].tobytes() == arrays["sparse"].tobytes()  # not named, not cut


def test_parts_of_a_layer_stand_by_gain_for_each_byte():
    rng = np.random.default_rng(3)
    arrays = {f"{i}.w": np.clip(np.rint(rng.normal(0, 25, (200, 1000))), -127, 127).astype(np.int8) for i in range(4)}
    harms = {"0.w": 1.0, "1.w": 900.0, "2.w": 30.0, "3.w": 8000.0}
    _, index, _ = archive.open_bytes(Layered("", arrays, layers=2, harms=harms).encode())
    assert [p.layer for p in index.parts] == sorted(p.layer for p in index.parts)
    assert sum(p.layer == 2 for p in index.parts) == 4
    order = [index.tensors[p.pieces[0].tensor].name for p in index.parts if p.layer == 2]
    assert order != sorted(order) and order.index("0.w") == 3


def test_large_tensors_are_cut_into_ranges(equal):
    rng = np.random.default_rng(1)
    arrays = {"large": np.clip(np.rint(rng.normal(0, 9, (5000, 1000))), -127, 127).astype(np.int8)}
    arrays |= {"float": rng.normal(size=(1300, 1000)).astype(np.float32)}
    data = Layered("", arrays, layers=3).encode()
    _, index, _ = archive.open_bytes(data)
    assert sum(p.layer == 2 for p in index.parts) > 3
    assert equal(decode(data)[1], arrays)


@pytest.mark.parametrize("seed", range(6))
def test_odd_networks_come_back(seed, equal):
    rng = np.random.default_rng(seed)
    arrays = {
        "constant": np.full((40, 30), 7, dtype=np.int8),
        "binary": rng.choice([-1, 1], (50, 40)).astype(np.int8),
        "ends": rng.choice([-128, 127, 0], (40, 40)).astype(np.int8),
        "any": rng.integers(-128, 128, (50, 50)).astype(np.int8),
        "unsigned": rng.integers(0, 256, (64, 64)).astype(np.uint8),
    }
    chosen = [n for n in arrays if rng.random() < 0.7] or ["any"]
    data = Layered("", arrays, layers=2 + seed % 3, harms={n: float(rng.random()) + 1e-3 for n in chosen}).encode()
    assert equal(decode(data)[1], arrays)


def test_bad_arguments_are_refused():
    topology, arrays = network()
    for layers in (0, 1, 9):
        with pytest.raises(InputError, match="layers must be from 2 to 8"):
            Layered(topology, arrays, layers=layers)
    with pytest.raises(InputError, match="nothing that can be cut"):
        Layered("", {"bias": arrays["bias"]}, layers=2)
    with pytest.raises(InputError, match="'bias' cannot be cut"):
        Layered(topology, arrays, layers=2, harms={"bias": 1.0})


# --------------------------------------------------------------------------------------------------------- transport
@pytest.fixture
def folder(tmp_path):
    save(Layered(*network(scale=6), layers=3).encode(), tmp_path / "net", layout="directory")
    return tmp_path / "net"


def test_a_network_gets_better_as_parts_come_in(folder, tmp_path):
    front = Refining(folder)._front
    away = tmp_path / "away"
    away.mkdir()
    later = [p for p in front.parts if p.layer > 1]
    assert len(later) > 4
    for part in later:
        (folder / part.digest.hex()).rename(away / part.digest.hex())
    found, exact = Refining(folder), network(scale=6)[1]["wide"].astype(float)
    assert found.layers == 0 and found.refresh() > 0 and found.layers == 1
    errors = [float(((found.read()[1]["wide"] - exact) ** 2).sum())]
    for part in reversed(later):  # out of order: what refines nothing yet waits
        (away / part.digest.hex()).rename(folder / part.digest.hex())
        found.refresh()
        errors.append(float(((found.read()[1]["wide"] - exact) ** 2).sum()))
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0 and found.layers == 3 and not found.missing()


def test_missing_layers_are_named(folder):
    front = Refining(folder)._front
    first = next(p for p in front.parts if p.layer == 3)
    (folder / first.digest.hex()).unlink()
    assert read_layers(folder, layers=2)[0] == "topology"
    with pytest.raises(PackageError, match=r"1 of \d+ parts are missing: part \d+"):
        read_layers(folder, layers=3)
    base = next(p for p in front.parts if p.layer == 1)
    (folder / base.digest.hex()).write_bytes(b"x" * base.stored)
    with pytest.raises(PackageError, match="does not match its SHA-256"):
        read_layers(folder, layers=1)
    (folder / base.digest.hex()).unlink()
    found = Refining(folder, layers=1)
    found.refresh()
    with pytest.raises(PackageError, match="the first layer is not here"):
        found.read()
    with pytest.raises(InputError, match="at least 1"):
        Refining(folder, layers=0)


def test_layers_are_split_and_read_in_any_layout(folder, tmp_path, equal):
    volumes = split(folder, tmp_path / "volumes", into=2)
    assert read_layers(folder, layers=9)[1].keys() == read(folder)[1].keys()
    assert equal(read_layers(folder, layers=3)[1], network(scale=6)[1])
    assert len(volumes) == 2


# ------------------------------------------------------------------------------------------------------------ ladders
def test_cuts_are_optimal_and_nested():
    """Against every partition of a small alphabet."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 50, 9).astype(float)
    total = counts.sum()

    def cost(cuts, price):
        edges, sum_ = [0, *cuts, 9], 0.0
        for a, b in zip(edges, edges[1:], strict=False):
            n, v = counts[a:b], np.arange(a, b)
            if n.sum():
                mean = (n @ v) / n.sum() if a else 0.0
                sum_ += n @ (v - mean) ** 2 + price * n.sum() * (np.log2(total / n.sum()) + (a > 0))
        return sum_

    every = [[i + 1 for i in range(8) if mask >> i & 1] for mask in range(256)]
    for price in (0.1, 1.0, 5.0):
        found = ladders.nested(counts, price)
        assert cost(found, price) == pytest.approx(min(cost(c, price) for c in every), rel=1e-4)
        finer = ladders.nested(counts, price / 8, found)
        assert set(found) <= set(finer)


def test_bins_have_values_of_their_own():
    bins = Bins((tuple(ladders.around(128, [2, 9, 25])),))
    weights = np.random.default_rng(0).integers(0, 9, (3, 256))
    weights[1, 150] = 10_000  # more than half of its bin
    weights[2] = 0  # nothing expected: all alike
    values = bins.values(weights, 1)
    used = int(bins.tables[0].max()) + 1
    assert used == 7 and (bins.tables[0][values[:, :used]] == np.arange(used)).all() and not values[:, used:].any()
    for each, row in zip(weights, values, strict=True):
        for number in range(used):
            inside = np.flatnonzero(bins.tables[0] == number)
            own = each[inside] if each[inside].any() else np.ones_like(inside)
            mean = (2 * int(own @ inside) + int(own.sum())) // (2 * int(own.sum()))
            assert row[number] == (inside[own.argmax()] if 2 * own.max() > own.sum() else mean)
    assert 150 in values[1]
    assert Planes((2, 1, 1)).shift(1) == 16 and Planes((2, 1, 1)).shift(3) == 0


# ------------------------------------------------------------------------------------------------------- corrupt ones
@pytest.fixture(scope="module")
def good():
    return Layered(*network(), layers=3).encode({"name": "tiny"})


def rows(change):
    return lambda p: change(p.front["parts"])


def last(values):
    return lambda p: p.front["parts"].__setitem__(-1, values(p.front["parts"][-1]))


def payload(number, change):
    def apply(p):
        p.payloads[number] = change(p.payloads[number])
        p.resize()

    return apply


def again(p):
    p.front["parts"].append(p.front["parts"][-1])
    p.payloads.append(p.payloads[-1])


LIES = {
    "no ladders": (lambda p: p.front.pop("ladders"), "'ladders' is missing"),
    "no feature": (lambda p: setattr(p, "required", 0), "not understood|where it cannot be"),
    "a ladder too few": (lambda p: p.front["ladder"].pop(), "one ladder for each tensor"),
    "a ladder that is not": (lambda p: p.front["ladder"].__setitem__(0, 99), "one ladder for each tensor"),
    "a ladder for floats": (lambda p: p.front["ladder"].__setitem__(1, 1), "for other types"),
    "a ladder of an empty tensor": (lambda p: p.front["ladder"].__setitem__(6, 1), "for other types"),
    "a ladder no list": (lambda p: p.front["ladders"].__setitem__(0, 7), "a ladder is not understood"),
    "too many layers": (lambda p: p.front["ladders"].__setitem__(0, [[9]] * 9), "a ladder is not understood"),
    "cuts that fall": (lambda p: p.front["ladders"][0].__setitem__(0, [9, 8]), "do not ascend"),
    "a cut at 0": (lambda p: p.front["ladders"][0].__setitem__(0, [0, 8]), "do not ascend"),
    "a cut at 256": (lambda p: p.front["ladders"][0].__setitem__(0, [8, 256]), "do not ascend"),
    "bins not nested": (lambda p: p.front["ladders"][0].__setitem__(0, [1, 2, 3]), "not nested"),
    "floats of five bytes": (lambda p: p.front["ladders"].__setitem__(-1, [2, 2, 1]), "make up a float"),
    "floats of three": (lambda p: p.front["ladders"].__setitem__(-1, [3, 1]), "make up a float"),
    "a negative cut": (lambda p: p.front["ladders"][0].__setitem__(0, [-3]), "no list of numbers"),
    "layer 9": (last(lambda r: [*r[:2], 9, *r[3:]]), "a part of layer 9 stands where none can"),
    "layer 1 again": (last(lambda r: [*r[:2], 1, *r[3:]]), "a part of layer 1 stands where none can"),
    "tensors that do not exist": (last(lambda r: [*r[:3], 99, *r[4:]]), "do not exist"),
    "more tensors than there are": (last(lambda r: [*r[:4], 10**9]), "do not exist"),
    "no tensors": (last(lambda r: [*r[:4], 0]), "do not exist"),
    "a range beyond the tensor": (last(lambda r: [*r[:4], 0, 10**9]), "goes beyond its tensor"),
    "a range of nothing": (last(lambda r: [*r[:4], 5, 5]), "goes beyond its tensor"),
    "a range that leaves a gap": (last(lambda r: [*r[:4], 5, 6]), "a gap"),
    "a part twice": (again, "overlaps"),
    "a part less": (lambda p: (p.front["parts"].pop(), p.payloads.pop()), "a gap"),
    "layers before the first": (rows(lambda r: r.insert(0, r.pop())), "stands behind others"),
    "floats as bins": (last(lambda r: [6, *r[1:]]), "nested, cannot"),
    "bins as bytes": (lambda p: p.front["parts"][0].__setitem__(0, 1), "zstd|bins of a layer"),
    "nothing in the first layer": (payload(1, lambda d: b""), "cannot be decoded"),
    "an unknown form": (payload(1, lambda d: b"\7" + d[1:]), "cannot be decoded"),
    "the first layer cut off": (payload(1, lambda d: d[:-1]), "cannot be decoded|makes no sense|stream"),
    "a tail": (payload(1, lambda d: d + b"\0"), "cannot be decoded|stream"),
    "words too few": (payload(3, lambda d: d[: len(d) // 8 * 4]), "cannot be decoded"),
    "words too many": (payload(3, lambda d: d + b"\1\0\0\0"), "cannot be decoded"),
    "half a word": (payload(3, lambda d: d + b"\1"), "cannot be decoded"),
    "no models": (lambda p: setattr(p, "models", b""), "cannot be decoded"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.replace(" ", "-"))
def test_each_lie_has_its_sentence(lie, good, forge):
    change, words = LIES[lie]
    package = forge.of(good)
    change(package)
    data = package.build()
    assert data != good
    with pytest.raises(PackageError, match=words) as raised:
        decode(data)
    assert raised.value.hint and "\n" not in raised.value.message and len(raised.value.message) < 200


def test_rows_cannot_make_the_reader_slow(good, forge):
    package = forge.of(good)
    row = package.front["parts"][-1]
    package.front["parts"] += [row] * 20_000
    package.payloads += [package.payloads[-1]] * 20_000
    with pytest.raises(PackageError, match="overlaps"):
        decode(package.build())


def test_flipped_bits_are_errors_or_other_values_but_never_a_crash(good, forge, equal):
    rng, exact = np.random.default_rng(0), network()[1]
    package = forge.of(good)
    for number in rng.integers(1, len(package.payloads), 150):
        broken = forge.of(good)
        body = bytearray(broken.payloads[number])
        body[rng.integers(len(body))] ^= 1 << int(rng.integers(8))
        broken.payloads[number] = bytes(body)
        try:
            got = decode(broken.build())[1]
        except PackageError:
            continue
        assert {k: (a.shape, a.dtype) for k, a in got.items()} == {k: (a.shape, a.dtype) for k, a in exact.items()}


def test_old_readers_refuse(good, monkeypatch):
    monkeypatch.setattr("penjing.package.layout.KNOWN_REQUIRED", 0b100)
    with pytest.raises(PackageError, match="needs feature 0 that this penjing does not have"):
        decode(good)


def test_what_is_told_of_layers_may_be_nonsense(forge, good):
    for told in (
        {"name": "x", "unit": "", "values": [1]},
        {"values": "abc"},
        7,
        {"name": "\x1b[2J", "unit": "", "values": [1, 2, 3]},
    ):
        package = forge.of(good)
        package.front["metadata"] = {"ladder": told}
        contents = describe(package.build())
        assert [r.name for r in contents.ladder] == ["", "", ""] and "\x1b" not in str(contents)


def golden():
    """Arrays made by arithmetic alone."""
    noise = np.frombuffer(hashlib.shake_256(b"layers").digest(16_000), dtype=np.uint8).astype(np.int64)
    bell = noise.reshape(4, 4000).sum(axis=0) - 510
    arrays = {
        "w": (bell[:3000] // 4).clip(-127, 127).reshape(30, 100).astype(np.int8),
        "zeros": np.where(noise[:2000] < 210, 0, bell[:2000] // 9).reshape(40, 50).astype(np.int8),
        "f": ((bell[:1500] + 0.5) / 77).astype(np.float32).reshape(50, 30),
        "b": (noise[:30] * 7).astype(np.int16),
    }
    return '{"graph": []}', arrays


def test_the_golden_layered_package_is_read(equal):
    data = FILE.read_bytes()
    assert hashlib.sha256(data).hexdigest() == (FILE.parent / "layered.sha256").read_text().strip()
    got = decode(data)
    assert got[0] == golden()[0] and equal(got[1], golden()[1])
    coarse = hashlib.sha256(b"".join(a.tobytes() for a in decode(data, layers=1)[1].values())).hexdigest()
    assert coarse == (FILE.parent / "layered-first.sha256").read_text().strip()
