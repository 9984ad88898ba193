from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from penjing.analysis.footprint import footprint
from penjing.analysis.residuals import find_residuals, without_blocks
from penjing.data import Data
from penjing.errors import EditError, RecipeError
from penjing.methods.prune_layers import PruneLayers
from penjing.network import MaskWeights, Network, QuantizeTensor, ReplaceLayer, SetWeights, capture
from penjing.recipe import Context, Plan
from penjing.runtimes import RUNTIMES
from penjing.task import get_task
from penjing.testing.oracles import TOLERANCE, captured, distance, fresh, inputs_of, run

X = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(2))
Y = torch.arange(96) % 5


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.b, self.nb = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.drop(self.nb(self.b(self.na(self.a(x)).relu()))) + x).relu()


class Small(nn.Module):
    """Four blocks of one shape, and before the last of them one that is no block, for it changes the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8), Block(8), Block(8))
        self.way, self.short = nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.Conv2d(8, 12, 1, stride=2)
        self.last = Block(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.stem(x).relu())
        x = (self.way(x) + self.short(x)).relu()
        return self.head(self.last(x).mean((2, 3)))


@pytest.fixture()
def network() -> Network:
    return capture(Small(), inputs=(X[:2],))


def context(network: Network, *, data: bool = True, task: bool = True) -> Context:
    samples = Data((X, Y)) if data else None
    return Context(original=network, data=samples, task=get_task("classification") if task else None)


def goes(plan: Plan) -> list[str]:
    return [r.layer for r in plan.reasons if r.choice == "goes"]


def zoo(name: str) -> Network:
    pytest.importorskip("transformers")
    return captured(name)


def scaled(network: Network, name: str, factor: float) -> Network:
    return network.apply([SetWeights(parameter=name, value=network.tensors()[name].detach() * factor)])


def silent(network: Network, block: str) -> Network:
    """`network` with a block whose norm at the end gives zero."""
    return scaled(scaled(network, f"{block}.nb.weight", 0), f"{block}.nb.bias", 0)


def test_blocks_are_found(network: Network) -> None:
    blocks = find_residuals(network)
    assert [b.name for b in blocks] == ["blocks.0", "blocks.1", "blocks.2", "last"]
    assert blocks[1].weights == ("blocks.1.a.weight", "blocks.1.b.weight")
    assert blocks[1].last == ("blocks.1.b.weight",)


@pytest.mark.parametrize(
    ("name", "count", "last"),
    [
        ("vit", 4, "o_proj"),
        ("bert", 4, "output.dense"),
        ("gpt2", 4, "c_proj"),
        ("llama", 4, "o_proj"),
        ("gptj", 2, "out_proj"),  # attention and feed-forward part side by side: one block
        ("cohere", 4, "o_proj"),  # side by side, but summed up one after the other
        ("mobilenet_v2", 10, "reduce_1x1"),
        ("convnext", 2, "pwconv2"),
    ],
)
def test_blocks_of_known_networks(name: str, count: int, last: str) -> None:
    """And without each of them the network computes what it does where the block adds zero."""
    network, example = zoo(name), inputs_of(zoo(name))
    blocks = find_residuals(network)
    assert len(blocks) == count and any(last in w for w in blocks[0].last)
    for block in (blocks[0], blocks[-1]):
        small = network.apply(without_blocks(blocks, [block]))
        assert not set(block.weights) & set(small.tensors())
        module = network.graph_module
        nodes = {n.name: n for n in module.graph.nodes}
        total, source = nodes[block.total], nodes[block.source]
        branch = next(a for a in total.args[:2] if a is not source)
        want = _run_with_zero(network, branch.name, example)
        assert distance(want, run(small.graph_module, example)) < TOLERANCE
    empty = network.apply(without_blocks(blocks, blocks))
    assert not {w for b in blocks for w in b.weights} & set(empty.tensors())
    assert [t.shape for t in empty.run(example)] == [t.shape for t in network.run(example)]


def _run_with_zero(network: Network, node: str, example: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Outputs with the value of a node at zero, in double precision."""
    copy = network.apply([]).graph_module
    target = next(n for n in copy.graph.nodes if n.name == node)
    with copy.graph.inserting_after(target):
        zero = copy.graph.call_function(torch.ops.aten.mul.Tensor, (target, 0.0))
    target.replace_all_uses_with(zero, delete_user_cb=lambda user: user is not zero)
    copy.recompile()
    return run(copy, example)


