"""Changed weights on the grids of before: nearest codes, nothing else, and what it did is told."""

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.analysis.regrid import onto_grids
from penjing.errors import InputError
from penjing.package import delta, encode


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 40)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def captured(change=0.0, only=None):
    torch.manual_seed(0)
    net = Net().eval()
    net.norm.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if weight.ndim > 1 and (only is None or only in name):
                generator = torch.Generator().manual_seed(1)
                weight += change * weight.std() * torch.randn(weight.shape, generator=generator)
    return pj.capture(net, inputs=(torch.rand(2, 3, 8, 8),), name="net")


def parent(network, **settings):
    step = pj.Quantize(activations=None, correct_bias=False, correct_scale=False, **settings)
    return pj.compress(network, pj.Recipe(step), data=None).network


@pytest.mark.parametrize(
    "settings", [{}, {"granularity": "tensor"}, {"weights": "int4", "granularity": "group:16"}, {"symmetric": False}]
)
def test_the_same_weights_give_the_same_codes(settings):
    old = parent(captured(), **settings)
    new, moved = onto_grids(captured(), old)
    assert moved.changed == 0 and moved.codes > 0
    before, after = old.state()[1], new.state()[1]
    assert list(before) == list(after) and all((before[k] == after[k]).all() for k in before)
    x = torch.rand(4, 3, 8, 8)
    assert torch.equal(old(x), new(x))


def test_new_codes_are_the_nearest():
    old = parent(captured())
    tuned = captured(0.01)
    new, moved = onto_grids(tuned, old)
    assert 0 < moved.changed < moved.codes and moved.sqnr > 30
    x = torch.rand(64, 3, 8, 8)
    error = (new(x) - tuned(x)).norm() / tuned(x).norm()
    assert error < 0.02 and error < (old(x) - tuned(x)).norm() / tuned(x).norm()
    held = old.tensors()
    assert torch.equal(new.tensors()["head.weight_scale"], held["head.weight_scale"])
    scale = held["head.weight_scale"][:, None]
    wanted = (tuned.tensors()["head.weight"] / scale).round().clamp(-127, 127)
    assert (new.tensors()["head.weight"] - wanted).abs().max() <= 1  # ties go to the code of before
    assert (new.tensors()["head.weight"] != wanted).float().mean() < 0.01


def test_slack_changes_fewer_codes():
    old, tuned = parent(captured()), captured(0.01)
    changed = [onto_grids(tuned, old, slack=s)[1].changed for s in (0.0, 0.25, 0.5, 4.0)]
    assert changed == sorted(changed, reverse=True) and changed[0] > changed[2] > changed[3]


def test_weights_beyond_the_grid_are_clipped_and_counted():
    _, moved = onto_grids(captured(0.5), parent(captured()))
    assert moved.clipped > 0 and "clipped" in str(moved)


def test_the_delta_is_small_and_exact():
    old = parent(captured())
    new, _ = onto_grids(captured(0.003, only="head"), old)
    packed = [(*n.state(), {}) for n in (old, new)]
    coded = delta.encode(*packed)
    got = delta.decode(coded, packed[0])
    assert got[0] == packed[1][0] and all((got[1][k] == packed[1][1][k]).all() for k in got[1])
    assert len(coded) < 0.6 * len(encode(*packed[1][:2]))


def test_networks_that_do_not_fit_are_refused():
    old = parent(captured())
    with pytest.raises(InputError, match="quantized already"):
        onto_grids(old, old)
    with pytest.raises(InputError, match="no integer grids"):
        onto_grids(captured(), captured())
    with pytest.raises(InputError, match="slack must be"):
        onto_grids(captured(), old, slack=-1)
    other = pj.capture(nn.Linear(3, 4).eval(), inputs=(torch.rand(2, 3),))
    with pytest.raises(InputError, match="not the float form of net: tensor '.*' is in one alone"):
        onto_grids(other, old)
    shared = pj.compress(captured(), pj.Recipe(pj.ShareWeights(codes=16)), data=None).network
    with pytest.raises(InputError, match="shares levels"):
        onto_grids(captured(), shared)
