"""What a compressed network kept of each part that sensitivity curves are of."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from penjing.errors import InputError
from penjing.evaluation.curves import Sensitivity
from penjing.evaluation.describe import digest
from penjing.network import Network
from penjing.network.channels.groups import Group, Member


def kept_of(curves: Sensitivity, network: Network, baseline: Network | None) -> dict[str, int]:
    """How many units (entries of a weight) of each group of `curves` are left in `network`.

    Groups of which that cannot be told from the parameters that still have their names are left out. Without a
    `baseline` the curves are of `network` itself, of which nothing went: then there are none.

    Raises:
        InputError: the curves are of another network than the baseline.
    """
    measured = network if baseline is None else baseline
    if curves.digest != digest(measured):
        raise InputError(
            f"the sensitivity curves are of another network ({curves.network}) than the "
            f"{'one evaluated' if baseline is None else 'baseline'}",
            hint="measure them again with pj.sensitivity(network, ...), on the network as it was before compression",
        )
    if baseline is None:
        return {}
    if curves.kind == "weights":
        found = {name: _entries(name, network) for name in curves.groups}
    else:
        units = _units(network, baseline)
        found = {name: units.get(name) for name in curves.groups}
    return {name: count for name, count in found.items() if count is not None}


def _entries(name: str, network: Network) -> int | None:
    """Entries of a weight that are neither masked nor removed with a channel."""
    if name in network.masks:
        return int(network.masks[name].sum())
    weight = network.tensors().get(name)
    book = network.shared_levels().get(name)
    if weight is not None and book is not None and bool((network.tensors()[book.levels][:, 0] == 0).all()):
        return int((weight != 0).sum())  # code 0 is zero
    return None if weight is None else weight.numel()


def _units(network: Network, baseline: Network) -> dict[str, int]:
    """Read off the lengths of parameters: a dimension is as long as what is left of the groups that share it, and one
    group of which that is not known yet can be told from the others. Groups no parameter of which is left kept 0.

    What only reads the channels does not count once their makers are gone: it may read others then.
    """
    before, after = baseline.tensors(), network.tensors()
    sharing: dict[tuple[str, int], list[tuple[Group, Member]]] = {}
    known: dict[str, int] = {}
    for group in baseline.groups():
        there = [m for m in group.members if m.parameter in after and after[m.parameter].ndim > m.dim]
        if not there:
            known[group.name] = 0
        for member in group.members:
            sharing.setdefault((member.parameter, member.dim), []).append((group, member))
    axes = [(axis, lot) for axis, lot in sharing.items() if axis[0] in after and after[axis[0]].ndim > axis[1]]
    axes.sort(key=lambda item: all(member.role == "consumer" for _, member in item[1]))
    progress = True
    while progress:
        progress = False
        for (parameter, dim), lot in axes:
            open_ = [(group, member) for group, member in lot if group.name not in known]
            if len(open_) != 1 or not _readable(*open_[0], after):
                continue
            group, member = open_[0]
            gone = before[parameter].shape[dim] - after[parameter].shape[dim]
            gone -= sum((g.size - known[g.name]) * _each(m) for g, m in lot if g.name in known)
            if gone % _each(member) == 0 and 0 <= gone <= group.size * _each(member):
                known[group.name] = group.size - gone // _each(member)
                progress = True
    return known


def _each(member: Member) -> int:
    """Positions a unit."""
    return int(member.indices.shape[1])


def _readable(group: Group, member: Member, after: Mapping[str, Tensor]) -> bool:
    made = not group.producers or any(m.parameter in after for m in group.producers)
    return made or member.role != "consumer"
