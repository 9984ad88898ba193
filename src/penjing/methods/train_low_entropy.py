"""TrainLowEntropy: training for few bytes in a package, pruning and quantization in one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from penjing.analysis.fake_quantize import Simulated, WeightGrid, simulate
from penjing.analysis.grid_edits import weight_edit
from penjing.analysis.passes import fold_batch_norms
from penjing.analysis.unread import unread_units
from penjing.errors import DataError, RecipeError
from penjing.network import Edit, Network, RemoveChannels, SetWeights
from penjing.recipe import Context, Plan, Reason, Step, step
from penjing.recipe.judging import scores_of
from penjing.recipe.stored_layers import stored_weights
from penjing.tensors.coding_rates import rate
from penjing.tensors.grids import Grid, quantize
from penjing.tensors.sparse_coding import coded_bits

_MOST = 127  # the largest code
#: The share of the steps over which the rate grows to its full strength.
_RISE = 0.3


@step
@dataclass(frozen=True, kw_only=True)
class TrainLowEntropy(Step):
    """Train for few bytes: `finetune` (a Finetune) minimises its loss + `rate` × the kilobytes that the weights will
    take in a package.

    Weights and biases are rounded to a grid of their own on the way forward, the gradient goes straight through, and
    the grid's step is learned (Esser et al. 2020, "Learned step size quantization"). Bytes are counted under the
    chances that the package's coder for sparse grids will give (`penjing.tensors.coding_rates`; after Oktay et al.
    2020, "Scalable model compression by entropy penalized reparameterization"): zeros get cheap, in rows and columns
    that are nearly empty most of all, so that weights, neurons and inputs fall out by themselves. Units
    that nothing reads any more are removed. Batch norms are folded first.

    `rate` is the one knob: how much loss a kilobyte is worth. 0.003 left 7 kilobytes of LeNet-300-100, 0.012 three;
    larger networks want less.
    It grows over the first third of the steps. Adam finds the balance best: `Finetune(optimizer="adamw", lr=1e-3,
    weight_decay=0, teacher="original", alpha=1)`. The Plan's notes tell bytes after every epoch and, with a task and
    labels, the metric on the first `samples` samples. Weights that an earlier step masked stay zero.
    """

    learns: ClassVar[bool] = True

    finetune: Step
    rate: float = 0.003
    samples: int = 2000

    def __post_init__(self) -> None:
        if not isinstance(self.finetune, Step) or not self.finetune.learns or not hasattr(self.finetune, "epochs"):
            got = self.finetune.name if isinstance(self.finetune, Step) else repr(self.finetune)
            raise RecipeError(
                f"TrainLowEntropy.finetune must be a Step that trains, got {got}", hint="finetune: Finetune"
            )
        if getattr(self.finetune, "watches", False):
            raise RecipeError(
                "TrainLowEntropy.finetune keeps what measured best, which is what was before anything got small",
                hint="leave held_out and patience away",
            )
        self.require_between("rate", 0, float("inf"))
        self.require_whole("samples", 1)

    def check(self, context: Context) -> None:
        """What the training needs."""
        if context.data is None:
            raise DataError(
                "TrainLowEntropy needs samples and no data was given", hint="give data, best what it was trained on"
            )
        self.finetune.check(context)

    def plan(self, network: Network, context: Context) -> Plan:
        """Trains a copy; the Plan folds, sets, removes and quantizes."""
        self.check(context)
        if network.is_quantized:
            raise RecipeError(
                "TrainLowEntropy needs a float network, and this one is quantized",
                hint="leave steps that quantize away before it",
            )
        folds = fold_batch_norms(network)
        folded = network.apply(folds) if folds else network
        made = simulate(folded, self._grids(folded))
        watch = _Watch(self, folded, made, context)
        inner = replace(
            context,
            after_step=watch.after_step,
            watcher=watch,
            penalty=watch.penalty,
            rates=_step_rates(made),
            trainings=context.trainings.inside(self) if context.trainings else None,
        )
        trained = self.finetune.plan(made.network, inner)
        after = made.network.apply(trained.edits).tensors()
        weights = made.weights(after)
        before, values = folded.tensors(), {n: v for n, (v, _) in weights.items()}
        values = {n: values.get(n, after[n].detach()) for n in before}
        sets = [SetWeights(parameter=n, value=v) for n, v in values.items() if not torch.equal(v, before[n])]
        removed, small = unread_units(folded.apply(sets))
        edits: list[Edit] = [*folds, *sets, *removed]
        reasons, held = [], small.tensors()
        for name, (_, weight) in weights.items():
            edits.append(weight_edit(name, weight.grid))
            reasons.append(_reason(name, quantize(held[name].detach(), weight.grid), weight.grid))
        gone = sum(len(e.indices) for e in removed if isinstance(e, RemoveChannels))
        notes = [*trained.notes, *watch.notes, f"{gone} channels that nothing read are removed"]
        return Plan(step=self, edits=tuple(edits), reasons=tuple(reasons), notes=tuple(notes))

    def _grids(self, folded: Network) -> dict[str, WeightGrid]:
        """What weights and biases start from; a bias of zeros from its weight."""
        tensors, found = folded.tensors(), dict[str, WeightGrid]()
        for name, biases in stored_weights(self, folded).items():
            weight = tensors[name].detach()
            found[name] = _grid(weight)
            for bias in biases:
                like = tensors[bias].detach()
                found[bias] = _grid(like if bool(like.any()) else weight)
        return found


def _grid(x: Tensor) -> WeightGrid:
    """A grid for the whole tensor, its step the root mean square: about a third is zero, and all can still move."""
    step = x.square().mean().sqrt().clamp_min(1e-8).to(torch.float32)
    return WeightGrid(Grid(scale=step, zero_point=torch.tensor(0), quant_min=-_MOST, quant_max=_MOST))


def _step_rates(made: Simulated) -> dict[str, float]:
    """Steps change by the learning rate times what they are: Adam moves everything by about the rate."""
    return {f"{name}_step": float(weight.grid.scale) for name, weight in made.started.items()}


class _Watch:
    """The rate term of a training, and what is said after every epoch."""

    def __init__(self, settings: TrainLowEntropy, folded: Network, made: Simulated, context: Context) -> None:
        self._settings, self._folded, self._made, self._context = settings, folded, made, context
        self._trained = set(folded.parameter_names)
        self._done, self._epoch = 0.0, 0
        self.notes: list[str] = []

    def penalty(self, module: nn.Module) -> Tensor:
        """`rate` × kilobytes."""
        held = dict(module.named_parameters())
        strength = self._settings.rate * min(1.0, self._done / _RISE) / 8000
        if not strength:
            return torch.zeros((), device=next(iter(held.values())).device)
        bits = [rate(held[n] / held[f"{n}_step"].clamp_min(1e-8), _MOST) for n in self._made.started]
        return strength * torch.stack(bits).sum()

    @torch.no_grad()
    def after_step(self, module: nn.Module, done: float, lr: float) -> None:
        """Goes on counting; tells bytes and metric where an epoch ends."""
        if self._context.after_step is not None:
            self._context.after_step(module, done, lr)
        if done <= self._done:  # a training that goes on repeats its last call
            return
        self._done = done
        epochs = cast(float, self._settings.finetune.epochs)  # type: ignore[attr-defined]
        epoch = int(done * epochs + 1e-9)
        if epoch > self._epoch or done >= 1:
            self._epoch = epoch
            tensors = {n: p.detach().cpu().contiguous() for n, p in module.named_parameters()}
            weights = self._made.weights(tensors)
            # What is on no grid stays as it is: norms that could not be folded, say.
            metric = self._metric(
                {n: weights[n][0] if n in weights else tensors[n] for n in self._trained & set(tensors)}
            )
            self.notes.append(
                f"epoch {min(epochs, epoch + (done >= 1)):g}: {_bytes(weights):,.0f} bytes of weights{metric}"
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: how far it is, and what was said until then."""
        return {"done": self._done, "epoch": self._epoch, "notes": self.notes}

    def put_back(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        self._done, self._epoch, self.notes = state["done"], state["epoch"], list(state["notes"])

    def _metric(self, values: Mapping[str, Tensor]) -> str:
        data, task = self._context.data, self._context.task
        if task is None or data is None or next(data.batches(1, limit=1))[1] is None:
            return ""
        now = self._folded.apply([SetWeights(parameter=n, value=v) for n, v in values.items()])
        value = float(scores_of(now, data, task, limit=self._settings.samples).double().mean())
        return (
            f", {task.metric} {value:.2%}" if task.unit == "%" else f", {task.metric} {value:.4g} {task.unit}".rstrip()
        )


def _bytes(weights: Mapping[str, tuple[Tensor, WeightGrid]]) -> float:
    return sum(_coded(quantize(value, weight.grid)) for value, weight in weights.values())


def _coded(codes: Tensor) -> float:
    """Bytes of a tensor's codes in a package."""
    row = codes[0].numel() if codes.ndim > 1 else codes.numel()
    return coded_bits(codes.flatten().numpy(), row) / 8


def _reason(name: str, codes: Tensor, grid: Grid) -> Reason:
    there = int(codes.count_nonzero())
    why = (
        f"{there:,} of {codes.numel():,} are not zero, up to {int(codes.abs().max())} steps of {float(grid.scale):.3g}"
    )
    return Reason(layer=name, choice=f"{_coded(codes):,.0f} bytes", score=there / codes.numel(), why=why)


__all__ = ["TrainLowEntropy"]
