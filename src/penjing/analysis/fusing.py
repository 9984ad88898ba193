"""Weights of one network brought to another's shapes, mixed with them, and the norms' statistics taken anew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from penjing.analysis.expose import correlations, exposing, most_alike
from penjing.analysis.features import values_of
from penjing.analysis.footprint import footprint
from penjing.analysis.operators import operator_name
from penjing.analysis.ranking import rank
from penjing.network import Network, RemoveChannels, SetWeights
from penjing.network.channels.groups import Group
from penjing.training import call

#: How channels were chosen where nothing is known but weights.
LARGEST = "the largest"


@dataclass(frozen=True)
class Fitted:
    """Tensors of a source by the names that the student has for them, in the student's shapes; `kept` says of each
    group of channels that was cut, by its name, how many stay of how many, and how they were chosen; `left` names the
    student's tensors that the source has nothing for."""

    tensors: Mapping[str, Tensor]
    kept: Mapping[str, tuple[int, int, str]] = field(default_factory=dict)
    left: tuple[str, ...] = ()


def fit(student: Network, source: Network, inputs: Any = None) -> Fitted:
    """The tensors of `source` that `student` has, too (by name, or by a name that ends alike), each cut to the
    student's shape: whole channels go, with all that is coupled with them.

    Those stay that, with `inputs`, correlate most with the student's own; else those of the largest norms. What has no
    counterpart, or does not come to the student's shape in this way, is left out.
    """
    names = _paired(student, source)
    mine, theirs = student.tensors(), source.tensors()
    removals: list[RemoveChannels] = []
    kept: dict[str, tuple[int, int, str]] = {}
    if any(mine[n].shape != theirs[s].shape for n, s in names.items()):
        back = {s: n for n, s in names.items()}
        sizes = {g.name: size for g in source.groups() if (size := _size(g, back, mine, theirs)) is not None}
        groups = [g for g in source.groups() if g.name in sizes]
        orders = {
            r.group.name: r.order
            for r in rank(source, groups, "l2", [], footprint(source), by_cost=False, refitted=False)
        }
        for group in groups:
            stay = None if inputs is None else _matched(student, source, group, back, inputs)
            gone = orders[group.name][: group.size - sizes[group.name]]
            if stay is not None:
                gone = [unit for unit in range(group.size) if unit not in stay]
            how = LARGEST if stay is None else "the most alike"
            member = group.members[0]
            places = tuple(int(i) for i in member.indices[gone].flatten())
            removals.append(RemoveChannels(parameter=member.parameter, dim=member.dim, indices=places))
            kept[group.name] = (sizes[group.name], group.size, how)
    cut = source.apply(removals).tensors() if removals else theirs
    found = {
        n: cut[s].detach() for n, s in names.items() if cut[s].shape == mine[n].shape and cut[s].dtype == mine[n].dtype
    }
    return Fitted(found, kept, tuple(n for n in student.parameter_names if n not in found))


def _paired(student: Network, source: Network) -> dict[str, str]:
    """The source's name of each tensor that the student has."""
    theirs, found = source.tensors(), {}
    for name in student.tensors():
        alike = [s for s in theirs if s.endswith(f".{name}") or name.endswith(f".{s}")]
        if name in theirs or len(alike) == 1:
            found[name] = name if name in theirs else alike[0]
    return found


def _size(
    group: Group, back: Mapping[str, str], mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> int | None:
    """How many units the student has of a source's group, if it has fewer and all that it has of it says the same."""
    sizes = set()
    for member in group.members:
        own = mine.get(back.get(member.parameter, ""))
        whole = theirs[member.parameter]
        if own is None:
            continue
        if own.ndim != whole.ndim or member.indices.size != whole.shape[member.dim]:
            return None  # another layer, or one that reads several groups
        sizes.add(own.shape[member.dim] / member.indices.shape[1])
    size = sizes.pop() if len(sizes) == 1 else 0
    return int(size) if size == int(size) and 0 < size < group.size else None


@torch.no_grad()
def _matched(student: Network, source: Network, group: Group, back: Mapping[str, str], inputs: Any) -> set[int] | None:
    """The units of a source's group whose values correlate most with the student's, over all layers that make them."""
    makers = [
        (back[m.parameter], m.parameter) for m in group.producers if m.parameter in back and m.indices.shape[1] == 1
    ]
    likeness = []
    for own, other in makers:
        values = [(n, _value_of(n, p)) for n, p in ((student, own), (source, other))]
        if any(v is None for _, v in values):
            continue
        seen = [exposing(n, [str(v)]).run(inputs)[-1] for n, v in values]
        dim = values_of(student, inputs)[str(values[0][1])].channels
        if seen[0].ndim == seen[1].ndim and seen[1].shape[dim] == group.size:
            likeness.append(correlations(seen[0], seen[1], dim))
    chosen = most_alike(torch.stack(likeness).mean(0)) if likeness else None
    return None if chosen is None else set(chosen.tolist())


def _value_of(network: Network, parameter: str) -> str | None:
    """The graph value that a parameter makes."""
    for node in network.graph_module.graph.nodes:
        if any(s.op == "get_attr" and str(s.target) == parameter for s in node.all_input_nodes):
            return str(node.name)
    return None


def mixed(
    network: Network, others: Sequence[Mapping[str, Tensor]], shares: Sequence[float], selected: Iterable[str]
) -> list[SetWeights]:
    """`selected` floating-point tensors as sums: each of `others` by its share, the network's own by what is left; a
    tensor that one of them lacks stays as it is. Masked weights stay zero."""
    edits = []
    tensors = network.tensors()
    for name in selected:
        own = tensors[name].detach()
        if not own.is_floating_point() or any(name not in other for other in others):
            continue
        value = own * (1 - sum(shares))
        for other, share in zip(others, shares, strict=True):
            value = value + other[name] * share
        edits.append(SetWeights(parameter=name, value=value * network.masks[name] if name in network.masks else value))
    return edits


@torch.no_grad()
def restated(network: Network, batches: Iterable[Any], selected: Iterable[str]) -> list[SetWeights]:
    """`selected` statistics of batch norms as the means over `batches` of inputs: those of mixed weights are no mix of
    theirs (Izmailov et al. 2018, "Averaging weights leads to wider optima", §3.1)."""
    module = network.module()
    norms = [n for n in module.graph.nodes if operator_name(n) == "aten::batch_norm" and n.args[3] is not None]
    names = {str(a.target) for n in norms for a in n.args[3:5] if a.op == "get_attr"} & set(selected)
    if not names:
        return []
    for number, inputs in enumerate(batches, 1):
        for node in norms:
            node.update_arg(5, True)
            node.update_arg(6, 1 / number)
        module.recompile()
        call(module, inputs)
    held = module.state_dict()
    return [SetWeights(parameter=name, value=held[name].clone()) for name in sorted(names)]
