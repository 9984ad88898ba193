"""zstd frames (RFC 8878) without sizes or checksums of their own: the index has both."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import zstandard

from penjing.errors import PackageError

_LEVEL = 19
_HURRIED = 9
_LARGE = 256 << 10  # bytes from which hurry is heeded
_SMALL = 16 << 10  # bytes up to which the strongest level is always tried
_MAX_WINDOW = 128 << 20


def compress(
    data: bytes, *, worth: int | None = None, hurry: bool = False, phrases: bool = False, known: bytes = b""
) -> bytes | None:
    """A frame of `data`; None if it would not come below `worth` bytes, which a quick trial tells.

    With `phrases` it may point into phrases.txt, what topologies usually say: a reader needs that file. With `known` it
    may point into those bytes.

    The trial finds what a coder of single symbols cannot see, repetition; without any, the slow level gains nothing.
    hurry: for many bytes a level that is ten times as fast, and finds long repeats as well.
    """
    if worth is not None and len(data) > _SMALL and len(_frame(data, 3)) > worth:
        return None
    return _frame(data, _HURRIED if hurry and len(data) > _LARGE else _LEVEL, phrases, known)


def decompress(
    frame: bytes | memoryview, size: int, *, less: bool = False, phrases: bool = False, known: bytes = b""
) -> bytes:
    """The `size` bytes of one frame (or, where `less` will do, up to so many); raises PackageError if the frame says
    anything else."""
    try:
        # A size in the frame would overrule the limit given, so a frame with another size is refused before.
        declared = zstandard.frame_content_size(frame)
        if declared not in (-1, size):
            raise PackageError(f"a zstd frame holds {declared} bytes instead of {size}", hint="get the package again")
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW, **_known(phrases, known))
        # A limit of 0 would mean none; a writer stores nothing as nothing.
        data = decompressor.decompress(frame, max_output_size=max(size, 1), allow_extra_data=False)
    except (zstandard.ZstdError, ValueError, MemoryError) as error:
        raise PackageError("a zstd frame cannot be decoded", hint="get the package again") from error
    if less and len(data) < size:  # once more, as the library sees bytes behind the frame only where the size is right
        return decompress(frame, len(data), phrases=phrases, known=known)
    if len(data) != size:
        raise PackageError(f"a zstd frame holds {len(data)} bytes instead of {size}", hint="get the package again")
    return bytes(data)


def _frame(data: bytes, level: int, phrases: bool = False, known: bytes = b"") -> bytes:
    given = _known(phrases, known)
    return zstandard.ZstdCompressor(level=level, write_content_size=False, write_checksum=False, **given).compress(data)


def _known(phrases: bool, known: bytes) -> dict[str, Any]:
    return {"dict_data": _phrases()} if phrases else {"dict_data": _dictionary(known)} if known else {}


@cache
def _phrases() -> zstandard.ZstdCompressionDict:
    return _dictionary(phrases_text())


@cache
def phrases_text() -> bytes:
    """What topologies usually say."""
    return Path(__file__).with_name("phrases.txt").read_bytes()


def _dictionary(text: bytes) -> zstandard.ZstdCompressionDict:
    return zstandard.ZstdCompressionDict(text, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
