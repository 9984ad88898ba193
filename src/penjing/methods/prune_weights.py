"""PruneWeights: single weights, or small blocks of them, pinned to zero."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from penjing.analysis.footprint import footprint
from penjing.analysis.saliency import gradient_sizes, gradients, input_norms, movement
from penjing.analysis.sparse_reconstruct import Result, prune_layers, prune_together
from penjing.analysis.weights import Weight, find_weights
from penjing.data import Data
from penjing.errors import DataError, RecipeError
from penjing.network import MaskWeights, Network, SetWeights
from penjing.recipe import Context, Plan, Reason, Step, matches, step
from penjing.task import primary
from penjing.tensors.distillation import matching
from penjing.tensors.masks import Draw, Judged
from penjing.tensors.saliency import WEIGHT_CRITERIA, Evidence, WeightCriterion, magnitude
from penjing.tensors.sparsity import ALLOCATIONS, Pattern, parse_pattern
from penjing.training import Batch, call

_DEFAULT = 0.8
_GRADIENT_BATCH, _FISHER_BATCH, _TRAINING_BATCH, _BATCH = 16, 4, 64, 100
#: Most entries of one value that are kept for all samples together while layers are rebuilt (float32: 1 GiB).
_ENTRIES = 1 << 28
#: Where a criterion finds what it needs.
_EVIDENCE: dict[str | None, str] = {"gradients": "gradient", "inputs": "inputs", "movement": "movement"}


@step
@dataclass(frozen=True, kw_only=True)
class PruneWeights(Step):
    """Pin the weights that matter least to zero, from now on: later steps keep them there.

    How many: the share `sparsity` of all selected weights (0.8 if nothing is said), those masked before included; or
    all below the absolute `threshold`; or what `pattern` says. Which: `criterion`, see `penjing.tensors.saliency`:
    "magnitude", "gradient" and "taylor" (labelled samples), "movement" (`movement_steps` of training at the rate
    `movement_lr` on a copy, by labels or else by the original's answers), "wanda" (samples), "random"; "obc",
    "sparsegpt" and "chita" rebuild what stays from samples (`penjing.analysis.sparse_reconstruct`).

    How scores compare: `allocation` spreads the sparsity over tensors, "global" by one threshold, "lamp" by one for
    layer-adaptive scores, "uniform", or "erk" (`penjing.tensors.sparsity`); with `per_row` every output then keeps as
    many weights (not for "obc" and "sparsegpt", which choose over whole layers). Where nothing is said the criterion's
    own way is taken: global, and uniform by row for "wanda".

    `pattern` "2:4" keeps two of every four neighbours along a layer's inputs: for convolutions input channels at one
    tap, in the order in which channels-last kernels sum; a row's last weights count as if zeros followed.
    "block:4x1" takes blocks of 4 outputs × 1 input, judged by the `norm` of their scores ("l1" or "l2"). Blocks go
    whole, those at an edge too, so that it may be a little more than asked for.

    Weights are those of convolutions, linear, bilinear and recurrent layers and products; of `embeddings` if asked.
    """

    amounts: ClassVar[Mapping[str, str]] = {"sparsity": "zero"}

    sparsity: float | None = None
    criterion: str = "magnitude"
    pattern: str | None = None
    allocation: str | None = None
    per_row: bool | None = None
    threshold: float | None = None
    norm: str = "l2"
    embeddings: bool = False
    samples: int = 1000
    movement_steps: int = 200
    movement_lr: float = 0.01

    def __post_init__(self) -> None:
        self.require_between("sparsity", 0, 1, open_high=True)
        self.require_one_of("criterion", WEIGHT_CRITERIA.names())
        self.require_one_of("allocation", (None, *ALLOCATIONS.names()))
        self.require_one_of("per_row", (None, True, False))
        self.require_between("threshold", 0, float("inf"))
        self.require_one_of("norm", ("l1", "l2"))
        self.require_one_of("embeddings", (True, False))
        self.require_between("samples", 1, float("inf"))
        self.require_between("movement_steps", 1, float("inf"))
        self.require_between("movement_lr", 0, float("inf"), open_low=True)
        try:
            pattern = parse_pattern(self.pattern)
        except (ValueError, TypeError):
            raise RecipeError(
                f"PruneWeights.pattern must be like '2:4' or 'block:4x1', got {self.pattern!r}",
                hint="'2:4' keeps two of every four weights; 'block:4x1' takes blocks of 4 outputs and 1 input",
            ) from None
        self._refuse_contradictions(pattern)

    def _refuse_contradictions(self, pattern: Pattern) -> None:
        if self.threshold is not None and self.sparsity is not None:
            raise RecipeError(
                "PruneWeights takes either sparsity or threshold, got both",
                hint="sparsity is the share of weights that goes; threshold the magnitude below which they go",
            )
        if self.threshold is not None and self.criterion != "magnitude":
            raise RecipeError(
                f"PruneWeights.threshold is a magnitude and says nothing to criterion {self.criterion!r}",
                hint="give sparsity, or use 'magnitude'",
            )
        if self.threshold is not None and (self.allocation is not None or self.per_row):
            raise RecipeError(
                "PruneWeights.threshold decides by itself; allocation and per_row must be left away",
                hint="or give sparsity instead of threshold",
            )
        if pattern.group:
            implied = 1 - pattern.keep / pattern.group
            if self.threshold is not None or (self.sparsity is not None and abs(self.sparsity - implied) > 1e-6):
                other = "threshold" if self.threshold is not None else f"sparsity={self.sparsity:g}"
                raise RecipeError(
                    f"PruneWeights.pattern {self.pattern!r} makes {implied:.4g} of the weights zero, "
                    f"which {other} contradicts",
                    hint="leave the other away",
                )
            if self.allocation is not None or self.per_row:
                raise RecipeError(
                    f"PruneWeights.pattern {self.pattern!r} keeps as many everywhere; "
                    "allocation and per_row must be left away",
                    hint="or give sparsity instead of a pattern",
                )
        if self.per_row and self.criterion in ("obc", "sparsegpt"):
            raise RecipeError(
                f"PruneWeights.per_row is not for {self.criterion!r}, which chooses over whole layers",
                hint="leave per_row away, or take 'wanda'",
            )
        if pattern.blocks and self.per_row:
            raise RecipeError("PruneWeights.per_row takes single weights, got blocks", hint="leave per_row away")
        if pattern.blocks and self._criterion.needs == "reconstruction":
            raise RecipeError(
                f"criterion {self.criterion!r} takes single weights or patterns like '2:4', got {self.pattern!r}",
                hint="blocks go by 'magnitude', 'taylor' or 'wanda'",
            )

    @property
    def _criterion(self) -> WeightCriterion:
        return WEIGHT_CRITERIA.get(self.criterion)

    def check(self, context: Context) -> None:
        """Criteria that look at more than weights need samples; gradients also labels and a task."""
        needs = self._criterion.needs
        if needs is not None and context.data is None:
            raise DataError(
                f"criterion '{self.criterion}' needs samples and no data was given",
                hint="give data, or use 'magnitude', which needs none",
            )
        if needs != "gradients" and self.criterion != "chita":
            return
        if context.task is None or next(cast(Data, context.data).batches(1, limit=1))[1] is None:
            raise RecipeError(
                f"criterion '{self.criterion}' needs samples with labels and a task",
                hint="give labelled data and a task, or use 'magnitude' or 'wanda'",
            )

    def plan(self, network: Network, context: Context) -> Plan:
        """Judges the weights and draws the masks; rebuilds what stays if the criterion does."""
        self.check(context)
        if network.is_quantized:
            raise RecipeError(
                "PruneWeights cannot change a network that is already quantized",
                hint="put PruneWeights before Quantize",
            )
        everything = find_weights(network)
        left = dict(everything.left)
        for name, weight in everything.found.items():
            if not matches(self.where, name):
                left[name] = "not selected by where"
            elif weight.embedding and not self.embeddings:
                left[name] = "rows are looked up in it; embeddings=True takes it too"
        weights = {name: weight for name, weight in everything.found.items() if name not in left}
        if not weights:
            raise RecipeError(
                f"there is no weight of {network.name} that PruneWeights(where={self.where!r}) may take",
                hint="weights are those of convolutions, linear and recurrent layers: "
                + (", ".join(list(everything.found)[:5]) or "this network has none"),
            )
        return _Planner(self, network, context, weights).plan(left)


class _Planner:
    """Samples, scores and masks of one Step on one network."""

    def __init__(self, settings: PruneWeights, network: Network, context: Context, weights: dict[str, Weight]) -> None:
        self.settings, self.network, self.context, self.weights = settings, network, context, weights
        self.criterion = WEIGHT_CRITERIA.get(settings.criterion)
        self.draw = Draw(
            pattern=parse_pattern(settings.pattern),
            allocation=settings.allocation or self.criterion.allocation,
            per_row=self.criterion.per_row if settings.per_row is None else settings.per_row,
            norm=settings.norm,
            threshold=settings.threshold,
        )
        self.tensors = network.tensors()
        self.sparsity = _DEFAULT if settings.sparsity is None else settings.sparsity
        self.notes: list[str] = []

    def plan(self, left: Mapping[str, str]) -> Plan:
        result = self._rebuilt() if self.criterion.needs == "reconstruction" else Result(self._masks())
        edits = [MaskWeights(parameter=name, mask=mask) for name, mask in result.masks.items()]
        values = [SetWeights(parameter=name, value=value) for name, value in result.tensors.items()]
        held = self.network.masks
        kept = {n: int((m & held[n]).sum() if n in held else m.sum()) for n, m in result.masks.items()}
        size, stay = sum(m.numel() for m in result.masks.values()), sum(kept.values())
        notes = [f"{size:,} weights, {stay:,} stay: {1 - stay / size:.2%} zero", *self.notes, *result.notes]
        if emptied := [name for name, count in kept.items() if count == 0]:
            notes.append(f"nothing is left of {', '.join(emptied)}: allocation 'lamp' or 'erk' would leave some")
        reasons = [self._reason(name, kept[name], result) for name in result.masks]
        reasons += [Reason(layer=name, choice="stays", why=why) for name, why in left.items()]
        return Plan(step=self.settings, edits=(*edits, *values), reasons=tuple(reasons), notes=tuple(notes))

    def _reason(self, name: str, kept: int, result: Result) -> Reason:
        weight, mask = self.tensors[name].detach().float(), result.masks[name]
        gone = float((weight * ~mask).square().sum() / weight.square().sum().clamp_min(1e-30))
        why = f"{self.settings.criterion}; {gone:.2%} of the squared weights went"
        if name in result.errors:
            why += f"; rebuilt, output error {result.errors[name]:.3g}"
        return Reason(layer=name, score=1 - kept / mask.numel(), choice=f"{kept:,}/{mask.numel():,} kept", why=why)

    # ------------------------------------------------------------------------------------------------------- masks
    def _masks(self) -> dict[str, Tensor]:
        return self.draw.masks(self._judged(self._scores()), self.sparsity)

    def _judged(self, scores: Mapping[str, Tensor]) -> dict[str, Judged]:
        held = self.network.masks
        return {name: Judged(score, self.weights[name].layout, held.get(name)) for name, score in scores.items()}

    def _scores(self) -> dict[str, Tensor]:
        needs, names, progress = self.criterion.needs, list(self.weights), self.context.progress
        gathered: dict[str, Tensor] = {}
        if needs == "gradients":
            gathered = gradient_sizes(self.network, names, self._batches(_GRADIENT_BATCH), self._loss, progress)
        elif needs == "inputs":
            gathered = input_norms(self.network, self.weights.values(), self._bound(self.settings.samples), progress)
            if unseen := [name for name in names if name not in gathered]:
                self.notes.append(f"what {', '.join(unseen)} multiplies cannot be watched: judged by magnitude")
        elif needs == "movement":
            gathered = self._movement()
        return {name: self._score(name, gathered.get(name)) for name in names}

    def _score(self, name: str, found: Tensor | None) -> Tensor:
        generator = torch.Generator().manual_seed(self.context.seed * 100_003 + zlib.crc32(name.encode()))
        seen = {_EVIDENCE[self.criterion.needs]: found} if self.criterion.needs in _EVIDENCE else {}
        return self.criterion.score(Evidence(self.tensors[name], **seen), generator)

    def _movement(self) -> dict[str, Tensor]:
        seed = self.context.seed

        def batches(epoch: int) -> Iterator[Batch]:
            for number, batch in enumerate(self._batches(_TRAINING_BATCH, None, seed * 7919 + epoch)):
                if number == 0 or _size(batch[0]) > 1:  # one sample has no variance: it would spoil batch norms
                    yield batch

        return movement(
            self.network,
            list(self.weights),
            batches,
            self._loss,
            lambda scores, part: self.draw.masks(self._judged(scores), self.sparsity, part),
            steps=self.settings.movement_steps,
            lr=self.settings.movement_lr,
            seed=seed,
            progress=self.context.progress,
        )

    def _rebuilt(self) -> Result:
        settings = self.settings
        keep = None
        if settings.allocation is not None:  # otherwise it finds its own
            sizes = {name: magnitude(Evidence(self.tensors[name]), torch.Generator()) for name in self.weights}
            keep = self.draw.shares(self._judged(sizes), self.sparsity)
        most = max(2, min(settings.samples, _ENTRIES // max(footprint(self.network).largest, 1)))
        if most < settings.samples:
            self.notes.append(f"{most} samples instead of {settings.samples}, to fit in memory")
        if settings.criterion == "chita":
            return prune_together(
                self.network,
                sparsity=self._asked,
                names=list(self.weights),
                batches=self._bound(most),
                gradients=lambda network: gradients(network, self._batches(_FISHER_BATCH), self._loss),
                draw=lambda scores, share: self.draw.masks(self._judged(scores), share, share / self._asked),
                progress=self.context.progress,
            )
        result = prune_layers(
            self.network,
            settings.criterion,
            sparsity=self.sparsity,
            names=list(self.weights),
            batches=self._bound(most),
            keep=keep,
            pattern=self.draw.pattern if self.draw.pattern.group else None,
            progress=self.context.progress,
        )
        others = {n: s for n, s in self._scores().items() if n not in result.masks}
        if others:
            result.notes.append(f"{', '.join(others)} cannot be rebuilt: judged by magnitude, each on its own")
            alone = replace(self.draw, allocation="uniform", per_row=False)
            result.masks.update(alone.masks(self._judged(others), self.sparsity))
        return result

    @property
    def _asked(self) -> float:
        pattern = self.draw.pattern
        return 1 - pattern.keep / pattern.group if pattern.group else self.sparsity

    # ----------------------------------------------------------------------------------------------------- samples
    def _batches(self, size: int, limit: int | None = -1, seed: int | None = None) -> Iterator[tuple[Any, Any]]:
        """Batches (inputs, labels) in an order drawn by the seed; of the number that the network takes."""
        data, fixed = cast(Data, self.context.data), self.network.inputs[0].shape[0]
        free = self.network.batch_is_dynamic
        limit = self.settings.samples if limit == -1 else limit
        seed = self.context.seed if seed is None else seed
        for inputs, labels in data.batches(size if free else fixed, shuffle=True, seed=seed, limit=limit):
            if free or _size(inputs) == fixed:
                yield inputs, labels

    def _bound(self, limit: int) -> list[dict[str, Tensor]]:
        return [self.network.bind(inputs) for inputs, _ in self._batches(_BATCH, limit)]

    @cached_property
    def _teacher(self) -> nn.Module:
        return self.context.original.module()

    def _loss(self, module: nn.Module, inputs: Any, labels: Any) -> Tensor:
        """The task's loss; without labels or a task, the distance from what the original answers."""
        outputs, task = call(module, inputs), self.context.task
        if task is not None and labels is not None:
            return task.loss(outputs, labels)
        with torch.no_grad():
            answer = primary(call(self._teacher, inputs))
        return matching(primary(outputs), answer)


def _size(inputs: Any) -> int:
    return len(next(t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)))
