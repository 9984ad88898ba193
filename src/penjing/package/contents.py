"""What is inside a package, and what each tensor costs."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np

from penjing.package import codecs
from penjing.package.archive import LADDER, load, open_bytes
from penjing.package.claims import shown
from penjing.package.delta import changes
from penjing.package.layout import DELTA, HEADER_SIZE, SEALED, Index
from penjing.package.pieces import spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One tensor. `coded_bytes` is exact for a part of its own; a part shared with others is divided by estimate."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: str
    raw_bytes: int
    coded_bytes: int

    @property
    def bits_per_element(self) -> float:
        """Coded bits for each element; 0 for an empty tensor."""
        elements = self.raw_bytes // np.dtype(self.dtype).itemsize
        return 8 * self.coded_bytes / elements if elements else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rung:
    """A quality layer: `bytes` of the package up to its end, and how good the network is then.

    `value` is of what `name` says, in `unit`: a metric on `samples` samples that was measured at packing, or the
    weights' SQNR; None: exact, or not known (no name).
    """

    layer: int
    bytes: int
    share: float
    name: str = ""
    unit: str = ""
    value: float | None = None
    samples: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        text = f"layer {self.layer}: {self.bytes:,} bytes ({self.share:.1%})"
        if self.name == "SQNR":
            return (
                f"{text}, weights exact" if self.value is None else f"{text}, weights at {self.value:.1f} {self.unit}"
            )
        if not self.name or self.value is None:
            return text
        shown = f"{self.value:.2%}" if self.unit == "%" else f"{self.value:.4g} {self.unit}".rstrip()
        return f"{text}, {self.name} {shown}" + (f" on {self.samples:,} samples" if self.samples else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """A package's inventory. `index_bytes` + `topology_coded_bytes` + the rows' coded bytes are `file_bytes`.

    Of a sealed package only the sizes can be told: everything behind the index is `sealed_bytes`. `ladder` has the
    quality layers, where there are several. `delta` has what a delta says of parent and child; its rows are changes.
    """

    format_version: int
    required_flags: int
    optional_flags: int
    metadata: dict[str, Any]
    tensors: tuple[Row, ...]
    parts: int
    models: int
    index_bytes: int
    topology_raw_bytes: int
    topology_coded_bytes: int
    file_bytes: int
    sealed_bytes: int = 0
    ladder: tuple[Rung, ...] = ()
    delta: dict[str, str] | None = None

    @property
    def raw_bytes(self) -> int:
        """Bytes of all tensors in memory."""
        return sum(row.raw_bytes for row in self.tensors)

    @property
    def coded_bytes(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(row.coded_bytes for row in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        out = dataclasses.asdict(self)
        out["tensors"] = [
            {**dataclasses.asdict(row), "shape": list(row.shape), "bits_per_element": round(row.bits_per_element, 4)}
            for row in self.tensors
        ]
        return {**out, "raw_bytes": self.raw_bytes, "coded_bytes": self.coded_bytes}

    def __str__(self) -> str:
        if self.sealed_bytes:
            return (
                f"sealed penjing package, format {self.format_version}: {self.sealed_bytes:,} encrypted bytes in "
                f"{self.parts} parts, {self.file_bytes:,} bytes in all"
            )
        head = ("tensor", "type", "shape", "codec", "raw", "coded", "bits/element")
        rows = [
            (shown(r.name), r.dtype, "×".join(map(str, r.shape)) or "scalar", r.codec, f"{r.raw_bytes:,}",
             f"{r.coded_bytes:,}", f"{r.bits_per_element:.2f}")
            for r in self.tensors
        ]  # fmt: skip
        rows.append(("topology", "", "", "", f"{self.topology_raw_bytes:,}", f"{self.topology_coded_bytes:,}", ""))
        rows.append(("index", "", "", "", "", f"{self.index_bytes:,}", ""))
        rows.append(("total", "", "", "", f"{self.raw_bytes + self.topology_raw_bytes:,}", f"{self.file_bytes:,}", ""))
        widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
        table = [
            "  ".join(
                cell.ljust(width) if i < 4 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in (head, *rows)
        ]
        table.insert(1, "  ".join("-" * width for width in widths))
        kind = "package" if self.delta is None else "delta"
        title = (
            f"penjing {kind}, format {self.format_version}: {len(self.tensors)} tensors in {self.parts} parts, "
            f"{self.models} symbol models"
        )
        notes = [f"{key}: {value}" for key, value in self.metadata.items() if not (self.ladder and key == LADDER)]
        notes += [f"{key}: {value}" for key, value in (self.delta or {}).items()]
        notes += map(str, self.ladder)
        return "\n".join([title, *notes, "", *table])


def inspect(path: str | os.PathLike[str]) -> Contents:
    """The inventory of a file, its digests checked, without decoding a tensor. Raises PackageError."""
    return describe(load(path))


def describe(data: bytes) -> Contents:
    """The inventory of a package in memory."""
    header, index, payloads = open_bytes(data)
    if header.required & SEALED:
        return Contents(
            format_version=header.version,
            required_flags=header.required,
            optional_flags=header.optional,
            metadata={},
            tensors=(),
            parts=len(index.parts) + 1,
            models=0,
            index_bytes=HEADER_SIZE + header.index_size,
            topology_raw_bytes=0,
            topology_coded_bytes=0,
            file_bytes=len(data),
            sealed_bytes=index.stored,
        )
    told = changes(index) if header.required & DELTA else None
    coded = [0] * len(index.tensors)
    codec = [set[str]() for _ in index.tensors]
    for part, payload in zip(index.parts, payloads[1:], strict=True):
        specs = [spec(index.tensors, p) for p in part.pieces]
        if part.codec == codecs.NESTED or any(index.ladders[p.tensor] for p in part.pieces if index.ladders):
            # Layers cut through what else would tell.
            weights = [float(s.nbytes) for s in specs]
        else:
            weights = codecs.shares(part.codec, payload, specs, index.models)
        for piece, share in zip(part.pieces, _divided(part.stored, weights), strict=True):
            coded[piece.tensor] += share
            codec[piece.tensor].add(codecs.NAMES[part.codec])
    return Contents(
        format_version=header.version,
        required_flags=header.required,
        optional_flags=header.optional,
        metadata=index.metadata,
        tensors=tuple(
            Row(
                name=t.name,
                dtype=np.dtype(t.code).name,
                shape=t.shape,
                codec="+".join(sorted(codec[i])),
                raw_bytes=t.nbytes,
                coded_bytes=coded[i],
            )
            for i, t in enumerate(index.tensors)
        ),
        parts=len(index.parts) + 1,
        models=len(index.models),
        index_bytes=HEADER_SIZE + header.index_size,
        topology_raw_bytes=index.topology_raw,
        topology_coded_bytes=index.topology.stored,
        file_bytes=len(data),
        ladder=_ladder(index, HEADER_SIZE + header.index_size + index.topology.stored, len(data)),
        delta=None if told is None else {"parent": told.parent, "child": told.child},
    )


def _ladder(index: Index, front: int, total: int) -> tuple[Rung, ...]:
    """The quality layers; what the metadata say of them, if that makes sense."""
    if index.layers == 1:
        return ()
    told = index.metadata.get(LADDER)
    told = told if isinstance(told, dict) else {}
    name, unit, count, values = told.get("name"), told.get("unit"), told.get("n"), told.get("values")
    sound = (
        isinstance(name, str)
        and isinstance(unit, str)
        and (name + unit).isprintable()
        and isinstance(values, list)
        and len(values) == index.layers
        and all(v is None or (isinstance(v, int | float) and abs(v) < 1e300) for v in values)
    )
    rungs, end = [], front
    for layer in range(1, index.layers + 1):
        end += sum(part.stored for part in index.parts if part.layer == layer)
        rung = Rung(layer=layer, bytes=end, share=end / total)
        if sound:
            samples = count if type(count) is int else None
            value = told["values"][layer - 1]
            rung = dataclasses.replace(rung, name=str(name), unit=str(unit), value=value, samples=samples)
        rungs.append(rung)
    return tuple(rungs)


def _divided(total: int, weights: list[float]) -> list[int]:
    """`total` in whole numbers proportional to `weights`, nothing lost to rounding."""
    if not weights:
        return []
    whole = sum(weights)
    shares = np.array(weights) if whole > 0 else np.ones(len(weights))
    edges = np.rint(np.concatenate([[0.0], np.cumsum(shares)]) * (total / shares.sum())).astype(np.int64)
    edges[-1] = total
    return [int(n) for n in np.diff(edges)]
