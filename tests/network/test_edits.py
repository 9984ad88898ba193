"""The Edits that need no channel groups: each against torch's own operators, and each refusing what it cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penjing.errors import EditError
from penjing.network import Call, MaskWeights, Network, QuantizeTensor, ReplaceLayer, SetWeights, capture

X = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def network() -> Network:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    return capture(model, (X[:2],))


def weights(network: Network, name: str) -> Tensor:
    return network.tensors()[name].detach()


def test_set_weights(network: Network) -> None:
    value = torch.randn(5)
    changed = network.apply([SetWeights(parameter="4.bias", value=value)])
    torch.testing.assert_close(changed.run(X)[0] - network.run(X)[0], (value - weights(network, "4.bias")).expand(3, 5))
    assert isinstance(changed.tensors()["4.bias"], nn.Parameter)
    assert changed.tensors()["4.weight"] is network.tensors()["4.weight"], "what stays the same is shared"


def test_mask_weights_stay_zero(network: Network) -> None:
    mask = torch.rand(5, 144) > 0.5
    masked = network.apply([MaskWeights(parameter="4.weight", mask=mask)])
    assert torch.equal(weights(masked, "4.weight"), weights(network, "4.weight") * mask)
    trained = masked.apply([SetWeights(parameter="4.weight", value=torch.ones(5, 144))])
    assert torch.equal(weights(trained, "4.weight"), mask.float())
    again = Network.from_state(*trained.state())
    assert torch.equal(again.masks["4.weight"], mask)


@pytest.mark.parametrize("axis", [None, 0])
def test_quantized_weights_are_integers_and_equal_fake_quantize(network: Network, axis: int | None) -> None:
    weight = weights(network, "0.weight")
    if axis is None:
        scale, zero = weight.abs().max() / 127, 0
        expected = torch.fake_quantize_per_tensor_affine(weight, float(scale), 0, -127, 127)
    else:
        scale = weight.abs().amax((1, 2, 3)) / 127
        zero = torch.zeros(4, dtype=torch.int64)
        expected = torch.fake_quantize_per_channel_affine(weight, scale, zero.int(), 0, -127, 127)
    edit = QuantizeTensor(tensor="0.weight", scale=scale, zero_point=zero, axis=axis, quant_min=-127)
    quantized = network.apply([edit])
    assert weights(quantized, "0.weight").dtype == torch.int8
    reference = network.apply([SetWeights(parameter="0.weight", value=expected)])
    torch.testing.assert_close(quantized.run(X)[0], reference.run(X)[0], rtol=1e-5, atol=1e-6)
    assert quantized.parameter_count() == network.parameter_count()
    with pytest.raises(EditError, match="stored as integers already"):
        quantized.apply([edit])


def test_quantized_activations_equal_fake_quantize(network: Network) -> None:
    relu = next(n.name for n in network.graph_module.graph.nodes if "relu" in n.name)
    edits = [
        QuantizeTensor(tensor=network.inputs[0].name, scale=1 / 255, zero_point=-128),
        QuantizeTensor(tensor=relu, scale=0.02, zero_point=-128),
    ]
    quantized = network.apply(edits)
    module = network.module()
    x = torch.fake_quantize_per_tensor_affine(X, 1 / 255, -128, -128, 127)
    with torch.no_grad():
        y = F.batch_norm(
            F.conv2d(x, weights(network, "0.weight"), weights(network, "0.bias")),
            *(weights(network, f"1.{n}") for n in ("running_mean", "running_var", "weight", "bias")),
        ).relu()
        y = torch.fake_quantize_per_tensor_affine(y, 0.02, -128, -128, 127)
        expected = F.linear(y.flatten(1), module.state_dict()["4.weight"], module.state_dict()["4.bias"])
    torch.testing.assert_close(quantized.run(X)[0], expected, rtol=1e-4, atol=1e-5)
    again = Network.from_state(*quantized.state())
    assert torch.equal(again.run(X)[0], quantized.run(X)[0])


def test_only_the_named_users_are_quantized() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, x * 2

    network = capture(Two(), (torch.rand(2, 3),))
    added = next(n.name for n in network.graph_module.graph.nodes if n.name.startswith("add"))
    x = torch.tensor([[0.1, 0.24, 0.9]])
    got = network.apply([QuantizeTensor(tensor="x", scale=0.5, zero_point=0, users=(added,))]).run(x)
    torch.testing.assert_close(got[0], torch.tensor([[1.0, 1.0, 2.0]]))
    torch.testing.assert_close(got[1], x * 2)


def test_replace_layer_by_a_chain(network: Network) -> None:
    u, s, v = torch.linalg.svd(weights(network, "4.weight"), full_matrices=False)
    linear = next(n.name for n in network.graph_module.graph.nodes if n.name.startswith("linear"))
    edit = ReplaceLayer(
        node=linear,
        calls=(
            Call(operator="aten.linear.default", arguments=("%", "@4.first")),
            Call(operator="aten.linear.default", arguments=("%", "@4.second", "@4.bias")),
        ),
        tensors={"4.first": nn.Parameter(s[:, None] * v), "4.second": nn.Parameter(u.contiguous())},
    )
    replaced = network.apply([edit])
    torch.testing.assert_close(replaced.run(X)[0], network.run(X)[0], rtol=1e-4, atol=1e-5)
    assert "4.weight" not in replaced.tensors()
    assert {"4.first", "4.second"} <= set(replaced.parameter_names)


def test_replace_layer_by_nothing(network: Network) -> None:
    norm = next(n.name for n in network.graph_module.graph.nodes if n.name.startswith("batch_norm"))
    replaced = network.apply([ReplaceLayer(node=norm)])
    assert not any(name.startswith("1.") for name in replaced.tensors())


def test_nothing_half_done(network: Network) -> None:
    before = network.run(X)[0]
    state = network.state()
    good = SetWeights(parameter="4.bias", value=torch.zeros(5))
    for bad, words in [
        (
            SetWeights(parameter="4.bias", value=torch.zeros(6)),
            r"has the shape \(5,\); the edit brings \(6,\)",
        ),
        (SetWeights(parameter="4.bias", value=torch.full((5,), torch.nan)), "NaN"),
        (SetWeights(parameter="nine", value=torch.zeros(5)), "no tensor called 'nine'"),
        (QuantizeTensor(tensor="nine", scale=1.0, zero_point=0), "neither a parameter nor a node"),
        (QuantizeTensor(tensor="4.bias", scale=1.0, zero_point=0, dtype="int7"), "no integer type"),
        (ReplaceLayer(node="nine"), "no node called 'nine'"),
    ]:
        with pytest.raises(EditError, match=words):
            network.apply([good, bad])
    assert torch.equal(network.run(X)[0], before)
    assert network.state()[0] == state[0]


@pytest.mark.parametrize(
    "topology",
    [
        "",
        "[]",
        "{}",
        '{"penjing": 9}',
        '{"penjing": 1, "name": "n", "graph": [["call_function", "a", "os.system", []]]}',
    ],
)
def test_a_wrong_topology_is_refused(network: Network, topology: str) -> None:
    with pytest.raises(EditError):
        Network.from_state(topology, network.state()[1])


def test_a_missing_tensor_is_named(network: Network, tmp_path: Path) -> None:
    topology, arrays = network.state()
    del arrays["4.bias"]
    with pytest.raises(EditError, match="reads 4.bias"):
        Network.from_state(topology, arrays)


def test_a_mask_that_zeros_tell_is_not_kept(network: Network) -> None:
    mask = torch.ones(5, 144, dtype=torch.bool)
    mask[0] = False
    masked = network.apply([MaskWeights(parameter="4.weight", mask=mask)])
    assert "4.weight.mask" not in masked.state()[1]
    assert torch.equal(Network.from_state(*masked.state()).masks["4.weight"], mask)
    value = weights(masked, "4.weight").clone()
    value[1, 1] = 0  # it may train
    other = masked.apply([SetWeights(parameter="4.weight", value=value)])
    assert "4.weight.mask" in other.state()[1]
    assert torch.equal(Network.from_state(*other.state()).masks["4.weight"], mask)
