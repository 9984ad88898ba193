"""Hand-written networks, each with a way of joining channels of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penjing.testing.networks.base import IMAGE, Made, entry


def conv(i: int, o: int, **more: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False, **more), nn.BatchNorm2d(o), nn.ReLU())


class Head(nn.Module):
    def __init__(self, channels: int, *body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(*body), nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


@entry("joins", quick=True)
def residual() -> Made:
    return Head(8, conv(3, 8), Residual(conv(8, 6), nn.Conv2d(6, 8, 1)), Residual(conv(8, 8), conv(8, 8))), (
        torch.randn(IMAGE),
    )


class PaddedShortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.first = conv(8, 16, stride=2), conv(16, 16), conv(3, 8)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.head(F.adaptive_avg_pool2d(self.b(self.a(x)) + short, 1).flatten(1))


@entry("joins", quick=True)
def padded_shortcut() -> Made:
    return PaddedShortcut(), (torch.randn(IMAGE),)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + 4 * i), nn.ReLU(), nn.Conv2d(8 + 4 * i, 4, 3, padding=1)) for i in range(3)
        )
        self.head = nn.Linear(20 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = torch.cat([x, block(x)], 1)
        return self.head(F.avg_pool2d(x, 4).flatten(1))


@entry("joins", quick=True)
def densenet() -> Made:
    return Dense(), (torch.randn(IMAGE),)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x))
        return self.head(F.gelu(self.shared(F.gelu(self.shared(x)))))


@entry("joins", quick=True)
def shared_weights() -> Made:
    return Shared(), (torch.randn(2, 6),)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.out = nn.Embedding(30, 8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        e = self.table(x)
        return (e + self.out(F.gelu(self.mix(e)))) @ self.table.weight.t()


@entry("joins", quick=True)
def tied_embedding() -> Made:
    return Tied(), (torch.randint(0, 30, (2, 5)),)


@entry("joins", quick=True)
def grouped() -> Made:
    return Head(
        12, conv(3, 16), conv(16, 16, groups=4), conv(16, 16, groups=16), nn.Conv2d(16, 32, 3, groups=16), conv(32, 12)
    ), (torch.randn(IMAGE),)


class ShuffleUnit(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            conv(c // 2, c // 2),
            nn.Conv2d(c // 2, c // 2, 3, padding=1, groups=c // 2),
            nn.BatchNorm2d(c // 2),
            conv(c // 2, c // 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        x = torch.cat([a, self.branch(b)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


@entry("joins", quick=True)
def shufflenet() -> Made:
    return Head(16, conv(3, 16), ShuffleUnit(16), ShuffleUnit(16), conv(16, 16)), (torch.randn(IMAGE),)


class Gate(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(c, c // 2, 1), nn.Conv2d(c // 2, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(F.silu(self.squeeze(x.mean((2, 3), keepdim=True)))))


@entry("joins", quick=True)
def squeeze_excite() -> Made:
    return Head(8, conv(3, 8), Gate(8), conv(8, 8), Gate(8)), (torch.randn(IMAGE),)


class SpatialGate(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.gate = nn.Conv2d(c, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.gate(x))


@entry("joins", quick=True)
def spatial_gate() -> Made:
    return Head(8, conv(3, 8), SpatialGate(8), conv(8, 8)), (torch.randn(IMAGE),)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 12), conv(12, 16)
        self.up1, self.d1 = nn.ConvTranspose2d(16, 12, 2, stride=2), conv(24, 12)
        self.up2, self.d2 = nn.ConvTranspose2d(12, 8, 2, stride=2, groups=2), conv(16, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(F.max_pool2d(a, 2))
        x = self.c(F.max_pool2d(b, 2))
        x = self.d1(torch.cat([self.up1(x), b], 1))
        return self.out(self.d2(torch.cat([self.up2(x), a], 1)))


@entry("joins", quick=True)
def unet() -> Made:
    return UNet(), (torch.randn(IMAGE),)


@entry("joins", quick=True)
def generator() -> Made:
    return nn.Sequential(
        nn.Linear(6, 16 * 4),
        nn.Unflatten(1, (16, 2, 2)),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 3, 4, 2, 1),
        nn.Tanh(),
    ), (torch.randn(2, 6),)


@entry("joins", quick=True)
def pixel_shuffle() -> Made:
    return nn.Sequential(
        conv(3, 8),
        nn.Conv2d(8, 24, 3, padding=1),
        nn.PixelShuffle(2),
        conv(6, 6),
        nn.PixelUnshuffle(2),
        conv(24, 8),
        nn.Conv2d(8, 3, 1),
    ), (torch.randn(IMAGE),)


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.last = conv(3, 16), conv(4, 6), conv(6, 6), nn.Conv2d(18, 8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        p, q, r = self.first(x).split([6, 4, 6], 1)
        return self.head(self.last(torch.cat([p, self.a(q), self.b(p[:, :] * r)], 1)).amax((2, 3)))


@entry("joins", quick=True)
def channel_split() -> Made:
    return Split(), (torch.randn(IMAGE),)


@entry("joins", quick=True)
def gated_linear() -> Made:
    return nn.Sequential(nn.Linear(6, 16), nn.GLU(), nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3)), (
        torch.randn(2, 6),
    )


@entry("joins", quick=True)
def group_norm() -> Made:
    return Head(
        8,
        nn.Conv2d(3, 16, 3),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3),
        nn.GroupNorm(8, 8),
        nn.Conv2d(8, 8, 3),
        nn.InstanceNorm2d(8, affine=True),
        nn.ReLU(),
    ), (torch.randn(IMAGE),)


@entry("joins", quick=True)
def conv1d_3d() -> Made:
    return nn.Sequential(
        nn.Conv1d(3, 8, 3),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Unflatten(2, (1, 2, 6)),
        nn.Conv3d(8, 6, (1, 2, 3)),
        nn.Flatten(),
        nn.Linear(24, 3),
    ), (torch.randn(2, 3, 14),)


@entry("joins", quick=True)
def weight_norm() -> Made:
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)),
        nn.Tanh(),
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        nn.Tanh(),
        nn.Linear(8, 3),
    ), (torch.randn(2, 6),)


class Attention(nn.Module):
    """Attention written by hand: one product for q, k, v; einsum for the scores; a gain a head."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.qkv, self.out, self.head = (
            nn.Linear(6, 16),
            nn.Linear(16, 48),
            nn.Linear(16, 16),
            nn.Linear(16, 3),
        )
        self.gain = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n, t, c = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (torch.einsum("nhqd,nhkd->nhqk", q, k) * 0.5 * self.gain).softmax(-1)
        return self.head(x + self.out((weights @ v).transpose(1, 2).reshape(n, t, c)))


