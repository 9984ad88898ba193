"""FuseWeights: take weights of other networks over, or mix them in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from penjing.analysis.fusing import LARGEST, Fitted, fit, mixed, restated
from penjing.data import Data
from penjing.errors import DataError, RecipeError
from penjing.network import Network, SetWeights
from penjing.recipe import Context, Plan, Reason, Step, matches, step
from penjing.recipe.judging import HELD_OUT, scores_of

_WAYS = ("slices", "interpolate", "soup", "greedy")
_CHANNELS = ("norm", "matched")
#: The shares of the source that are tried.
_SHARES = tuple(n / 10 for n in range(11))
#: Samples on which channels are compared; batches, and their size, for the norms' statistics.
_LIKENESS_SAMPLES = 64
_BATCHES, _BATCH = 20, 64


@step
@dataclass(frozen=True, kw_only=True)
class FuseWeights(Step):
    """Take weights of `source` over, or mix them in: "original" (what the recipe started from), or a name or several of
    `compress(..., teachers=)`. Layers are the same if their names are, or if one ends as the other.

    `how="slices"` lets the network start from its teacher's weights. A wider source is cut to its widths, whole
    channels with all that is coupled to them: those stay whose weights are largest (`channels="norm"`) or, where this
    network was made from the source, whose values on samples are most like its own ("matched").

    "interpolate" gives one source the `weight`, or the one of 0, 0.1, … 1 that is best. "soup" is the mean of this
    network and all sources; "greedy" begins with the best of them and takes in, from the best on, each that does not
    make the mean worse (Wortsman et al. 2022, "Model soups"). What is best is measured on the share `held_out` of the
    samples, by the task's metric or, without labels, by the distance of the outputs from the original network's; it
    means what it says only if these samples were not trained on. Statistics of batch norms are taken anew from the
    other samples, if there are any, where weights are mixed or cut; this network as it is, and a source of the same
    size that is taken over whole, keep their own.
    """

    source: str | list[str] = "original"
    how: str = "slices"
    channels: str = "norm"
    weight: float | None = None
    held_out: float = HELD_OUT

    def __post_init__(self) -> None:
        self.require_names("source")
        self.require_one_of("how", _WAYS)
        self.require_one_of("channels", _CHANNELS)
        self.require_between("weight", 0, 1)
        self.require_between("held_out", 0, 1, open_low=True, open_high=True)
        if not self.source:
            raise RecipeError("FuseWeights.source is empty", hint="source: original")
        if self.weight is not None and self.how != "interpolate":
            raise RecipeError(
                f"FuseWeights.weight belongs to how='interpolate', got {self.how!r}", hint="leave it away"
            )

    def check(self, context: Context) -> None:
        """Sources must be there; samples, where something is compared or chosen."""
        count = len(self._sources(context))
        if self.how in ("slices", "interpolate") and count > 1:
            raise RecipeError(
                f"FuseWeights(how={self.how!r}) takes one source, got {count}", hint="how: soup takes several"
            )
        needed = self._chooses or (self.channels == "matched" and self.how == "slices")
        if needed and context.data is None:
            raise DataError("FuseWeights compares on samples and no data was given", hint="labels are not needed")

    def plan(self, network: Network, context: Context) -> Plan:
        """Tries the mixes out; the Plan holds the new values of every tensor that changed."""
        self.check(context)
        sources = self._sources(context)
        if any(n.has_integer_grids for n in (network, *sources)):
            raise RecipeError(
                "FuseWeights mixes floats, and a network is quantized", hint="put FuseWeights before Quantize"
            )
        if not any(matches(self.where, name) for name in network.parameter_names):
            raise RecipeError(
                f"FuseWeights.where selects no parameter, got {self.where!r}",
                hint=f"for example where={next(iter(network.parameter_names), '*')!r}",
            )
        return _Fusion(self, network, context, sources).plan()

    @property
    def _chooses(self) -> bool:
        return self.how == "greedy" or (self.how == "interpolate" and self.weight is None)

    def _sources(self, context: Context) -> list[Network]:
        names = [self.source] if isinstance(self.source, str) else self.source
        return [n for name in names for n in context.networks(name, "FuseWeights.source")]


class _Fusion:
    def __init__(self, settings: FuseWeights, network: Network, context: Context, sources: Sequence[Network]) -> None:
        self.settings, self.network, self.context, self.sources = settings, network, context, sources
        self.names = [n for n in network.tensors() if matches(settings.where, n)]
        self.data, self.held = context.data, None
        if settings._chooses:
            ((self.data, self.held),) = cast(Data, context.data).split([settings.held_out], seed=context.seed)
        # Mixed weights must mean the same: there the channels are always those that are most alike.
        alike = settings.channels == "matched" or settings.how != "slices"
        inputs = None
        if alike and self.data is not None:
            inputs = self.data.first(_LIKENESS_SAMPLES if network.batch_is_dynamic else network.inputs[0].shape[0])
        self.fitted = [fit(network, source, inputs) for source in sources]
        for source, found in zip(sources, self.fitted, strict=True):
            if not any(n in found.tensors for n in network.parameter_names):
                raise RecipeError(
                    f"FuseWeights: {source.name} and {network.name} have no layer in common",
                    hint="layers are the same if their names are, and if the source's is at least as large",
                )
            guessed = [name for name, (_, _, how) in found.kept.items() if how == LARGEST]
            if guessed and settings.how != "slices":
                raise RecipeError(
                    f"FuseWeights cannot tell which channels {network.name} has of {source.name}: {guessed[0]}",
                    hint="give samples; only networks made from one another can be mixed",
                )

    def plan(self) -> Plan:
        edits, reasons, notes = getattr(self, f"_{self.settings.how}")()
        return Plan(
            step=self.settings,
            edits=tuple(self._with_statistics(edits)),
            reasons=(*reasons, *(r for found in self.fitted for r in _said(found))),
            notes=tuple(notes),
        )

    def _slices(self) -> tuple[list[SetWeights], list[Reason], list[str]]:
        edits = mixed(self.network, [self.fitted[0].tensors], [1.0], self.names)
        return edits, [], [f"{len(edits)} of {len(self.names)} tensors start from the source"]

    def _interpolate(self) -> tuple[list[SetWeights], list[Reason], list[str]]:
        def at(part: float) -> list[SetWeights]:
            return mixed(self.network, [self.fitted[0].tensors], [part], self.names)

        if self.settings.weight is not None:
            return at(self.settings.weight), [], []
        judge, word = self._judge()
        scores = {part: judge(at(part)) for part in _SHARES}
        best = max(scores, key=lambda part: scores[part])
        reasons = [
            Reason(layer=f"{part:.0%} of the source", score=abs(score), choice="best" if part == best else "", why=word)
            for part, score in scores.items()
        ]
        return at(best), reasons, [f"{best:.0%} of the source, by {word}"]

    def _soup(self) -> tuple[list[SetWeights], list[Reason], list[str]]:
        return self._mean(range(len(self.fitted) + 1)), [], [f"the mean of {len(self.fitted) + 1} networks"]

    def _greedy(self) -> tuple[list[SetWeights], list[Reason], list[str]]:
        judge, word = self._judge()
        alone = [judge(self._mean([number])) for number in range(len(self.fitted) + 1)]
        order = sorted(range(len(alone)), key=lambda number: alone[number], reverse=True)
        chosen, best = [order[0]], alone[order[0]]
        for number in order[1:]:
            if (score := judge(self._mean([*chosen, number]))) >= best:
                chosen, best = [*chosen, number], score
        reasons = [
            Reason(
                layer="this network" if number == 0 else f"source {number}",
                score=abs(alone[number]),
                choice="in the soup" if number in chosen else "left out",
                why=f"{word}, by itself",
            )
            for number in order
        ]
        return self._mean(chosen), reasons, [f"the mean of {len(chosen)} networks: {abs(best):.4g}, by {word}"]

    def _mean(self, chosen: Sequence[int]) -> list[SetWeights]:
        """The mean of some networks; number 0 is the one that the Step was given."""
        others = [self.fitted[number - 1].tensors for number in chosen if number]
        return mixed(self.network, others, [1 / len(chosen)] * len(others), self.names)

    def _with_statistics(self, edits: list[SetWeights]) -> list[SetWeights]:
        """What of `edits` changes something, with statistics of norms that fit it."""
        before = self.network.tensors()
        edits = [e for e in edits if not torch.equal(e.value, before[e.parameter])]
        if self.data is None or not edits or self._is_one_of_them(edits):
            return edits
        network, data = self.network.apply(edits), self.data
        batch = _BATCH if network.batch_is_dynamic else network.inputs[0].shape[0]
        drawn = data.batches(batch, shuffle=True, seed=self.context.seed)
        whole = (x for x, _ in drawn if len(pytree.tree_leaves(x)[0]) == batch or network.batch_is_dynamic)
        new = restated(network, islice(whole, _BATCHES), self.names)
        return [*(e for e in edits if e.parameter not in {n.parameter for n in new}), *new]

    def _is_one_of_them(self, edits: list[SetWeights]) -> bool:
        """Whether `edits` make the network all of a source of its size, whose statistics are then its own."""
        now = {**self.network.tensors(), **{e.parameter: e.value for e in edits}}
        count = len(self.network.parameter_names)
        return any(
            not (found.kept or found.left)
            and len(source.parameter_names) == count
            and all(torch.equal(now[n], value) for n, value in found.tensors.items())
            for source, found in zip(self.sources, self.fitted, strict=True)
        )

    def _judge(self) -> tuple[Callable[[list[SetWeights]], float], str]:
        """What measures a mix on held-out samples, the higher the better, and what it measures in words."""
        held, task = cast(Data, self.held), self.context.task
        labelled = task is not None and next(held.batches(1, limit=1))[1] is not None

        def by_metric(edits: list[SetWeights]) -> float:
            score = float(scores_of(self.network.apply(self._with_statistics(edits)), held, cast(Any, task)).mean())
            return score if cast(Any, task).higher_is_better else -score

        def by_outputs(edits: list[SetWeights]) -> float:
            return -_distance(self.network.apply(self._with_statistics(edits)), self.context.original, held)

        if labelled:
            return by_metric, f"{cast(Any, task).metric} on held-out samples"
        return by_outputs, "relative distance of outputs from the original's on held-out samples"


def _said(found: Fitted) -> list[Reason]:
    rows = [
        Reason(layer=name, choice=f"{kept}/{size} channels", why=how) for name, (kept, size, how) in found.kept.items()
    ]
    return [*rows, *(Reason(layer=name, choice="stays", why="the source has none of its shape") for name in found.left)]


@torch.no_grad()
def _distance(one: Network, other: Network, data: Data) -> float:
    """Squared difference of all outputs, over the squares of the other's about their mean."""
    off, size = 0.0, 0.0
    batch = _BATCH if one.batch_is_dynamic and other.batch_is_dynamic else other.inputs[0].shape[0]
    for inputs, _ in data.batches(batch):
        pairs: list[tuple[Tensor, Tensor]] = list(zip(one.run(inputs), other.run(inputs), strict=True))
        off += sum(float((a.float() - b.float()).square().sum()) for a, b in pairs)
        size += sum(float((b.float() - b.float().mean()).square().sum()) for _, b in pairs)
    return off / max(size, 1e-12)


__all__ = ["FuseWeights"]
