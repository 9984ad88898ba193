"""Models of transformers in miniature: no dropout, one or a few tensors in, chosen tensors out."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from penjing.testing.networks.base import Made

#: Sizes that most configurations share.
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
WORDS = {"vocab_size": 40, "max_position_embeddings": 16}


class Pick(nn.Module):
    """A transformers model called by keyword, and one tensor (or several) out of what it gives."""

    def __init__(
        self,
        model: nn.Module,
        arguments: str | tuple[str, ...],
        outputs: int | str | tuple[str, ...] = 0,
        **fixed: Any,
    ) -> None:
        super().__init__()
        self.model, self.outputs, self.fixed = model, outputs, fixed
        self.arguments = (arguments,) if isinstance(arguments, str) else arguments

    def forward(self, *given: Tensor) -> Any:
        result = self.model(**dict(zip(self.arguments, given, strict=True)), **self.fixed)
        if isinstance(self.outputs, tuple):
            return tuple(getattr(result, name) for name in self.outputs)
        return getattr(result, self.outputs) if isinstance(self.outputs, str) else result[self.outputs]


def make(kind: str, **settings: Any) -> nn.Module:
    """The model class called `kind` with a configuration of these settings (three labels where it has labels)."""
    model: Any = getattr(transformers, kind)
    if "num_labels" not in settings:
        settings["num_labels"] = 3
    made: nn.Module = model(still(model.config_class(**settings)))
    return made.eval()


def still(config: Any) -> Any:
    """The configuration with every dropout at zero, so that training mode is deterministic too."""
    for key, value in list(vars(config).items()):
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
        elif isinstance(value, transformers.PretrainedConfig):
            still(value)
    return config


def images(model: nn.Module, size: int = 16, outputs: int | str | tuple[str, ...] = 0, **fixed: Any) -> Made:
    """A model and two square images."""
    return Pick(model, "pixel_values", outputs, **fixed), (torch.randn(2, 3, size, size),)


def words(model: nn.Module, length: int = 6, outputs: int | str | tuple[str, ...] = 0, **fixed: Any) -> Made:
    """A model and two sentences."""
    return Pick(model, "input_ids", outputs, **fixed), (torch.randint(2, 40, (2, length)),)


def pairs(model: nn.Module, outputs: int | str | tuple[str, ...] = 0) -> Made:
    """A model that reads one sentence and writes another, and two of each."""
    inputs = torch.randint(2, 40, (2, 6)), torch.randint(2, 40, (2, 4))
    return Pick(model, ("input_ids", "decoder_input_ids"), outputs, use_cache=False), inputs
