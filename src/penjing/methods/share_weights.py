"""ShareWeights: the weights of a layer share a few values, and are stored as short codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from penjing.analysis.footprint import footprint
from penjing.analysis.saliency import gradient_sizes, input_norms
from penjing.analysis.weights import Weight, find_weights
from penjing.data import Data
from penjing.errors import DataError, InputError, RecipeError
from penjing.network import Network, QuantizeTensor
from penjing.recipe import Context, Plan, Reason, Step, matches, step
from penjing.recipe.samples import bound_samples
from penjing.tensors import grids
from penjing.tensors.codebooks import decode, encode, kmeans
from penjing.training import call

_CRITERIA = ("weights", "activation", "outputs")
_MOST = 256
_PROBE_BATCH = 4
#: What a weight counts at least, as a share of the mean: samples that are not among those seen may need it.
_LEAST = 0.01


@step
@dataclass(frozen=True, kw_only=True)
class ShareWeights(Step):
    """Let the weights of a layer take only `codes` different values, found by k-means, and store which takes which.

    Han, Mao & Dally 2016, "Deep compression", §3. With `granularity` "tensor" all weights of a tensor share one table,
    with "channel" those of each of its rows (dimension 0), which is finer and costs a table a row. What is computed
    stays float: the network gets smaller, not faster. `Finetune` afterwards trains the shared values.

    `criterion` says which errors count. "weights": all alike. "activation": by the mean square of what a weight
    multiplies. "outputs": by how much the network's outputs change with it, the diagonal of the Gauss-Newton matrix
    (as Kim et al. 2024, "SqueezeLLM", by the Fisher information; here from random probes of the outputs, so without
    labels). The last two look at `samples`, without labels. If nothing is said it is "outputs", or "weights" where
    there are no samples.

    Weights that were masked stay zero, and with `keep_zeros` all that are exactly zero: one of the codes is theirs.
    Weights are those of convolutions, linear and recurrent layers, products and embeddings.
    """

    codes: int = 16
    granularity: str = "tensor"
    criterion: str | None = None
    keep_zeros: bool = True
    samples: int = 256

    def __post_init__(self) -> None:
        self.require_whole("codes", 2)
        self.require_between("codes", 2, _MOST)
        self.require_one_of("granularity", ("tensor", "channel"))
        self.require_one_of("criterion", (None, *_CRITERIA))
        self.require_one_of("keep_zeros", (True, False))
        self.require_whole("samples", 1)

    def check(self, context: Context) -> None:
        """ "activation" and "outputs" need samples."""
        if self.criterion not in (None, "weights") and context.data is None:
            raise DataError(
                f"ShareWeights(criterion='{self.criterion}') needs samples and no data was given",
                hint="give data (a hundred samples without labels are enough), or use criterion='weights'",
            )

    def plan(self, network: Network, context: Context) -> Plan:
        """A table for every selected weight; a reason for each with its SQNR in dB."""
        self.check(context)
        if network.is_quantized:
            raise RecipeError(
                "ShareWeights cannot change a network that is already quantized",
                hint="select all weights at once, or leave Quantize away",
            )
        weights, left = self._selected(network)
        notes: list[str] = []
        importance = self._importance(network, weights, context, notes)
        tensors = network.tensors()
        edits, reasons = [], []
        for name in weights:
            weight = tensors[name].detach().float()
            try:
                levels = self._levels(weight, network.masks.get(name), importance.get(name))
            except ValueError as error:
                raise InputError(f"{name} cannot be shared: {error}", hint="exclude it with where") from error
            table = levels[0] if len(levels) == 1 else levels
            edits.append(QuantizeTensor(tensor=name, scale=1.0, zero_point=0, levels=table))
            reasons.append(self._reason(name, weight, levels, importance.get(name), self._criterion(context)))
        count, size = sum(tensors[n].numel() for n in weights), sum(self._bits(tensors[n]) for n in weights)
        notes.insert(0, f"{count:,} weights in {len(weights)} tensors at {size / count:.3g} bits, tables included")
        reasons += [Reason(layer=name, choice="stays", why=why) for name, why in left.items()]
        return Plan(step=self, edits=tuple(edits), reasons=tuple(reasons), notes=tuple(notes))

    # ----------------------------------------------------------------------------------------------------- choosing
    def _selected(self, network: Network) -> tuple[dict[str, Weight], dict[str, str]]:
        everything = find_weights(network)
        tensors, left = network.tensors(), dict(everything.left)
        for name in everything.found:
            stored = 8 * tensors[name].element_size() * tensors[name].numel()
            if not matches(self.where, name):
                left[name] = "not selected by where"
            elif self._bits(tensors[name]) >= stored:
                left[name] = "too few weights: codes and table would take more"
        weights = {name: weight for name, weight in everything.found.items() if name not in left}
        if not weights:
            raise RecipeError(
                f"there is no weight of {network.name} that ShareWeights(where={self.where!r}) may take",
                hint="too few weights for so many codes"
                if any("too few" in why for why in left.values())
                else "weights are those of convolutions, linear and recurrent layers and embeddings",
            )
        return weights, left

    def _bits(self, weight: Tensor) -> int:
        """What codes and tables take."""
        rows = len(weight) if self.granularity == "channel" else 1
        return weight.numel() * (self.codes - 1).bit_length() + rows * self.codes * 8 * weight.element_size()

    # ------------------------------------------------------------------------------------------------------- levels
    def _levels(self, weight: Tensor, mask: Tensor | None, importance: Tensor | None) -> Tensor:
        """(rows, codes)"""
        rows = self._rows(weight)
        zeros = rows == 0 if self.keep_zeros else torch.zeros_like(rows, dtype=torch.bool)
        zeros = zeros if mask is None else zeros | ~self._rows(mask)
        counts = torch.ones_like(rows) if importance is None else self._rows(importance).float()
        counts = counts / counts.mean().clamp_min(1e-30) + (0.0 if importance is None else _LEAST)
        # What is zero anyway has its level already and must not draw others to it.
        return kmeans(rows, self.codes, importance=counts * ~zeros, zero=bool(zeros.any()))

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(len(tensor) if self.granularity == "channel" else 1, -1)

    def _reason(self, name: str, weight: Tensor, levels: Tensor, importance: Tensor | None, by: str) -> Reason:
        rows = self._rows(weight)
        shared = decode(encode(rows, levels), levels)
        score = grids.sqnr(rows, shared)
        words = [f"weights {score:.1f} dB"]
        if importance is not None:
            root = self._rows(importance).float().sqrt()
            words.append(f"by {by} {grids.sqnr(rows * root, shared * root):.1f} dB")
        bits = self._bits(weight) / weight.numel()
        words.append(f"{bits:.3g} bits a weight with the table{'s' if len(levels) > 1 else ''}")
        choice = f"{self.codes} levels per {self.granularity}"
        return Reason(layer=name.removesuffix(".weight"), choice=choice, score=score, why=", ".join(words))

    # --------------------------------------------------------------------------------------------------- importance
    def _criterion(self, context: Context) -> str:
        return self.criterion or ("weights" if context.data is None else "outputs")

    def _importance(
        self, network: Network, weights: Mapping[str, Weight], context: Context, notes: list[str]
    ) -> dict[str, Tensor]:
        criterion = self._criterion(context)
        if criterion == "weights":
            return {}
        if criterion == "activation":
            batches = bound_samples(network, context, footprint(network), self.samples, notes)
            if not batches:
                raise DataError("the data holds no samples", hint="ShareWeights looks at some of data")
            found = input_norms(network, weights.values(), batches, context.progress)
        else:
            found = gradient_sizes(
                network, list(weights), self._batches(network, context), _probe(context.seed), context.progress
            )
        if unseen := [name for name in weights if name not in found]:
            notes.append(f"what {', '.join(unseen)} multiplies cannot be watched: all of its errors count alike")
        return {name: size.square() for name, size in found.items()}

    def _batches(self, network: Network, context: Context) -> Iterator[tuple[Any, Any]]:
        free, fixed = network.batch_is_dynamic, network.inputs[0].shape[0]
        data = cast(Data, context.data)
        limit = max(self.samples, fixed)
        for inputs, _ in data.batches(_PROBE_BATCH if free else fixed, shuffle=True, seed=context.seed, limit=limit):
            if free or len(next(iter(network.bind(inputs).values()))) == fixed:
                yield inputs, None


def _probe(seed: int) -> Any:
    """A loss whose squared gradients are, in the mean over random signs, those of all outputs added up."""
    generator = torch.Generator().manual_seed(seed)

    def loss(module: nn.Module, inputs: Any, labels: Any) -> Tensor:
        outputs = [o for o in pytree.tree_leaves(call(module, inputs)) if isinstance(o, Tensor)]
        floating = [o for o in outputs if o.is_floating_point()]
        signs = [torch.randint(0, 2, o.shape, generator=generator).to(o.dtype) * 2 - 1 for o in floating]
        return torch.stack([(o * s).sum() for o, s in zip(floating, signs, strict=True)]).sum()

    return loss


__all__ = ["ShareWeights"]
