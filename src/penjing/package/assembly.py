"""Tensors put together from parts as they come: at once from a whole package, or layer by layer.

Of a layered package all tensors can be had once the first layer is here; what is not known yet of a value is taken from
the middle of what it can be.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.errors import PackageError
from penjing.package import codecs, grids, nested, prediction
from penjing.package.claims import shown
from penjing.package.ladders import Bins, Ladder, Planes
from penjing.package.layout import Index, Part
from penjing.package.models import Bytes
from penjing.package.pieces import Piece, Spec, Tensor, spec
from penjing.package.prediction import Predictor, Weights

Array = NDArray[Any]

_RANGE = 1 << 20


class Assembly:
    """The tensors of a package, as far as parts of it were taken. Values of layered tensors are kept as bins."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._ladders = index.ladders or (None,) * len(index.tensors)
        self._taken: set[int] = set()
        # Of the tensors of which a part was taken: an index may tell of more than there is.
        self._held: dict[int, Array] = {}
        self._used: dict[int, Bytes] = {}  # the model of each element of a tensor with bins
        self._known: dict[int, Bytes] = {}  # layers that are known of each element of a layered tensor

    @property
    def layers(self) -> int:
        """How many layers are here whole."""
        missing = [p.layer for n, p in enumerate(self._index.parts) if n not in self._taken]
        return min(missing) - 1 if missing else self._index.layers

    def has(self, number: int) -> bool:
        """Whether part `number` was taken."""
        return number in self._taken

    def fits(self, number: int) -> bool:
        """Whether part `number` was not taken yet, and what it refines is here."""
        part = self._index.parts[number]
        return number not in self._taken and all(self._is_next(p, part.layer) for p in part.pieces)

    def take(self, number: int, payload: memoryview) -> None:
        """Adds part `number`, whose digest was checked. Raises PackageError for bytes that no writer makes."""
        part = self._index.parts[number]
        if not all(self._is_next(p, part.layer) for p in part.pieces):
            raise PackageError(
                f"part {number} is of layer {part.layer}, and a layer before it is missing",
                hint="take the parts of one layer after those of the one before",
            )
        for piece in part.pieces:
            if piece.tensor not in self._held:
                self._open(piece.tensor)
        if part.codec == codecs.NESTED:
            self._take_nested(part, payload)
        else:
            self._take_plain(part, payload)
        for piece in part.pieces:
            if piece.tensor in self._known:
                self._known[piece.tensor][piece.start : piece.stop] = part.layer
        self._taken.add(number)

    def arrays(self) -> dict[str, Array]:
        """The tensors as they are known now. Raises PackageError before the first layer is here."""
        if not self.layers:
            raise PackageError("the first layer is not here", hint="penjing pull fetches it")
        out = {}
        for number in range(len(self._index.tensors)):
            if number not in self._held:  # nothing of it is anywhere
                self._open(number)
        found = [
            self._values(i, t, ladder)
            for i, (t, ladder) in enumerate(zip(self._index.tensors, self._ladders, strict=True))
        ]
        self._restore(found)
        for tensor, values in zip(self._index.tensors, found, strict=True):
            out[tensor.name] = values.reshape(tensor.shape).astype(tensor.dtype.newbyteorder("="), copy=False)
        return out

    def _restore(self, found: list[Array]) -> None:
        """Puts values in the place of what prediction left of them."""
        members: dict[Weights, list[tuple[int, Predictor]]] = {}
        for number, predictor in enumerate(self._index.predictors):
            if predictor is not None:
                members.setdefault(predictor.weights, []).append((number, predictor))
        for group in members.values():
            restored = prediction.restore([grids.symbols(found[i]) for i, _ in group], [p for _, p in group])
            for (i, _), symbols in zip(group, restored, strict=True):
                found[i] = grids.values(symbols, self._index.tensors[i].code)

    def _open(self, number: int) -> None:
        """Makes room for a tensor."""
        tensor, ladder = self._index.tensors[number], self._ladders[number]
        try:
            if ladder is None:
                self._held[number] = np.empty(tensor.size, dtype=tensor.dtype)
                return
            held: Array = np.zeros(tensor.size, dtype=np.uint8 if isinstance(ladder, Bins) else "<u4")
            self._known[number] = np.zeros(tensor.size, dtype=np.uint8)
            if isinstance(ladder, Bins):
                self._used[number] = np.zeros(tensor.size, dtype=np.uint8)
            self._held[number] = held
        except MemoryError as error:
            raise PackageError(
                f"there is no memory for the {tensor.nbytes:,} bytes of tensor '{shown(tensor.name)}'",
                hint="is the package from whom you think? Then take a larger machine",
            ) from error

    def _is_next(self, piece: Piece, layer: int) -> bool:
        if self._ladders[piece.tensor] is None:
            return True
        known = self._known.get(piece.tensor)
        return layer == 1 if known is None else bool((known[piece.start : piece.stop] == layer - 1).all())

    def _take_plain(self, part: Part, payload: memoryview) -> None:
        specs = [self._spec(p, part.layer) for p in part.pieces]
        decoded = codecs.decode(part.codec, payload, specs, self._index.models)
        for piece, values in zip(part.pieces, decoded, strict=True):
            ladder, target = self._ladders[piece.tensor], self._held[piece.tensor][piece.start : piece.stop]
            if isinstance(ladder, Bins):
                raise _misplaced("bins of a layer", codecs.NAMES[part.codec])
            if isinstance(ladder, Planes):
                target |= values.astype(np.uint32) << np.uint32(ladder.shift(part.layer))
            else:
                target[:] = values

    def _take_nested(self, part: Part, payload: memoryview) -> None:
        runs, places = [], []
        for piece in part.pieces:
            own, ladder = spec(self._index.tensors, piece), self._ladders[piece.tensor]
            if not self._index.tensors[piece.tensor].is_grid or isinstance(ladder, Planes):
                raise _misplaced("no 8-bit integers", "nested")
            runs.append(nested.Run(size=own.size, unit=own.unit, row=own.row, ladder=ladder or nested.WHOLE))
            places.append((piece.tensor, slice(piece.start, piece.stop)))
        if part.layer == 1:
            bins, used = nested.decode_first(payload, runs, self._index.models)
            for (tensor, place), found, names in zip(places, bins, used, strict=True):
                if tensor in self._used:
                    self._held[tensor][place], self._used[tensor][place] = found, names
                else:
                    self._held[tensor][place] = grids.values(found, self._index.tensors[tensor].code)
            return
        before = [self._held[tensor][place] for tensor, place in places]
        names_before = [self._used[tensor][place] for tensor, place in places]
        decoded = nested.decode_next(payload, runs, before, names_before, self._index.models, part.layer)
        for (tensor, place), values in zip(places, decoded, strict=True):
            self._held[tensor][place] = values

    def _spec(self, piece: Piece, layer: int) -> Spec:
        own, ladder = spec(self._index.tensors, piece), self._ladders[piece.tensor]
        return dataclasses.replace(own, code=ladder.code(layer)) if isinstance(ladder, Planes) else own

    def _values(self, number: int, tensor: Tensor, ladder: Ladder | None) -> Array:
        held = self._held[number]
        if ladder is None:
            return held
        known = self._known[number]
        if isinstance(ladder, Planes):
            bits = held
            for layer in range(1, ladder.layers):
                bits = np.where(known == layer, ladder.values(held, layer), bits)
            return np.asarray(bits).astype("<u4").view(tensor.dtype)
        values = held
        if (known < ladder.layers).any():
            table = np.empty((ladder.layers, max(1, len(self._index.models)), 256), dtype=np.uint8)
            table[-1] = np.arange(256)
            for layer in range(1, ladder.layers):
                table[layer - 1] = ladder.table(self._index.models, layer)
            values = np.empty_like(held)
            for start in range(0, len(held), _RANGE):  # numpy widens what it looks up with to 64 bits
                place = slice(start, start + _RANGE)
                values[place] = table[known[place] - 1, self._used[number][place], held[place]]
        return grids.values(values, tensor.code)


def _misplaced(what: str, codec: str) -> PackageError:
    return PackageError(
        f"a part holds {what} where its codec, {codec}, cannot", hint="the package was made by a faulty writer"
    )
