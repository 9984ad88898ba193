"""Edits of several rounds as one set: the oracle is one application after the other."""

from __future__ import annotations

import random

import pytest
import torch

from penjing.network import Edit, MaskWeights, Network, RemoveChannels, SetWeights
from penjing.network.composing import compose
from penjing.testing.oracles import TOLERANCE, captured, distance, inputs_of


def some_channels(network: Network, drawn: random.Random) -> list[Edit]:
    """Up to a third of the units of every group."""
    edits: list[Edit] = []
    for group in network.groups():
        count = min(drawn.randint(0, max(1, group.size // 3)), group.size - 1)
        member = (group.producers or group.members)[0]
        units = drawn.sample(range(group.size), count)
        indices = sorted({int(i) for u in units for i in member.indices[u]})
        if indices:
            edits.append(RemoveChannels(parameter=member.parameter, dim=member.dim, indices=tuple(indices)))
    return edits


def some_values(network: Network, drawn: random.Random) -> list[Edit]:
    """A mask and new values for two of the weights."""
    torch.manual_seed(drawn.randint(0, 999))
    names = drawn.sample([n for n in network.parameter_names if network.tensors()[n].ndim > 1], 2)
    tensors = [network.tensors()[n] for n in names]
    return [
        MaskWeights(parameter=names[0], mask=torch.rand(tensors[0].shape) > 0.3),
        SetWeights(parameter=names[1], value=torch.randn(tensors[1].shape) * 0.1),
    ]


@pytest.mark.parametrize("name", ["squeeze_excite", "gru", "multihead_attention", "diffusion_unet"])
def test_rounds_together_are_rounds_in_turn(name: str) -> None:
    start, drawn = captured(name), random.Random(1)
    in_turn = now = start
    edits: tuple[Edit, ...] = ()
    for _ in range(2):
        for some in (some_channels, some_values, some_channels):
            more = some(now, drawn)
            in_turn = in_turn.apply(more)
            edits, now = compose(start, edits, more, now=now)
    again = start.apply(edits)
    for network in (now, again):
        assert set(network.parameter_names) == set(in_turn.parameter_names)
        assert all(torch.equal(network.tensors()[n], in_turn.tensors()[n]) for n in network.parameter_names)
        assert set(network.masks) == set(in_turn.masks)
        assert all(torch.equal(m, in_turn.masks[n]) for n, m in network.masks.items())
    x = inputs_of(start)
    assert distance(again.run(x), in_turn.run(x)) < TOLERANCE


def test_removals_become_one_and_values_are_those_at_the_end() -> None:
    start, drawn = captured("squeeze_excite"), random.Random(2)
    now = start
    edits: tuple[Edit, ...] = ()
    for some in (some_channels, some_values, some_channels, some_values):
        edits, now = compose(start, edits, some(now, drawn), now=now)
    kinds = [type(e) for e in edits]
    assert kinds == sorted(kinds, key=[RemoveChannels, MaskWeights, SetWeights].index)
    removals = [(e.parameter, e.dim) for e in edits if isinstance(e, RemoveChannels)]
    assert len(removals) == len(set(removals))
    values = [(type(e), e.parameter) for e in edits if not isinstance(e, RemoveChannels)]
    assert len(values) == len(set(values))  # type: ignore[arg-type]


def test_what_cannot_go_at_once_goes_in_turn() -> None:
    """Two removals without anything between them, each in the numbers of the network it was decided for."""
    start = captured("squeeze_excite")
    first = [RemoveChannels(parameter="body.2.0.weight", dim=0, indices=(0, 1))]
    paused, now = compose(start, (), first)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("penjing.network.composing._alike", lambda base, after: False)
        paused, now = compose(start, paused, first, now=now)
    assert [type(e) for e in paused[:3]] == [RemoveChannels, SetWeights, RemoveChannels]
    joined, same = compose(start, compose(start, (), first)[0], first)
    (removal,) = joined
    assert isinstance(removal, RemoveChannels) and removal.indices == (0, 1, 2, 3)
    for network in (start.apply(paused), same):
        assert torch.equal(network.run(inputs_of(start))[0], now.run(inputs_of(start))[0])
    name = now.parameter_names[0]
    more, _ = compose(start, paused, [MaskWeights(parameter=name, mask=now.tensors()[name] > 0)])
    assert [type(e) for e in more[:4]] == [RemoveChannels, SetWeights, RemoveChannels, MaskWeights]
