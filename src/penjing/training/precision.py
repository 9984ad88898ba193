"""Which type networks multiply in while they train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

PRECISIONS = ("f32", "bf16")


@contextmanager
def autocast(modules: Sequence[nn.Module], device: torch.device, precision: str) -> Iterator[None]:
    """Runs `modules` in `precision`; their outputs are float32 all the same."""
    if precision == "f32":
        yield
        return

    def wide(module: nn.Module) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(device.type, torch.bfloat16):
                # Looked up at each call: training and eval rewrite the class's own.
                outputs = type(module).forward(module, *args, **kwargs)
            return pytree.tree_map(
                lambda t: t.float() if isinstance(t, Tensor) and t.dtype == torch.bfloat16 else t, outputs
            )

        return run

    for module in modules:
        module.forward = wide(module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward
