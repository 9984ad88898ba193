"""Runtimes: export with a parity gate, load, run, and say what was really executed. One file a runtime."""

from penjing.runtimes import ort, ov, pytorch
from penjing.runtimes.base import (
    RUNTIMES,
    Artifact,
    Executed,
    Runtime,
    Session,
    Target,
    get_runtime,
    load,
    register,
    uncompressed_settings,
)
from penjing.runtimes.cpu import available_cores, integer_products_saturate
from penjing.runtimes.parity import Parity

__all__ = [
    "RUNTIMES",
    "Artifact",
    "Executed",
    "Parity",
    "Runtime",
    "Session",
    "Target",
    "available_cores",
    "get_runtime",
    "integer_products_saturate",
    "load",
    "ort",
    "ov",
    "pytorch",
    "register",
    "uncompressed_settings",
]
