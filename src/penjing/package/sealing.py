"""Packages that only their recipients can read, encrypted by age (age-encryption.org/v1) through the library pyrage.

A sealed package is a package whose parts are age files, one for each part of the package inside. All are encrypted to
an identity that is made for the package; that identity lies in front, encrypted to the recipients. So a part can be
fetched, checked, decrypted and decoded alone, and somebody can be added without touching a part. docs/format.md has the
bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from penjing.errors import InputError, MissingExtraError, PackageError, SealError
from penjing.files import appearing_folder
from penjing.package import archive, directory, manifest
from penjing.package.codecs import STORED
from penjing.package.keys import Paths, identities, recipients
from penjing.package.layout import HEADER_SIZE, SEALED, Header, Index, Part, pack, parse_header, parse_index
from penjing.package.manifest import Manifest
from penjing.package.volumes import fill, holding, read_at
from penjing.progress import SILENT, Progress

try:
    import pyrage
except ImportError as error:
    raise MissingExtraError("sealing needs the package pyrage", hint="pip install 'penjing[secure]'") from error

_LENGTH = struct.Struct("<I")
_MAX_ENVELOPES = 1000  # times that recipients may be added; each costs a reader a try


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """The front of a sealed package, decrypted: what is inside, and the key to each part.

    front: header and index of the package inside; index: the same, read.
    """

    front: bytes
    index: Index
    identity: Any = dataclasses.field(repr=False)

    def layers(self, count: int) -> list[int]:
        """The quality layer of each of the `count` parts of the sealed package; raises SealError where they are others
        than the package inside needs."""
        if count != len(self.index.parts) + 1:
            raise SealError(f"the sealed package has {count} parts of {len(self.index.parts) + 1}", hint=_AGAIN)
        return [1, *(part.layer for part in self.index.parts)]

    def part(self, number: int, sealed: bytes | memoryview) -> bytes:
        """Part `number` of the package inside (0: its topology) from the part of the same number of the sealed one.

        Raises SealError where it was changed, cut short or put in another's place.
        """
        inner = (self.index.topology, *self.index.parts)[number]
        data = _decrypt(sealed, [self.identity], lambda: SealError(
            f"part {number} of the sealed package cannot be decrypted: it was changed or cut short", hint=_AGAIN
        ))  # fmt: skip
        if len(data) != inner.stored or hashlib.sha256(data).digest() != inner.digest:
            raise SealError(f"part {number} of the sealed package is not the one that belongs there", hint=_AGAIN)
        return data


_AGAIN = "get the package again from who sealed it"


def encrypt(source: Paths, out: Paths, to: Sequence[str], *, layout: str = "file", progress: Progress = SILENT) -> int:
    """Seals the package `source` for the recipients `to` (`keys.recipients` says how to name them); returns bytes."""
    directory.check(layout)
    return directory.save(seal(archive.load(source), to, progress=progress), out, layout=layout)


def decrypt(
    source: Paths,
    out: Paths,
    key: Paths,
    *,
    passphrase: str | None = None,
    layers: int | None = None,
    layout: str = "file",
    progress: Progress = SILENT,
) -> int:
    """Writes the package that was sealed, bit for bit, opened with the identity in the file `key`; returns bytes.

    layers: only the parts of so many quality layers, whatever others are missing (a pull under way); `out` is a
    directory then, to which `unpack` and `Refining` with as many layers look.
    """
    directory.check(layout)
    keys = identities(key, passphrase)
    if layers is None:
        return directory.save(unseal(archive.load(source), keys, progress=progress), out, layout=layout)
    found = holding(Path(source))
    opened = open_front(_place(found.manifest), keys)
    wanted = [n for n, layer in enumerate(opened.layers(len(found.manifest.parts))) if layer <= layers]
    sealed = [read_at(found.places.get(p.digest), p.stored) for p in map(found.manifest.parts.__getitem__, wanted)]
    if missing := [n for n, payload in zip(wanted, sealed, strict=True) if payload is None]:
        raise directory.lacking(found.manifest, missing)
    with (
        progress.task("decrypting parts", len(wanted)) as advance,
        appearing_folder(Path(out), ours=directory.is_ours) as folder,
    ):
        topology, *parts = (opened.part(n, payload or b"") for n, payload in zip(wanted, sealed, strict=True))
        front = manifest.parse(opened.front + topology)
        fill(folder, front, range(len(parts)), parts, advance)
    return len(front.data) + sum(map(len, parts))


def admit(
    source: Paths,
    out: Paths,
    to: Sequence[str],
    key: Paths,
    *,
    passphrase: str | None = None,
    layout: str = "file",
) -> int:
    """Adds the recipients `to` to a sealed package that `key` opens, and leaves every part as it is; returns bytes."""
    directory.check(layout)
    return directory.save(add(archive.load(source), to, identities(key, passphrase)), out, layout=layout)


def seal(data: bytes, to: Sequence[str], *, progress: Progress = SILENT) -> bytes:
    """The sealed form of a package in memory."""
    readers = recipients(to)
    header, _, payloads = archive.open_bytes(data)
    if header.required & SEALED:
        raise InputError(
            "the package is sealed already", hint="to add recipients takes the identity of one (--identity)"
        )
    identity = pyrage.x25519.Identity.generate()
    own = [identity.to_public()]
    sealed = []
    with progress.task("encrypting parts", len(payloads)) as advance:
        for payload in payloads:
            sealed.append(_encrypt(bytes(payload), own))
            advance(1)
    front = _encrypt(data[: HEADER_SIZE + header.index_size], own)
    return _assemble([_encrypt(str(identity).encode(), readers)], front, sealed)


def unseal(data: bytes, keys: Sequence[Any], *, progress: Progress = SILENT) -> bytes:
    """The package inside a sealed one in memory. Raises SealError, PackageError."""
    _, index, payloads = _sealed(data)
    opened = open_front(payloads[0], keys)
    opened.layers(len(index.parts))  # refuses another number of parts
    parts = [opened.front]
    with progress.task("decrypting parts", len(index.parts)) as advance:
        for number, payload in enumerate(payloads[1:]):
            parts.append(opened.part(number, payload))
            advance(1)
    return b"".join(parts)


def add(data: bytes, to: Sequence[str], keys: Sequence[Any]) -> bytes:
    """A sealed package in memory for further recipients, its parts unchanged."""
    readers = recipients(to)
    _, _, payloads = _sealed(data)
    envelopes, front = _frames(payloads[0])
    if len(envelopes) == _MAX_ENVELOPES:
        raise InputError(f"recipients were added {_MAX_ENVELOPES} times", hint="decrypt the package and seal it anew")
    identity = open_front(payloads[0], keys).identity
    return _assemble([*envelopes, _encrypt(str(identity).encode(), readers)], front, [bytes(p) for p in payloads[1:]])


def layers_of(front: Manifest, keys: Sequence[Any]) -> list[int]:
    """The quality layer of each part of a sealed package, which only its recipients can tell. Raises SealError,
    InputError."""
    return open_front(_place(front), keys).layers(len(front.parts))


def open_front(place: bytes | memoryview, keys: Sequence[Any]) -> Opened:
    """Opens a sealed package by what lies in its topology's place: enough to decrypt parts as they arrive.

    keys: from `keys.identities`. Raises SealError where none of them is a recipient's.
    """
    envelopes, sealed_front = _frames(place)
    identity = next((found for e in envelopes if (found := _identity(e, keys)) is not None), None)
    if identity is None:
        raise SealError("the package is sealed for other recipients", hint="give the identity of one of them")
    front = _decrypt(sealed_front, [identity], lambda: SealError(
        "the front of the sealed package cannot be decrypted: it was changed", hint=_AGAIN
    ))  # fmt: skip
    header = parse_header(front)
    if header.required & SEALED or len(front) != HEADER_SIZE + header.index_size:
        raise SealError("the front of the sealed package makes no sense", hint=_AGAIN)
    return Opened(front=front, index=parse_index(front, front[HEADER_SIZE:], None), identity=identity)


def _identity(envelope: bytes, keys: Sequence[Any]) -> Any | None:
    """The package's identity, if one of `keys` opens this envelope."""
    try:
        return pyrage.x25519.Identity.from_str(bytes(pyrage.decrypt(envelope, keys)).decode())
    except pyrage.DecryptError:
        return None
    except (pyrage.IdentityError, UnicodeDecodeError) as error:
        raise SealError("the envelope of the sealed package holds no key", hint=_AGAIN) from error


