"""Bytes and speed of packages against zstd-19, lzma, nncodec and ZipNN, on int8, int4, sparse and float tensors.

    python benchmarks/package.py [--weights FOLDER] [--peers PYTHON ...] [--only TEXT] [--out FILE] [--rounds 5]

PYTHON is the interpreter of an environment with nncodec or zipnn or both; several where they agree on no numpy. nncodec
gets the integers, ZipNN the floats, both their best setting of some (benchmarks/package_peers.py).

Prints one JSON object. Networks are the safetensors files of FOLDER (default: ../shared/data/weights), quantized here
row by row, the largest magnitude to the end of the range; where there are none, random ones take their place. Speeds
are of one core, the best of ROUNDS by processor time, in 10^6 raw bytes a second. zstd, lzma and ZipNN get the same
numbers as one run of bytes, nncodec tensors with names; a package's bytes include its index with the tensors' names.
"5 M int8" is ResNet-56 six times, its kernels turned over and transposed, so that nothing repeats; then as it is.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from safetensors.numpy import load_file

from penjing import package

Arrays = dict[str, np.ndarray]


def networks(folder: Path) -> dict[str, Arrays]:
    found = {f.stem: load_file(f) for f in sorted(folder.glob("*.safetensors"))}
    if found:
        return found
    rng = np.random.default_rng(0)
    return {
        "random": {
            f"{i}.weight": (rng.standard_t(5, (256, 2304)) * rng.uniform(0.5, 2, (256, 1)) / 50).astype(np.float32)
            for i in range(8)
        }
    }


def quantized(arrays: Arrays, bits: int, sparsity: float = 0.0) -> Arrays:
    """The tensors of two axes or more on a symmetric grid for each row."""
    out = {}
    for name, array in arrays.items():
        if array.ndim < 2:
            continue
        rows = array.astype(np.float32).reshape(len(array), -1)
        if sparsity:
            rows = np.where(np.abs(rows) < np.quantile(np.abs(rows), sparsity), 0, rows)
        top = 2 ** (bits - 1) - 1
        scale = np.abs(rows).max(axis=1, keepdims=True) / top
        out[name] = np.rint(rows / np.where(scale > 0, scale, 1)).astype(np.int8).reshape(array.shape)
    return out


def grown(arrays: Arrays, times: int, *, turned: bool) -> Arrays:
    """A network several times over; turned: each time with another reflection or transposition of its kernels."""
    out = {}
    for n in range(times):
        for name, array in arrays.items():
            again = array
            if turned and array.ndim == 4:
                again = again[..., ::-1] if n & 1 else again
                again = again[..., ::-1, :] if n & 2 else again
                again = again.swapaxes(2, 3) if n & 4 else again
            elif turned:
                again = np.roll(array, n, axis=-1)
            out[f"{n}.{name}"] = np.ascontiguousarray(again)
    return out


def by_peers(pythons: list[Path], jobs: dict[str, Arrays]) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Versions, and for each job what each peer made of it."""
    versions: dict[str, str] = {}
    rows: dict[str, dict[str, Any]] = {name: {} for name in jobs}
    with tempfile.TemporaryDirectory() as folder:
        for number, arrays in enumerate(jobs.values()):
            if all(a.dtype == np.int8 for a in arrays.values()):
                np.savez(Path(folder) / f"{number}.npz", **arrays)
            else:
                np.savez(
                    Path(folder) / f"{number}.npz", floats=np.concatenate([a.reshape(-1) for a in arrays.values()])
                )
        for python in pythons:
            script = str(Path(__file__).with_name("package_peers.py"))
            known = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run([str(python), script, folder], stdout=subprocess.PIPE, text=True, env=known)
            if done.returncode:
                raise SystemExit(f"the peers of {python} failed")
            found = json.loads(done.stdout.strip().splitlines()[-1])
            versions |= found["versions"]
            for number, name in enumerate(jobs):
                rows[name] |= found["rows"].get(str(number), {})
    return versions, rows


def bfloat16(arrays: Arrays) -> Arrays:
    return {k: (a.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for k, a in arrays.items() if a.size > 1}


def best(action: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    times = []
    for _ in range(rounds):
        began = time.process_time()
        value = action()
        times.append(time.process_time() - began)
    return min(times), value


def measure(arrays: Arrays, rounds: int, others: dict[str, Any]) -> dict[str, Any]:
    raw = b"".join(a.tobytes() for a in arrays.values())
    elements = sum(a.size for a in arrays.values())
    write, data = best(lambda: package.encode("", arrays), rounds)
    read, got = best(lambda: package.decode(data), rounds)
    for name, array in arrays.items():
        assert got[1][name].tobytes() == array.tobytes(), name
    peers = {
        "zstd-19": {"bytes": len(zstandard.ZstdCompressor(level=19).compress(raw))},
        "lzma": {"bytes": len(lzma.compress(raw, preset=9))},
        **others,
    }
    return {
        "elements": elements,
        "raw_bytes": len(raw),
        "bytes": len(data),
        "bits_per_element": round(8 * len(data) / elements, 4),
        "encode_mb_per_s": round(len(raw) / 1e6 / write, 1),
        "decode_mb_per_s": round(len(raw) / 1e6 / read, 1),
        "peers": peers,
        "smallest": len(data) <= min(peer["bytes"] for peer in peers.values()),
    }


def machine() -> dict[str, Any]:
    model = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "zstd": ".".join(map(str, zstandard.ZSTD_VERSION)),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).resolve().parent.parent
    parser.add_argument("--weights", type=Path, default=here.parent / "shared" / "data" / "weights")
    parser.add_argument("--peers", type=Path, nargs="+", default=[], metavar="PYTHON", help="with nncodec or zipnn")
    parser.add_argument("--only", default="", metavar="TEXT", help="jobs whose name holds it")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    nets = networks(args.weights)
    every = {f"{net}.{k}": a for net, arrays in nets.items() for k, a in arrays.items() if a.dtype.kind == "f"}
    chosen = {
        k: v for k, v in nets.items() if k in ("resnet56-cifar10", "resnet20-cifar10", "mlperf-dscnn-kws")
    } or nets
    jobs: dict[str, Arrays] = {}
    for name, arrays in {**chosen, "all": every}.items():
        jobs[f"{name} int8"] = quantized(arrays, 8)
        jobs[f"{name} int8, 80 % zeros"] = quantized(arrays, 8, 0.8)
        jobs[f"{name} int4"] = quantized(arrays, 4)
    jobs["all float32"] = {k: a for k, a in every.items() if a.dtype == np.float32}
    jobs["all bfloat16"] = bfloat16(every)
    large = quantized(
        next(iter(chosen.values())) if "resnet56-cifar10" not in chosen else chosen["resnet56-cifar10"], 8
    )
    jobs["5 M int8"] = grown(large, 6, turned=True)
    jobs["5 M int8, six times the same"] = grown(large, 6, turned=False)
    jobs = {name: arrays for name, arrays in jobs.items() if args.only in name}
    versions, others = by_peers(args.peers, jobs)
    results = {}
    for name, arrays in jobs.items():
        print(f"{name} …", file=sys.stderr, flush=True)
        results[name] = measure(arrays, args.rounds, others[name])
        print(json.dumps(results[name]), file=sys.stderr, flush=True)
    text = json.dumps({"benchmark": "package", "machine": machine(), "peers": versions, "results": results}, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
