"""What nncodec and ZipNN make of the same numbers. Runs in an environment of its own, with either of them or both.

    python package_peers.py FOLDER      # holds an .npz a job: arrays of integers, or one array of float32 or uint16

Prints a JSON object: versions, and for each job a row a peer: bytes, the best of the settings tried, what that took on
one thread (10^6 raw bytes a second of processor time, best of 3). What decodes to anything else is an error.
uint16 is bfloat16. nncodec gets integers as integers, which it codes without a step of quantization of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np

Made = tuple[int, dict[str, Any], Callable[[], Any], Callable[[], Any]]  # bytes, setting, what encodes, what decodes
ROUNDS = 3


def main() -> None:
    found: dict[str, Any] = {"versions": {}, "rows": {}}
    peers = {"nncodec": with_nncodec, "zipnn": with_zipnn}
    here = [name for name in peers if importlib.util.find_spec(name)]
    found["versions"] = {name: version(name) for name in here}
    for file in sorted(Path(sys.argv[1]).glob("*.npz")):
        with np.load(file) as held:
            arrays = {name: held[name] for name in held.files}
        raw = sum(a.nbytes for a in arrays.values())
        whole = all(a.dtype in (np.int8, np.uint8) for a in arrays.values())
        for name in here:
            if whole != (name == "nncodec"):
                continue
            size, setting, encode, decode = min(peers[name](arrays), key=lambda made: made[0])
            speeds = {"encode_mb_per_s": speed(raw, encode), "decode_mb_per_s": speed(raw, decode)}
            found["rows"].setdefault(file.stem, {})[name] = {"bytes": size, "setting": setting, **speeds}
            print(file.stem, name, size, file=sys.stderr, flush=True)
    print(json.dumps(found))


def speed(raw: int, action: Callable[[], Any]) -> float:
    times = []
    for _ in range(ROUNDS):
        began = time.process_time()
        action()
        times.append(time.process_time() - began)
    return round(raw / 1e6 / max(min(times), 1e-9), 1)


def with_nncodec(arrays: dict[str, np.ndarray]) -> Iterator[Made]:
    """Lengths of its unary part; with the best of them both orders of scanning, and the skipping of empty rows."""
    if not _imports("torchvision"):
        # Its package imports data sets of images, which coding has no use for.
        for name in ("", ".datasets", ".transforms", ".models", ".datasets.folder"):
            sys.modules["torchvision" + name] = MagicMock()
    from nncodec import nnc

    given = {name: a.astype(np.int32) for name, a in arrays.items()}

    def made(**setting: Any) -> Made:
        def encode() -> Any:
            return nnc.compress(given, bitstream_path=None, return_bitstream=True, use_dq=False, **setting)

        data = encode()
        got = nnc.decompress(data)
        if any(not np.array_equal(got[name], a) for name, a in given.items()):
            raise SystemExit(f"nncodec gave other integers with {setting}")
        return len(data), setting, encode, lambda: nnc.decompress(data)

    tried = [made(cabac_unary_length_minus1=unary) for unary in (0, 1, 2, 4, 7, 10, 15)]
    yield from tried
    best = min(tried, key=lambda one: one[0])[1]
    for scan, skip in ((0, True), (1, False), (1, True)):
        with contextlib.suppress(KeyError):  # it cannot scan some shapes in the other order
            yield made(**best, scan_order=scan, row_skipping=skip)


def with_zipnn(arrays: dict[str, np.ndarray]) -> Iterator[Made]:
    """Its chunks from 32 KiB to its own 256 KiB, and its threshold, on one thread."""
    from zipnn import ZipNN

    (array,) = arrays.values()
    raw, kind = array.tobytes(), {"float32": "float32", "uint16": "bfloat16"}[array.dtype.name]
    for chunk, threshold in itertools.product((1 << 15, 1 << 16, 1 << 17, 1 << 18), (0.95, 0.99)):
        setting = {"compression_chunk": chunk, "compression_threshold": threshold}
        coder = ZipNN(input_format="byte", bytearray_dtype=kind, threads=1, **setting)
        # It turns the bytes that it is given in place.
        data = bytes(coder.compress(bytearray(raw)))
        if bytes(coder.decompress(bytearray(data))) != raw:
            raise SystemExit(f"ZipNN gave other bytes with {setting}")

        def encode(coder: Any = coder) -> Any:
            return coder.compress(bytearray(raw))

        yield len(data), setting, encode, lambda coder=coder, data=data: coder.decompress(bytearray(data))


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:  # a wheel for another torch fails in many ways
        for module in [m for m in sys.modules if m.split(".")[0] == name]:
            del sys.modules[module]
        return False
    return True


if __name__ == "__main__":
    main()
