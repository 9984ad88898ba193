"""What the outputs become as one part of a network after the other is silenced, bit by bit.

A part is a channel group, whose units go cheapest first, or a weight, whose entries do. Nothing is trained in between
(Li et al. 2017, "Pruning filters for efficient ConvNets", §3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penjing.analysis.elimination import Reader, readers_of, watch_inputs, without_units, zeroed_units
from penjing.analysis.ranking import Ranked
from penjing.analysis.tail import Tails
from penjing.errors import RecipeError
from penjing.network import Network, SetWeights
from penjing.network.channels.groups import Group
from penjing.progress import SILENT, Progress
from penjing.registry import Registry
from penjing.tensors.allocation import rounded
from penjing.tensors.least_squares import eliminate

#: A score for every entry of a weight: the smallest go first.
EntryScores = Callable[[Tensor, torch.Generator], Tensor]
ENTRY_SCORES: Registry[EntryScores] = Registry("criterion", error=RecipeError)


@ENTRY_SCORES.register("magnitude")
def magnitude(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Absolute values."""
    return weight.detach().abs()


@ENTRY_SCORES.register("random")
def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """A draw: the baseline that every other criterion must beat."""
    return torch.rand(weight.shape, generator=generator)


@dataclass(frozen=True)
class Part:
    """What is silenced: `size` units or entries of it, of which `counts[i]` go at the i-th ratio.

    `tensors` are all that its edits change; `edits(counts)` yields those of each count in turn.
    """

    name: str
    size: int
    counts: tuple[int, ...]
    tensors: tuple[str, ...]
    edits: Callable[[Sequence[int]], Iterator[tuple[SetWeights, ...]]]
    inexact: str | None = None


def channel_parts(
    network: Network,
    ranked: Sequence[Ranked],
    ratios: Sequence[float],
    watched: Sequence[dict[str, Tensor]] = (),
    progress: Progress = SILENT,
) -> list[Part]:
    """One Part a group. With `watched` (bound inputs), the layers behind make up for what goes, as far as they could be
    watched: group Optimal Brain Surgeon (`penjing.tensors.least_squares.eliminate`)."""
    tensors = network.tensors()
    weights = [m.parameter for r in ranked for m in r.group.consumers]
    seen = watch_inputs(network, weights, list(watched), progress) if watched else {}
    parts = [_channel_part(r, ratios, readers_of(r.group, seen, tensors), tensors) for r in ranked]
    return [part for part in parts if part.tensors]


def _channel_part(
    ranked: Ranked, ratios: Sequence[float], readers: Sequence[Reader], tensors: Mapping[str, Tensor]
) -> Part:
    group, order = ranked.group, ranked.order
    counts = tuple(group.size - rounded(round(group.size * (1 - r)), group.size, None, 1) for r in ratios)
    # A reader that could not be watched would still read what is to go: then units are silenced where they are made.
    if not readers or {r.layer.weight for r in readers} != {m.parameter for m in group.consumers}:
        names = tuple(e.parameter for e in zeroed_units(group, order[:1], tensors))

        def silence(counts: Sequence[int]) -> Iterator[tuple[SetWeights, ...]]:
            for count in counts:
                yield zeroed_units(group, order[:count], tensors)

        return Part(group.name, group.size, counts, names, silence, group.inexact)

    def without(counts: Sequence[int]) -> Iterator[tuple[SetWeights, ...]]:
        gone = eliminate([r.consumer for r in readers], order=order, keep=1, snapshots=tuple(counts))
        for count in counts:
            yield without_units(readers, gone.weights.pop(count), tensors)

    whole = without_units(readers, [r.consumer.weight for r in readers], tensors)
    return Part(group.name, group.size, counts, tuple(e.parameter for e in whole), without, group.inexact)


def weight_parts(
    network: Network, names: Sequence[str], criterion: str, ratios: Sequence[float], seed: int = 0
) -> list[Part]:
    """One Part a weight of `names`: its entries become zero one by one."""
    return [
        _weight_part(name, network.tensors()[name], ENTRY_SCORES.get(criterion), ratios, seed * 100_003 + number)
        for number, name in enumerate(names)
    ]


def _weight_part(name: str, weight: Tensor, score: EntryScores, ratios: Sequence[float], seed: int) -> Part:
    def zero(counts: Sequence[int]) -> Iterator[tuple[SetWeights, ...]]:
        order = score(weight, torch.Generator().manual_seed(seed)).flatten().argsort(stable=True)
        for count in counts:
            value = weight.detach().clone()
            value.view(-1)[order[:count]] = 0
            yield (SetWeights(parameter=name, value=value),)

    counts = tuple(round(weight.numel() * r) for r in ratios)
    return Part(name, weight.numel(), counts, (name,), zero)


def prunable_weights(network: Network) -> list[str]:
    """Trainable weights of two dimensions and more that the graph reads."""
    read = {str(n.target) for n in network.graph_module.graph.nodes if n.op == "get_attr" and n.users}
    tensors = network.tensors()
    return [n for n in network.parameter_names if n in read and tensors[n].ndim > 1 and tensors[n].is_floating_point()]


def silence(
    network: Network,
    parts: Sequence[Part],
    batches: Sequence[Mapping[str, Tensor]],
    progress: Progress = SILENT,
) -> Iterator[tuple[int, int, int, tuple[Tensor, ...]]]:
    """Yields (part, count, batch, outputs) for every part, count above 0 and batch: the flat outputs that `network`
    has after the part's edits for that count, its masks kept.

    Only what lies behind a part is run again.
    """
    tails = Tails(network, batches)
    tensors = network.tensors()
    ordered = sorted(range(len(parts)), key=lambda i: tails.position(parts[i].tensors))
    steps = [sorted(set(part.counts) - {0}) for part in parts]
    with progress.task("silencing part after part", sum(map(len, steps))) as advance:
        for i in ordered:
            if not steps[i]:
                continue
            tail = tails.behind(parts[i].tensors)
            for count, edits in zip(steps[i], parts[i].edits(steps[i]), strict=True):
                changed = {e.parameter: _masked(network, e).to(tensors[e.parameter].dtype) for e in edits}
                for batch in range(len(batches)):
                    yield i, count, batch, tail.run(batch, changed)
                advance(1)


def _masked(network: Network, edit: SetWeights) -> Tensor:
    mask = network.masks.get(edit.parameter)
    return edit.value if mask is None else edit.value * mask


def selected_groups(network: Network, chosen: Callable[[str], bool]) -> list[Group]:
    """Groups of two units and more, all of whose makers are `chosen` by the parameter's name."""
    return [g for g in network.groups() if g.size > 1 and all(chosen(m.parameter) for m in g.producers or g.members)]
