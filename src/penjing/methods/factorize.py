"""Factorize: layers written as several smaller ones, so that there are fewer weights and fewer products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from penjing.analysis.chain_work import Work
from penjing.analysis.chains import find_chains
from penjing.analysis.factorization import Factorable, Ways, decompose, find_factorable, replacement
from penjing.analysis.footprint import Footprint, footprint, shrinkage
from penjing.analysis.passes import numbered_paddings, outputs_first
from penjing.analysis.reconstruct import Refit, reconstruct
from penjing.analysis.rounding_harm import harms_of, measured_changes
from penjing.errors import RecipeError
from penjing.network import Network, ReplaceLayer, SetWeights
from penjing.network.edits import Edit
from penjing.recipe import Context, Plan, Reason, Step, matches, step
from penjing.recipe.samples import bound_samples
from penjing.runtimes import Target
from penjing.runtimes.layer_latency import latency_of_each
from penjing.tensors.allocation import along_curves
from penjing.tensors.low_rank import FORMS, Option

_ALL = tuple(name for name in FORMS if name != "cp")
#: Forms that nobody gets without naming them.
_ASKED = ("svd", "spatial", "cp")
_CRITERIA = ("activations", "weights")
_ALLOCATIONS = ("error", "sensitivity")
#: Multiply-accumulates that measuring the layers' sensitivities may take.
_SENSITIVITY_WORK = 6e11


@step
@dataclass(frozen=True, kw_only=True)
class Factorize(Step):
    """Write weights as products of smaller ones: a layer becomes a chain of two or three, with nothing in between.

    How small: the share `ratio` of the weights of all layers that can be factorized goes (half if nothing is said),
    or every layer keeps the share `energy` of its outputs' energy with as few weights as possible. With a ratio, layers
    give up weights where the error rises least for it: the relative error of each layer's own outputs
    (`allocation="error"`), scaled, where there are samples, to what the layer at half its weights does to the outputs
    of the network ("sensitivity").

    Linear layers, embeddings and 1×1 convolutions get two factors by SVD; other convolutions what `convolutions` says:
    "tucker2", "svd", "spatial" (k×1 and 1×k), "cp", or "auto", the best of the first three layer by layer
    (`penjing.tensors.low_rank`). With the `criterion` "activations", factors are those nearest on what the layers see
    in `samples`; with "weights", or without samples, the nearest to the weights. With `reconstruct` and samples, the
    last factor of each chain is then refitted, without labels (`penjing.analysis.reconstruct`). Ranks are multiples of
    `round_to`, where a layer has room for some.

    A layer stays where no product is smaller, where every smaller one takes more multiply-accumulates (unless it is a
    table, or `convolutions` names its form "svd", "spatial" or "cp"; a note then warns), and, with a `target`, where
    the chain is not faster there, each measured by itself for one sample (`penjing.runtimes.layer_latency`). Factors
    are not factorized once more; `MergeFactors` makes one layer of a chain again.
    """

    amounts: ClassVar[Mapping[str, str]] = {"ratio": "goes"}
    once: ClassVar[str] = "a factor is not factorized once more"

    ratio: float | None = None
    energy: float | None = None
    convolutions: str = "tucker2"
    criterion: str = "activations"
    allocation: str = "sensitivity"
    reconstruct: bool = True
    round_to: int = 1
    target: str | None = None
    samples: int = 512

    def __post_init__(self) -> None:
        self.require_between("ratio", 0, 1, open_low=True, open_high=True)
        self.require_between("energy", 0, 1, open_low=True)
        if self.ratio is not None and self.energy is not None:
            raise RecipeError(
                "Factorize takes either ratio or energy, got both",
                hint="ratio is the share of weights that goes, energy the share of the outputs' energy that stays",
            )
        self.require_one_of("convolutions", (*FORMS, "auto"))
        self.require_one_of("criterion", _CRITERIA)
        self.require_one_of("allocation", _ALLOCATIONS)
        self.require_one_of("reconstruct", (True, False))
        self.require_whole("round_to", 1)
        self.require_between("samples", 1, float("inf"))
        if self.target is not None:
            Target.parse(self.target)

    def plan(self, network: Network, context: Context) -> Plan:
        """Decides on the ranks, makes the factors and refits the last ones; a reason for every layer, with the share of
        its outputs' energy that is lost as score."""
        if network.is_quantized:
            raise RecipeError(
                "Factorize cannot change a network that is already quantized", hint="put Factorize before Quantize"
            )
        turned = [
            e
            for e in (*numbered_paddings(network), *outputs_first(network))
            if all(matches(self.where, name) for name in _named(e))
        ]
        size, network = footprint(network), network.apply(turned)
        found, left = find_factorable(network)
        left |= {layer.weight: "not selected by where" for layer in found if not matches(self.where, layer.weight)}
        left |= {w: "a factor already" for chain in find_chains(network) if chain.made for w in chain.weights}
        layers = [layer for layer in found if layer.weight not in left]
        if not layers:
            raise RecipeError(
                f"there is no layer of {network.name} that Factorize(where={self.where!r}) can write as a product",
                hint="; ".join(f"{n}: {why}" for n, why in list(left.items())[:3]) or "it has no weights",
            )
        notes: list[str] = []
        batches = self._samples(network, context, size, notes)
        weighted = batches if self.criterion == "activations" else []
        forms = _ALL if self.convolutions == "auto" else (self.convolutions,)
        ways = decompose(network, layers, weighted, forms, each=self.round_to, progress=context.progress)
        work = Work(network, layers)
        options = _smaller(network, ways, work, self.convolutions, left)
        chosen = self._choose(network, ways, options, left, batches, context, notes)
        slow = self._slow(network, chosen, context) if self.target is not None else {}
        chosen, left = {n: o for n, o in chosen.items() if n not in slow}, left | slow
        made = {n: ways[n].factors(o) for n, o in chosen.items()}
        edits, last = list[ReplaceLayer](), dict[str, str]()
        for layer in layers:
            if layer.weight in chosen:
                more, names = replacement(layer, chosen[layer.weight], made[layer.weight], network.tensors())
                edits += more
                last[layer.weight] = names[-1]
        factored = network.apply(edits)
        refit = self._refit(network, factored, layers, last, batches, context)
        tensors = network.tensors()
        values = {n: v for w, f in made.items() for n, v in ways[w].instead(f, tensors).items() if n != w}
        refitted = tuple(SetWeights(parameter=n, value=value) for n, value in {**values, **refit.tensors}.items())
        notes[:0] = [f"{len(chosen)} of {len(chosen) + len(left)} layers factorized"]
        notes[1:1] = [*shrinkage(size, footprint(factored)), *_warned(chosen, work)]
        reasons = _reasons(network, chosen, left, last, refit)
        return Plan(step=self, edits=(*turned, *edits, *refitted), reasons=reasons, notes=tuple(notes))

    def _samples(
        self, network: Network, context: Context, size: Footprint, notes: list[str]
    ) -> list[dict[str, Tensor]]:
        if context.data is None:
            notes.append("no samples were given: factors are the nearest to the weights, and nothing is refitted")
            return []
        return bound_samples(network, context, size, self.samples, notes)

    def _choose(
        self,
        network: Network,
        ways: Mapping[str, Ways],
        options: Mapping[str, Sequence[Option]],
        left: dict[str, str],
        batches: Sequence[Mapping[str, Tensor]],
        context: Context,
        notes: list[str],
    ) -> dict[str, Option]:
        """An option by weight; `left` gets those that stay, and why."""
        tensors = network.tensors()
        if self.energy is not None:
            chosen = {}
            for name, several in options.items():
                good = [o for o in several if o.error <= 1 - self.energy + 1e-9]
                if good:
                    chosen[name] = min(good, key=lambda o: (o.parameters, o.error))
                else:
                    left[name] = f"no smaller product keeps {self.energy:.4g} of its outputs' energy"
            return chosen
        scales = dict.fromkeys(options, 1.0)
        if self.allocation == "sensitivity" and batches:
            scales = _sensitivities(network, ways, options, batches[0], context)
        saved = {n: [(tensors[n].numel() - o.parameters, o.error * scales[n]) for o in options[n]] for n in options}
        wanted = round((0.5 if self.ratio is None else self.ratio) * sum(tensors[n].numel() for n in options))
        chosen = {}
        for name, gone in along_curves(saved, wanted).items():
            fitting = [o for o in options[name] if tensors[name].numel() - o.parameters >= gone]
            if gone > 0:
                chosen[name] = min(fitting, key=lambda o: (o.error, o.parameters))
            else:
                left[name] = "others lose less for as many weights"
        most = sum(max(gone for gone, _ in points) for points in saved.values())
        if most < wanted:
            notes.append(f"only {most:,} of {wanted:,} weights can go: every layer has its lowest rank")
        return chosen

    def _slow(self, network: Network, chosen: Mapping[str, Option], context: Context) -> dict[str, str]:
        """Those of the layers that are not faster on the target as a chain, and what was measured."""
        target = Target.parse(str(self.target))
        ways = {name: (o.form, o.ranks, o.shapes, o.core) for name, o in chosen.items()}

        def alone(single: Network, way: tuple[str, tuple[int, ...], tuple[tuple[int, ...], ...], int]) -> Network:
            (layer,), _ = find_factorable(single)
            form, ranks, shapes, core = way
            option = Option(form, ranks, shapes, 0.0, core)
            return single.apply(replacement(layer, option, [torch.randn(s) for s in shapes], single.tensors())[0])

        taken = latency_of_each(network, ways, alone, target, context.progress)
        return {
            name: f"not faster on {target}: {before:.3g} ms, as a product {after:.3g} ms"
            for name, (before, after) in taken.items()
            if after >= before
        }

    def _refit(
        self,
        network: Network,
        factored: Network,
        layers: Sequence[Factorable],
        last: Mapping[str, str],
        batches: list[dict[str, Tensor]],
        context: Context,
    ) -> Refit:
        if not (self.reconstruct and batches and last):
            return Refit()
        alone = [layer for layer in layers if layer.weight in last and len(layer.nodes) == 1]
        stands = {last[layer.weight]: layer.nodes[0].name for layer in alone}
        return reconstruct(network, factored, {}, batches, only=set(stands), stands=stands, progress=context.progress)


