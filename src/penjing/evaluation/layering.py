"""Quality layers of a network's package, chosen and judged on samples: what each tensor's errors do, what each layer
gives."""

from __future__ import annotations

import math
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from penjing.data import Data
from penjing.errors import InputError
from penjing.network import Network
from penjing.package.archive import LADDER
from penjing.package.layered import Layered, layerable
from penjing.progress import SILENT, Progress
from penjing.recipe.judging import scores_of
from penjing.task import Task

_SAMPLES = 128  # on which harms are measured
_COARSE = 0.25  # of a tensor's root mean square, about the error with which its harm is measured

Array = NDArray[Any]


def layered(
    network: Network,
    layers: int,
    *,
    data: Data | None = None,
    task: Task | None = None,
    progress: Progress = SILENT,
) -> bytes:
    """The bytes of `network`'s package in layers.

    data: the harm of errors in each tensor is measured on 128 of them, as the change of the outputs; otherwise errors
    count in relation to the weights. With a task, its metric on `data` after each layer is kept in the package, else
    the weights' SQNR. Raises InputError where nothing can be cut, DataError.
    """
    topology, arrays = network.state()
    names = _candidates(network, arrays)
    if not names:
        raise InputError(
            f"{network.name} holds nothing that can be cut into layers", hint="int8 grids and float32 matrices can be"
        )
    harms = _shares(network, names) if data is None else _harms(network, names, data, progress)
    made = Layered(topology, arrays, layers=layers, harms=harms, progress=progress)
    quality = _measured(made, topology, data, task, progress) if data is not None and task is not None else _told(made)
    return made.encode({"name": network.name, LADDER: quality})


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


def _harms(network: Network, names: list[str], data: Data, progress: Progress) -> dict[str, float]:
    """What a squared error of 1 in one value of each tensor does to the outputs, relative to their squares."""
    probe = Network.from_state(*network.state())
    inputs = probe.bind(data.first(_SAMPLES if probe.batch_is_dynamic else probe.inputs[0].shape[0]))
    before = _outputs(probe, inputs)
    power = sum(float(b.square().sum()) for b in before)
    found = {}
    with progress.task("what each tensor's errors do", len(names)) as advance:
        for name in names:
            held = probe.tensors()[name]
            exact = held.detach().clone()
            noise = _noise(exact)
            with torch.no_grad():
                held.copy_(exact + noise if exact.is_floating_point() else _within(exact, noise))
                error = float((held.double() - exact.double()).square().sum())
                after = _outputs(probe, inputs)
                held.copy_(exact)
            change = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))
            found[name] = change / power / error if error and power and math.isfinite(change) else 0.0
            advance(1)
    least = min((h for h in found.values() if h > 0), default=1.0)
    return {n: h or least for n, h in found.items()}  # what was not felt at all is cut like what is felt least


def _noise(exact: Tensor) -> Tensor:
    """Errors as rounding makes them, the same in every run."""
    size = exact.double().square().mean().sqrt() * _COARSE
    if not exact.is_floating_point():
        size = size.clamp(min=0.5)
    return (torch.rand(exact.shape, generator=torch.Generator().manual_seed(0)) - 0.5) * float(2 * size)


def _within(exact: Tensor, noise: Tensor) -> Tensor:
    info = torch.iinfo(exact.dtype)
    return (exact + noise.round()).clamp(info.min, info.max).to(exact.dtype)


def _outputs(network: Network, inputs: Any) -> list[Tensor]:
    return [o.double() for o in network.run(inputs) if o.is_floating_point()]


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


__all__ = ["layered"]
