"""The machine and the software a report was taken with. No host name, user name or path: reports are passed around."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("penjing", "torch", "numpy", "onnx", "onnxruntime", "openvino", "onnxscript")
_TELLING = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
    "bf16",
)


def environment(*, seed: int | None = None, threads: int | None = None) -> dict[str, Any]:
    """Software versions, processor, cores, memory and the seed, as plain values."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _cpu_field("model name") or platform.processor() or platform.machine(),
        "instructions": _instructions(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory(),
    }
    if threads is not None:
        found["threads"] = threads
    if seed is not None:
        found["seed"] = seed
    return found


def versions(packages: tuple[str, ...] = _PACKAGES) -> dict[str, str]:
    """Versions of those of ``packages`` that are installed, by name."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_field(name: str) -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() == name:
            return value.strip()
    return None


def _instructions() -> list[str]:
    flags = (_cpu_field("flags") or _cpu_field("features") or "").split()
    return [flag for flag in _TELLING if flag in flags]


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
