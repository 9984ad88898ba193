"""What this machine's processor can do."""

from __future__ import annotations

import functools
import os
from contextlib import suppress
from pathlib import Path

import psutil


def available_cores() -> int:
    """Physical cores that this process may use (its affinity, not the machine's total)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction sets of this CPU as Linux names them; empty where that cannot be read."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def integer_products_saturate() -> bool:
    """Whether this CPU adds pairs of u8×s8 products in 16 bits (x86 before VNNI), which overflows at full range."""
    flags = cpu_flags()
    return "avx2" in flags and not flags & {"avx512_vnni", "avx_vnni", "amx_int8"}
