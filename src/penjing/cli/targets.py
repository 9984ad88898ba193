"""TARGET arguments, and where the bundles of several targets go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from penjing.errors import MissingExtraError
from penjing.runtimes import RUNTIMES, Target


def parse_targets(texts: Sequence[str] | None) -> list[Target]:
    """The targets named, each checked to be installed before any long work; by default ONNX Runtime."""
    targets = [Target.parse(t) for t in texts or ["onnxruntime"]]
    for target in targets:
        RUNTIMES.get(target.runtime).need()
    return targets


@contextmanager
def bundle_folders(folder: Path, targets: Sequence[Target]) -> Iterator[list[tuple[Target, Path]]]:
    """Each target with the folder of its bundle: `folder` itself for one target, a folder inside it for several."""
    if len(targets) == 1:
        yield [(targets[0], folder)]
        return
    names: list[str] = []
    for target in targets:
        same = sum(n == target.runtime or n.startswith(f"{target.runtime}-") for n in names)
        names.append(f"{target.runtime}-{same + 1}" if same else target.runtime)
    yield [(t, folder / n) for t, n in zip(targets, names, strict=True)]


def installed_targets(names: Sequence[str]) -> list[Target]:
    """Those of `names` that are installed; MissingExtraError if none is."""
    found = [Target(runtime=n) for n in names if RUNTIMES.get(n).available()]
    if not found:
        raise MissingExtraError(f"none of {', '.join(names)} is installed", hint=f"pip install 'penjing[{names[0]}]'")
    return found
