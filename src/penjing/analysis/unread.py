"""Units that no layer behind them reads any more: they can go, and nothing changes."""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.network.channels.groups import Group
from penjing.network.composing import compose
from penjing.network.edits import Edit, RemoveChannels
from penjing.network.network import Network


def unread_units(network: Network) -> tuple[tuple[Edit, ...], Network]:
    """Edits that remove all units whose every weight behind is zero, and the network without them.

    What only such units read goes with them, layer after layer; of each group one unit stays."""
    edits: tuple[Edit, ...] = ()
    now = network
    while True:
        tensors = now.tensors()
        more = [e for group in now.groups() if (e := _unread(group, tensors)) is not None]
        if not more:
            return edits, now
        edits, now = compose(network, edits, more, now=now)


def _unread(group: Group, tensors: dict[str, Tensor]) -> RemoveChannels | None:
    if not group.consumers or group.inexact is not None or group.sums is not None:
        return None
    dead = torch.ones(group.size, dtype=torch.bool)
    for member in group.consumers:
        tensor = tensors[member.parameter].detach()
        used = tensor.movedim(member.dim, 0).reshape(tensor.shape[member.dim], -1).any(1)
        dead &= ~used[torch.as_tensor(member.indices)].any(1)
    if dead.all():
        dead[0] = False
    if not dead.any():
        return None
    first = group.members[0]
    gone = torch.as_tensor(first.indices)[dead].flatten().tolist()
    return RemoveChannels(parameter=first.parameter, dim=first.dim, indices=tuple(sorted(gone)))
