"""Penalties on whole channels, taken after each step of training, so that what is cut afterwards is zero already."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from penjing.network import Network, RemoveChannels
from penjing.network.channels.groups import Group, Member, kept_indices
from penjing.training import AfterStep


def growing(network: Network, removals: Sequence[RemoveChannels], strength: float) -> AfterStep:
    """Decay that grows linearly, on the entries that go with `removals` alone; by itself it would shrink them by
    exp(-strength) in the whole training (Wang et al. 2021, "Neural pruning via growing regularization", GReg-1; apart
    from the gradient, as by Loshchilov & Hutter 2019)."""
    kept = kept_indices(network.groups(), [(e.parameter, e.dim, e.indices) for e in removals])
    going: dict[str, Tensor] = {}
    for name, parameter in network.module().named_parameters():
        stays = torch.ones_like(parameter, dtype=torch.bool)
        for dim, indices in kept.get(name, {}).items():
            there = torch.zeros(parameter.shape[dim], dtype=torch.bool)
            there[torch.as_tensor(indices)] = True
            stays &= there.view([-1 if d == dim else 1 for d in range(parameter.ndim)])
        if not stays.all():
            going[name] = (~stays).to(parameter.dtype)

    before = 0.0

    @torch.no_grad()
    def shrink(module: nn.Module, done: float, rate: float) -> None:
        nonlocal before
        factor = math.exp(-strength * (done**2 - before**2))
        before = done
        for name, tensor in _parameters(module, going):
            tensor.mul_(1 - (1 - factor) * going[name].to(tensor.device))

    return shrink


def group_lasso(groups: Iterable[Group], strength: float) -> AfterStep:
    """The proximal step of `strength` × Σ √n · ‖unit‖₂ over the units of `groups`: all n entries that belong to a unit
    shrink by the same factor, to zero where it is weak (Yuan & Lin 2006, "Model selection and estimation in regression
    with grouped variables"; Wen et al. 2016, "Learning structured sparsity", for channels)."""
    every = list(groups)

    @torch.no_grad()
    def shrink(module: nn.Module, done: float, rate: float) -> None:
        held = dict(module.named_parameters())
        for group in every:
            members = [m for m in group.members if m.parameter in held and held[m.parameter].requires_grad]
            if not members:
                continue
            device = held[members[0].parameter].device
            squares, entries = torch.zeros(group.size, device=device), torch.zeros(group.size, device=device)
            for m in members:
                tensor, places = held[m.parameter], torch.as_tensor(m.indices, device=device)
                squares += _across(tensor.square(), m.dim)[places].sum(1)
                entries += places.shape[1] * (tensor.numel() // tensor.shape[m.dim])
            factor = (1 - rate * strength * entries.sqrt() / squares.sqrt().clamp_min(1e-12)).clamp_min(0)
            for m in members:
                _scale(held[m.parameter], m, factor)

    return shrink


def _parameters(module: nn.Module, names: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [(n, p) for n, p in module.named_parameters() if n in names and p.requires_grad]


def _across(tensor: Tensor, dim: int) -> Tensor:
    """Sums over everything but `dim`."""
    return tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1).sum(1)


def _scale(tensor: Tensor, member: Member, factor: Tensor) -> None:
    spread = torch.ones(tensor.shape[member.dim], device=tensor.device)
    places = torch.as_tensor(member.indices, device=tensor.device)
    spread[places.flatten()] = factor.repeat_interleave(places.shape[1])
    tensor.mul_(spread.view([-1 if d == member.dim % tensor.ndim else 1 for d in range(tensor.ndim)]))
