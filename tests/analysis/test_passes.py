"""Folding: the function stays, the batch norms and pads go."""

import pytest
import torch
from torch import Tensor, nn

from penjing.analysis.operators import operator_name
from penjing.analysis.passes import fold_batch_norms, fold_pads
from penjing.network import Network, capture


def operators(network: Network) -> list[str]:
    return [operator_name(n).removeprefix("aten::") for n in network.graph_module.graph.nodes if operator_name(n)]


def shaken(module: nn.Module) -> nn.Module:
    """Batch norms that do something."""
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(m.running_mean, -1, 1)
            nn.init.uniform_(m.running_var, 0.3, 3)
            if m.affine:
                nn.init.uniform_(m.weight, -2, 2)
                nn.init.uniform_(m.bias, -1, 1)
    return module.eval()


NETS = {
    "conv": (nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()), (3, 8, 8)),
    "conv with bias": (nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=1e-2), nn.ReLU()), (3, 8, 8)),
    "depthwise": (nn.Sequential(nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8)), (4, 8, 8)),
    "conv1d": (nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6, affine=False)), (3, 9)),
    "conv3d": (nn.Sequential(nn.Conv3d(2, 4, 3, bias=False), nn.BatchNorm3d(4)), (2, 5, 5, 5)),
    "linear": (nn.Sequential(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.Linear(7, 3), nn.BatchNorm1d(3)), (5,)),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, bias=False), nn.BatchNorm2d(6)), (4, 5, 5)),
    "transposed, grouped": (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (4, 5, 5)),
}


@pytest.mark.parametrize("name", NETS)
def test_folding_keeps_the_function(name: str) -> None:
    module, shape = NETS[name]
    x = torch.randn(3, *shape)
    network = capture(shaken(module), inputs=(x,))
    before = network.run((x,))[0]
    folded = network.apply(fold_batch_norms(network))
    assert "batch_norm" not in operators(folded)
    torch.testing.assert_close(folded.run((x,))[0], before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network.run((x,))[0], before, rtol=0, atol=0)


class Awkward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.shared, self.norm2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.norm3 = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.norm1(y) + y  # the convolution's result is used twice
        return self.norm3(self.norm2(self.shared(self.shared(z))).relu())  # a shared weight; a norm without a layer


def test_what_cannot_be_folded_stays() -> None:
    x = torch.randn(2, 3, 4, 4)
    network = capture(shaken(Awkward()), inputs=(x,))
    assert fold_batch_norms(network) == ()


def test_a_mask_survives_folding() -> None:
    from penjing.network import MaskWeights

    network = capture(shaken(NETS["conv"][0]), inputs=(torch.randn(2, 3, 8, 8),))
    mask = torch.rand(6, 3, 3, 3) > 0.5
    pruned = network.apply([MaskWeights(parameter="0.weight", mask=mask)])
    folded = pruned.apply(fold_batch_norms(pruned))
    assert torch.equal(folded.tensors()["0.weight"] != 0, mask & (network.tensors()["0.weight"] != 0))


def test_symmetric_pads_move_into_convolutions() -> None:
    module = nn.Sequential(
        nn.ZeroPad2d((1, 1, 2, 2)), nn.Conv2d(3, 4, 3, padding=1), nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 4, 3)
    )
    x = torch.randn(2, 3, 8, 8)
    network = capture(module, inputs=(x,))
    folded = network.apply(fold_pads(network))
    assert sum(o in ("pad", "constant_pad_nd") for o in operators(folded)) == 1  # one side only: stays
    torch.testing.assert_close(folded.run((x,))[0], network.run((x,))[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pad", [nn.ReflectionPad2d(1), nn.ConstantPad2d(1, 0.5)])
def test_other_pads_stay(pad: nn.Module) -> None:
    network = capture(nn.Sequential(pad, nn.Conv2d(3, 4, 3)), inputs=(torch.randn(2, 3, 8, 8),))
    assert fold_pads(network) == ()
