from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from penjing.analysis.footprint import footprint
from penjing.data import Data
from penjing.errors import DataError, RecipeError
from penjing.methods.prune_channels import PruneChannels
from penjing.network import MaskWeights, Network, QuantizeTensor, RemoveChannels, SetWeights, capture
from penjing.recipe import Context, Plan, Recipe
from penjing.task import get_task
from penjing.tensors.criteria import CRITERIA

X = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(2))
Y = torch.arange(96) % 5


class Small(nn.Module):
    """Two convolutions with norms, a residual block, a head: three groups of 16, 8 and 12 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.nb = nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.c, self.nc = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.d = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.nb(self.b(self.na(self.a(x)).relu())).relu()
        x = self.d(self.nc(self.c(x)).relu()) + x
        return self.head(x.relu().mean((2, 3)))


@pytest.fixture()
def network() -> Network:
    return capture(Small(), inputs=(torch.rand(2, 3, 8, 8),))


def context(network: Network, *, data: bool = True, task: bool = True, seed: int = 0) -> Context:
    samples = Data((X, Y)) if data else None
    return Context(original=network, data=samples, task=get_task("classification") if task else None, seed=seed)


def counts(plan: Plan) -> dict[str, int]:
    return {r.layer: int(r.choice.split("/")[0]) for r in plan.reasons if "/" in r.choice}


def error(a: Network, b: Network) -> float:
    return float((a.run((X,))[0] - b.run((X,))[0]).square().mean())


def removed(plan: Plan) -> dict[str, tuple[int, ...]]:
    return {e.parameter: e.indices for e in plan.edits if isinstance(e, RemoveChannels)}


@pytest.mark.parametrize("data", [True, False])
def test_a_ratio_is_the_share_of_every_group_that_goes(network: Network, data: bool) -> None:
    plan = PruneChannels(ratio=0.25).plan(network, context(network, data=data))
    assert counts(plan) == {"a": 12, "b": 6, "c": 9}
    small = network.apply(plan.edits)
    shapes = {n: tuple(t.shape) for n, t in small.tensors().items()}
    assert shapes["b.weight"] == (6, 12, 3, 3) and shapes["d.weight"] == (6, 9, 1, 1)
    assert shapes["head.weight"] == (5, 6) and shapes["nc.running_var"] == (9,)
    assert small.run((X,))[0].shape == (96, 5)
    assert network.parameter_count() == sum(p.numel() for p in Small().parameters())


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("fields", [{"keep_macs": 0.5}, {"keep_params": 0.6}, {"keep_macs": 0.6, "keep_params": 0.5}])
def test_budgets_hold_on_the_network_that_comes_out(network: Network, fields: dict[str, float], data: bool) -> None:
    small = network.apply(PruneChannels(**fields).plan(network, context(network, data=data)).edits)
    before, after = footprint(network), footprint(small)
    if "keep_macs" in fields:
        assert after.macs <= fields["keep_macs"] * before.macs
    if "keep_params" in fields:
        assert after.parameters <= fields["keep_params"] * before.parameters
    shares = {"keep_macs": after.macs / before.macs, "keep_params": after.parameters / before.parameters}
    fullest = max(shares[name] / limit for name, limit in fields.items())
    assert fullest > 0.8  # and no more than needed is taken


def test_the_weakest_channels_go(network: Network) -> None:
    weights = {n: network.tensors()[n].clone() for n in ("a.weight", "b.weight")}
    weak = [1, 5, 6, 10]
    weights["a.weight"][weak] *= 1e-3
    weights["b.weight"][:, weak] *= 1e-3
    network = network.apply([SetWeights(parameter=n, value=w) for n, w in weights.items()])
    for criterion in ("l1", "l2", "taylor", "obs"):
        plan = PruneChannels(ratio=0.25, criterion=criterion).plan(network, context(network))
        assert removed(plan)["a.weight"] == tuple(weak), criterion


def test_norm_gains_decide(network: Network) -> None:
    gain = torch.ones(16)
    gain[[0, 3, 8, 15]] = 0.01
    network = network.apply([SetWeights(parameter="na.weight", value=gain)])
    plan = PruneChannels(ratio=0.25, criterion="bn_scale").plan(network, context(network, data=False))
    assert removed(plan)["a.weight"] == (0, 3, 8, 15)


@pytest.mark.parametrize("criterion", [c for c in CRITERIA.names() if c != "random"])
def test_every_criterion_judges_and_shrinks(network: Network, criterion: str) -> None:
    plan = PruneChannels(ratio=0.5, criterion=criterion).plan(network, context(network))
    assert counts(plan) == {"a": 8, "b": 4, "c": 6}
    again = PruneChannels(ratio=0.5, criterion=criterion).plan(network, context(network))
    assert removed(plan) == removed(again)


def test_silent_channels_go_by_what_they_do(network: Network) -> None:
    """Channels that a strongly negative offset keeps at zero: their weights are as large as the others'."""
    offset, silent = torch.zeros(16), [2, 3, 11, 15]
    offset[silent] = -9.0
    network = network.apply([SetWeights(parameter="na.bias", value=offset)])
    for criterion in ("apoz", "mean_activation", "feature_rank"):
        plan = PruneChannels(ratio=0.25, criterion=criterion).plan(network, context(network, task=False))
        assert removed(plan)["a.weight"] == tuple(silent), criterion
        with pytest.raises(RecipeError, match=f"criterion '{criterion}' needs samples"):
            PruneChannels(criterion=criterion).plan(network, context(network, data=False))


