"""Equalize: the channels between layers scaled so that quantization hurts less; the network computes the same."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from penjing.analysis.channel_scales import Link, find_links
from penjing.analysis.equalization import awq, equalize_weights, smooth
from penjing.analysis.footprint import footprint
from penjing.analysis.passes import fold_batch_norms, fold_pads, outputs_first, simplified
from penjing.analysis.reconstruct import find_layers
from penjing.analysis.weight_grids import granularity
from penjing.errors import DataError, RecipeError
from penjing.network import Network, SetWeights
from penjing.network.edits import Edit
from penjing.recipe import Context, Plan, Reason, Step, matches, step
from penjing.recipe.samples import bound_samples
from penjing.tensors import grids
from penjing.tensors.gptq import GridRule

_CRITERIA = ("weights", "smooth", "awq")
_BATCH = 16


@step
@dataclass(frozen=True, kw_only=True)
class Equalize(Step):
    """Scale channels where they are made, and scale them back where they are read, before `Quantize`.

    In float nothing changes, up to rounding. Channels can be scaled where a layer or a norm with a weight makes them
    and only layers read them, with nothing in between but what lets a factor through (relu, pooling, views, a gate).
    Batch norms are folded first. By how much: `criterion`.

    - "weights": so that weights that make and that read a channel have the same range (cross-layer equalization: Nagel
      et al. 2019, "Data-free quantization through weight equalization and bias correction"). Needs no samples. For
      scales per tensor, above all in networks of depthwise convolutions.
    - "smooth": so that large activations move into weights, by `alpha` of their size (0.5 if nothing is said; Xiao et
      al. 2023, "SmoothQuant"). For activations of which a few channels are far wider than the others, in front
      of linear layers and convolutions alike, with weights of 8 bits, which have codes to spare.
    - "awq": so that channels that carry much get finer steps, by a power `alpha` of their mean size (None: the one that
      makes the error of the layers least when their weights are rounded as `weights`, `granularity` and `symmetric`
      say; Lin et al. 2024, "AWQ"). For weights of few bits. What no power makes better stays.

    `samples` are looked at by "smooth" and "awq", without labels. `where` selects weights; channels are scaled only if
    all weights concerned are selected.
    """

    criterion: str = "weights"
    alpha: float | None = None
    weights: str = "int4"
    granularity: str = "group:128"
    symmetric: bool = True
    samples: int = 128

    def __post_init__(self) -> None:
        self.require_one_of("criterion", _CRITERIA)
        self.require_between("alpha", 0, 1)
        self.require_one_of("symmetric", (True, False))
        self.require_between("samples", 1, float("inf"))
        self._rule()

    def _rule(self) -> GridRule:
        """The grid that "awq" rounds to. Raises RecipeError if the fields make none."""
        try:
            low, high = grids.limits(str(self.weights), narrow=self.symmetric)
        except ValueError as error:
            raise RecipeError(
                f"Equalize.weights must be an integer type of 2 to 16 bits, got {self.weights!r}",
                hint="for example weights='int4'",
            ) from error
        if high - low < 2 or high - low >= 2**16:
            raise RecipeError(
                f"Equalize.weights must have 2 to 16 bits, got {self.weights!r}", hint="for example weights='int4'"
            )
        known = granularity(self.granularity) if isinstance(self.granularity, str) else None
        if known is None:
            raise RecipeError(
                f"Equalize.granularity must be 'channel', 'tensor' or 'group:N', got {self.granularity!r}",
                hint="for example granularity='group:128'",
            )
        per_channel, group = known
        return GridRule(low, high, axis=0 if per_channel else None, group=group, symmetric=self.symmetric)

    def check(self, context: Context) -> None:
        """All but "weights" need samples."""
        if self.criterion != "weights" and context.data is None:
            raise DataError(
                f"Equalize(criterion='{self.criterion}') needs samples to see the activations",
                hint="give data (a hundred samples without labels are enough), or use criterion='weights'",
            )

    def plan(self, network: Network, context: Context) -> Plan:
        """New weights, biases and norm weights; a reason for every link, with its largest scale as score."""
        self.check(context)
        if network.is_quantized:
            raise RecipeError(
                "Equalize cannot change a network that is already quantized", hint="put Equalize before Quantize"
            )
        turned = [outputs_first] if self.criterion == "awq" else []
        network, folding = simplified(network, fold_pads, *turned, fold_batch_norms)
        edits: list[Edit] = list(folding)
        links = self._links(network)
        before = {n: t.detach() for n, t in network.tensors().items()}
        tensors, notes = dict(before), list[str]()
        scales = self._scales(network, links, tensors, context, notes)
        for name, value in tensors.items():
            if value is not before[name]:
                edits.append(SetWeights(parameter=name, value=value))
        moved = sum(bool((s != 1).any()) for s in scales)
        notes.insert(0, f"{moved} of {len(links)} links scaled")
        return Plan(step=self, edits=tuple(edits), reasons=_reasons(links, scales), notes=tuple(notes))

    def _links(self, network: Network) -> list[Link]:
        found = find_links(network)
        known = {layer.weight for layer in find_layers(network)}
        links = [
            link
            for link in found
            if all(matches(self.where, p) for p in link.parameters)
            and (link.layer or self.criterion != "weights")
            and (self.criterion != "awq" or all(r.weight in known for r in link.readers))
        ]
        if not links:
            raise RecipeError(
                f"Equalize finds no channels in {network.name} that can be scaled by '{self.criterion}'",
                hint=f"where={self.where!r} selects none of those that could be"
                if found
                else "channels must be made by a layer or norm and read by layers only, relu or pooling between",
            )
        return links

    def _scales(
        self, network: Network, links: list[Link], tensors: dict[str, Tensor], context: Context, notes: list[str]
    ) -> list[Tensor]:
        if self.criterion == "weights":
            return equalize_weights(links, tensors)
        batches = bound_samples(network, context, footprint(network), self.samples, notes, _BATCH)
        if not batches:
            raise DataError("the data holds no samples", hint="Equalize looks at some of data")
        if self.criterion == "smooth":
            alpha = 0.5 if self.alpha is None else self.alpha
            return smooth(network, links, tensors, batches, alpha, context.progress)
        return awq(network, links, tensors, batches, self._rule(), self.alpha, context.progress)


def _reasons(links: list[Link], scales: list[Tensor]) -> tuple[Reason, ...]:
    rows = []
    for link, scale in zip(links, scales, strict=True):
        spread = float((scale.max() / scale.min()).item())
        readers = ", ".join(r.weight.removesuffix(".weight") for r in link.readers)
        choice = f"scaled by {float(scale.min()):.3g} to {float(scale.max()):.3g}" if spread > 1 else "stays"
        rows.append(
            Reason(layer=link.weight.removesuffix(".weight"), choice=choice, score=spread, why=f"read by {readers}")
        )
    return tuple(rows)


__all__ = ["Equalize"]
