"""MergeFactors on tables that are looked up in and multiplied with; chains of other kinds are in test_factorize."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import penjing as pj
from penjing.data import Data
from penjing.errors import RecipeError
from penjing.recipe import Context
from penjing.testing.oracles import distance


class Shared(nn.Module):
    """A table that tokens are looked up in and outputs multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.inner = nn.Embedding(40, 16), nn.Linear(16, 16)
        self.out = nn.Linear(16, 40)
        self.out.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.out(self.inner(self.table(tokens)).relu())
        return logits


def factorized(network: pj.Network, tokens: Tensor) -> pj.Plan:
    return pj.Factorize(ratio=0.4, where="table").plan(network, Context(original=network, data=Data(tokens)))


def test_a_shared_table_merges_back(tmp_path: Path) -> None:
    tokens = torch.randint(0, 40, (6, 9))
    model = pj.capture(Shared().eval(), inputs=(tokens[:2],))
    made = model.apply(factorized(model, tokens).edits)
    made.save(tmp_path / "made.safetensors")
    made = pj.Network.load(tmp_path / "made.safetensors")
    assert set(model.parameter_names) - set(made.parameter_names) == {"table.weight"}
    with pytest.raises(RecipeError, match="no layer .* that Factorize"):
        factorized(made, tokens)
    found = pj.MergeFactors(always=True).plan(made, Context(original=made))
    again = made.apply(found.edits)
    assert found.notes[0] == "1 of 1 chains merged" and set(again.parameter_names) == set(model.parameter_names)
    assert again.parameter_count() == model.parameter_count()
    assert distance([*made.run(tokens)], [*again.run(tokens)]) < 1e-5
    by_size = pj.MergeFactors(target="onnxruntime").plan(made, Context(original=made))
    assert not by_size.edits and [r.choice for r in by_size.reasons] == ["stays a chain"]
