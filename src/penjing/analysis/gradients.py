"""Gradients of a loss, batch by batch: what Taylor and Hessian criteria look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from penjing.network.network import Network
from penjing.training import call


def gradients(
    network: Network, batches: Iterable[tuple[Any, Any]], loss: Callable[[Any, Any], Tensor]
) -> list[dict[str, Tensor]]:
    """Gradients of `loss(outputs, labels)` by parameter, in eval mode, one dictionary a batch of (inputs, labels)."""
    module, found = network.module(), []
    for inputs, labels in batches:
        module.zero_grad(set_to_none=True)
        torch.autograd.backward(loss(call(module, inputs), labels))
        found.append({
            n: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for n, p in module.named_parameters()
        })  # fmt: skip
    return found
