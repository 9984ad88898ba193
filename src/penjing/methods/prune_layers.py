"""PruneLayers: fewer layers: residual blocks that change little give way to their inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from penjing.analysis.footprint import Footprint, footprint, shrinkage
from penjing.analysis.residuals import Residual, choose, find_residuals, last_norms, turning, without_blocks
from penjing.errors import RecipeError
from penjing.network import Network
from penjing.recipe import Context, Plan, Reason, Step, matches, step
from penjing.recipe.samples import bound_samples
from penjing.training import call

_CRITERIA = ("similarity", "output", "metric")
_BATCH = 32


@step
@dataclass(frozen=True, kw_only=True)
class PruneLayers(Step):
    """Remove whole residual blocks: where the graph sums x + f(x), f goes with its weights and x stays.

    `count` blocks go, or the share `ratio` of them (0.25 if nothing is said). Which: `criterion`.

    - "similarity": those that turn what passes least on samples (Men et al. 2024, "ShortGPT"; Gromov et al. 2024, "The
      unreasonable ineffectiveness of the deeper layers"); without samples, those whose last weights are smallest.
    - "output": one after the other, that whose loss changes the network's outputs least. Needs samples.
    - "metric": one after the other, that whose loss costs the task's metric least. Needs samples, labels and a task.

    In a transformer, attention and feed-forward part are blocks of their own, unless they are summed up together. A
    block at which the shape changes stays. `where` selects layers; a block goes only if all layers in it are selected.
    Nothing is refitted: `Finetune` afterwards.
    """

    amounts: ClassVar[Mapping[str, str]] = {"ratio": "goes"}

    count: int | None = None
    ratio: float | None = None
    criterion: str = "similarity"
    samples: int = 256

    def __post_init__(self) -> None:
        self.require_between("count", 1, float("inf"))
        self.require_between("ratio", 0, 1, open_high=True)
        if self.count is not None and self.ratio is not None:
            raise RecipeError(
                "PruneLayers takes either count or ratio, got both",
                hint="count is the number of blocks that go, ratio their share",
            )
        self.require_one_of("criterion", _CRITERIA)
        self.require_between("samples", 1, float("inf"))

    def check(self, context: Context) -> None:
        """Criteria may need samples, or labels and a task."""
        if self.criterion == "output" and context.data is None:
            raise RecipeError("criterion 'output' needs samples", hint="give data, or use 'similarity'")
        if self.criterion == "metric" and (context.data is None or context.task is None):
            raise RecipeError(
                "criterion 'metric' needs samples with labels and a task",
                hint="give data and task, or use 'output', which needs no labels",
            )

    def plan(self, network: Network, context: Context) -> Plan:
        """Decides on the blocks."""
        self.check(context)
        if network.is_quantized:
            raise RecipeError(
                "PruneLayers cannot change a network that is already quantized", hint="put PruneLayers before Quantize"
            )
        known = find_residuals(network)
        blocks = [b for b in known if all(matches(self.where, w) for w in b.weights)]
        if not blocks:
            raise RecipeError(
                f"there is no residual block of {network.name} that PruneLayers(where={self.where!r}) may remove",
                hint=f"blocks: {', '.join(b.name for b in known)}"
                if known
                else "it takes sums x + f(x) of one shape; PruneChannels makes other networks smaller",
            )
        count = self._count(network, blocks)
        size = footprint(network)
        notes: list[str] = []
        gone, scores, why = self._choose(network, blocks, count, context, size, notes)
        if len(gone) == len(known):
            notes.append("no residual block is left")
        edits = without_blocks(known, gone)
        notes[:0] = [
            f"blocks {len(known)} → {len(known) - len(gone)}",
            *shrinkage(size, footprint(network.apply(edits))),
        ]
        reasons = tuple(
            Reason(layer=b.name, score=scores[b.name], choice="goes" if b in gone else "stays", why=why)
            if b.name in scores
            else Reason(layer=b.name, choice="stays", why="not selected by where")
            for b in known
        )
        return Plan(step=self, edits=edits, reasons=reasons, notes=tuple(notes))

    def _count(self, network: Network, blocks: Sequence[Residual]) -> int:
        if self.count is not None and self.count > len(blocks):
            raise RecipeError(
                f"PruneLayers cannot remove {self.count} blocks of {network.name}, which has {len(blocks)}",
                hint="ask for fewer, or widen 'where'",
            )
        return self.count or round((0.25 if self.ratio is None else self.ratio) * len(blocks))

    def _choose(
        self,
        network: Network,
        blocks: Sequence[Residual],
        count: int,
        context: Context,
        size: Footprint,
        notes: list[str],
    ) -> tuple[list[Residual], dict[str, float], str]:
        """What goes, a score by block, and what the score says."""
        if self.criterion == "similarity":
            if context.data is None:
                notes.append("no samples were given: blocks are judged by the size of their last weights")
                scores, why = last_norms(network, blocks), "norm of the last weights"
            else:
                batches = self._samples(network, context, size)
                scores, why = turning(network, blocks, batches, context.progress), "1 - cosine of input and output"
            return sorted(blocks, key=lambda b: scores[b.name])[:count], scores, why
        output = self.criterion == "output"
        harm = self._output_error(network, context, size) if output else self._metric_loss(network, context)

        def without(gone: Sequence[Residual]) -> float:
            return harm(network.apply(without_blocks(blocks, gone)))

        gone, scores = choose(blocks, count, without, context.progress)
        why = "relative output error without it" if output else "what the metric loses without it"
        return gone, scores, f"{why} and those gone before"

    def _samples(self, network: Network, context: Context, size: Footprint) -> list[dict[str, Tensor]]:
        return bound_samples(network, context, size, self.samples, [], _BATCH)

    def _output_error(self, network: Network, context: Context, size: Footprint) -> Callable[[Network], float]:
        """The squared error of a network's outputs, in shares of their variance."""
        batches = self._samples(network, context, size)
        wanted = [network.run(b) for b in batches]

        def error(changed: Network) -> float:
            total = 0.0
            for batch, want in zip(batches, wanted, strict=True):
                total += sum(
                    float((a.float() - b.float()).square().mean() / b.float().var().clamp_min(1e-12))
                    for a, b in zip(changed.run(batch), want, strict=True)
                    if b.is_floating_point()
                )
            return total / max(len(batches), 1)

        return error

    def _metric_loss(self, network: Network, context: Context) -> Callable[[Network], float]:
        """How much worse than `network` another one does by the task's metric."""
        task, data = context.task, context.data
        if task is None or data is None:
            raise RecipeError("criterion 'metric' needs samples with labels and a task", hint="give data and task")
        fixed = _BATCH if network.batch_is_dynamic else network.inputs[0].shape[0]

        def mean(of: Network) -> float:
            drawn = data.batches(fixed, shuffle=True, seed=context.seed, limit=self.samples)
            module = of.module()
            with torch.no_grad():
                scores = [task.scores(call(module, inputs), labels) for inputs, labels in drawn]
            return float(torch.cat(scores).double().mean())

        before = mean(network)
        sign = 1 if task.higher_is_better else -1
        return lambda changed: sign * (before - mean(changed))