@pytest.mark.parametrize("criterion", ["similarity", "output", "metric"])
def test_a_block_that_adds_nothing_goes_first_and_is_not_missed(network: Network, criterion: str) -> None:
    network = silent(network, "blocks.1")
    for data in (True, False):
        if not data and criterion != "similarity":
            continue
        plan = PruneLayers(count=1, criterion=criterion).plan(network, context(network, data=data))
        score = next(r.score for r in plan.reasons if r.layer == "blocks.1")
        assert score == pytest.approx(0, abs=1e-6)
        if criterion != "metric":  # other blocks may cost this random network nothing, too
            assert goes(plan) == ["blocks.1"]
            small = network.apply(plan.edits)
            torch.testing.assert_close(small.run((X,))[0], network.run((X,))[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "gpt2", "llama"])
def test_last_weights_of_zero(name: str) -> None:
    """A transformer's block whose last layer gives zero."""
    network = zoo(name)
    example = inputs_of(network, 8)
    block = find_residuals(network)[1]
    tensors = fresh(network.graph_module)
    zero = [w for w in tensors if w in block.last or w.replace("bias", "weight") in block.last]
    network = network.apply([SetWeights(parameter=w, value=torch.zeros_like(tensors[w])) for w in zero])
    for data in (Data(list(_one_by_one(example))), None):
        plan = PruneLayers(count=1).plan(network, Context(original=network, data=data))
        assert goes(plan) == [block.name]
        small = network.apply(plan.edits)
        assert distance(run(network.graph_module, example), run(small.graph_module, example)) < TOLERANCE


