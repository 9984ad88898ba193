"""What samples that a network was trained on tell of others: outputs stretched beyond the gap of their margins."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.budget import Constraint, parse_constraints
from penjing.data import Data
from penjing.errors import RecipeError
from penjing.methods.search_amount import SearchAmount
from penjing.network import SetWeights, capture
from penjing.recipe import judging
from penjing.recipe.judging import Judge
from penjing.task import get_task


def floor_of(text: str) -> Constraint:
    return parse_constraints(text)[0]


def test_stretched_outputs_tell_what_other_samples_lose() -> None:
    """Margins with a gap: small errors turn no answer, and the square law is read off errors that reach across it."""
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    network = capture(model, inputs=(torch.rand(2, 2),))
    margins = torch.linspace(0.5, 2.5, 200)
    inputs = torch.stack([margins, torch.zeros(200)], 1)
    data = Data((inputs, torch.zeros(200, dtype=torch.long)))
    # The second output grows by a share of the first: answers turn once that is above 1.
    turned = Data((torch.stack([margins, 0.5 * torch.ones(200)], 1), torch.zeros(200, dtype=torch.long)))
    task = get_task("classification")
    for held, share, stretch in ((data, 0.3, 2.0), (turned, 0.3, 2.0), (turned, 0.3, 3.0)):
        value = torch.tensor([[1.0, 0.0], [share, 1.0]])
        other = network.apply([SetWeights(parameter="weight", value=value)])
        judge = Judge(floor_of("accuracy>=-1%"), task, [held], network, stretch=stretch)
        verdict = judge.judge([other])
        ((x, y),) = held.batches(200)
        before, now = network(x), other(x)
        plain = [float((o.argmax(1) == y).float().mean()) for o in (before, now, before + stretch * (now - before))]
        expected = plain[0] + (plain[2] - plain[0]) / stretch**2
        assert f"{expected:.2%} expected of other samples" in verdict.words
        assert verdict.met == (min(plain[1], expected) >= plain[0] - 0.01)
    assert not verdict.met


def test_stretched_outputs_do_not_depend_on_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = capture(nn.Linear(4, 3), inputs=(torch.rand(2, 4),))
    other = network.apply([SetWeights(parameter="bias", value=torch.tensor([0.3, 0.0, 0.0]))])
    held = Data((torch.rand(230, 4), torch.arange(230) % 3))
    words = set()
    for kept in (0, 1500, 1 << 28):
        monkeypatch.setattr(judging, "_KEPT", kept)
        judge = Judge(floor_of("accuracy>=-1%"), get_task("classification"), [held], network, stretch=2.0)
        words |= {judge.judge([other]).words, judge.judge([other]).words}
    assert len(words) == 1


def test_a_stretch_below_one_is_refused() -> None:
    with pytest.raises(RecipeError, match="stretch"):
        SearchAmount(step=pj.PruneWeights(sparsity=0.8), floor="accuracy>=-1%", stretch=0.5)
