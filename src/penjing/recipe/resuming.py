"""A folder that keeps what long work has reached, so that it goes on there after it was killed.

    run.json                   whose work it is: settings, network, task, samples and seed, as digests
    round-0003.safetensors     the Plan after so many rounds; the one before is deleted once this one is whole
    plan.safetensors           the Plan in the end

Every file appears whole or not at all (`penjing.files`).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from penjing.data import Data
from penjing.errors import RecipeError
from penjing.files import appearing
from penjing.network import Network
from penjing.recipe.context import Context
from penjing.recipe.plans import Plan
from penjing.recipe.steps import Step

#: Samples that tell one data set from another, beside their number.
_SAMPLES = 256
_NAMES = {
    "settings": "settings",
    "network": "network",
    "original": "original network",
    "teachers": "teachers",
    "task": "task",
    "data": "samples",
    "seed": "seed",
}


class Rounds:
    """The rounds of one run in a folder, which is made if it is not there.

    Raises RecipeError if the folder holds another run's: other settings, network, samples, task or
    seed. Samples must be read alike every time; a Dataset that varies them at random by itself is another one each
    time.
    """

    def __init__(self, folder: str | Path, step: Step, network: Network, context: Context) -> None:
        self.folder, self._step = Path(folder), step
        run = {
            "settings": {step.name: step.done()},
            "network": network_digest(network),
            "original": network_digest(context.original),
            "teachers": {name: [network_digest(n) for n in held] for name, held in context.teachers.items()},
            "task": context.task.name if context.task else None,
            "data": None if context.data is None else _data_digest(context.data, context.seed),
            "seed": context.seed,
        }
        file = self.folder / "run.json"
        text = json.dumps(run, indent=2)  # what comes back from JSON is compared: tuples are lists there
        if not file.exists():
            with appearing(file) as aside:
                aside.write_text(text, encoding="utf8")
            return
        try:
            known = json.loads(file.read_text(encoding="utf8"))
            others = [word for key, word in _NAMES.items() if known[key] != json.loads(text)[key]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecipeError(
                f"{step.name}.resume: {file} cannot be read ({error})", hint="delete the folder to begin anew"
            ) from error
        if others:
            raise RecipeError(
                f"{step.name}.resume: {self.folder} holds another run, with other {' and '.join(others)}",
                hint="name another folder, or delete this one to begin anew",
            )

    def finished(self) -> Plan | None:
        """The Plan in the end, if it came to that."""
        file = self.folder / "plan.safetensors"
        return Plan.load(file) if file.exists() else None

    def latest(self) -> tuple[int, Plan] | None:
        """The last round that was kept, and the Plan after it."""
        kept = self._kept()
        return (max(kept), Plan.load(kept[max(kept)])) if kept else None

    def keep(self, number: int, plan: Plan) -> None:
        """Writes the Plan after round `number`."""
        earlier = self._kept()
        plan.save(self.folder / f"round-{number:04}.safetensors")
        for file in earlier.values():
            file.unlink(missing_ok=True)

    def finish(self, plan: Plan) -> None:
        """Writes the Plan in the end."""
        plan.save(self.folder / "plan.safetensors")
        for file in self._kept().values():
            file.unlink(missing_ok=True)

    def _kept(self) -> dict[int, Path]:
        files = {f.stem.removeprefix("round-"): f for f in self.folder.glob("round-*.safetensors")}
        return {int(number): file for number, file in files.items() if number.isdecimal()}


def network_digest(network: Network) -> str:
    """SHA-256 of graph and tensors. What happened to it before does not matter."""
    topology, arrays = network.replace(history=()).state()
    found = hashlib.sha256(topology.encode())
    for name in sorted(arrays):
        _take(found, arrays[name], name)
    return found.hexdigest()


def _data_digest(data: Data, seed: int) -> str:
    """SHA-256 of the number of samples, if it is known, and of the first ones."""
    try:
        found = hashlib.sha256(str(len(data)).encode())
    except TypeError:
        found = hashlib.sha256()
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # a DataLoader that shuffles begins alike every time
        for batch in data.batches(64, limit=_SAMPLES):
            for path, value in pytree.tree_leaves_with_path(batch):
                if isinstance(value, Tensor):
                    _take(found, value.detach().cpu().numpy(), pytree.keystr(path))
    return found.hexdigest()


def _take(found: Any, array: np.ndarray[Any, Any], name: str) -> None:
    found.update(f"{name} {array.dtype.str} {array.shape}".encode())
    found.update(np.ascontiguousarray(array).tobytes())
