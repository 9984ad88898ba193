"""The image classifiers of torchvision and their like, written by hand in miniature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penjing.testing.networks.base import IMAGE, Made, entry
from penjing.testing.networks.layers import Head, conv


@entry("classic", quick=True)
def alexnet() -> Made:
    features = [
        nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU(True), nn.MaxPool2d(3, 2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(True),
        nn.Conv2d(16, 12, 3, padding=1), nn.ReLU(True), nn.AdaptiveAvgPool2d((2, 2)), nn.Flatten(), nn.Dropout(0.0),
        nn.Linear(48, 20), nn.ReLU(True), nn.Linear(20, 3),
    ]  # fmt: skip
    return nn.Sequential(*features), (torch.randn(2, 3, 32, 32),)


@entry("classic", quick=True)
def vgg() -> Made:
    body = [conv(3, 8), conv(8, 8), nn.MaxPool2d(2), conv(8, 16), conv(16, 16), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(256, 24), nn.ReLU(), nn.Linear(24, 3)), (torch.randn(IMAGE),)


class Fire(nn.Module):
    def __init__(self, i: int, s: int, e: int) -> None:
        super().__init__()
        self.squeeze, self.one, self.three = nn.Conv2d(i, s, 1), nn.Conv2d(s, e, 1), nn.Conv2d(s, e, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)


@entry("classic", quick=True)
def squeezenet() -> Made:
    body = [conv(3, 8, stride=2), Fire(8, 4, 6), Fire(12, 4, 8), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(16, 6, 8)]
    return nn.Sequential(*body, nn.Conv2d(16, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (torch.randn(IMAGE),)


class Inception(nn.Module):
    """Four branches side by side, one of them factorized into 1 × 3 and 3 × 1."""

    def __init__(self, i: int, each: int) -> None:
        super().__init__()
        self.one, self.pool = conv1(i, each), conv1(i, each)
        self.three = nn.Sequential(conv1(i, each), conv(each, each + 2))
        self.five = conv1(i, each)
        self.wide = nn.Conv2d(each, each, (1, 3), padding=(0, 1))
        self.tall = nn.Conv2d(each, each, (3, 1), padding=(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        five = self.five(x)
        pooled = self.pool(F.avg_pool2d(x, 3, 1, 1))
        return torch.cat([self.one(x), self.three(x), self.wide(five), self.tall(five), pooled], 1)


def conv1(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 1, bias=False), nn.BatchNorm2d(o, eps=1e-3), nn.ReLU(inplace=True))


@entry("classic", quick=True)
def inception() -> Made:
    return Head(42, conv(3, 8), Inception(8, 4), nn.MaxPool2d(3, 2), Inception(22, 8)), (torch.randn(IMAGE),)


class Auxiliary(nn.Module):
    """GoogLeNet with its second classifier, which it gives as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = conv(3, 8), Inception(8, 4), Inception(22, 4)
        self.aux, self.head = nn.Linear(22, 3), nn.Linear(22, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(self.first(x))
        return self.head(self.b(x).mean((2, 3))), self.aux(F.adaptive_avg_pool2d(x, 1).flatten(1))


@entry("classic")
def googlenet() -> Made:
    return Auxiliary(), (torch.randn(IMAGE),)


class DenseLayer(nn.Module):
    def __init__(self, i: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(i), nn.Conv2d(i, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(x)))


class DenseBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = conv(3, 8)
        self.one = nn.ModuleList(DenseLayer(8 + 4 * i, 4) for i in range(3))
        self.down = nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 10, 1), nn.AvgPool2d(2))
        self.two = nn.ModuleList(DenseLayer(10 + 4 * i, 4) for i in range(2))
        self.norm, self.head = nn.BatchNorm2d(18), nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.first(x)]
        for layer in self.one:
            features.append(layer(features))
        features = [self.down(torch.cat(features, 1))]
        for layer in self.two:
            features.append(layer(features))
        return self.head(F.relu(self.norm(torch.cat(features, 1))).mean((2, 3)))