def test_random_is_seeded(network: Network) -> None:
    def chosen(seed: int) -> dict[str, tuple[int, ...]]:
        step = PruneChannels(criterion="random", reconstruct=False)
        return removed(step.plan(network, context(network, data=False, seed=seed)))

    assert chosen(1) == chosen(1) and chosen(1) != chosen(2)


def test_counts_end_on_multiples_and_enough_stay(network: Network) -> None:
    plan = PruneChannels(ratio=0.6, round_to=4).plan(network, context(network))
    assert counts(plan) == {"a": 8, "b": 4, "c": 8}
    assert counts(PruneChannels(ratio=0.9, min_channels=5).plan(network, context(network))) == {"a": 5, "b": 5, "c": 5}
    by_cost = PruneChannels(keep_macs=0.5, round_to=4).plan(network, context(network))
    assert all(kept % 4 == 0 for kept in counts(by_cost).values())


def test_reconstruction_brings_the_outputs_back_without_labels(network: Network) -> None:
    here = context(network, task=False)
    plain = PruneChannels(ratio=0.5, reconstruct=False).plan(network, here)
    refitted = PruneChannels(ratio=0.5).plan(network, here)
    judged = PruneChannels(ratio=0.5, criterion="obs").plan(network, here)
    assert removed(plain) == removed(refitted)
    assert error(network.apply(refitted.edits), network) < 0.5 * error(network.apply(plain.edits), network)
    assert error(network.apply(judged.edits), network) < 0.5 * error(network.apply(plain.edits), network)
    assert not any(isinstance(e, SetWeights) for e in plain.edits)


def test_where_needs_all_makers_of_a_group(network: Network) -> None:
    plan = PruneChannels(where="c").plan(network, context(network))
    assert set(removed(plan)) == {"c.weight"}
    assert next(r.why for r in plan.reasons if r.layer == "a") == "not selected by where"
    # b's channels are also made by d (the residual sum), which is excluded here.
    assert set(removed(PruneChannels(where=["*", "!d"]).plan(network, context(network)))) == {"a.weight", "c.weight"}
    with pytest.raises(RecipeError, match="no channel"):
        PruneChannels(where="head").plan(network, context(network))


def test_masks_shrink_with_the_weights(network: Network) -> None:
    mask = torch.rand(8, 16, 3, 3) > 0.5
    masked = network.apply([MaskWeights(parameter="b.weight", mask=mask)])
    small = masked.apply(PruneChannels(ratio=0.5).plan(masked, context(masked)).edits)
    kept = small.masks["b.weight"]
    assert kept.shape == (4, 8, 3, 3) and (small.tensors()["b.weight"][~kept] == 0).all()


def test_the_plan_says_why_and_can_be_kept(network: Network, tmp_path: Path) -> None:
    plan = PruneChannels(keep_macs=0.5).plan(network, context(network))
    text = str(plan)
    assert "multiply-accumulates" in text and "output error" in text and "refitted" in text
    assert any(r.layer == "head.weight dim 0" and "output" in r.why for r in plan.reasons)
    again = Plan.load(plan.save(tmp_path / "plan.safetensors"))
    assert torch.equal(network.apply(again.edits).run((X,))[0], network.apply(plan.edits).run((X,))[0])
    without = PruneChannels().plan(network, context(network, data=False))
    assert any("no samples were given" in n for n in without.notes)


