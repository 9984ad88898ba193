"""A zoo of small networks of many families: what tests and benchmarks run penjing on (`ZOO`, `build`).

Those of transformers are there if that package is installed (`penjing[transformers]`).
"""

from __future__ import annotations

import importlib.util

from penjing.testing.networks import classic, generative, layers, positions, recurrent  # noqa: F401
from penjing.testing.networks.base import ZOO, Architecture, build, entry, randomise

if importlib.util.find_spec("transformers") is not None:
    from penjing.testing.networks import audio, dense, language, together, vision  # noqa: F401

__all__ = ["ZOO", "Architecture", "build", "entry", "randomise"]
