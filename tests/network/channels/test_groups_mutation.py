"""The oracles see a rule that is missing or wrong: each mutation here must make one of them fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from penjing.errors import EditError
from penjing.network.channels.groups import analyse
from penjing.network.channels.labels import core
from penjing.network.channels.resize import RESIZE
from penjing.network.channels.rules import RULES, Call
from penjing.network.channels.rules.elementwise import same
from penjing.testing.oracles import TOLERANCE, Case, captured, distance, duplicated, inputs_of, masked, run


def caught(name: str, heads: str = "heads") -> set[str]:
    network = captured(name)
    graph, example = network.graph_module, inputs_of(network)
    found = set()
    try:
        case = Case(name, graph, example, analyse(graph, example, heads))  # type: ignore[arg-type]
    except (EditError, RuntimeError):
        return {"analysis"}
    for oracle in (masked, duplicated):
        try:
            big, small = oracle(case)
            if not distance(run(big, example), run(small, example)) <= TOLERANCE:
                found.add(oracle.__name__)
        except (EditError, RuntimeError):
            found.add(oracle.__name__)
    return found


def first_only(call: Call) -> Any:
    """Forgets that the other operands share the channels."""
    labels = call.tensors()[0]
    return core(labels).expand(call.shape) if isinstance(labels, torch.Tensor) else labels


def reshape_only(call: Call) -> Any:
    """Takes a movement of data for a change of shape."""
    return call.label("self").reshape(call.shape)


def heads_reversed(call: Call) -> Any:
    return RULES_BEFORE[call.name](call).flip(2)


def reversed_parts(call: Call) -> Any:
    return tuple(reversed(RULES_BEFORE[call.name](call)))


def reversed_cat(call: Call) -> Any:
    return RULES_BEFORE[call.name](call).flip(1)


def without_joining(call: Call) -> Any:
    """A normalization over groups that forgets its groups."""
    x = call.label("input")
    for name in ("weight", "bias"):
        call.tape.union(core(x).reshape(-1), call.vector(name))
    return x


def gate_first_half(call: Call) -> Any:
    return call.label("self").chunk(2, int(call.values["dim"]))[0]


def forgets_queries(call: Call) -> Any:
    labels = call.label("value")
    return labels if labels.shape == call.shape else labels.expand(call.shape)


def shuffle_by_reshape(call: Call) -> Any:
    labels = core(call.label("self"))
    factor = int(call.values["upscale_factor"]) ** 2
    return (
        labels.reshape(1, factor, -1, 1, 1)[:, 0].expand(call.shape)
        if labels.numel() > 1
        else labels.expand(call.shape)
    )


RULES_BEFORE: dict[str, Callable[[Call], Any]] = dict(RULES)
MUTATIONS: list[tuple[str, str, Callable[[Call], Any], set[str]]] = [
    ("resnet", "aten::batch_norm", same, {"masked", "duplicated"}),
    ("resnet", "pointwise::any", first_only, {"masked", "duplicated"}),
    ("vit", "aten::layer_norm", same, {"duplicated"}),
    ("group_norm", "aten::group_norm", without_joining, {"duplicated"}),
    ("shufflenet", "aten::transpose", reshape_only, {"masked", "duplicated"}),
    ("shufflenet", "aten::chunk", reversed_parts, {"masked", "duplicated"}),
    ("unet", "aten::cat", reversed_cat, {"masked", "duplicated"}),
    ("gated_linear", "aten::glu", gate_first_half, {"masked", "duplicated"}),
    ("bert", "aten::scaled_dot_product_attention", forgets_queries, {"masked", "duplicated"}),
    ("pixel_shuffle", "aten::pixel_shuffle", shuffle_by_reshape, {"masked", "duplicated"}),
    ("fused_attention", "aten::permute", heads_reversed, {"masked", "duplicated"}),
]


@pytest.mark.parametrize(
    ("name", "operator", "mutant", "expected"), MUTATIONS, ids=[f"{m[0]}-{m[1]}" for m in MUTATIONS]
)
def test_a_wrong_rule_is_caught(
    name: str, operator: str, mutant: Callable[[Call], Any], expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert caught(name) == set()
    monkeypatch.setitem(RULES, operator, mutant)
    assert caught(name) & (expected | {"analysis"})


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("multihead_attention", "aten::scaled_dot_product_attention"),
        ("llama", "aten::slice"),
        ("grouped", "aten::conv2d"),
        ("swin", "aten::view"),
        ("padded_shortcut", "aten::pad"),
        ("channel_split", "aten::split_with_sizes"),
        ("gru", "aten::gru"),
        ("group_norm", "aten::group_norm"),
        ("vit", "aten::layer_norm"),
        ("llama", "pointwise::any"),
    ],
)
def test_a_constant_that_is_not_rewritten_is_caught(name: str, operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = "dims" if name in ("multihead_attention", "llama") else "heads"
    assert caught(name, kind) <= {"duplicated"}  # dimensions of heads are summed over: copies do not judge them
    monkeypatch.delitem(RESIZE, operator)
    assert "masked" in caught(name, kind) or kind == "heads" and caught(name, kind)
