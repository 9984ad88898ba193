"""Two sets of Edits as one: what was decided for a network, and then for what came out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence, Set

import torch

from penjing.errors import EditError
from penjing.network.channels.groups import kept_indices
from penjing.network.edits import Edit, MaskWeights, RemoveChannels, ReplaceLayer, SetWeights
from penjing.network.network import Network


def compose(
    start: Network, edits: Sequence[Edit], more: Sequence[Edit], *, now: Network | None = None
) -> tuple[tuple[Edit, ...], Network]:
    """Edits for `start` that do what `edits` and then `more` do, and the network that they give.

    Removals are counted in the channels of `start`, so that several rounds of them become one; masks and values are
    those at the end, each tensor's once. `edits` are what this function gave before, or none; `now` is
    `start.apply(edits)`, if it is known already. Operators that cut constants to size are those of one removal, not one
    for every round; otherwise the network is that of one application after the other.

    Raises EditError if `more` does not fit.
    """
    now = start.apply(edits) if now is None else now
    after = now.apply(more)
    shape = _without_last_values(edits)
    try:
        joined = _joined(start, shape, more)
        base = start.apply(joined)
    except EditError:  # what can go in turns cannot always go at once, as some operators have it
        base = None
    if base is None or not _alike(base, after):
        joined = [*shape, _pause(start.apply(shape)), *_without_last_values(more)]
        base = start.apply(joined)
    # The constants that removals leave behind are their own; they may have each other's names in `after`.
    named = {n for e in joined if isinstance(e, ReplaceLayer) for n in e.tensors} | set(start.tensors())
    values = list(_values(base, after, named))
    return (*joined, *values), base.apply(values)


def _without_last_values(edits: Sequence[Edit]) -> list[Edit]:
    """`edits` up to the last one that changes the graph."""
    rest = itertools.dropwhile(lambda e: isinstance(e, MaskWeights | SetWeights), reversed(edits))
    return list(rest)[::-1]


def _joined(start: Network, shape: Sequence[Edit], more: Sequence[Edit]) -> list[Edit]:
    """`shape` and what `more` does to the graph."""
    result = list(shape)
    for kind, run in itertools.groupby(more, key=type):
        if kind is RemoveChannels:
            removals = (e for e in run if isinstance(e, RemoveChannels))
            for _, alike in itertools.groupby(removals, key=lambda e: e.heads):
                result = _with_removals(start, result, list(alike))
        elif kind not in (MaskWeights, SetWeights):
            result += run
    return result


def _with_removals(start: Network, shape: Sequence[Edit], more: Sequence[RemoveChannels]) -> list[Edit]:
    """`shape` and then `more`; removals that `shape` ends with are made together with those of `more`."""
    heads = more[0].heads
    earlier: list[RemoveChannels] = []
    for e in reversed(shape):
        if not isinstance(e, RemoveChannels) or e.heads != heads:
            break
        earlier.insert(0, e)
    before = list(shape[: len(shape) - len(earlier)])
    kept = {}
    if earlier:
        groups = (start.apply(before) if before else start).groups(heads=heads)
        kept = kept_indices(groups, [(e.parameter, e.dim, e.indices) for e in earlier])
    gone: dict[tuple[str, int], set[int]] = {}
    for e in earlier:
        gone.setdefault((e.parameter, e.dim), set()).update(e.indices)
    for e in more:
        there = kept.get(e.parameter, {}).get(e.dim)
        places = e.indices if there is None else [int(there[i]) for i in e.indices]
        gone.setdefault((e.parameter, e.dim), set()).update(places)
    removals = [
        RemoveChannels(parameter=parameter, dim=dim, indices=tuple(sorted(places)), heads=heads)
        for (parameter, dim), places in gone.items()
    ]
    return [*before, *removals]


def _alike(base: Network, after: Network) -> bool:
    """Whether both have the same parameters in the same shapes."""
    old, new = base.tensors(), after.tensors()
    same = set(base.parameter_names) == set(after.parameter_names)
    return same and all(old[n].shape == new[n].shape for n in after.parameter_names)


def _pause(network: Network) -> SetWeights:
    """An Edit that leaves everything as it is: removals before and after it are not made together."""
    name, tensor = min(network.tensors().items(), key=lambda item: item[1].numel())
    return SetWeights(parameter=name, value=tensor.detach())


def _values(base: Network, after: Network, named: Set[str]) -> Iterator[Edit]:
    """Masks and values of tensors that are `named` which make `after` of `base`."""
    old, new = base.tensors(), after.tensors()
    shared = [n for n, t in old.items() if n in named and n in new and new[n].shape == t.shape]
    for name in shared:
        if name in after.masks and not (name in base.masks and torch.equal(base.masks[name], after.masks[name])):
            yield MaskWeights(parameter=name, mask=after.masks[name])
    for name in shared:
        masked = old[name].detach() * after.masks[name] if name in after.masks else old[name].detach()
        if not torch.equal(masked, new[name].detach()):
            # In the usual order of memory, which a file gives back: kernels of another order sum in another order.
            value = new[name].detach().clone(memory_format=torch.contiguous_format)
            yield SetWeights(parameter=name, value=value)