def test_attention_and_recurrent_layers() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 16)
            self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
            self.rnn = nn.LSTM(16, 12, batch_first=True)
            self.out = nn.Linear(12, 3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.rnn(self.layer(self.embed(ids)))[0][:, -1])

    ids = torch.randint(0, 20, (32, 6))
    network = capture(Text(), inputs=(ids[:2],))
    here = Context(original=network, data=Data(ids))
    plan = PruneChannels(keep_params=0.6, criterion="obs", samples=32).plan(network, here)
    small = network.apply(plan.edits)
    assert footprint(small).parameters <= 0.6 * footprint(network).parameters
    assert small.run((ids,))[0].shape == (32, 3)


def test_what_heads_saved_too_much_comes_back() -> None:
    """A head is a quarter of its layer and takes attention along, which the cost model does not see."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = torch.randn(32, 24, 32)
    network = capture(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), inputs=(x[:2],))
    step = PruneChannels(keep_macs=0.5, where="*linear1|*in_proj*".split("|"), samples=32)
    plan = step.plan(network, Context(original=network, data=Data(x)))
    assert any(kept < 4 for layer, kept in counts(plan).items() if "attn" in layer)
    share = footprint(network.apply(plan.edits)).macs / footprint(network).macs
    assert 0.49 < share <= 0.5  # a unit of linear1 is 0.4 %


def test_what_cannot_be_done_is_said(network: Network) -> None:
    with pytest.raises(RecipeError, match="the least it can leave is macs"):
        PruneChannels(keep_macs=0.001).plan(network, context(network))
    with pytest.raises(RecipeError, match="criterion 'taylor' needs samples"):
        PruneChannels(criterion="taylor").plan(network, context(network, task=False))
    edit = QuantizeTensor(tensor="a.weight", scale=torch.full((16,), 0.01), zero_point=torch.zeros(16), axis=0)
    with pytest.raises(RecipeError, match="already quantized"):
        PruneChannels().plan(network.apply([edit]), context(network))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio": 1.5}, "PruneChannels.ratio must be between 0 and 1, got 1.5"),
        ({"keep_macs": 0}, "PruneChannels.keep_macs must be between 0 and 1, got 0"),
        ({"keep_params": 2}, "PruneChannels.keep_params must be between 0 and 1, got 2"),
        ({"ratio": 0.5, "keep_macs": 0.5}, "PruneChannels takes either ratio or keep_macs, got both"),
        ({"criterion": "l3"}, "PruneChannels.criterion must be one of"),
        ({"round_to": 0}, "PruneChannels.round_to"),
        ({"min_channels": 0}, "PruneChannels.min_channels"),
        ({"samples": 0}, "PruneChannels.samples"),
    ],
)
def test_fields_are_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        PruneChannels(**fields)  # type: ignore[arg-type]
    assert message in str(caught.value)


@pytest.mark.slow
def test_a_real_network_survives_without_training(hub: ModuleType) -> None:
    """ResNet-20, a third of its multiply-accumulates gone: nothing but least squares on 200 unlabelled images."""
    network = capture(hub.resnet20(), inputs=(torch.rand(2, 3, 32, 32),))
    images = hub.cifar10_train10k().tensors[0][:200]
    plan = PruneChannels(keep_macs=0.67, criterion="obs", samples=200).plan(
        network, Context(original=network, data=Data(images))
    )
    x, y = (t[:400] for t in hub.cifar10_test().tensors)
    small = network.apply(plan.edits)
    assert footprint(small).macs <= 0.67 * footprint(network).macs
    assert float((small.run((x,))[0].argmax(1) == y).float().mean()) > 0.84


@pytest.mark.parametrize("criterion", ["l2", "taylor"])
def test_a_fixed_batch_takes_full_batches_only(criterion: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    fixed = capture(model, inputs=(torch.rand(8, 4),), dynamic_batch=False)
    data = Data((torch.rand(21, 4), torch.randint(0, 3, (21,))))
    small = fixed.apply(
        PruneChannels(ratio=0.5, criterion=criterion)
        .plan(fixed, Context(original=fixed, data=data, task=get_task("classification")))
        .edits
    )
    assert [g.size for g in small.groups()] == [4]


@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
def test_labels_are_asked_for(network: Network, criterion: str) -> None:
    unlabelled = Data([(torch.rand(4, *network.inputs[0].shape[1:]), None)])
    with pytest.raises(DataError, match=f"criterion '{criterion}' needs labels and the data has none"):
        PruneChannels(criterion=criterion).check(
            Context(original=network, data=unlabelled, task=get_task("classification"))
        )


def test_the_example_recipe_is_readable() -> None:
    recipe = Recipe.load(Path(__file__).resolve().parents[2] / "examples" / "resnet56.yaml")
    assert [s.name for s in recipe] == ["PruneChannels", "Finetune", "Quantize"]
