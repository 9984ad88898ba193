"""A changed float network put on the grids of a quantized one: same scales, new codes.

So that an update is a few small differences of codes, scales must not move. What it costs is told: weights beyond the
ends of their grid are clipped, and the error of rounding is that of grids that were fitted to the weights as they were.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from penjing import digests
from penjing.analysis.passes import fold_batch_norms, fold_pads, outputs_first, simplified
from penjing.errors import InputError
from penjing.network import Network
from penjing.network.graph import DEQUANTIZE
from penjing.network.integers import codes_read
from penjing.tensors.grids import Grid, dequantize, quantize

_ENDLESS = 2**24  # the code of a weight that would be clipped; float32 counts so far


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What putting weights on given grids did.

    codes: how many there are; changed: of them, those that are others than before; clipped: those whose weights lie
    beyond the ends of their grid; sqnr: of the new weights, in dB.
    """

    codes: int
    changed: int
    clipped: int
    sqnr: float

    def __str__(self) -> str:
        return (
            f"{self.changed:,} of {self.codes:,} codes changed ({self.changed / max(self.codes, 1):.1%}), "
            f"{self.clipped:,} weights were clipped, the new weights stand at {self.sqnr:.1f} dB"
        )


def onto_grids(network: Network, parent: Network, *, slack: float = 0.0) -> tuple[Network, Moved]:
    """`network` (float, the same layers as `parent` had before it was quantized) with `parent`'s graph and grids.

    A code stays unless the new weight is further than ½ + `slack` steps from it: with more slack, codes that were
    rounded by other rules than nearest stay where little happened, and deltas get smaller. Tensors that are on no grid
    (float biases) are the new network's. Raises InputError for networks that do not fit each other.
    """
    if not 0 <= slack < 8:
        raise InputError(f"slack must be at least 0 and less than 8 steps, got {slack:g}")
    if network.is_quantized:
        raise InputError(f"{network.name} is quantized already", hint="give the float network that was trained further")
    grids = _grids(parent)
    if not grids or parent.shared_levels():
        what = "shares levels, which" if parent.shared_levels() else "has no integer grids that"
        raise InputError(f"{parent.name} {what} weights cannot be put on", hint="diff the packages as they are")
    beside = {f"{n}{end}" for n in grids for end in ("_scale", "_zero_point")}
    tensors = {n: t.detach() for n, t in parent.tensors().items() if n not in beside}
    source, plain = _source(network, parent.name, tensors, set(grids))
    codes = changed = clipped = 0
    noise = power = 0.0
    topology, arrays = _described(network, parent).state()
    for name, held in tensors.items():
        value = source[name]
        if name not in grids:
            arrays[name] = plain[name]
            continue
        grid, old = grids[name], held.to(torch.int32)
        free = quantize(value, dataclasses.replace(grid, quant_min=-_ENDLESS, quant_max=_ENDLESS), torch.int32)
        new = free.clamp(grid.quant_min, grid.quant_max)
        before = dequantize(old, grid)
        step = (dequantize(old + 1, grid) - before).abs()
        new = torch.where((value - before).abs() <= (0.5 + slack) * step, old, new)
        arrays[name] = new.to(held.dtype).numpy()
        codes, changed = codes + held.numel(), changed + int((new != old).sum())
        clipped += int(((free < grid.quant_min) | (free > grid.quant_max)).sum())
        noise += float((dequantize(new, grid).double() - value.double()).square().sum())
        power += float(value.double().square().sum())
    ratio = 10 * math.log10(power / noise) if power and noise else math.inf
    return Network.from_state(topology, arrays), Moved(codes=codes, changed=changed, clipped=clipped, sqnr=ratio)


def _described(network: Network, parent: Network) -> Network:
    """The parent with the history of the new network, and of this."""
    event = {
        "event": "grids",
        "name": "onto_grids",
        "before": digests.digest(*network.state()),
        "parent": digests.digest(*parent.state()),
    }
    return parent.replace(history=network.history).record(event)


def _source(
    network: Network, parent: str, tensors: dict[str, Tensor], grids: set[str]
) -> tuple[dict[str, Tensor], dict[str, np.ndarray[Any, Any]]]:
    """The new network's tensors under the parent's names and in its shapes, rewritten as quantizing rewrites networks;
    the same as plain values."""
    missing = ""
    for passes in (
        (),
        (fold_batch_norms,),
        (fold_pads, fold_batch_norms),
        (fold_pads, outputs_first, fold_batch_norms),
    ):
        changed, _ = simplified(network, *passes)
        held = {n: t.detach().cpu() for n, t in changed.tensors().items()}
        unlike = [
            n
            for n, t in tensors.items()
            if n not in held or held[n].shape != t.shape or (n not in grids and held[n].dtype != t.dtype)
        ]
        extra = [n for n in held if n not in tensors]  # norms that are not folded yet: weights mean something else
        if not unlike and not extra:
            return held, changed.state()[1]
        missing = missing or (unlike or extra)[0]
    raise InputError(
        f"{network.name} is not the float form of {parent}: tensor '{missing}' is in one alone, or of another shape",
        hint="train the very network further that was quantized; or diff the packages as they are",
    )


def _grids(parent: Network) -> dict[str, Grid]:
    """The grid of every weight that is stored as codes."""
    tensors, found = parent.tensors(), {}
    for node in parent.graph_module.graph.nodes:
        read = codes_read(node) if node.op == "call_function" and node.target in DEQUANTIZE else None
        if read is None:
            continue
        low, high = node.args[-3:-1]
        per_channel = isinstance(node.args[1], fx.Node)
        scale = tensors[str(node.args[1].target)] if per_channel else torch.tensor(float(node.args[1]))
        zero = tensors[str(node.args[2].target)] if per_channel else torch.tensor(int(node.args[2]))
        codes = tensors[str(read.target)]
        axis, group = (int(node.args[3]) if per_channel else None), 0
        if node.args[0] is not read:  # groups of rows: the codes are cut by a view
            axis, group = 0, int(node.args[0].args[1][1])
            scale, zero = scale.reshape(len(codes), -1), zero.reshape(len(codes), -1)
        found[str(read.target)] = Grid(scale.detach(), zero.detach(), int(low), int(high), axis, group)
    return found