def _named(edit: Edit) -> list[str]:
    return list(edit.tensors) if isinstance(edit, ReplaceLayer) else [str(getattr(edit, "parameter", ""))]


def _smaller(
    network: Network, ways: Mapping[str, Ways], work: Work, asked: str, left: dict[str, str]
) -> dict[str, list[Option]]:
    """Options that have fewer weights, and no more multiply-accumulates unless their form was `asked` for or is the
    only one of a table, by weight; `left` gets those without any."""
    tensors, found = network.tensors(), dict[str, list[Option]]()
    for name, several in ways.items():
        smaller = [o for d in several.decompositions for o in d.options if o.parameters < tensors[name].numel()]
        before = work.of_layer(name)
        good = [o for o in smaller if not before or o.form == asked in _ASKED or work.of(name, o) <= before]
        if good:
            found[name] = good
        else:
            more = "every smaller product takes more multiply-accumulates"
            left[name] = more if smaller else "no product is smaller"
    return found


def _warned(chosen: Mapping[str, Option], work: Work) -> list[str]:
    more = {n: (work.of_layer(n), work.of(n, o)) for n, o in chosen.items()}
    rows = [f"{n} {before:,} → {after:,}" for n, (before, after) in more.items() if after > before]
    return [f"warning: more multiply-accumulates as a chain: {', '.join(rows)}"] if rows else []


