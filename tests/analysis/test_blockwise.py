from __future__ import annotations

import pytest
import torch
from torch import nn

from penjing.analysis.blockwise import find_blocks, optimise_blocks
from penjing.network import MaskWeights, Network, RemoveChannels, SetWeights, capture
from penjing.network.channels.groups import kept_values

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """A stem, two residual blocks (one with an in-place sum), pooling, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (self.b(self.a(x).relu()) + x).relu()
        y = self.d(self.c(x).relu())
        y += x
        return self.head(y.relu_().mean((2, 3)))


class Attention(nn.Module):
    """Tokens with a mask that every layer reads, and a view that needs the sizes of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 48) for _ in range(2)])
        self.outs = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])
        self.last = nn.Linear(16, 16)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for qkv, out in zip(self.layers, self.outs, strict=True):
            q, k, v = (t.view(ids.shape[0], ids.shape[1], 2, 8).transpose(1, 2) for t in qkv(x).split(16, -1))
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
            x = x + out(y.transpose(1, 2).reshape(ids.shape[0], ids.shape[1], 16))
        return self.last(x) @ self.embed.weight.T


@pytest.fixture()
def network() -> Network:
    torch.manual_seed(0)
    model = Residual()
    model.norm.running_var.uniform_(0.5, 2.0)
    return capture(model, inputs=(X[:2],))


def batches(network: Network, size: int = 16) -> list[dict[str, torch.Tensor]]:
    return [network.bind((part,)) for part in X.split(size)]


def error(a: Network, b: Network) -> float:
    return float((a.run((X,))[0] - b.run((X,))[0]).square().mean())


def changed(network: Network, new: dict[str, torch.Tensor]) -> Network:
    return network.apply(SetWeights(parameter=n, value=v) for n, v in new.items())


def test_blocks_hold_every_weight_once_and_cut_only_where_one_value_passes(network):
    blocks = find_blocks(network)
    assert sorted(w for b in blocks for w in b.weights) == sorted(network.parameter_names)
    layers = [{w.split(".")[0] for w in b.weights} for b in blocks]
    assert layers == [{"stem", "norm"}, {"a", "b"}, {"c", "d"}, {"head"}]
    # The targets are taken before pooling, which tells less.
    assert [str(b.ends[0].target) for b in blocks[1:3]] == ["aten.relu.default"] * 2
    for before, after in zip(blocks, blocks[1:], strict=False):
        assert [n for n in after.outside if n.op == "call_function"] == list(before.ends)


def test_a_mask_that_all_layers_read_does_not_glue_them_together():
    model = Attention()
    ids, mask = torch.randint(20, (4, 6)), torch.zeros(4, 6)
    network = capture(model, inputs=(ids, mask))
    blocks = find_blocks(network)
    owned = [set(b.weights) for b in blocks]
    assert {"layers.1.weight", "layers.1.bias", "outs.1.weight", "outs.1.bias"} in owned
    assert all("embed.weight" not in w for w in owned), "read at both ends: no single block may change it"


def test_what_is_already_right_stays(network):
    result = optimise_blocks(network, network, {}, batches(network), steps=4)
    assert result.tensors == {} and set(result.errors.values()) == {(0.0, 0.0)}


def test_pruned_blocks_come_nearer_to_the_original(network):
    edits = [RemoveChannels(parameter=f"{n}.weight", dim=0, indices=tuple(range(6))) for n in "ac"]
    pruned = network.apply(edits)
    result = optimise_blocks(network, pruned, {}, batches(network), steps=60, lr=5e-3)
    assert error(changed(pruned, result.tensors), network) < 0.5 * error(pruned, network)
    assert all(after <= before for before, after in result.errors.values())


def test_targets_lose_the_channels_that_the_stream_lost(network):
    removal = ("stem.weight", 0, (0, 3))
    pruned = network.apply([RemoveChannels(parameter=removal[0], dim=0, indices=removal[2])])
    kept = {n: (d, torch.as_tensor(i)) for n, (d, i) in kept_values(network.groups(), [removal]).items()}
    result = optimise_blocks(network, pruned, kept, batches(network), steps=60, lr=5e-3)
    assert error(changed(pruned, result.tensors), network) < 0.7 * error(pruned, network)


def test_a_block_that_gets_worse_keeps_its_tensors(network):
    pruned = network.apply([RemoveChannels(parameter="a.weight", dim=0, indices=tuple(range(6)))])
    result = optimise_blocks(network, pruned, {}, batches(network), steps=4, lr=50.0)
    assert all(after <= before for before, after in result.errors.values())
    assert error(changed(pruned, result.tensors), network) <= error(pruned, network) * 1.001


def test_masked_weights_stay_zero(network):
    mask = torch.rand(network.tensors()["b.weight"].shape, generator=torch.Generator().manual_seed(1)) < 0.5
    masked = network.apply([MaskWeights(parameter="b.weight", mask=mask)])
    result = optimise_blocks(network, masked, {}, batches(network), steps=20, lr=5e-3)
    assert (result.tensors["b.weight"][~mask] == 0).all()
    assert error(changed(masked, result.tensors), network) < error(masked, network)


def test_the_same_seed_gives_the_same_values(network):
    pruned = network.apply([RemoveChannels(parameter="a.weight", dim=0, indices=tuple(range(6)))])
    first, second = (optimise_blocks(network, pruned, {}, batches(network), steps=8, seed=3) for _ in range(2))
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[n], second.tensors[n]) for n in first.tensors)
