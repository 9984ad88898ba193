"""What a Network costs as a function of the channels that go: the models that an allocation works on."""

from __future__ import annotations

from collections.abc import Sequence

from penjing.analysis.footprint import Footprint
from penjing.network import Network
from penjing.network.channels.groups import Group
from penjing.tensors.allocation import CostModel, Share


def cost_models(network: Network, groups: Sequence[Group], size: Footprint) -> dict[str, CostModel]:
    """ "parameters" and "macs" as functions of the units that go from `groups`.

    Exact for parameters and for products with weights; products without weights (attention) count as constant.
    """
    owners: dict[str, dict[int, list[tuple[str, int]]]] = {}
    for group in groups:
        for m in group.members:
            owners.setdefault(m.parameter, {}).setdefault(m.dim, []).append((group.name, m.indices.shape[1]))
    tensors = network.tensors()
    models = {}
    for what, bases in (
        ("macs", size.by_weight),
        ("parameters", {n: tensors[n].numel() for n in network.parameter_names}),
    ):
        shares = [
            Share(bases[name], tuple(tensors[name].shape), {dim: tuple(o) for dim, o in dims.items()})
            for name, dims in owners.items()
            if bases.get(name)
        ]
        models[what] = CostModel(getattr(size, what) - sum(s.base for s in shares), shares)
    return models
