"""Channel rules for ATen operators: what each does to the labels of `penjing.network.channels.labels`."""

from penjing.network.channels.rules import contraction, convolution, elementwise, movement, normalization, recurrent
from penjing.network.channels.rules.base import RULES, Call, trace

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