def _sensitivities(
    network: Network,
    ways: Mapping[str, Ways],
    options: Mapping[str, Sequence[Option]],
    batch: Mapping[str, Tensor],
    context: Context,
) -> dict[str, float]:
    """What a layer's own relative error counts for the network's outputs: seen with the layer at half its weights."""
    tensors = network.tensors()
    halves, trials = {}, {}
    for name, several in options.items():
        half = [o for o in several if 2 * o.parameters <= tensors[name].numel()] or list(several)
        halves[name] = min(half, key=lambda o: (o.error, o.parameters))
        trials[name] = [ways[name].instead(ways[name].factors(halves[name]), tensors)]
    count = int(_SENSITIVITY_WORK / max(footprint(network).macs * len(trials), 1))
    most = max(4, min(64, count)) if network.batch_is_dynamic else None
    looked_at = {name: value[:most] for name, value in batch.items()}
    harms = harms_of(measured_changes(network, trials, [looked_at], context.progress))
    return {name: harms[name][0] / max(halves[name].error, 1e-12) for name in halves}


def _reasons(
    network: Network, chosen: Mapping[str, Option], left: Mapping[str, str], last: Mapping[str, str], refit: Refit
) -> tuple[Reason, ...]:
    rows = []
    for name, tensor in network.tensors().items():
        if name in chosen:
            option = chosen[name]
            ranks = " × ".join(map(str, option.ranks))
            why = f"parameters {tensor.numel():,} → {option.parameters:,} ({option.parameters / tensor.numel():.1%})"
            if last[name] in refit.errors:
                before, after = refit.errors[last[name]]
                why += f"; outputs refitted, error {before:.3g} → {after:.3g}"
            rows.append(Reason(layer=name, choice=f"{option.form}, rank {ranks}", score=option.error, why=why))
        elif name in left:
            rows.append(Reason(layer=name, choice="stays", why=left[name]))
    return tuple(rows)
