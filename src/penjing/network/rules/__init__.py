"""Channel rules for ATen operators: what each does to the labels of `penjing.network.labels`."""

from penjing.network.rules import contraction, convolution, elementwise, movement, normalization, recurrent
from penjing.network.rules.base import RULES, Call, trace

__all__ = [
    "RULES",
    "Call",
    "contraction",
    "convolution",
    "elementwise",
    "movement",
    "normalization",
    "recurrent",
    "trace",
]
