"""penjing: neural-network compression, proven by measurement on the runtime that will run it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from penjing._version import __version__

if TYPE_CHECKING:
    from penjing.compression import Result, compress
    from penjing.deployment import Bundle, deploy, pack, unpack
    from penjing.errors import PenjingError
    from penjing.evaluation import Report, Sensitivity, evaluate, sensitivity
    from penjing.methods import (
        CodeWeights,
        Distill,
        Equalize,
        Factorize,
        Finetune,
        FuseWeights,
        Gradually,
        MergeFactors,
        MixPrecision,
        Plan,
        PruneChannels,
        PruneHeads,
        PruneLayers,
        PruneWeights,
        Quantize,
        Recipe,
        Regularize,
        SearchAmount,
        ShareWeights,
        Step,
        TrainLowEntropy,
        TrainQuantized,
    )
    from penjing.network import Network, capture
    from penjing.runtimes import Target
    from penjing.task import Task

_HOMES = {
    "Bundle": "penjing.deployment",
    "CodeWeights": "penjing.methods",
    "Distill": "penjing.methods",
    "Equalize": "penjing.methods",
    "Factorize": "penjing.methods",
    "Finetune": "penjing.methods",
    "FuseWeights": "penjing.methods",
    "Gradually": "penjing.methods",
    "MergeFactors": "penjing.methods",
    "MixPrecision": "penjing.methods",
    "Network": "penjing.network",
    "PenjingError": "penjing.errors",
    "Plan": "penjing.methods",
    "PruneChannels": "penjing.methods",
    "PruneHeads": "penjing.methods",
    "PruneLayers": "penjing.methods",
    "PruneWeights": "penjing.methods",
    "Quantize": "penjing.methods",
    "Recipe": "penjing.methods",
    "Regularize": "penjing.methods",
    "Report": "penjing.evaluation",
    "Result": "penjing.compression",
    "SearchAmount": "penjing.methods",
    "Sensitivity": "penjing.evaluation",
    "ShareWeights": "penjing.methods",
    "Step": "penjing.methods",
    "Target": "penjing.runtimes",
    "Task": "penjing.task",
    "TrainLowEntropy": "penjing.methods",
    "TrainQuantized": "penjing.methods",
    "capture": "penjing.network",
    "compress": "penjing.compression",
    "deploy": "penjing.deployment",
    "evaluate": "penjing.evaluation",
    "pack": "penjing.deployment",
    "sensitivity": "penjing.evaluation",
    "unpack": "penjing.deployment",
}

__all__ = [
    "Bundle",
    "CodeWeights",
    "Distill",
    "Equalize",
    "Factorize",
    "Finetune",
    "FuseWeights",
    "Gradually",
    "MergeFactors",
    "MixPrecision",
    "Network",
    "PenjingError",
    "Plan",
    "PruneChannels",
    "PruneHeads",
    "PruneLayers",
    "PruneWeights",
    "Quantize",
    "Recipe",
    "Regularize",
    "Report",
    "Result",
    "SearchAmount",
    "Sensitivity",
    "ShareWeights",
    "Step",
    "Target",
    "Task",
    "TrainLowEntropy",
    "TrainQuantized",
    "__version__",
    "capture",
    "compress",
    "deploy",
    "evaluate",
    "pack",
    "sensitivity",
    "unpack",
]


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first used, so that reading a package needs no torch and `--help` is quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'penjing' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
