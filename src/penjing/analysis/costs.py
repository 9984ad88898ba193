"""What a Network costs as a function of the channels that go: the models that an allocation works on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from penjing.analysis.footprint import Footprint, footprint
from penjing.network import Network
from penjing.network.channels.groups import Group
from penjing.tensors.allocation import CostModel, Share

Owners = Mapping[str, Mapping[int, tuple[tuple[str, int], ...]]]


@dataclass(frozen=True)
class Cost:
    """Something that has a limit: `what` it is called, what the `whole` network costs, the `limit`, a `model` of it by
    the units that go, and `measure`, which says what a network really costs. `timed` ones are slow to measure and a
    little different every time."""

    what: str
    whole: float
    limit: float
    model: CostModel
    measure: Callable[[Network], float]
    timed: bool = False

    def share(self, value: float) -> str:
        """A value as a share of the whole, for people."""
        return f"{self.what} {value / max(self.whole, 1e-30):.1%}"


def cost_models(network: Network, groups: Sequence[Group], size: Footprint) -> dict[str, CostModel]:
    """ "parameters", "macs" and "bytes" as functions of the units that go from `groups`.

    Exact for parameters, bytes and products with weights; products without weights (attention) count as constant.
    """
    owners = owners_of(groups)
    tensors = network.tensors()
    stored = network.stored_bytes()
    models = {}
    for what, bases, whole in (
        ("macs", size.by_weight, size.macs),
        ("parameters", {n: tensors[n].numel() for n in network.parameter_names}, size.parameters),
        ("bytes", stored, sum(stored.values())),
    ):
        shares = [
            Share(bases[name], tuple(tensors[name].shape), dims) for name, dims in owners.items() if bases.get(name)
        ]
        models[what] = CostModel(whole - sum(s.base for s in shares), shares)
    return models


def exact_costs(
    network: Network, groups: Sequence[Group], size: Footprint, limits: Mapping[str, float]
) -> tuple[Cost, ...]:
    """The costs among "macs", "parameters" and "bytes" that have a limit, each counted on the real network."""
    models = cost_models(network, groups, size)
    wholes = {"macs": size.macs, "parameters": size.parameters, "bytes": stored_bytes(network)}
    measures: dict[str, Callable[[Network], float]] = {
        "macs": lambda n: footprint(n).macs,
        "parameters": lambda n: footprint(n).parameters,
        "bytes": stored_bytes,
    }
    return tuple(Cost(w, wholes[w], limit, models[w], measures[w]) for w, limit in limits.items())


def stored_bytes(network: Network) -> int:
    """Bytes of everything a network stores: weights, statistics of norms, constants; float32 takes 4 bytes a number,
    codes of narrow grids are packed."""
    return sum(network.stored_bytes().values())


def owners_of(groups: Sequence[Group]) -> dict[str, dict[int, tuple[tuple[str, int], ...]]]:
    """For every tensor and dimension in `groups`: (group, positions a unit) of each group that lies there."""
    found: dict[str, dict[int, tuple[tuple[str, int], ...]]] = {}
    for group in groups:
        for m in group.members:
            dims = found.setdefault(m.parameter, {})
            dims[m.dim] = (*dims.get(m.dim, ()), (group.name, m.indices.shape[1]))
    return found
