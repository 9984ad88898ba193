"""Where quantizers go on small graphs, by rule and by counting."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penjing.analysis.placement import Placement, place
from penjing.network import capture


def placed(
    module: nn.Module, *inputs: Tensor, activations: bool = True, where: str = ""
) -> tuple[Placement, list[str]]:
    network = capture(module.eval(), inputs=inputs)
    result = place(
        network.graph_module,
        floating=[i.name for i in network.inputs if i.dtype.is_floating_point],
        parameters=network.parameter_names,
        selected=lambda name: where in name,
        activations=activations,
    )
    return result, [q.value for q in result.quantizers]


def image(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 8, 8)


def test_relu_is_fused_and_views_carry_the_grid() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(4, 2)
    )
    result, values = placed(module, image())
    assert len(values) == 3 and values[1].startswith("relu") and values[2].startswith(("relu6", "hardtanh", "clamp"))
    assert [layer.kind for layer in result.layers] == ["conv", "conv", "linear"]
    assert len({q.grid for q in result.quantizers}) == 3


class Residual(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm = nn.LayerNorm(8) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.c(self.norm(F.relu(x + self.b(x))))


def test_an_addition_between_convolutions_is_done_in_integers() -> None:
    _, values = placed(Residual(norm=False), image(4))
    assert len(values) == 5  # input, relu(a), b, relu(add), c
    assert not any(v.startswith("add") for v in values)


def test_an_addition_before_a_float_operator_stays_float() -> None:
    _, values = placed(Residual(norm=True), image(4))
    assert sum(v.startswith("relu") for v in values) == 1 and any(v.startswith("layer_norm") for v in values)


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.max_pool2d(torch.cat([F.relu(self.a(x)), self.b(x)], 1), 2))


def test_a_concatenation_shares_one_grid() -> None:
    result, values = placed(Joined(), image())
    grids = {q.value: q.grid for q in result.quantizers}
    assert len(values) == 4 and len(set(grids.values())) == 3
    assert grids["conv2d_1"] == grids["relu"]


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.a(x).split(4, -1)
        return self.b(y) + z.softmax(-1)


def test_a_tuple_is_never_quantized() -> None:
    result, values = placed(Split(), torch.randn(2, 4))
    assert values == ["x", "getitem"] or values[-1].startswith("getitem")
    assert len(values) == 2 and all(q.users is None for q in result.quantizers)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = x.tanh()
        return self.a(y) * y.sigmoid()


def test_only_those_who_want_a_grid_see_it() -> None:
    result, values = placed(Mixed(), torch.randn(2, 4))
    assert values == ["tanh"] and result.quantizers[0].users is not None
    assert [u for u in result.quantizers[0].users if not u.startswith("linear")] == []


class Rotary(nn.Module):
    """Angles from positions: nothing there is an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.a = nn.Embedding(10, 4), nn.Linear(4, 4)
        self.register_buffer("frequencies", torch.rand(1, 4, 1))

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1]).float()[None, None]
        angles = torch.matmul(self.frequencies, positions).transpose(1, 2)
        x = self.emb(ids) * angles.cos()
        scores = torch.matmul(x, x.transpose(1, 2))
        return torch.matmul(scores.softmax(-1), self.a(x))


def test_products_of_positions_are_left_alone() -> None:
    result, values = placed(Rotary(), torch.randint(0, 10, (2, 5)))
    kinds = sorted(layer.kind for layer in result.layers)
    assert kinds == ["embedding", "linear", "product", "product"]
    assert not any("matmul" == v for v in values)


def test_weights_only() -> None:
    result, values = placed(Joined(), image(), activations=False)
    assert values == [] and len(result.layers) == 3


def test_where_excludes_layers_and_their_inputs() -> None:
    result, values = placed(Joined(), image(), where="c.")
    assert [layer.parameter for layer in result.layers] == ["c.weight"]
    assert "x" not in values and len(result.left) == 2


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 6))
        self.up = nn.ConvTranspose2d(6, 5, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(torch.ones(6), x, self.w) + x @ self.w
        return self.up(y[:, :, None, None])


def test_axes_of_output_channels() -> None:
    result, _ = placed(Transposed(), torch.randn(2, 4))
    assert [(layer.parameter, layer.axis) for layer in result.layers] == [("w", 1), ("w", 1), ("up.weight", 1)]
