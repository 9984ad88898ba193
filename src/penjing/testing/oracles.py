"""Two independent ways to say what a shrunk network must compute.

*Mask*: removing a unit is setting it to zero (exact where no statistic crosses the channels).
*Duplicate*: when half of the units are copies of the others, removing the copies and doubling what reads the rest
changes nothing (exact where nothing sums over the channels without weights).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, fx

from penjing.network import Network, capture
from penjing.network import graph as flat
from penjing.network.channels.groups import Group, Groups, analyse
from penjing.network.channels.remove import remove
from penjing.testing.networks import build

#: How far two networks that compute the same in another order may be apart, relative to the largest output.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """A captured network, an input for it, and its channel groups."""

    name: str
    graph: fx.GraphModule
    example: dict[str, Tensor]
    groups: Groups


@cache
def captured(name: str) -> Network:
    """A network of the zoo."""
    model, inputs = build(name)
    return capture(model, inputs=inputs, name=name)


@cache
def case(name: str, heads: Literal["heads", "dims"] = "heads") -> Case:
    """A network of the zoo with its groups; both are made once."""
    network = captured(name)
    example = inputs_of(network)
    return Case(name, network.graph_module, example, analyse(network.graph_module, example, heads))


def inputs_of(network: Network, batch: int = 2) -> dict[str, Tensor]:
    """Inputs that no network gives constant outputs for: normal numbers, where it takes real ones."""
    generator = torch.Generator().manual_seed(3)
    drawn = network.bind(network.example(batch))
    for spec in network.inputs:
        if spec.dtype.is_floating_point and spec.low < 0:
            drawn[spec.name] = torch.randn(drawn[spec.name].shape, generator=generator).to(spec.dtype)
    return drawn


def run(graph: fx.GraphModule, example: dict[str, Tensor], training: bool = False) -> list[Tensor]:
    """Outputs of a graph, whose own tensors stay as they are, in double precision: with random weights some networks
    make large numbers of the last bits of float32. Quantized graphs run as they are, their grids give float32.
    """
    grids = any("quantize" in str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    precise = _same if grids else _double
    copy = flat.copy(graph, tensors={name: precise(t) for name, t in fresh(graph).items()})
    flat.set_mode(copy.graph, training)
    for node in copy.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, precise)
        node.kwargs = fx.node.map_aggregate(node.kwargs, precise)
    copy.recompile()
    with torch.no_grad():
        return [t for t in copy(*map(precise, example.values())) if isinstance(t, Tensor)]


def _same(value: Any) -> Any:
    return value


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype == torch.float32 else value
    return torch.float64 if value is torch.float32 else value


def larger(example: dict[str, Tensor], batch: int = 3) -> dict[str, Tensor]:
    """Inputs of the same look for another batch."""
    generator = torch.Generator().manual_seed(7)
    return {
        k: t[torch.randint(0, len(t), (batch,), generator=generator)]
        if not t.is_floating_point()
        else torch.randn((batch, *t.shape[1:]), generator=generator)
        for k, t in example.items()
    }


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of the output it is in; infinite for other shapes."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    return max(_apart(x.float(), y.float()) for x, y in zip(a, b, strict=True))


def _apart(x: Tensor, y: Tensor) -> float:
    real = torch.isfinite(x)
    if not torch.equal(torch.where(real, 0.0, x), torch.where(torch.isfinite(y), 0.0, y)):
        return float("inf")
    x, y = x[real], y[real]
    return float((x - y).abs().max() / x.abs().max().clamp_min(1e-6)) if x.numel() else 0.0


def fresh(graph: fx.GraphModule) -> dict[str, Tensor]:
    """Copies of a graph's tensors."""
    return {k: v.detach().clone() for k, v in flat.tensors_of(graph).items()}


def chosen(group: Group, seed: int) -> list[tuple[int, int]]:
    """Units to remove, each with the unit that stays for it: pairs drawn at random."""
    units = list(range(group.size))
    random.Random(f"{seed} {group.name}").shuffle(units)
    return list(zip(units[::2], units[1::2], strict=False))


def removal(group: Group, units: list[int]) -> tuple[str, int, list[int]]:
    """What removes these units of a group."""
    member = group.members[0]
    return member.parameter, member.dim, member.indices[units, 0].tolist()


def maskable(group: Group) -> bool:
    """Whether removing a unit is setting it to zero."""
    return group.inexact is None and group.size > 1


def copyable(group: Group) -> bool:
    """Whether units may be copied and the readers of the rest doubled."""
    tied = any("consumer" in m.roles and "producer" in m.roles for m in group.members)
    crossed = "weight" in str(group.inexact)
    return not tied and not crossed and group.sums is None and group.size > 1 and bool(group.consumers)


def masked(case: Case, seed: int = 0) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graph with half of the units at zero, and the shrunk graph."""
    tensors, removals = fresh(case.graph), []
    for group in filter(maskable, case.groups):
        units = [gone for gone, _ in chosen(group, seed)]
        removals.append(removal(group, units))
        for m in group.members:
            if "parametrizations" in m.parameter and m.role != "consumer":
                continue  # a weight of norm zero has no direction
            tensors[m.parameter].index_fill_(m.dim, torch.as_tensor(m.indices[units].reshape(-1)), 0)
    return flat.copy(case.graph, tensors=tensors), remove(case.graph, case.groups, removals).graph_module


def duplicated(case: Case, seed: int = 0) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graph with half of the units copies of others, and the graph without the copies and with doubled readers."""
    tensors, removals, readers = fresh(case.graph), [], []
    for group in filter(copyable, case.groups):
        pairs = chosen(group, seed)
        removals.append(removal(group, [gone for gone, _ in pairs]))
        for m in group.members:
            to, source = (torch.as_tensor(m.indices[[p[i] for p in pairs]].reshape(-1)) for i in (0, 1))
            tensors[m.parameter].index_copy_(m.dim, to, tensors[m.parameter].index_select(m.dim, source))
            if "consumer" in m.roles:
                readers.append((m, source))
    big = flat.copy(case.graph, tensors={k: v.clone() for k, v in tensors.items()})
    for m, source in readers:
        doubled = tensors[m.parameter].index_select(m.dim, source) * 2
        tensors[m.parameter].index_copy_(m.dim, source, doubled)
    ready = flat.copy(case.graph, tensors=tensors)
    return big, remove(ready, case.groups, removals).graph_module
