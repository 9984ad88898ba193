"""Float and quantized network side by side: what correction finds."""

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.analysis.twin import Twin


def convolution(bias: bool = True) -> pj.Network:
    torch.manual_seed(0)
    return pj.capture(nn.Conv2d(3, 4, 3, bias=bias).eval(), inputs=(torch.randn(4, 3, 8, 8),), name="convolution")


@pytest.mark.parametrize("bias", [True, False])
def test_rows_that_rounding_shrank_are_scaled_back(bias: bool) -> None:
    network, x = convolution(bias), torch.randn(8, 3, 8, 8)
    (layer,) = (n.name for n in network.graph_module.graph.nodes if n.op == "call_function")
    shrunk = torch.tensor([0.8, 0.9, 1.0, 1.1])
    rounded = {"weight": network.tensors()["weight"].detach() * shrunk.view(-1, 1, 1, 1)}
    plain, before = Twin(network.graph_module, rounded, [], []).run(x)
    twin = Twin(network.graph_module, rounded, [], [], rescale={layer: "weight"})
    after = twin.run(x)[1]
    # Of eight samples the last hundredths are not believed.
    torch.testing.assert_close(twin.gains["weight"], 1 / shrunk, rtol=0.02, atol=0)
    assert (after[0] - plain[0]).square().mean() < 0.02 * (before[0] - plain[0]).square().mean()
    assert not twin.biases


def test_a_channel_that_never_varies_keeps_its_scale() -> None:
    network = convolution()
    (layer,) = (n.name for n in network.graph_module.graph.nodes if n.op == "call_function")
    weight = network.tensors()["weight"].detach().clone()
    weight[1] = 0
    twin = Twin(network.graph_module, {"weight": weight}, [], [layer], rescale={layer: "weight"})
    twin.run(torch.randn(8, 3, 8, 8))
    assert twin.gains["weight"][1] == 1
    assert all(torch.isfinite(v).all() for v in (twin.gains["weight"], twin.biases["bias"]))


def test_scales_move_and_integers_stay() -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    x = torch.randn(64, 8, 8, 8)
    network = pj.capture(nn.Sequential(*layers).eval(), inputs=(x[:2],), name="three")
    data = torch.utils.data.TensorDataset(x)

    def made(**fields: bool) -> pj.Network:
        recipe = pj.Recipe(pj.Quantize(weights="int3", activations="int8", headroom=False, **fields))
        return pj.compress(network, recipe, data=data).network

    def error(n: pj.Network) -> float:
        with torch.no_grad():
            return float((n.module()(x) - network.module()(x)).square().mean())

    plain, scaled = made(correct_scale=False), made()
    assert error(scaled) < error(plain)
    integers = [{k: v for k, v in n.tensors().items() if v.dtype == torch.int8} for n in (plain, scaled)]
    assert integers[0]
    assert all(torch.equal(v, integers[1][k]) for k, v in integers[0].items())
