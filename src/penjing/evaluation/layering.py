"""Quality layers of a network's package, chosen and judged on samples: what each tensor's errors do, what each layer
gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from penjing.data import Data
from penjing.errors import InputError
from penjing.network import Network
from penjing.package.archive import LADDER
from penjing.package.contents import Rung, describe
from penjing.package.layered import Layered, layerable
from penjing.progress import SILENT, Progress
from penjing.recipe.judging import scores_of
from penjing.task import Task

_SAMPLES = 128  # on which harms are measured
_LARGE = 0.55  # share of the bytes from which on a first layer is said to be large
_POOR = 6.0  # dB below which it is said to be poor
_LOST = 1 / 3  # part of the metric, without which it is

Array = NDArray[Any]


def layered(
    network: Network,
    layers: int,
    *,
    packed: tuple[str, dict[str, Array], dict[str, Any]] | None = None,
    data: Data | None = None,
    task: Task | None = None,
    progress: Progress = SILENT,
) -> bytes:
    """The bytes of `network`'s package in layers.

    packed: topology, arrays and metadata, where they are more than the network's own.
    data: the harm of errors in each tensor is measured on 128 of them, as the change of the outputs; otherwise errors
    count in relation to the weights. With a task, its metric on `data` after each layer is kept in the package, else
    the weights' SQNR. A first layer that is large or poor is noted. Raises InputError where nothing can be cut,
    DataError.
    """
    topology, arrays, metadata = packed or (*network.state(), {"name": network.name})
    names = _candidates(network, arrays)
    if not names:
        raise InputError(
            f"{network.name} holds nothing that can be cut into layers", hint="int8 grids and float32 matrices can be"
        )
    made = Layered(topology, arrays, layers=layers, harms=_shares(network, names), progress=progress)
    if data is not None:
        judge = _Judge(network, data)
        harms = judge.harms(names, made.arrays(1), progress)
        other = Layered(topology, arrays, layers=layers, harms=harms, first=made.first, progress=progress)
        # What errors do one by one is not all of what they do together: the samples decide.
        made = min(made, other, key=lambda each: judge.change(topology, each.arrays(1)))
    quality = _measured(made, topology, data, task, progress) if data is not None and task is not None else _told(made)
    coded = made.encode({**metadata, LADDER: quality})
    if text := _doubts(describe(coded).ladder, higher_is_better=task is None or task.higher_is_better):
        progress.note(text)
    return coded


def _candidates(network: Network, arrays: dict[str, Array]) -> list[str]:
    """Tensors that mean nearly the same when they are known coarsely: weights, codes of grids, not codes of tables."""
    kinds, shared, tensors = network.code_kinds(), network.shared_levels(), network.tensors()
    fit = [n for n in layerable(arrays) if n in tensors and n not in shared]
    return [n for n in fit if tensors[n].is_floating_point() or n in kinds]


def _shares(network: Network, names: list[str]) -> dict[str, float]:
    """Relative errors of all weights count alike."""
    tensors, found = network.tensors(), {}
    for name in names:
        power = float(tensors[name].detach().double().square().sum())
        found[name] = tensors[name].numel() / power if power and math.isfinite(power) else 0.0
    return found


class _Judge:
    """How much a network's outputs on some samples change, relative to their squares."""

    def __init__(self, network: Network, data: Data) -> None:
        self._probe = Network.from_state(*network.state())  # its tensors may be changed
        self._inputs = network.bind(data.first(_SAMPLES if network.batch_is_dynamic else network.inputs[0].shape[0]))
        self._exact = self._outputs(network)
        self._power = sum(float(o.square().sum()) for o in self._exact)

    def _outputs(self, network: Network) -> list[Tensor]:
        return [o.double() for o in network.run(self._inputs) if o.is_floating_point()]

    def _change(self, network: Network) -> float:
        pairs = zip(self._outputs(network), self._exact, strict=True)
        found = sum(float((a - b).square().sum()) for a, b in pairs) / (self._power or 1.0)
        return found if math.isfinite(found) else math.inf

    def change(self, topology: str, arrays: dict[str, Array]) -> float:
        """That of the network with other values."""
        return self._change(Network.from_state(topology, arrays))

    def harms(self, names: list[str], coarse: dict[str, Array], progress: Progress) -> dict[str, float]:
        """What a squared error of 1 in one value of each tensor does where it is known as coarsely as in `coarse`."""
        found = {}
        with progress.task("what each tensor's errors do", len(names)) as advance:
            for name in names:
                held = self._probe.tensors()[name]
                exact = held.detach().clone()
                with torch.no_grad():
                    held.copy_(torch.from_numpy(coarse[name].copy()))
                    error = float((held.double() - exact.double()).square().sum())
                    change = self._change(self._probe)
                    held.copy_(exact)
                found[name] = change / error if error and math.isfinite(change) else 0.0
                advance(1)
        least = min((h for h in found.values() if h > 0), default=1.0)
        return {n: h or least for n, h in found.items()}  # what was not felt at all is cut like what is felt least


def _measured(made: Layered, topology: str, data: Data, task: Task, progress: Progress) -> dict[str, Any]:
    values, count = [], 0
    for layer in range(1, made.layers + 1):
        network = Network.from_state(topology, made.arrays(layer))
        scores = scores_of(network, data, task, progress=progress)
        values.append(float(scores.double().mean()))
        count = len(scores)
    if not all(map(math.isfinite, values)):
        raise InputError(f"{task.metric} is not a finite number after every layer", hint="leave task away")
    return {"name": task.metric, "unit": task.unit, "n": count, "values": values}


def _told(made: Layered) -> dict[str, Any]:
    found = [made.sqnr(layer) for layer in range(1, made.layers + 1)]
    return {"name": "SQNR", "unit": "dB", "values": [round(v, 2) if math.isfinite(v) else None for v in found]}


def _doubts(ladder: Sequence[Rung], *, higher_is_better: bool) -> str:
    """What a person should know of a first layer that is larger or worse than usual; nothing of others."""
    first, last = ladder[0], ladder[-1]
    if first.value is None or last.value is None:
        poor = first.value is not None and first.value < _POOR
    else:
        loss = last.value - first.value if higher_is_better else first.value - last.value
        poor = loss > _LOST * abs(last.value)
    said = [
        *(["larger than usual, as in sparse or small networks"] if first.share > _LARGE else []),
        *(["poor: do not rely on it alone"] if poor else []),
    ]
    return f"the first layer is {', and '.join(said)} ({first})" if said else ""


__all__ = ["layered"]
