"""Two independent ways to say what a shrunk network must compute.

*Mask*: removing a unit is setting it to zero (exact where no statistic crosses the channels).
*Duplicate*: when half of the units are copies of the others, removing the copies and doubling what reads the rest
changes nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, fx
from zoo import build

import penjing as pj
from penjing.network import graph as flat
from penjing.network.channels.groups import Group, Groups, analyse
from penjing.network.channels.remove import remove

TOLERANCE = 1e-4

SUMMED = {("single_head_attention", "qkv")}
"""Groups that a product of two activations sums over: dropping copies halves that sum, so only the mask can judge
them."""


@dataclass(frozen=True)
class Case:
    name: str
    graph: fx.GraphModule
    example: dict[str, Tensor]
    groups: Groups


@cache
def captured(name: str) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    model, inputs = build(name)
    network = pj.capture(model, inputs=inputs)
    return network.graph_module, network.bind(inputs)


@cache
def case(name: str, heads: str = "heads") -> Case:
    graph, example = captured(name)
    return Case(name, graph, example, analyse(graph, example, heads))


def run(graph: fx.GraphModule, example: dict[str, Tensor], training: bool = False) -> list[Tensor]:
    copy = flat.copy(graph, tensors={k: v.detach().clone() for k, v in flat.tensors_of(graph).items()})
    flat.set_mode(copy.graph, training)
    copy.recompile()
    with torch.no_grad():
        return [t for t in copy(*example.values()) if isinstance(t, Tensor)]


def larger(example: dict[str, Tensor], batch: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        k: t[torch.randint(0, len(t), (batch,), generator=generator)]
        if not t.is_floating_point()
        else torch.randn((batch, *t.shape[1:]), generator=generator)
        for k, t in example.items()
    }


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    return max(float((x - y).abs().max() / x.abs().max().clamp_min(1e-6)) for x, y in zip(a, b, strict=True))


def fresh(graph: fx.GraphModule) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in flat.tensors_of(graph).items()}


def chosen(group: Group, seed: int) -> list[tuple[int, int]]:
    """Units to remove, each with the unit that stays for it: pairs drawn at random."""
    units = list(range(group.size))
    random.Random(f"{seed} {group.name}").shuffle(units)
    return list(zip(units[::2], units[1::2], strict=False))


def removal(group: Group, units: list[int]) -> tuple[str, int, list[int]]:
    member = group.members[0]
    return member.parameter, member.dim, member.indices[units, 0].tolist()


def masked(case: Case, seed: int = 0) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graph with units at zero, and the shrunk graph."""
    tensors, removals = fresh(case.graph), []
    for group in case.groups:
        if group.inexact is not None or group.size < 2:
            continue
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
    for group in case.groups:
        tied = any("consumer" in m.roles and "producer" in m.roles for m in group.members)
        if (case.name, group.name) in SUMMED:
            continue
        if tied or group.size < 2 or not group.consumers or "weight" in str(group.inexact):
            continue
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
