"""Packages that only their recipients can read, encrypted by age (age-encryption.org/v1) through the library pyrage.

A sealed package is a package whose parts are age files, one for each part of the package inside. All are encrypted to
an identity that is made for the package; that identity lies in front, encrypted to the recipients. So a part can be
fetched, checked, decrypted and decoded alone, and somebody can be added without touching a part. docs/format.md has the
bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any

from penjing.errors import InputError, MissingExtraError, PackageError, SealError
from penjing.files import appearing
from penjing.package import archive, layout
from penjing.package.codecs import STORED
from penjing.package.keys import Paths, identities, recipients
from penjing.package.layout import HEADER_SIZE, Header, Index, Part
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


def encrypt(source: Paths, out: Paths, to: Sequence[str], *, progress: Progress = SILENT) -> int:
    """Seals the package `source` for the recipients `to` (`keys.recipients` says how to name them); returns bytes."""
    return _write(out, seal(archive.load(source), to, progress=progress))


def decrypt(
    source: Paths, out: Paths, key: Paths, *, passphrase: str | None = None, progress: Progress = SILENT
) -> int:
    """Writes the package that was sealed, bit for bit, opened with the identity in the file `key`; returns bytes."""
    return _write(out, unseal(archive.load(source), identities(key, passphrase), progress=progress))


def admit(source: Paths, out: Paths, to: Sequence[str], key: Paths, *, passphrase: str | None = None) -> int:
    """Adds the recipients `to` to a sealed package that `key` opens, and leaves every part as it is; returns bytes."""
    return _write(out, add(archive.load(source), to, identities(key, passphrase)))


def seal(data: bytes, to: Sequence[str], *, progress: Progress = SILENT) -> bytes:
    """The sealed form of a package in memory."""
    readers = recipients(to)
    header, _, payloads = archive.open_bytes(data)
    if header.required & layout.SEALED:
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
    if len(index.parts) != len(opened.index.parts) + 1:
        raise SealError(
            f"the sealed package has {len(index.parts)} parts of {len(opened.index.parts) + 1}", hint=_AGAIN
        )
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
    header = layout.parse_header(front)
    if header.required & layout.SEALED or len(front) != HEADER_SIZE + header.index_size:
        raise SealError("the front of the sealed package makes no sense", hint=_AGAIN)
    return Opened(front=front, index=layout.parse_index(front, front[HEADER_SIZE:], None), identity=identity)


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
    if not header.required & layout.SEALED:
        raise InputError("the package is not sealed", hint="penjing encrypt seals one")
    return header, index, payloads


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
    return b"".join([layout.pack(index, required=layout.SEALED), place, *sealed])


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


def _write(out: str | os.PathLike[str], data: bytes) -> int:
    with appearing(out) as aside:
        aside.write_bytes(data)
    return len(data)
