from __future__ import annotations

import pytest
import torch
from torch import nn

from penjing.analysis.activations import made_by, watch_values
from penjing.network import Network, capture


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b, self.nb = nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.c = nn.Conv2d(4, 4, 1)
        self.f, self.g = nn.Linear(4, 7), nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu_(self.na(self.a(x)))
        x = nn.functional.max_pool2d(x, 2)
        x = self.nb(self.b(x)).relu()
        x = (x + self.c(x)).mean((2, 3))
        return self.g(nn.functional.gelu(self.f(x)))


@pytest.fixture()
def network() -> Network:
    return capture(Residual(), inputs=(torch.rand(2, 3, 8, 8),))


def batches(network: Network, count: int) -> list[dict[str, torch.Tensor]]:
    x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    return [network.bind(part) for part in x.split(4)]


def test_statistics_are_those_of_the_values_behind_the_nonlinearity(network: Network) -> None:
    given = batches(network, 10)  # the last batch is smaller
    seen = watch_values(network, list(network.groups()), given, ranks=True)
    module, x = Residual(), torch.cat([b[network.inputs[0].name] for b in given])
    module.load_state_dict(network.module().state_dict(), strict=False)
    module.eval()
    with torch.no_grad():
        value = module.na(module.a(x)).relu()  # before the pooling
        got = seen["a"]
        assert torch.allclose(got.mean.float(), value.mean((0, 2, 3)), atol=1e-6)
        assert torch.allclose(got.magnitude.float(), value.abs().mean((0, 2, 3)), atol=1e-6)
        assert torch.allclose(got.deviation.float(), value.std((0, 2, 3), correction=0), atol=1e-5)
        assert torch.allclose(got.zeros.float(), (value == 0).float().mean((0, 2, 3)), atol=1e-6)
        assert got.rank is not None
        assert torch.allclose(got.rank.float(), torch.linalg.matrix_rank(value).float().mean(0))
        hidden = nn.functional.gelu(
            module.f(
                (v := module.nb(module.b(nn.functional.max_pool2d(value, 2))).relu()).add(module.c(v)).mean((2, 3))
            )
        )
    assert torch.allclose(seen["f"].mean.float(), hidden.mean(0), atol=1e-6)
    assert seen["f"].rank is None  # a vector is no map


def test_all_values_that_are_read_count(network: Network) -> None:
    """The residual stream is read twice: by the block's convolution and, summed, by the linear layer."""
    found = made_by(network, list(network.groups()))
    assert len(found["b"]) == 2 and any("add" in name for name in found["b"])
    assert found["a"] and all("relu" in name for name in found["a"])


def test_heads_have_the_mean_of_their_dimensions() -> None:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    x = torch.randn(6, 5, 16)
    network = capture(layer, inputs=(x[:2],))
    group = next(g for g in network.groups() if g.size == 4)
    seen = watch_values(network, [group], [network.bind(x)], ranks=True)[group.name]
    attention = layer.self_attn
    with torch.no_grad():
        q, k, v = nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
        heads = [t.view(6, 5, 4, 4).transpose(1, 2) for t in (q, k, v)]
        out = nn.functional.scaled_dot_product_attention(*heads)
    assert torch.allclose(seen.mean.float(), out.mean((0, 2, 3)), atol=1e-5)
    assert seen.rank is not None and torch.allclose(seen.rank, torch.full((4,), 4.0).double())


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_recurrent_layers_and_embeddings(cell: type[nn.LSTM]) -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn, self.out = nn.Embedding(20, 16), cell(16, 12, batch_first=True), nn.Linear(12, 3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.rnn(self.embed(ids))[0][:, -1])

    ids = torch.randint(0, 20, (8, 6))
    network = capture(Text(), inputs=(ids[:2],))
    seen = watch_values(network, list(network.groups()), [network.bind(ids)])
    table = network.tensors()["embed.weight"]
    assert {name: len(s.mean) for name, s in seen.items()} == {"embed": 16, "rnn": 12}
    assert torch.allclose(seen["embed"].mean.float(), table[ids].mean((0, 1)), atol=1e-6)
