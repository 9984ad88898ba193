"""Shrunk networks compute what masked ones and ones with copied channels compute, on every family of the zoo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import penjing as pj
from penjing.errors import EditError
from penjing.network import graph as flat
from penjing.network.channels.groups import analyse, kept_indices
from penjing.network.channels.remove import remove
from penjing.testing.networks import ZOO
from penjing.testing.oracles import TOLERANCE, Case, captured, case, distance, duplicated, larger, masked, removal, run

QUICK = [name for name, architecture in ZOO.items() if architecture.quick]
WITH_HEADS = ["vit", "swin", "bert", "gpt2", "llama", "qwen3", "t5_encoder", "fused_attention", "wav2vec2"]


def compare(case: Case, big: torch.fx.GraphModule, small: torch.fx.GraphModule) -> None:
    for example, training in ((case.example, False), (larger(case.example, 3), False), (larger(case.example, 6), True)):
        wanted, given = run(big, example, training), run(small, example, training)
        assert distance(wanted, given) <= TOLERANCE
        assert all(len(t) < 2 or float((t[0] - t[1]).abs().max()) > 1e-5 for t in wanted[:1]), (
            "outputs do not depend on inputs"
        )


@pytest.mark.parametrize("name", QUICK)
def test_shrunk_equals_masked(name: str) -> None:
    found = case(name)
    big, small = masked(found)
    exact = [g for g in found.groups if g.inexact is None and g.size > 1]
    if exact:
        assert count(small) < count(big)
        assert distance(run(found.graph, found.example), run(big, found.example)) > 1e-4, "the mask changes nothing"
    compare(found, big, small)


@pytest.mark.parametrize("name", QUICK)
def test_shrunk_equals_duplicated(name: str) -> None:
    found = case(name)
    big, small = duplicated(found)
    compare(found, big, small)


@pytest.mark.parametrize("name", [*QUICK, "detr", "conditional_detr", "sew_d", "clipseg", "dlrm"])
def test_half_of_every_group_at_once(name: str) -> None:
    """Also of those that no oracle fits: outputs keep their shapes, whatever the batch."""
    network = captured(name)
    groups = [g for g in network.groups() if g.size > 1]
    halves = [
        pj.network.RemoveChannels(parameter=m.parameter, dim=m.dim, indices=tuple(m.indices[::2].ravel().tolist()))
        for m in (g.members[0] for g in groups)
    ]
    small = network.apply(halves)
    for batch in (1, 3) if network.batch_is_dynamic else (network.inputs[0].shape[0],):
        example = network.example(batch)
        for before, after in zip(network.run(example), small.run(example), strict=True):
            assert before.shape == after.shape
    assert count(small.graph_module) < count(network.graph_module) or not groups


@pytest.mark.parametrize("name", WITH_HEADS)
def test_head_dimensions_equal_masked(name: str) -> None:
    found = case(name, "dims")
    big, small = masked(found)
    assert count(small) < count(big)
    compare(found, big, small)


@pytest.mark.parametrize("name", ["resnet", "shufflenet", "swin", "llama", "lstm", "unet", "grouped"])
def test_pruned_twice(name: str) -> None:
    found = case(name)
    once = duplicated(found)[1]
    again = Case(name, once, found.example, analyse(once, found.example))
    assert {g.name for g in again.groups} <= {g.name for g in found.groups}
    compare(again, *duplicated(again, seed=1))


def count(graph: torch.fx.GraphModule) -> int:
    return sum(t.numel() for t in flat.tensors_of(graph).values())


def test_tensors_that_stay_are_shared() -> None:
    found = case("resnet")
    group = next(g for g in found.groups if len(g.layers) == 3 and g.size > 2)
    removed = remove(found.graph, found.groups, [removal(group, [0, 2])])
    before, after = flat.tensors_of(found.graph), flat.tensors_of(removed.graph_module)
    changed = {m.parameter for m in group.members}
    assert changed == set(removed.kept)
    for name, tensor in after.items():
        assert (tensor is before[name]) == (name not in changed)


def test_kept_indices_slice_the_old_tensors() -> None:
    found = case("unet")
    removals = [removal(g, [1, 3]) for g in found.groups if g.size > 4]
    removed = remove(found.graph, found.groups, removals)
    before = flat.tensors_of(found.graph)
    assert kept_indices(found.groups, removals).keys() == removed.kept.keys()
    for name, tensor in flat.tensors_of(removed.graph_module).items():
        expected = before[name]
        for dim, indices in removed.kept.get(name, {}).items():
            expected = expected.index_select(dim, torch.as_tensor(indices))
        assert torch.equal(expected, tensor)


def test_one_removal_is_closed_over_its_unit() -> None:
    found = case("llama")
    removed = remove(found.graph, found.groups, [("model.model.layers.0.self_attn.k_proj.weight", 0, [1])])
    kept = removed.kept
    assert len(kept["model.model.layers.0.self_attn.k_proj.weight"][0]) == 4
    assert len(kept["model.model.layers.0.self_attn.q_proj.weight"][0]) == 8
    assert list(kept["model.model.layers.0.self_attn.o_proj.weight"][1]) == list(range(8, 16))


def test_last_unit_stays() -> None:
    found = case("residual")
    group = found.groups[0]
    with pytest.raises(EditError, match="would lose all its"):
        remove(found.graph, found.groups, [removal(group, list(range(group.size)))])


@pytest.mark.parametrize(
    ("removed", "words"),
    [
        (("head.weight", 0, [0]), "must stay: an output of the network"),
        (("body.0.0.weight", 1, [0]), "must stay: input"),
        (("body.0.0.weight", 0, [8]), "has 8 positions"),
        (("nothing.weight", 0, [0]), "has no channels"),
    ],
)
def test_bad_removals(removed: tuple[str, int, list[int]], words: str) -> None:
    found = case("residual")
    with pytest.raises(EditError, match=words):
        remove(found.graph, found.groups, [removed])


def test_nothing_to_remove_gives_the_same_graph() -> None:
    found = case("residual")
    assert remove(found.graph, found.groups, []).graph_module is found.graph


class Constants(nn.Module):
    """Constants as wide as the channels, lookups by constant positions, a table that is stored twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(11, 2)
        self.register_buffer("wave", torch.linspace(0.5, 2, 8))
        self.register_buffer("order", torch.tensor([7, 6, 0, 1, 2, 3, 4, 5]))
        self.register_buffer("few", torch.tensor([1, 3, 5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.a(x)) * self.wave + torch.arange(8) * 0.1
        x = x[:, self.order].flip(1)
        return self.b(torch.cat([x, x.index_select(1, self.few)], 1))


def test_constants_follow_their_channels() -> None:
    network = pj.capture(Constants(), inputs=(torch.randn(2, 4),))
    example = network.bind(network.example(2))
    found = Case("constants", network.graph_module, example, analyse(network.graph_module, example))
    assert sum(g.size for g in found.groups) == 8
    removals = [("a.weight", 0, [1, 6])]
    tensors = {k: v.detach().clone() for k, v in flat.tensors_of(found.graph).items()}
    for group in found.groups:
        for m in group.consumers:
            for unit, rows in enumerate(m.indices):
                if group.members[0].indices[unit, 0] in (1, 6):
                    tensors[m.parameter][:, rows] = 0
    small = remove(found.graph, found.groups, removals).graph_module
    assert distance(run(flat.copy(found.graph, tensors=tensors), example), run(small, example)) < 1e-5


def test_network_applies_removals_with_masks_and_round_trips(tmp_path: Path) -> None:
    network = pj.capture(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3)),
        inputs=(torch.randn(2, 3, 9, 9),),
    )
    mask = torch.rand(2, 8, 3, 3) > 0.5
    edits = [
        pj.network.edits.MaskWeights(parameter="3.weight", mask=mask),
        pj.network.edits.RemoveChannels(parameter="0.weight", dim=0, indices=(0, 5)),
    ]
    small = network.apply(edits)
    assert torch.equal(small.masks["3.weight"], mask[:, [1, 2, 3, 4, 6, 7]])
    x = torch.randn(3, 3, 9, 9)
    small.save(tmp_path / "net.safetensors")
    assert torch.equal(pj.Network.load(tmp_path / "net.safetensors")(x), small(x))
    assert small(x).shape == (3, 2, 5, 5)


