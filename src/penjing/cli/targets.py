"""TARGET arguments."""

from __future__ import annotations

from collections.abc import Sequence

from penjing.errors import MissingExtraError
from penjing.runtimes import RUNTIMES, Target


def parse_targets(texts: Sequence[str] | None) -> list[Target]:
    """The targets named, each checked to be installed before any long work; by default ONNX Runtime."""
    targets = [Target.parse(t) for t in texts or ["onnxruntime"]]
    for target in targets:
        RUNTIMES.get(target.runtime).need()
    return targets


def installed_targets(names: Sequence[str]) -> list[Target]:
    """Those of `names` that are installed; MissingExtraError if none is."""
    found = [Target(runtime=n) for n in names if RUNTIMES.get(n).available()]
    if not found:
        raise MissingExtraError(f"none of {', '.join(names)} is installed", hint=f"pip install 'penjing[{names[0]}]'")
    return found
