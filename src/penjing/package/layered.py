"""Writing a package in quality layers: coarse values of all tensors first, then what makes them exact.

Every layer is a prefix of the file. Inside of a layer parts stand by how much loss they take away for each byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.errors import InputError
from penjing.package import archive, codecs, grids, ladders, layout, nested, prediction
from penjing.package.assembly import Assembly
from penjing.package.ladders import MAX_LAYERS, Bins, Ladder, Planes, weights_of
from penjing.package.layout import Index, Part
from penjing.package.models import Bytes, Floats, Model
from penjing.package.pieces import MAX_PART, Piece, divide, ranges, spec
from penjing.progress import SILENT, Progress

Array = NDArray[Any]

FIRST = 0.54  # of all bytes, about those of the first layer
_MORE = (0.57, 0.6, 0.63, 0.66, 0.7, 0.75, 0.8)  # those of sparse networks, as far as they need them
_FLOOR = 20.0  # dB that they need, as dense networks of 8 bits have
_SPARSE = 0.25  # of a class's values alike from which on it can be sparse
_LEAST = 1024  # elements of the smallest tensor that is worth cutting
_LEAST_PART = 64 << 10  # raw bytes of a part of a further layer, where there are so many
_MOST_PARTS = 8  # of a further layer, where they can be larger
_ROUNDS = 20


def layerable(arrays: Mapping[str, Array]) -> list[str]:
    """The names of tensors that can be known coarsely: int8 and float32 ones that are matrices at least, not tiny."""
    return [n for n, a in arrays.items() if a.dtype in (np.int8, np.float32) and a.ndim > 1 and a.size >= _LEAST]


def check(layers: int) -> None:
    """Raises InputError for a number of layers that no package has."""
    if isinstance(layers, bool) or not isinstance(layers, int) or not 2 <= layers <= MAX_LAYERS:
        raise InputError(
            f"layers must be from 2 to {MAX_LAYERS}, got {layers!r}", hint="without layers a package has one"
        )


@dataclasses.dataclass(frozen=True)
class _Class:
    """Tensors whose errors weigh alike, and so share a ladder."""

    members: tuple[int, ...]
    centre: int
    harm: float
    counts: Floats  # of distances from the centre, both signs together

    @property
    def sparse(self) -> bool:
        """Whether many values are alike, more than have either neighbour, and not all."""
        least = max(_SPARSE * self.counts.sum(), self.counts[1])
        return bool(least <= self.counts[0] < self.counts.sum())


class Layered:
    """A package in layers, ready but for its metadata: so that these can tell how good each layer was found to be."""

    def __init__(
        self,
        topology: str,
        arrays: Mapping[str, Array],
        *,
        layers: int,
        harms: Mapping[str, float] | None = None,
        first: float = FIRST,
        progress: Progress = SILENT,
    ) -> None:
        """Chooses the layers and codes them.

        topology, arrays: as `encode` takes them. layers: how many, 2 to 8. harms: the tensors to cut (of `layerable`,
        or uint8), each with the loss that a squared error of 1 in one of its values does; without, the errors of all
        int8 and float32 matrices count in relation to their squares. first: about the share of the bytes that the first
        layer has, 0 to 1, or of sparse networks as much above it, to 0.8, as makes their SQNR 20 dB.
        Raises InputError, also for networks of which nothing can be cut.
        """
        check(layers)
        self._topology = archive.utf8(topology)
        self._tensors = tuple(archive.described(name, array) for name, array in arrays.items())
        self._flat = [archive.flat(array) for array in arrays.values()]
        self._exact = self._on_grid()
        self._predictors = archive.predicted(self._tensors, self._flat)
        self._symbols = self._on_grid()  # of what prediction leaves: layers cut through that
        self._harms = self._weighed(arrays, harms)
        self._bundles = divide(self._tensors)
        with progress.task("coding layers") as advance:
            self._models, self._assigned = self._planned()
            self._used = self._models_of_elements()
            size = 256 * len(self._models)
            self._joint = {
                i: np.bincount(used.astype(np.int64) << 8 | self._symbols[i], minlength=size).reshape(-1, 256)
                for i, used in self._used.items()
            }
            self._ladders: list[Ladder | None] = [
                Planes((2, 2) if layers == 2 else (2, 1, 1)) if i in self._harms and t.code == "f" else None
                for i, t in enumerate(self._tensors)
            ]
            self._text = codecs.encode_text(self._topology)
            # Of these the first layer is the same whatever ladders are chosen.
            firsts = {pieces: self._first(pieces) for pieces in self._bundles if not self._is_cut(pieces)}
            self.first = self._choose(layers, sum(len(payload) for _, payload in firsts.values()), first)
            advance(1)
            self._parts, self._payloads = self._coded(layers, firsts, advance)
        if layout.raw_limit(sum(map(len, self._payloads))) < sum(t.nbytes for t in self._tensors) + len(self._topology):
            raise InputError("the network is too empty to be cut into layers", hint="pack it without layers")

    @property
    def layers(self) -> int:
        """Number of layers."""
        return max(part.layer for part in self._parts)

    def arrays(self, layers: int) -> dict[str, Array]:
        """The tensors as a reader has them after so many layers."""
        assembly = Assembly(self._index({}))
        for number, (part, payload) in enumerate(zip(self._parts, self._payloads, strict=True)):
            if part.layer <= layers:
                assembly.take(number, memoryview(payload))
        return assembly.arrays()

    def sqnr(self, layers: int) -> float:
        """Signal to quantization noise of the tensors cut, in dB, by the harm that errors do; infinite where exact."""
        noise = sum(self._loss(Piece(tensor=i, start=0, stop=self._tensors[i].size), layers) for i in self._harms)
        power = sum(self._harms[i] * float((self._values(i) ** 2).sum()) for i in self._harms)
        return math.inf if noise == 0 else 10 * math.log10(power / noise)

    def encode(self, metadata: Mapping[str, Any] | None = None) -> bytes:
        """The bytes of the package."""
        return b"".join([layout.pack(self._index(archive.plain(metadata))), self._text[1], *self._payloads])

    def _index(self, metadata: dict[str, Any]) -> Index:
        codec, frame = self._text
        return Index(
            tensors=self._tensors,
            topology=Part(codec=codec, stored=len(frame), digest=hashlib.sha256(frame).digest(), pieces=()),
            topology_raw=len(self._topology),
            parts=tuple(self._parts),
            models=self._models if any(p.codec in (codecs.GRID, codecs.NESTED) for p in self._parts) else (),
            metadata=metadata,
            ladders=tuple(self._ladders),
            predictors=self._predictors,
        )

    # ---------------------------------------------------------------------------------------------------- what to cut
    def _weighed(self, arrays: Mapping[str, Array], harms: Mapping[str, float] | None) -> dict[int, float]:
        numbers = {t.name: i for i, t in enumerate(self._tensors)}
        if harms is None:
            found = {numbers[n]: 0.0 for n in layerable(arrays)}
            for i in found:
                power = float((self._values(i) ** 2).sum())
                found[i] = self._tensors[i].size / power if power and math.isfinite(power) else 0.0
        else:
            if strange := [n for n in harms if n not in numbers or self._tensors[numbers[n]].code not in "bBf"]:
                raise InputError(f"tensor '{strange[0]}' cannot be cut into layers", hint="int8, uint8, float32 can")
            found = {numbers[n]: float(harm) for n, harm in harms.items()}
        cut = {i: harm for i, harm in found.items() if harm > 0 and math.isfinite(harm) and self._tensors[i].size}
        if not cut:
            raise InputError("the network holds nothing that can be cut into layers", hint="pack it without layers")
        return cut

    def _values(self, i: int) -> Floats:
        """A tensor's values as a squared error is taken of them: codes from their centre, or floats."""
        if self._tensors[i].is_grid:
            return np.asarray(self._exact[i].astype(np.float64) - self._centre(i, self._exact[i]))
        return np.nan_to_num(self._flat[i].astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)

    def _on_grid(self) -> dict[int, Bytes]:
        return {
            i: grids.symbols(a) for i, (t, a) in enumerate(zip(self._tensors, self._flat, strict=True)) if t.is_grid
        }

    def _centre(self, i: int, symbols: Bytes) -> int:
        """The code from which bins are laid out to both sides: zero, or the most frequent one of an unsigned grid."""
        return 128 if self._tensors[i].code == "b" else int(np.bincount(symbols, minlength=1).argmax())

    def _planned(self) -> tuple[tuple[Model, ...], dict[Piece, grids.Assignment]]:
        on_grid = [p for pieces in self._bundles for p in pieces if self._tensors[p.tensor].is_grid]
        models, assigned = grids.plan(
            [
                grids.Grid(values=self._symbols[p.tensor][p.start : p.stop], unit=self._tensors[p.tensor].unit)
                for p in on_grid
            ]
        )
        return models, dict(zip(on_grid, assigned, strict=True))

    def _models_of_elements(self) -> dict[int, Bytes]:
        used = {i: np.zeros(self._tensors[i].size, dtype=np.uint8) for i in self._symbols}
        for piece, assignment in self._assigned.items():
            unit = self._tensors[piece.tensor].unit
            used[piece.tensor][piece.start : piece.stop] = nested.spread(
                assignment.models, piece.stop - piece.start, unit
            )
        return used

    def _is_cut(self, pieces: Sequence[Piece]) -> bool:
        return any(p.tensor in self._harms and self._tensors[p.tensor].is_grid for p in pieces)

    # ------------------------------------------------------------------------------------------------- how to cut it
    def _choose(self, layers: int, whole_bytes: int, least_share: float) -> float:
        """Ladders of the 8-bit tensors, such that layers have the bytes they should, for the least loss; the share of
        the first."""
        classes = self._classes()
        if not classes:
            return least_share
        rest = len(self._text[1]) + whole_bytes + 40 * len(self._bundles) + 600
        later = sum(self._tensors[i].nbytes // 2 for i in self._harms if not self._tensors[i].is_grid)
        uncut = [i for i in self._symbols if i not in self._harms]
        rest_bits = 8 * rest + self._bits({i: nested.WHOLE for i in uncut}, 1)
        whole_bits = self._bits({i: nested.WHOLE for c in classes for i in c.members}, 1)
        sparse = [k for k, each in enumerate(classes) if each.sparse]
        mostly = 2 * sum(classes[k].counts.sum() for k in sparse) > sum(c.counts.sum() for c in classes)
        for share in (least_share, *(more for more in _MORE if more > least_share)):
            first = max(share * (whole_bits + rest_bits + 8 * later) - rest_bits, 0.0)
            cuts: list[list[list[int]]] = [[] for _ in classes]
            # Which values are zero, and the others' signs, are most of what there is to know of sparse tensors.
            least: list[list[int]] = [[1] if c.sparse and share > FIRST else [] for c in classes]
            for layer in range(1, layers):
                target = first + (whole_bits - first) * (layer - 1) / (layers - 1)
                least = self._priced(classes, least, target)
                for own, new in zip(cuts, least, strict=True):
                    own.append(new)
            for each, own in zip(classes, cuts, strict=True):
                ladder = Bins(tuple(tuple(ladders.around(each.centre, c)) for c in own))
                for i in each.members:
                    self._ladders[i] = ladder
            if all(cuts[k][0] for k in sparse) and (not mostly or self.sqnr(1) >= _FLOOR):
                break
        return share

    def _classes(self) -> list[_Class]:
        found: dict[tuple[int, int], list[int]] = {}
        for i, harm in self._harms.items():
            if self._tensors[i].is_grid:
                found.setdefault((self._centre(i, self._symbols[i]), round(math.log2(harm))), []).append(i)
        return [
            _Class(tuple(members), centre, 2.0**octave, self._distances(members, centre))
            for (centre, octave), members in sorted(found.items())
        ]

    def _distances(self, members: Sequence[int], centre: int) -> Floats:
        held = sum(np.bincount(self._symbols[i], minlength=256) for i in members)
        return np.bincount(np.abs(np.arange(256) - centre), weights=held).astype(np.float64)

    def _priced(self, classes: list[_Class], before: list[list[int]], target: float) -> list[list[int]]:
        """Cuts of every class, those `before` among them, that take at most `target` bits if any do, at one price of a
        bit for all."""
        weights = [math.log2(each.harm) for each in classes]
        low, high = min(weights) - 6, max(weights) + 18  # of the price, as a power of 2: errors are 1/4 to 255
        best = before
        for _ in range(_ROUNDS):
            price = 2 ** ((low + high) / 2)
            found = [
                ladders.nested(each.counts, price / each.harm, own) for each, own in zip(classes, before, strict=True)
            ]
            tried = {
                i: Bins((tuple(ladders.around(each.centre, cuts)),))
                for each, cuts in zip(classes, found, strict=True)
                for i in each.members
            }
            if self._bits(tried, 1) > target:
                low = math.log2(price)
            else:
                high, best = math.log2(price), found
        return best

    def _bits(self, chosen: Mapping[int, Bins], layer: int) -> float:
        """About the bits of the bins of some tensors."""
        joint: dict[Bins, NDArray[np.int64]] = {}
        for i, ladder in chosen.items():
            joint[ladder] = joint[ladder] + self._joint[i] if ladder in joint else self._joint[i]
        total = 0.0
        for ladder, counts in joint.items():
            for model, seen in zip(self._models, counts, strict=True):
                bins = ladder.folded(seen, layer)
                expected = ladder.folded(weights_of(model), layer).astype(np.float64)
                some = bins > 0
                total += float(bins[some] @ (np.log2(expected.sum()) - np.log2(expected[some])))
        return total

    # ------------------------------------------------------------------------------------------------------- coding
    def _coded(
        self, layers: int, firsts: Mapping[tuple[Piece, ...], tuple[int, bytes]], advance: Callable[[int], None]
    ) -> tuple[list[Part], list[bytes]]:
        parts, payloads = [], []

        def add(codec: int, payload: bytes, pieces: tuple[Piece, ...], layer: int) -> None:
            digest = hashlib.sha256(payload).digest()
            parts.append(Part(codec=codec, stored=len(payload), digest=digest, pieces=pieces, layer=layer))
            payloads.append(payload)

        for pieces in self._bundles:
            add(*(firsts.get(pieces) or self._first(pieces)), pieces, 1)
            advance(1)
        for layer in range(2, layers + 1):
            made = []
            for pieces in self._further(layer):
                codec, payload = self._next(pieces, layer)
                gain = sum(self._loss(p, layer - 1) - self._loss(p, layer) for p in pieces)
                made.append((gain / max(len(payload), 1), codec, payload, pieces))
                advance(1)
            for _, codec, payload, pieces in sorted(made, key=lambda each: -each[0]):
                add(codec, payload, pieces, layer)
        return parts, payloads

    def _first(self, pieces: tuple[Piece, ...]) -> tuple[int, bytes]:
        assigned = [self._assigned[p] for p in pieces] if pieces[0] in self._assigned else None
        if assigned is not None and self._is_cut(pieces):
            values = [self._symbols[p.tensor][p.start : p.stop] for p in pieces]
            return codecs.NESTED, nested.encode_first(self._runs(pieces), values, assigned, self._models)
        specs = [spec(self._tensors, p) for p in pieces]
        chosen = [self._flat[p.tensor][p.start : p.stop] for p in pieces]
        for k, piece in enumerate(pieces):
            ladder = self._ladders[piece.tensor]
            if isinstance(ladder, Planes):
                chosen[k] = ladder.cut(chosen[k].view("<u4"), 1)
                specs[k] = dataclasses.replace(specs[k], code=ladder.code(1))
        return codecs.encode(chosen, specs, assigned, self._models)

    def _next(self, pieces: tuple[Piece, ...], layer: int) -> tuple[int, bytes]:
        if self._tensors[pieces[0].tensor].is_grid:
            values = [self._symbols[p.tensor][p.start : p.stop] for p in pieces]
            used = [self._used[p.tensor][p.start : p.stop] for p in pieces]
            return codecs.NESTED, nested.encode_next(self._runs(pieces), values, used, self._models, layer)
        chosen, specs = [], []
        for piece in pieces:
            ladder = self._ladders[piece.tensor]
            if isinstance(ladder, Planes):
                chosen.append(ladder.cut(self._flat[piece.tensor][piece.start : piece.stop].view("<u4"), layer))
                specs.append(dataclasses.replace(spec(self._tensors, piece), code=ladder.code(layer)))
        return codecs.encode(chosen, specs, None, ())

    def _runs(self, pieces: Sequence[Piece]) -> list[nested.Run]:
        out = []
        for piece in pieces:
            own, ladder = spec(self._tensors, piece), self._ladders[piece.tensor]
            bins = ladder if isinstance(ladder, Bins) else nested.WHOLE
            out.append(nested.Run(size=own.size, unit=own.unit, row=own.row, ladder=bins))
        return out

    def _further(self, layer: int) -> list[tuple[Piece, ...]]:
        """The pieces of each part of a layer from 2 on: neighbours of a kind together."""
        members = ladders.has_layer(self._tensors, self._ladders, layer)
        least = max(_LEAST_PART, sum(self._tensors[i].nbytes for i in members) // _MOST_PARTS)
        least = min(least, MAX_PART // 2)
        out: list[tuple[Piece, ...]] = []
        open_: list[Piece] = []
        filled = 0
        for i in members:
            tensor = self._tensors[i]
            fresh = open_ and self._tensors[open_[0].tensor].is_grid != tensor.is_grid
            if open_ and (fresh or filled + tensor.nbytes > MAX_PART or filled >= least):
                out.append(tuple(open_))
                open_, filled = [], 0
            if tensor.nbytes > MAX_PART // 2:
                if open_:
                    out.append(tuple(open_))
                    open_, filled = [], 0
                out += [(piece,) for piece in ranges(i, tensor)]
            else:
                open_.append(Piece(tensor=i, start=0, stop=tensor.size))
                filled += tensor.nbytes
        return [*out, tuple(open_)] if open_ else out

    def _loss(self, piece: Piece, layer: int) -> float:
        """The harm that a piece's errors do after a layer."""
        i, place, ladder = piece.tensor, slice(piece.start, piece.stop), self._ladders[piece.tensor]
        if ladder is None or layer >= ladder.layers:
            return 0.0
        if isinstance(ladder, Planes):
            exact = self._flat[i][place].view("<u4")
            shift = np.uint32(ladder.shift(layer))
            near = ladder.values(exact >> shift << shift, layer).view("<f4").astype(np.float64)
            with np.errstate(invalid="ignore"):
                error = np.nan_to_num(near - exact.view("<f4"), nan=0.0, posinf=0.0, neginf=0.0)
        else:
            table = ladder.table(self._models, layer)[:, ladder.tables[layer - 1]]
            predictor = self._predictors[i] if self._predictors else None
            size = 1 if predictor is None else predictor.taps
            wide = slice(piece.start // size * size, -(-piece.stop // size) * size)  # whole kernels
            coarse = table[self._used[i][wide], self._symbols[i][wide]]
            if predictor is not None:
                kernels = predictor.part(wide.start // size, wide.stop // size)
                coarse = prediction.restore([coarse], [kernels])[0]
            error = coarse.astype(np.float64) - self._exact[i][wide]
            error = error[piece.start - wide.start :][: piece.stop - piece.start]
        return self._harms[i] * float(error @ error)


__all__ = ["FIRST", "Layered", "layerable"]