@pytest.mark.parametrize("axis", [None, 0])
def test_quantized_tensors_follow_their_channels(axis: int | None) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    x = torch.randn(2, 3, 9, 9)
    network = pj.capture(model, inputs=(x,))
    edits = []
    for name in ("0.weight", "2.weight"):
        weight = model.get_parameter(name)
        scale = weight.detach().abs().amax((1, 2, 3)) / 127 if axis == 0 else float(weight.detach().abs().max()) / 127
        zero = torch.zeros(len(weight), dtype=torch.int64) if axis == 0 else 0
        edits.append(pj.network.edits.QuantizeTensor(tensor=name, scale=scale, zero_point=zero, axis=axis))
    node = next(n.name for n in network.graph_module.graph.nodes if "relu" in n.name)
    edits.append(pj.network.edits.QuantizeTensor(tensor=node, scale=0.02, zero_point=-128))
    quantized = network.apply(edits)
    groups = quantized.groups()
    assert not groups.reasons
    (group,) = groups
    assert ("0.weight_scale", 0) in group.axes if axis == 0 else ("0.weight_scale", 0) not in group.axes
    tensors = {k: v.clone() for k, v in quantized.tensors().items()}
    tensors["2.weight"][:, [2, 7]] = 0
    small = remove(quantized.graph_module, groups, [("0.weight", 0, [2, 7])]).graph_module
    example = quantized.bind(x)
    assert flat.tensors_of(small)["0.weight"].dtype == torch.int8
    assert distance(run(flat.copy(quantized.graph_module, tensors=tensors), example), run(small, example)) < 1e-5
    assert np.prod(flat.tensors_of(small)["2.weight"].shape) == 2 * 6 * 9
