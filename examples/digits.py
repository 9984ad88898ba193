"""A trained network and its samples, named on the command line as examples/digits.py:build, :train and :test.

    penjing compress examples/digits.py:build --data examples/digits.py:train --test examples/digits.py:test \
        --task classification --recipe examples/digits.yaml --target onnxruntime --out out/digits
"""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from penjing.data import digits


def train() -> TensorDataset:
    """1437 handwritten digits, 1×8×8 in 0..1, with their labels."""
    return digits("train")


def test() -> TensorDataset:
    """The other 360."""
    return digits("test")


def build() -> nn.Module:
    """A small convolutional network, trained on `train` in a few seconds of ordinary PyTorch."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    x, y = train().tensors
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(6):
        for part in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
    return net.eval()
