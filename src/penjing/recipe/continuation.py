"""Language models that continue prompts, and samples made of what they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from penjing.data import Data, concatenate
from penjing.errors import DataError
from penjing.progress import Progress

#: A label that no loss counts.
IGNORED = -100
_BATCH = 32


@torch.no_grad()
def continued(
    data: Data,
    ask: Callable[[Any], Tensor],
    *,
    prompt: int,
    tokens: int,
    temperature: float,
    seed: int,
    progress: Progress,
    fixed: int | None = None,
) -> Data:
    """The first `prompt` tokens of every sample, continued by `tokens` more: (inputs, labels), the labels the next
    token at each position, ignored where that is the prompt's own.

    `ask(inputs)` gives the logits (n, length, vocabulary) of a causal model: what stands behind a position does not
    change them, so that sequences keep the samples' length while they are filled, and what is behind them stays as it
    was. The most likely token is taken at `temperature` 0, else one is drawn. Inputs are token numbers (n, length),
    or a dictionary with `input_ids`, whose `attention_mask` becomes ones; raises DataError for others, or if
    samples are shorter than prompt and continuation. A model that takes `fixed` samples at once gets so many; the rest
    is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = [], []
    with progress.task("continuing prompts", None) as advance:
        for given, _ in data.batches(fixed or _BATCH):
            ids = _ids(given).clone()
            if fixed is not None and len(ids) < fixed:
                continue
            if ids.shape[1] < prompt + tokens:
                raise DataError(
                    f"a sample has {ids.shape[1]} tokens, fewer than a prompt of {prompt} and {tokens} more",
                    hint="ask for fewer, or give longer samples",
                )
            for place in range(prompt, prompt + tokens):
                logits = ask(_with(given, ids))[:, place - 1]
                ids[:, place] = _next(logits, temperature, generator)
            end = prompt + tokens
            wanted = torch.full_like(ids, IGNORED)
            wanted[:, prompt - 1 : end - 1] = ids[:, prompt:end]
            inputs.append(_with(given, ids))
            labels.append(wanted)
            advance(len(ids))
    return Data(_Sequences(concatenate(inputs), torch.cat(labels)))


class _Sequences(Dataset[tuple[Any, Tensor]]):
    """Samples out of one batch of all of them."""

    def __init__(self, inputs: Any, labels: Tensor) -> None:
        self._inputs, self._labels = inputs, labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        return pytree.tree_map(lambda t: t[index], self._inputs), self._labels[index]


def _next(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1).cpu(), 1, generator=generator)[:, 0]


def _ids(inputs: Any) -> Tensor:
    if isinstance(inputs, tuple) and len(inputs) == 1:
        return _ids(inputs[0])
    ids = inputs.get("input_ids") if isinstance(inputs, dict) else inputs
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        raise DataError(
            "prompts must be token numbers (samples, length)", hint="inputs: one tensor, or a dictionary with input_ids"
        )
    return ids


def _with(inputs: Any, ids: Tensor) -> Any:
    if isinstance(inputs, dict):
        masks = {"attention_mask": torch.ones_like(inputs["attention_mask"])} if "attention_mask" in inputs else {}
        return {**inputs, "input_ids": ids, **masks}
    return (ids,) if isinstance(inputs, tuple) else ids
