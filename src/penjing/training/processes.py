"""Several processes started by `accelerate launch` or `torchrun`: who writes, and how all come to hold the same."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast, gather_object, parse_flag_from_env
from torch import nn


def accelerator(**settings: Any) -> Accelerator:
    """What runs a training on the devices and processes that there are."""
    return Accelerator(cpu=_on_cpu(), **settings)


def is_main_process() -> bool:
    """Whether this process is the one that writes files: the only one, or the first."""
    return bool(PartialState(cpu=_on_cpu()).is_main_process)


def count_processes() -> int:
    """How many processes share the work."""
    return int(PartialState(cpu=_on_cpu()).num_processes)


def left_alone() -> str | None:
    """A sentence to warn with where `accelerate launch` was told of several processes and started only this one."""
    # Its launcher for CPUs leaves them to mpirun; where to meet is all that it tells (accelerate/utils/launch.py).
    told = {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ
    if not told or count_processes() > 1:
        return None
    return (
        "accelerate launch was asked for several processes and started one: on CPUs use torchrun --nproc_per_node, "
        "on GPUs add --multi_gpu"
    )


def wait_for_all() -> None:
    """Returns when all processes have come here."""
    PartialState(cpu=_on_cpu()).wait_for_everyone()


def _on_cpu() -> bool:
    # Accelerate has to be told: without a device, processes of torchrun would each take themselves for the only one.
    wanted = parse_flag_from_env("ACCELERATE_USE_CPU")
    return wanted or ("LOCAL_RANK" in os.environ and not torch.accelerator.is_available())


class Team:
    """The processes that share a training: all of them, or, with `alone`, this one."""

    def __init__(self, accelerator: Accelerator, alone: bool) -> None:
        self.size = 1 if alone else accelerator.num_processes
        self.index = 0 if alone else accelerator.process_index
        self._device = accelerator.device

    def agree(self, module: nn.Module) -> None:
        """Gives all the first one's tensors: statistics of norms come from each process's own samples."""
        if self.size > 1:
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data.copy_(broadcast(tensor.detach().contiguous()))

    def first_says(self, value: float) -> float:
        """The first process's `value`, in all of them."""
        if self.size == 1:
            return value
        return float(broadcast(torch.tensor([value], dtype=torch.float64, device=self._device))[0])

    def from_all(self, value: Any) -> list[Any]:
        """Everyone's `value`, in the order of the processes."""
        return [value] if self.size == 1 else list(gather_object([value]))
