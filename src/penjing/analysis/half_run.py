"""Running a graph in half the time, for what its values are like and not for its answers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from penjing.analysis.operators import ADDITIONS, CONCATENATIONS, CONVOLUTIONS, FUSED, POOLS, VIEWS
from penjing.analysis.operators import operator_name as name_of

_SHORT = {*(c for c in CONVOLUTIONS if "transpose" not in c), "aten::linear", "aten::matmul", "aten::addmm"}
#: What makes small differences no larger; sums may cancel, but those of residual blocks hold up whole networks.
_EITHER = {
    *ADDITIONS, *CONCATENATIONS, *FUSED, *POOLS, *VIEWS,
    "aten::gelu", "aten::hardswish", "aten::hardswish_", "aten::leaky_relu", "aten::silu", "aten::silu_",
}  # fmt: skip


class HalfRun(fx.Interpreter):
    """Runs a graph as it is; with `half`, on processors that multiply bfloat16 faster than float32, convolutions and
    products read that and what is pointwise stays in it, in channels-last layout. Everything else reads float32.

    Values are off by about 2**-8 of their size then: enough to find ranges with, too much to compare answers.
    """

    def __init__(self, module: fx.GraphModule, *, half: bool) -> None:
        super().__init__(module)
        first = next((p for p in module.parameters()), None)
        self.half = half and fast_bfloat16() and (first is None or first.device.type == "cpu")
        self._weights: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """A node's value."""
        if not self.half:
            return super().run_node(n)
        if n.op == "get_attr" and n.users and all(name_of(user) in _SHORT for user in n.users):
            if n.name not in self._weights:
                self._weights[n.name] = _short(super().run_node(n))
            return self._weights[n.name]
        value = super().run_node(n)
        return _laid(value) if n.op == "placeholder" and isinstance(value, Tensor) else value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operator, on bfloat16 if it is a product, on what comes if that makes no difference to it."""
        if self.half and isinstance(target, torch._ops.OpOverload):
            name = target._schema.name
            if name not in _EITHER and not name.endswith("_"):  # what writes in place must not write to a copy
                change = _short if name in _SHORT else _long
                args, kwargs = map_aggregate((args, kwargs), lambda x: change(x) if isinstance(x, Tensor) else x)
            elif target is torch.ops.aten.view.default:  # of what need not be contiguous here
                target = torch.ops.aten.reshape.default
        return super().call_function(target, args, kwargs)


@lru_cache(maxsize=1)
def fast_bfloat16() -> bool:
    """Whether this processor has instructions that multiply bfloat16."""
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _short(x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        return x
    return _laid(x).to(torch.bfloat16)


def _laid(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x


def _long(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x