def _sealed(data: bytes) -> tuple[Header, Index, list[memoryview]]:
    header, index, payloads = archive.open_bytes(data)
    _require_seal(header)
    return header, index, payloads


def _place(front: Manifest) -> memoryview:
    """What lies in a sealed package's topology's place."""
    _require_seal(parse_header(front.data))
    return front.topology


def _require_seal(header: Header) -> None:
    if not header.required & SEALED:
        raise InputError("the package is not sealed", hint="penjing encrypt seals one")


def _assemble(envelopes: Sequence[bytes], front: bytes, sealed: Sequence[bytes]) -> bytes:
    frames = b"".join(_LENGTH.pack(len(e)) + e for e in envelopes)
    place = _LENGTH.pack(len(envelopes)) + frames + front
    index = Index(
        tensors=(),
        topology=_part(place),
        topology_raw=len(place),
        parts=tuple(_part(s) for s in sealed),
        models=(),
        metadata={},
    )
    return b"".join([pack(index, required=SEALED), place, *sealed])


def _part(data: bytes) -> Part:
    return Part(codec=STORED, stored=len(data), digest=hashlib.sha256(data).digest(), pieces=())


def _frames(place: bytes | memoryview) -> tuple[list[bytes], bytes]:
    """The envelopes and the sealed front."""
    data, found = bytes(place), []
    try:
        (number,) = _LENGTH.unpack_from(data)
        at = _LENGTH.size
        for _ in range(min(number, _MAX_ENVELOPES + 1)):
            (length,) = _LENGTH.unpack_from(data, at)
            found.append(data[at + _LENGTH.size : at + _LENGTH.size + length])
            at += _LENGTH.size + length
    except struct.error as error:
        raise PackageError("the front of the sealed package is cut short", hint=_AGAIN) from error
    if not 0 < number <= _MAX_ENVELOPES or at > len(data):
        raise PackageError("the front of the sealed package makes no sense", hint=_AGAIN)
    return found, data[at:]


def _encrypt(data: bytes, readers: Sequence[Any]) -> bytes:
    return bytes(pyrage.encrypt(data, readers))


def _decrypt(data: bytes | memoryview, keys: Sequence[Any], failed: Callable[[], SealError]) -> bytes:
    try:
        return bytes(pyrage.decrypt(bytes(data), keys))
    except pyrage.DecryptError as error:
        raise failed() from error
