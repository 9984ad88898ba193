"""What the channel groups say about networks whose answer is known."""

from __future__ import annotations

import torch
from torch import nn

import penjing as pj
from penjing.network.channels.groups import Groups, analyse
from penjing.testing.networks import ZOO
from penjing.testing.oracles import case

#: The whole zoo is for `benchmarks/`; these take under two seconds each.
QUICK = [name for name, architecture in ZOO.items() if architecture.quick]


def analysed(model: nn.Module, *inputs: torch.Tensor, heads: str = "heads") -> Groups:
    network = pj.capture(model, inputs=inputs)
    return analyse(network.graph_module, network.bind(inputs), heads)


def test_zoo_is_wide_enough() -> None:
    assert len(ZOO) >= 60
    assert len(QUICK) >= 25


def test_residual_blocks_couple_what_is_added() -> None:
    groups = case("residual").groups
    assert [g.size for g in groups] == [8, 6, 8]
    stream = groups.group_of("head.weight", 1)
    assert stream is not None and groups[0] is stream
    assert {m.parameter for m in stream.producers} == {
        "body.0.0.weight",
        "body.1.body.1.weight",
        "body.2.body.1.0.weight",
    }
    assert stream.inexact is None
    assert "producer body.0.0.weight dim 0" in str(stream)
    assert "consumer head.weight dim 1" in str(stream)


def test_concatenation_keeps_parts_apart() -> None:
    groups = case("densenet").groups
    assert sorted(g.size for g in groups) == [4, 4, 4, 8]
    assert len(groups.groups_of("head.weight", 1)) == 4
    readers = groups.group_of("first.weight", 0)
    assert readers is not None
    head = next(m for m in readers.members if m.parameter == "head.weight")
    assert head.indices.shape == (8, 16)
    assert head.indices[1].tolist() == list(range(16, 32))


def test_heads_go_whole_or_lose_dimensions() -> None:
    name = "model.model.layers.0.self_attn.k_proj.weight"
    whole, single = (case("llama", kind).groups.group_of(name, 0) for kind in ("heads", "dims"))
    assert whole is not None and single is not None
    assert whole.size == 2 and whole.members[0].indices.shape[1] * whole.size in (8, 16)
    assert single.size == 2  # rotary embeddings pair dimensions: 4 a head
    assert not set(whole.classes) & set(single.classes) or whole.axes != single.axes


def test_single_head_loses_dimensions() -> None:
    group = case("single_head_attention").groups.group_of("qkv.weight", 0)
    assert group is not None and group.size == 16


def test_depthwise_is_other_and_grouped_is_joined_across_groups() -> None:
    groups = case("grouped").groups
    narrow = groups.group_of("body.1.0.weight", 1)
    assert narrow is not None and narrow.size == 4
    depthwise = next(m for m in groups.group_of("body.2.0.weight", 0).members if m.parameter == "body.2.0.weight")  # type: ignore[union-attr]
    assert depthwise.role == "other"


def test_statistics_across_channels_are_named() -> None:
    assert case("vit").groups[0].inexact == "aten::layer_norm"
    assert case("llama").groups[0].inexact == "aten::mean"
    assert case("group_norm").groups.group_of("body.0.weight", 0).inexact == "aten::group_norm"  # type: ignore[union-attr]
    assert all(g.inexact is None for g in case("resnet").groups)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.relu(self.b(torch.sort(self.a(x), 1).values)))


def test_operator_without_a_rule_is_named_and_pins_only_its_own() -> None:
    groups = analysed(Unknown(), torch.randn(2, 4))
    assert groups.reasons == {"aten::sort": ("a.weight dim 0", "a.bias dim 0", "b.weight dim 1")}
    assert groups.group_of("a.weight", 0) is None
    assert groups.why("a.weight", 0) == ("no rule for aten::sort",)
    rest = groups.group_of("b.weight", 0)
    assert rest is not None and rest.size == 6
    assert "no rule for aten::sort" in str(groups)


def test_zoo_has_a_rule_for_every_operator() -> None:
    for name in QUICK:
        assert not case(name).groups.reasons, name


def test_inputs_and_outputs_stay() -> None:
    groups = case("residual").groups
    assert groups.group_of("head.weight", 0) is None
    assert groups.group_of("body.0.0.weight", 1) is None
    assert groups.why("head.weight", 0) == ("an output of the network",)


class Rows(nn.Module):
    """A frozen position table that meets constants, and weights read both as they are and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 8))
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x) + self.table[: x.shape[1]]
        return self.b(h) + (h @ self.a.weight)[..., :2]


def test_positions_stay_and_channels_of_a_table_go() -> None:
    groups = analysed(Rows(), torch.randn(2, 5, 4))
    group = groups.group_of("table", 1)
    assert group is not None and group.size == 8
    assert groups.group_of("table", 0) is None
    weight = next(m for m in group.members if m.parameter == "a.weight")
    assert set(weight.roles) == {"producer", "consumer"}


def test_members_cover_every_unit_once() -> None:
    for name in QUICK:
        for group in case(name).groups:
            for member in group.members:
                assert member.indices.shape[0] == group.size
                assert len(set(member.indices.reshape(-1).tolist())) == member.indices.size, (name, group.name)