@entry("classic")
def densenet121() -> Made:
    return DenseBlocks(), (torch.randn(IMAGE),)


class ShuffleV1(nn.Module):
    """Grouped 1 × 1 convolutions with a shuffle between them; with a stride, the shortcut is concatenated."""

    def __init__(self, i: int, o: int, stride: int, groups: int = 2) -> None:
        super().__init__()
        self.groups, self.stride, mid = groups, stride, 8
        grown = o - i if stride == 2 else o
        self.a = nn.Sequential(nn.Conv2d(i, mid, 1, groups=groups), nn.BatchNorm2d(mid), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(mid, mid, 3, stride, 1, groups=mid), nn.BatchNorm2d(mid))
        self.c = nn.Sequential(nn.Conv2d(mid, grown, 1, groups=groups), nn.BatchNorm2d(grown))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        n, c, h, w = y.shape
        y = y.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        y = self.c(self.b(y))
        return F.relu(torch.cat([F.avg_pool2d(x, 3, 2, 1), y], 1) if self.stride == 2 else x + y)


@entry("classic", quick=True)
def shufflenet_v1() -> Made:
    return Head(24, conv(3, 12), ShuffleV1(12, 24, 2), ShuffleV1(24, 24, 1)), (torch.randn(IMAGE),)


class ShuffleV2(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.stride, half = stride, o // 2
        own = i if stride == 2 else half
        self.right = nn.Sequential(
            conv1(own, half), nn.Conv2d(half, half, 3, stride, 1, groups=half), nn.BatchNorm2d(half), conv1(half, half)
        )
        self.left = nn.Sequential(nn.Conv2d(i, i, 3, 2, 1, groups=i), nn.BatchNorm2d(i), conv1(i, half))

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            a, b = x.chunk(2, dim=1)
            y = torch.cat((a, self.right(b)), dim=1)
        else:
            y = torch.cat((self.left(x), self.right(x)), dim=1)
        n, c, h, w = y.size()
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


@entry("classic", quick=True)
def shufflenet_v2() -> Made:
    return Head(24, conv(3, 8), ShuffleV2(8, 16, 2), ShuffleV2(16, 16, 1), ShuffleV2(16, 24, 2), conv1(24, 24)), (
        torch.randn(IMAGE),
    )


class Inverted(nn.Module):
    """MobileNetV3 and MNASNet: expansion, depthwise, optional gate, projection."""

    def __init__(self, i: int, o: int, grow: int, kernel: int, stride: int, gate: bool, act: type[nn.Module]) -> None:
        super().__init__()
        mid = i * grow
        self.joined = stride == 1 and i == o
        self.expand = nn.Sequential(nn.Conv2d(i, mid, 1, bias=False), nn.BatchNorm2d(mid), act())
        self.depth = nn.Sequential(
            nn.Conv2d(mid, mid, kernel, stride, kernel // 2, groups=mid, bias=False), nn.BatchNorm2d(mid), act()
        )
        self.gate = (
            nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(mid, 4, 1), nn.ReLU(), nn.Conv2d(4, mid, 1), nn.Hardsigmoid()
            )
            if gate
            else None
        )
        self.project = nn.Sequential(nn.Conv2d(mid, o, 1, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depth(self.expand(x))
        y = self.project(y * self.gate(y) if self.gate is not None else y)
        return x + y if self.joined else y


@entry("classic", quick=True)
def mobilenet_v3() -> Made:
    blocks = [Inverted(8, 8, 2, 3, 1, True, nn.ReLU), Inverted(8, 12, 3, 5, 2, True, nn.Hardswish)]
    return Head(12, conv(3, 8), *blocks, Inverted(12, 12, 2, 5, 1, True, nn.Hardswish)), (torch.randn(IMAGE),)


@entry("classic")
def mnasnet() -> Made:
    blocks = [Inverted(8, 8, 3, 3, 1, False, nn.ReLU), Inverted(8, 12, 3, 5, 2, False, nn.ReLU)]
    return Head(12, conv(3, 8), *blocks), (torch.randn(IMAGE),)


class Ghost(nn.Module):
    """Half of the channels are made by a cheap depthwise convolution of the other half."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.main, self.cheap = conv1(i, o // 2), conv(o // 2, o // 2, groups=o // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.main(x)
        return torch.cat([x, self.cheap(x)], 1)


@entry("classic")
def ghostnet() -> Made:
    return Head(16, conv(3, 8), Ghost(8, 16), Ghost(16, 16)), (torch.randn(IMAGE),)


class Res2(nn.Module):
    """Res2Net: a hierarchy of residuals inside a block."""

    def __init__(self, c: int, parts: int = 4) -> None:
        super().__init__()
        self.parts, self.into, self.out = parts, conv1(c, c), conv1(c, c)
        self.steps = nn.ModuleList(conv(c // parts, c // parts) for _ in range(parts - 1))

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.into(x).chunk(self.parts, 1)
        done, last = [first], torch.zeros_like(first)
        for step, part in zip(self.steps, rest, strict=True):
            last = step(part + last)
            done.append(last)
        return x + self.out(torch.cat(done, 1))


@entry("classic")
def res2net() -> Made:
    return Head(16, conv(3, 16), Res2(16), Res2(16)), (torch.randn(IMAGE),)


@entry("classic")
def resnext() -> Made:
    class Block(nn.Module):
        def __init__(self, c: int, width: int) -> None:
            super().__init__()
            self.body = nn.Sequential(conv1(c, width), conv(width, width, groups=4), nn.Conv2d(width, c, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.body(x))

    return Head(8, conv(3, 8), Block(8, 16), Block(8, 16)), (torch.randn(IMAGE),)


@entry("classic")
def convmixer() -> Made:
    def mixed(c: int) -> nn.Module:
        return nn.Sequential(
            Sum(nn.Sequential(nn.Conv2d(c, c, 5, groups=c, padding=2), nn.GELU(), nn.BatchNorm2d(c))),
            nn.Conv2d(c, c, 1), nn.GELU(), nn.BatchNorm2d(c),
        )  # fmt: skip

    return Head(12, nn.Conv2d(3, 12, 4, 4), nn.GELU(), nn.BatchNorm2d(12), mixed(12), mixed(12)), (torch.randn(IMAGE),)


class Sum(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Selective(nn.Module):
    """SKNet: a softmax over two branches, channel by channel."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b = conv(c, c), conv(c, c, dilation=1)
        self.squeeze, self.choose = nn.Linear(c, 4), nn.Linear(4, 2 * c)

    def forward(self, x: Tensor) -> Tensor:
        both: Any = torch.stack([self.a(x), self.b(x)], 1)
        weights = self.choose(F.relu(self.squeeze(both.sum(1).mean((2, 3))))).view(x.shape[0], 2, -1).softmax(1)
        return (both * weights[..., None, None]).sum(1)


@entry("classic")
def sknet() -> Made:
    return Head(8, conv(3, 8), Selective(8), Selective(8)), (torch.randn(IMAGE),)


@entry("classic")
def mlp_mixer() -> Made:
    class Block(nn.Module):
        def __init__(self, tokens: int, c: int) -> None:
            super().__init__()
            self.n1, self.n2 = nn.LayerNorm(c), nn.LayerNorm(c)
            self.tokens = nn.Sequential(nn.Linear(tokens, 12), nn.GELU(), nn.Linear(12, tokens))
            self.channels = nn.Sequential(nn.Linear(c, 20), nn.GELU(), nn.Linear(20, c))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.tokens(self.n1(x).transpose(1, 2)).transpose(1, 2)
            return x + self.channels(self.n2(x))

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = nn.Conv2d(3, 12, 4, 4), nn.Sequential(Block(16, 12), Block(16, 12))
            self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.body(self.stem(x).flatten(2).transpose(1, 2))).mean(1))

    return Mixer(), (torch.randn(IMAGE),)
