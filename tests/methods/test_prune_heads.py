from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from penjing.analysis.footprint import footprint
from penjing.data import Data
from penjing.errors import RecipeError
from penjing.methods.prune_heads import PruneHeads
from penjing.network import Network, QuantizeTensor, RemoveChannels, SetWeights, capture
from penjing.network.channels.groups import Group
from penjing.recipe import Context, Plan, Recipe
from penjing.runtimes import RUNTIMES
from penjing.task import get_task
from penjing.testing.oracles import TOLERANCE, captured, distance, fresh, inputs_of, run

ZOO = ["vit", "bert", "gpt2", "llama", "swin"]
X = torch.randn(64, 6, 16, generator=torch.Generator().manual_seed(2))
Y = torch.arange(64) % 3


class Text(nn.Module):
    """Two encoder layers with four heads of four dimensions each, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        for p in self.encoder.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.3)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x)[:, 0])


@pytest.fixture()
def network() -> Network:
    return capture(Text(), inputs=(X[:2],))


def context(network: Network, *, data: bool = True, seed: int = 0) -> Context:
    samples = Data((X, Y)) if data else None
    return Context(original=network, data=samples, task=get_task("classification") if data else None, seed=seed)


def zoo(name: str) -> Network:
    pytest.importorskip("transformers")
    return captured(name)


def heads(network: Network) -> list[Group]:
    return [g for g in network.groups() if g.heads and g.size > 1]


def gone(network: Network, plan: Plan) -> dict[str, list[int]]:
    """The heads that a plan removes, by group."""
    found = {}
    for edit in plan.edits:
        if isinstance(edit, RemoveChannels):
            group = next(g for g in heads(network) if (edit.parameter, edit.dim) in g.axes)
            member = next(m for m in group.members if m.parameter == edit.parameter)
            units = [u for u in range(group.size) if set(member.indices[u]) <= set(edit.indices)]
            assert {int(i) for i in member.indices[units].flatten()} == set(edit.indices)  # whole heads
            found[group.name] = units
    return found


def scaled(network: Network, group: Group, units: list[int], factor: float) -> Network:
    """`network` with all weights of some heads multiplied."""
    edits = []
    for m in group.members:
        value = network.tensors()[m.parameter].detach().clone()
        index = torch.as_tensor(m.indices[units].flatten())
        value.index_copy_(m.dim, index, value.index_select(m.dim, index) * factor)
        edits.append(SetWeights(parameter=m.parameter, value=value))
    return network.apply(edits)


def error(a: Network, b: Network) -> float:
    return float((a.run((X,))[0] - b.run((X,))[0]).square().mean())


@pytest.mark.parametrize("name", ZOO)
def test_heads_are_told_from_channels(name: str) -> None:
    network = zoo(name)
    kinds = {g.name: g.heads for g in network.groups()}
    assert all(("att" in layer) == whole for layer, whole in kinds.items() if "embed" not in layer)
    assert not any(g.heads for g in network.groups(heads="dims"))
    sizes = [g.size for g in network.groups() if g.heads]
    assert sizes == {"llama": [2, 2], "swin": [2, 2, 4]}.get(name, [4, 4])  # llama: two key-value heads


@pytest.mark.parametrize("name", ZOO)
def test_a_network_without_heads_computes_what_one_with_silent_heads_does(name: str) -> None:
    network = zoo(name)
    plan = PruneHeads(ratio=0.5).plan(network, Context(original=network))
    went = gone(network, plan)
    assert {g: len(units) for g, units in went.items()} == {g.name: g.size // 2 for g in heads(network)}
    tensors = fresh(network.graph_module)
    for group in heads(network):
        for m in group.consumers:  # what reads them reads nothing
            index = torch.as_tensor(m.indices[went[group.name]].flatten())
            tensors[m.parameter].index_fill_(m.dim, index, 0)
    silent = network.apply([SetWeights(parameter=n, value=t) for n, t in tensors.items() if t.is_floating_point()])
    small, example = network.apply(plan.edits), inputs_of(network)
    assert distance(run(silent.graph_module, example), run(small.graph_module, example)) < TOLERANCE
    before, after = footprint(network), footprint(small)
    assert after.macs < before.macs
    dropped = sum(
        len(went[g.name]) * network.tensors()[m.parameter].select(m.dim, 0).numel() * m.indices.shape[1]
        for g in heads(network)
        for m in g.members
        if m.parameter in network.parameter_names
    )
    assert after.parameters == before.parameters - dropped


def test_a_key_value_head_goes_with_the_queries_that_ask_it() -> None:
    network = zoo("llama")
    small = network.apply(PruneHeads(ratio=0.5).plan(network, Context(original=network)).edits)
    shapes = {n.rpartition("self_attn.")[2]: tuple(t.shape) for n, t in small.tensors().items() if "0.self_attn" in n}
    assert shapes["q_proj.weight"] == (8, 16) and shapes["k_proj.weight"] == (4, 16)
    assert shapes["v_proj.weight"] == (4, 16) and shapes["o_proj.weight"] == (16, 8)


@pytest.mark.parametrize("criterion", ["l1", "l2", "taylor", "hessian", "obs", "mean_activation"])
def test_the_weakest_heads_go(network: Network, criterion: str) -> None:
    for group, units in zip(heads(network), ([0, 2], [1, 3]), strict=True):
        network = scaled(network, group, units, 0.03)
    plan = PruneHeads(ratio=0.5, criterion=criterion).plan(network, context(network))
    assert list(gone(network, plan).values()) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("data", [True, False])
def test_globally_heads_go_where_they_matter_least(network: Network, data: bool) -> None:
    first, second = heads(network)
    if data:  # a layer whose heads all say little
        member = first.consumers[0]
        weak = SetWeights(parameter=member.parameter, value=network.tensors()[member.parameter].detach() * 1e-3)
        network = network.apply([weak])
    else:  # a layer with heads that are weak beside the others
        network = scaled(network, first, [0, 1, 3], 0.01)
    here = context(network, data=data)
    plan = PruneHeads(ratio=0.375, scope="global", criterion="l2").plan(network, here)
    went = gone(network, plan)
    assert set(went) == {first.name} and len(went[first.name]) == 3  # 3 of 8, none of them from the second layer
    plan = PruneHeads(ratio=0.375, scope="global", min_heads=2).plan(network, here)
    assert {g: len(units) for g, units in gone(network, plan).items()} == {first.name: 2, second.name: 1}


def test_counts_follow_the_ratio(network: Network) -> None:
    for ratio, kept in ((0.0, 4), (0.25, 3), (0.5, 2), (0.9, 1)):
        plan = PruneHeads(ratio=ratio).plan(network, context(network, data=False))
        assert [r.choice for r in plan.reasons] == [f"{kept}/4 heads kept"] * 2
    plan = PruneHeads(ratio=0.9, min_heads=3).plan(network, context(network, data=False))
    assert [len(units) for units in gone(network, plan).values()] == [1, 1]
    assert PruneHeads(ratio=0.4).share() == 0.4
    later = PruneHeads(ratio=0.5).taking(0.5, before=0.25)
    assert later.ratio == pytest.approx(1 / 3)


def test_projections_are_refitted_without_labels(network: Network) -> None:
    here = Context(original=network, data=Data(X))
    plain = PruneHeads(ratio=0.5, reconstruct=False).plan(network, here)
    refitted = PruneHeads(ratio=0.5).plan(network, here)
    assert gone(network, plain) == gone(network, refitted)
    changed = {e.parameter for e in refitted.edits if isinstance(e, SetWeights)}
    assert {n for n in changed if n.endswith("weight")} == {
        f"encoder.layers.{i}.self_attn.out_proj.weight" for i in (0, 1)
    }
    assert not any(isinstance(e, SetWeights) for e in plain.edits)
    assert error(network.apply(refitted.edits), network) < 0.7 * error(network.apply(plain.edits), network)


def test_where_needs_all_makers_of_a_head(network: Network) -> None:
    plan = PruneHeads(where="encoder.layers.1").plan(network, context(network, data=False))
    assert list(gone(network, plan)) == [heads(network)[1].name]
    with pytest.raises(RecipeError, match="no attention heads"):
        PruneHeads(where="head").plan(network, context(network))


def test_it_trains_afterwards(network: Network) -> None:
    small = network.apply(PruneHeads(ratio=0.5).plan(network, context(network)).edits)
    module = small.module()
    assert torch.equal(module(X), small.run((X,))[0])
    module.train()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(X), Y)
        torch.autograd.backward(loss)
        assert all(p.grad is not None for p in module.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_onnxruntime_computes_the_same(tmp_path: Path) -> None:
    network = zoo("llama")
    small = network.apply(PruneHeads(ratio=0.5).plan(network, Context(original=network)).edits)
    artifact = RUNTIMES.get("onnxruntime").export(small, tmp_path / "net.onnx")
    assert artifact.parity.max_rel <= artifact.parity.tolerance


def test_the_plan_says_why_and_can_be_kept(network: Network, tmp_path: Path) -> None:
    plan = PruneHeads(scope="global").plan(network, context(network))
    text = str(plan)
    assert "heads 8 → 4" in text and "output error" in text and "projection refitted" in text
    again = Plan.load(plan.save(tmp_path / "plan.safetensors"))
    assert torch.equal(network.apply(again.edits).run((X,))[0], network.apply(plan.edits).run((X,))[0])
    assert Recipe.load_text(str(Recipe(PruneHeads(ratio=0.3)))) if hasattr(Recipe, "load_text") else True
    without = PruneHeads(criterion="obs").plan(network, context(network, data=False))
    assert sum("no samples were given" in n for n in without.notes) == 2


def test_what_cannot_be_done_is_said(network: Network) -> None:
    plain = capture(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)), inputs=(X[:2, 0],))
    with pytest.raises(RecipeError, match="there are no attention heads of sequential") as caught:
        PruneHeads().plan(plain, Context(original=plain))
    assert caught.value.hint
    with pytest.raises(RecipeError, match="criterion 'taylor' needs samples"):
        PruneHeads(criterion="taylor").plan(network, context(network, data=False))
    edit = QuantizeTensor(tensor="head.weight", scale=torch.full((3,), 0.01), zero_point=torch.zeros(3), axis=0)
    with pytest.raises(RecipeError, match="already quantized"):
        PruneHeads().plan(network.apply([edit]), context(network))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio": 1.5}, "PruneHeads.ratio must be between 0 and 1, got 1.5"),
        ({"ratio": 1}, "PruneHeads.ratio must be below 1, got 1"),
        ({"criterion": "l3"}, "PruneHeads.criterion must be one of"),
        ({"scope": "network"}, "PruneHeads.scope must be one of layer, global"),
        ({"samples": 0}, "PruneHeads.samples"),
        ({"min_heads": 0}, "PruneHeads.min_heads"),
        ({"reconstruct": "blockwise"}, "PruneHeads.reconstruct"),
    ],
)
def test_fields_are_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        PruneHeads(**fields)  # type: ignore[arg-type]
    assert message in str(caught.value)