@entry("joins", quick=True)
def fused_attention() -> Made:
    return Attention(), (torch.randn(2, 5, 6),)


@entry("joins", quick=True)
def single_head_attention() -> Made:
    return Attention(1), (torch.randn(2, 5, 6),)


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend, self.head = (
            nn.Linear(6, 16),
            nn.MultiheadAttention(16, 4, batch_first=True),
            nn.Linear(16, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.attend(x, x, x, need_weights=False)[0])


@entry("joins", quick=True)
def multihead_attention() -> Made:
    return MultiHead(), (torch.randn(2, 5, 6),)


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.tokens = nn.Sequential(nn.Linear(5, 10), nn.GELU(), nn.Linear(10, 5))
        self.channels = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.channels(x)).mean(1))


@entry("joins", quick=True)
def mixer() -> Made:
    return Mixer(), (torch.randn(2, 5, 6),)


class ChannelAndSpatialGate(nn.Module):
    """CBAM: the mean and the maximum over channels steer a gate over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1)
        self.b, self.slope, self.head = nn.Conv2d(8, 12, 3), nn.PReLU(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x * torch.sigmoid(self.gate(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)))
        return self.head(self.slope(self.b(x)).mean((2, 3)))


@entry("joins", quick=True)
def cbam() -> Made:
    return ChannelAndSpatialGate(), (torch.randn(IMAGE),)
