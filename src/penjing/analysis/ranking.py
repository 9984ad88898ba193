"""Which units of each channel group go first, and what it does to the outputs when they go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penjing.analysis.activations import watch_values
from penjing.analysis.elimination import (
    Reader,
    eliminate_units,
    readers_of,
    watch_inputs,
    without_units,
    zeroed_units,
)
from penjing.analysis.footprint import Footprint
from penjing.network import Network, SetWeights
from penjing.network.channels.groups import Group
from penjing.progress import SILENT, Progress
from penjing.tensors.criteria import CRITERIA, ELIMINATION, Slices, Units

#: Multiply-accumulates that measuring the groups' sensitivities may take.
_SENSITIVITY_WORK = 6e11


@dataclass(frozen=True)
class Ranked:
    """A group with its units cheapest first, the error as they go, and how much half of it matters to the outputs."""

    group: Group
    order: list[int]
    errors: list[float]
    sensitivity: float | None = None


def rank(
    network: Network,
    groups: Sequence[Group],
    criterion: str,
    batches: list[dict[str, Tensor]],
    size: Footprint,
    *,
    by_cost: bool,
    refitted: bool,
    gradients: Sequence[Mapping[str, Tensor]] = (),
    seed: int = 0,
    progress: Progress = SILENT,
) -> list[Ranked]:
    """The units of each of `groups`, cheapest first by `criterion`.

    `batches` are bound inputs (none: only weights are looked at), `size` is the network's footprint, `gradients` those
    of a few batches by parameter, for criteria that need them; what the units do is watched here. With `by_cost` and
    batches the groups are made comparable: each group's error curve is scaled to what losing half of it does to the
    outputs, its readers having made up for it where they will be `refitted`.
    """
    tensors, gains = network.tensors(), _gains(network)
    weights = [m.parameter for g in groups for m in g.consumers]
    watch = bool(batches) and (by_cost or criterion == ELIMINATION)
    seen = watch_inputs(network, weights, batches, progress) if watch else {}
    looked_at = _first(batches, int(_SENSITIVITY_WORK / max(size.macs * len(groups), 1)))
    if batches and not network.batch_is_dynamic:
        looked_at = batches[0]
    wanted = network.run(looked_at) if by_cost and batches else ()
    needs = CRITERIA.get(criterion).needs
    watched = bool(needs & {"activity", "ranks"})
    active = watch_values(network, groups, batches, ranks="ranks" in needs, progress=progress) if watched else {}
    ranked = []
    with progress.task("judging channels", len(groups)) as advance:
        for number, group in enumerate(groups):
            readers = readers_of(group, seen, tensors)
            generator = torch.Generator().manual_seed(seed * 100_003 + number)
            slices = tuple(
                Slices(m.parameter, tensors[m.parameter], m.dim, torch.as_tensor(m.indices), m.parameter in gains,
                       tuple(g[m.parameter] for g in gradients))
                for m in group.members
                if m.parameter in network.parameter_names
            )  # fmt: skip
            units = Units(slices, active.get(group.name))
            # Whatever makes no value of its own (an offset alone) is judged by its weights.
            judge = "l2" if watched and active and units.activity is None else criterion
            ranked.append(_rank_one(network, group, judge, units, readers, generator, looked_at, wanted, refitted))
            advance(1)
    return ranked


def _rank_one(
    network: Network,
    group: Group,
    criterion: str,
    units: Units,
    readers: Sequence[Reader],
    generator: torch.Generator,
    samples: dict[str, Tensor],
    wanted: tuple[Tensor, ...],
    refitted: bool,
) -> Ranked:
    half, tensors = group.size // 2, network.tensors()
    scores = CRITERIA.get(criterion)(units, generator)
    order = torch.argsort(scores).tolist()
    errors = [0.0, *torch.cumsum(scores[order], 0).tolist()]
    trial: tuple[SetWeights, ...] = ()
    if readers:
        free = criterion == ELIMINATION
        gone = eliminate_units(readers, 1, half, None if free else order)
        order, errors = gone.order, [*gone.errors, gone.errors[-1]]
        # A reader that could not be watched would still read what is to go: then the units are silenced where
        # they are made.
        if refitted and {r.layer.weight for r in readers} == {m.parameter for m in group.consumers}:
            trial = without_units(readers, gone.weights[half], tensors)
    if not wanted:
        return Ranked(group, order, errors)
    trial = trial or zeroed_units(group, order[:half], tensors)
    got = network.apply(trial).run(samples)
    sensitivity = sum(
        float((a.float() - b.float()).square().mean() / b.float().var().clamp_min(1e-12))
        for a, b in zip(got, wanted, strict=True)
        if b.is_floating_point()
    )
    scale = sensitivity / max(errors[half], 1e-30)
    return Ranked(group, order, [e * scale for e in errors], sensitivity)


def _gains(network: Network) -> set[str]:
    """The multipliers of all norms."""
    places = {"batch_norm": 1, "instance_norm": 1, "layer_norm": 2, "group_norm": 2, "rms_norm": 2}
    found = set()
    for node in network.graph_module.graph.nodes:
        place = places.get(str(getattr(node.target, "__name__", "")).split(".")[0])
        if place is not None and len(node.args) > place and getattr(node.args[place], "op", "") == "get_attr":
            found.add(str(node.args[place].target))
    return found


def _first(batches: Sequence[dict[str, Tensor]], samples: int) -> dict[str, Tensor]:
    """About `samples` samples (at least 4, at most 256) as one batch."""
    if not batches:
        return {}
    shapes = [{name: value.shape[1:] for name, value in b.items()} for b in batches[:3]]
    alike = [b for b, shape in zip(batches, shapes, strict=False) if shape == shapes[0]]
    whole = {name: torch.cat([b[name] for b in alike]) for name in batches[0]}
    return {name: value[: max(4, min(256, samples))] for name, value in whole.items()}
