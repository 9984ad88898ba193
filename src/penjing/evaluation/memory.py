"""Peak memory of an artefact, taken in a fresh process that holds nothing but Python, the runtime and the artefact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.errors import TargetError

_PROBE = Path(__file__).with_name("probe.py")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak resident memory of a fresh process that opened and ran one artefact.

    Attributes:
        peak_bytes: the process's peak resident set size.
        before_opening_bytes: its peak before the artefact was opened (Python and the runtime's library alone).
        opening_bytes: by how much opening the artefact raised the peak.
        counted: what is inside ``peak_bytes``, in words.
        batch: samples in the runs.
    """

    peak_bytes: int
    before_opening_bytes: int
    opening_bytes: int
    counted: str
    batch: int

    @property
    def above_idle_bytes(self) -> int:
        """What the artefact and its activations add to an idle process with the runtime's library loaded."""
        return self.peak_bytes - self.before_opening_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with ``above_idle_bytes``."""
        return {**asdict(self), "above_idle_bytes": self.above_idle_bytes}


def peak_memory(
    path: Path,
    inputs: Mapping[str, NDArray[Any]],
    *,
    runtime: str,
    threads: int | None = None,
    precision: str | None = None,
    runs: int = 3,
    timeout_s: float = 300.0,
) -> Memory:
    """Open ``path`` on ``runtime`` in a fresh process, run it ``runs`` times on ``inputs``, and read the peak.

    Raises:
        TargetError: the process failed or ran longer than ``timeout_s`` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="penjing-memory-") as folder:
        feed = Path(folder) / "inputs.npz"
        with feed.open("wb") as file:
            np.savez(file, **dict(inputs))  # type: ignore[arg-type]
        order = {
            "path": str(path),
            "runtime": runtime,
            "threads": threads,
            "precision": precision,
            "inputs": str(feed),
            "runs": runs,
            "package": str(Path(__file__).resolve().parents[2]),
        }
        try:
            done = subprocess.run(
                [sys.executable, "-P", str(_PROBE)],
                input=json.dumps(order),
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
                cwd=folder,
                env=os.environ.copy(),
            )
        except subprocess.TimeoutExpired as error:
            raise TargetError(f"measuring memory on {runtime} took longer than {timeout_s:.0f} s") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise TargetError(f"{runtime} could not run {path.name} in a process of its own: {last[:300]}")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    batch = next((int(value.shape[0]) for value in inputs.values() if value.ndim), 1)
    return Memory(
        peak_bytes=answer["peak_bytes"],
        before_opening_bytes=answer["before_opening_bytes"],
        opening_bytes=answer["opening_bytes"],
        counted=answer["counted"],
        batch=batch,
    )