def _one_by_one(example: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
    """Two batches (inputs, no labels)."""
    (value,) = example.values()
    return [(value[:4], torch.zeros(4)), (value[4:], torch.zeros(4))]


def test_similarity_is_block_influence(network: Network) -> None:
    """Against the definition, on values taken from the modules themselves."""
    model = Small().eval()
    network = capture(model, inputs=(X[:2],))
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for i, block in enumerate(model.blocks):
        block.nb.register_forward_hook(lambda m, a, out, i=i: seen.update({f"f{i}": out}))
        block.register_forward_pre_hook(lambda m, a, i=i: seen.update({f"x{i}": a[0]}))
    with torch.no_grad():
        model(X)
    plan = PruneLayers(count=1, samples=96).plan(network, context(network))
    for i in range(3):
        x, y = seen[f"x{i}"].flatten(1), (seen[f"x{i}"] + seen[f"f{i}"]).flatten(1)
        want = 1 - float(nn.functional.cosine_similarity(x, y).mean())
        assert next(r.score for r in plan.reasons if r.layer == f"blocks.{i}") == pytest.approx(want, abs=1e-5)


def test_output_error_is_that_of_the_network_without(network: Network) -> None:
    plan = PruneLayers(count=2, criterion="output", samples=96).plan(network, context(network, task=False))
    went = goes(plan)
    assert len(went) == 2
    blocks = find_residuals(network)
    errors = {}
    for block in blocks:
        small = network.apply(without_blocks(blocks, [block]))
        errors[block.name] = float((small.run((X,))[0] - network.run((X,))[0]).square().mean())
    assert min(errors, key=errors.__getitem__) in went


@pytest.mark.parametrize(
    ("fields", "count"), [({}, 1), ({"count": 3}, 3), ({"ratio": 0.5}, 2), ({"ratio": 0.05}, 0), ({"count": 4}, 4)]
)
def test_how_many_go(network: Network, fields: dict[str, float], count: int) -> None:
    plan = PruneLayers(**fields).plan(network, context(network))  # type: ignore[arg-type]
    small = network.apply(plan.edits)
    assert len(goes(plan)) == count and len(find_residuals(small)) == 4 - count
    before, after = footprint(network), footprint(small)
    own = {
        b.name: sum(p.numel() for p in Block(12 if b.name == "last" else 8).parameters())
        for b in find_residuals(network)
    }
    assert after.parameters == before.parameters - sum(own[b] for b in goes(plan))
    assert (after.macs < before.macs) == (count > 0)
    assert small.run((X,))[0].shape == (96, 5)
    assert not [n for n in small.tensors() if any(n.startswith(f"{b}.") for b in goes(plan))]


def test_a_share_in_a_schedule() -> None:
    assert PruneLayers(ratio=0.4).share() == 0.4 and PruneLayers(count=2).share() is None
    assert PruneLayers(ratio=0.5).taking(0.5, before=0.25).ratio == pytest.approx(1 / 3)


def test_where_selects_whole_blocks(network: Network) -> None:
    plan = PruneLayers(count=1, where="last").plan(network, context(network))
    assert goes(plan) == ["last"]
    assert next(r.why for r in plan.reasons if r.layer == "blocks.0") == "not selected by where"
    with pytest.raises(RecipeError, match="no residual block") as caught:
        PruneLayers(where="blocks.0.a").plan(network, context(network))
    assert "blocks.0, blocks.1" in str(caught.value.hint)


def test_masks_of_what_went_go_too(network: Network) -> None:
    kept = torch.rand(8, 8, 3, 3) > 0.5
    masks = [MaskWeights(parameter=f"blocks.{i}.a.weight", mask=kept) for i in (0, 1)]
    network = silent(network, "blocks.1").apply(masks)
    small = network.apply(PruneLayers(count=1).plan(network, context(network)).edits)
    assert set(small.masks) == {"blocks.0.a.weight"}
    again = Network.from_state(*small.state())
    assert torch.equal(again.run((X,))[0], small.run((X,))[0])


def test_it_trains_afterwards(network: Network) -> None:
    small = network.apply(PruneLayers(count=2).plan(network, context(network)).edits)
    module = small.module()
    module.train()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(X), Y)
        torch.autograd.backward(loss)
        assert all(p.grad is not None for p in module.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", ["own", "bert"])
def test_onnxruntime_computes_the_same(network: Network, name: str, tmp_path: Path) -> None:
    if name != "own":
        network = zoo(name)
    small = network.apply(PruneLayers(count=2).plan(network, Context(original=network)).edits)
    artifact = RUNTIMES.get("onnxruntime").export(small, tmp_path / "net.onnx")
    assert artifact.parity.max_rel <= artifact.parity.tolerance


def test_the_plan_says_why_and_can_be_kept(network: Network, tmp_path: Path) -> None:
    plan = PruneLayers(count=3).plan(network, context(network))  # neighbours among them
    text = str(plan)
    assert "blocks 4 → 1" in text and "1 - cosine" in text
    again = Plan.load(plan.save(tmp_path / "plan.safetensors"))
    assert again.edits == plan.edits or len(again.edits) == 3
    assert torch.equal(network.apply(again.edits).run((X,))[0], network.apply(plan.edits).run((X,))[0])
    without = PruneLayers().plan(network, context(network, data=False))
    assert any("no samples were given" in n for n in without.notes)


def test_a_replaced_layer_gives_way_to_one_of_its_inputs(network: Network) -> None:
    block = find_residuals(network)[0]
    with pytest.raises(EditError, match="'conv2d' is not an input of"):
        network.apply([ReplaceLayer(node=block.total, source="conv2d")])


def test_what_cannot_be_done_is_said(network: Network) -> None:
    plain = capture(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)), inputs=(torch.rand(2, 16),))
    with pytest.raises(RecipeError, match="there is no residual block of sequential") as caught:
        PruneLayers().plan(plain, Context(original=plain))
    assert caught.value.hint
    with pytest.raises(RecipeError, match="cannot remove 5 blocks of small, which has 4"):
        PruneLayers(count=5).plan(network, context(network))
    with pytest.raises(RecipeError, match="criterion 'output' needs samples"):
        PruneLayers(criterion="output").plan(network, context(network, data=False))
    with pytest.raises(RecipeError, match="criterion 'metric' needs samples with labels and a task"):
        PruneLayers(criterion="metric").plan(network, context(network, task=False))
    edit = QuantizeTensor(tensor="stem.weight", scale=torch.full((8,), 0.01), zero_point=torch.zeros(8), axis=0)
    with pytest.raises(RecipeError, match="already quantized"):
        PruneLayers().plan(network.apply([edit]), context(network))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio": 1.5}, "PruneLayers.ratio must be between 0 and 1, got 1.5"),
        ({"count": 0}, "PruneLayers.count must be at least 1, got 0"),
        ({"count": 1, "ratio": 0.5}, "PruneLayers takes either count or ratio, got both"),
        ({"criterion": "l2"}, "PruneLayers.criterion must be one of similarity, output, metric"),
        ({"samples": 0}, "PruneLayers.samples"),
    ],
)
def test_fields_are_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        PruneLayers(**fields)  # type: ignore[arg-type]
    assert message in str(caught.value)
