"""Networks that answer for every position, written by hand: segmentation, detection, optical flow."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penjing.testing.networks.base import IMAGE, Made, entry
from penjing.testing.networks.layers import conv


class FCN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 12, stride=2), conv(12, 16, stride=2)
        self.head_b, self.head_c = nn.Conv2d(12, 3, 1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        b = self.b(self.a(x))
        c = self.head_c(self.c(b))
        both = self.head_b(b) + F.interpolate(c, scale_factor=2, mode="nearest")
        return F.interpolate(both, size=size, mode="bilinear", align_corners=False)


@entry("segmentation", quick=True)
def fcn() -> Made:
    return FCN(), (torch.randn(IMAGE),)


class DeepLab(nn.Module):
    """Atrous convolutions side by side and a branch that sees the whole image."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.body = conv(3, 8), nn.Sequential(conv(8, 12, stride=2), conv(12, 16))
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 8, 3, padding=d, dilation=d, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            for d in (1, 2, 3)
        )
        self.whole = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.ReLU())
        self.join, self.reduce, self.head = conv(32, 12), nn.Conv2d(8, 4, 1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(x)
        x = self.body(low)
        whole = F.interpolate(self.whole(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        x = self.join(torch.cat([*(p(x) for p in self.parts), whole], 1))
        x = F.interpolate(x, size=low.shape[-2:], mode="bilinear", align_corners=False)
        return self.head(torch.cat([x, self.reduce(low)], 1))


@entry("segmentation", quick=True)
def deeplab_v3() -> Made:
    return DeepLab(), (torch.randn(IMAGE),)


class SegNet(nn.Module):
    """Positions of the largest values are remembered and used to place values again."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.up, self.head = conv(3, 8), conv(8, 8), conv(8, 8), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, where = F.max_pool2d(self.down(x), 2, return_indices=True)
        return self.head(self.up(F.max_unpool2d(self.middle(x), where, [2, 2])))


@entry("segmentation")
def segnet() -> Made:
    return SegNet(), (torch.randn(IMAGE),)


class Pyramid(nn.Module):
    """A feature pyramid with one head for all its levels (SSD, RetinaNet, FCOS)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 12, stride=2), conv(12, 16, stride=2)
        self.lateral = nn.ModuleList(nn.Conv2d(i, 8, 1) for i in (12, 16))
        self.tower = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU())
        self.classes, self.boxes = nn.Conv2d(8, 2 * 3, 3, padding=1), nn.Conv2d(8, 2 * 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b = self.b(self.a(x))
        top = self.lateral[1](self.c(b))
        levels = [self.lateral[0](b) + F.interpolate(top, scale_factor=2.0, mode="nearest"), top]
        classes, boxes = [], []
        for level in levels:
            y = self.tower(level)
            n = y.shape[0]
            classes.append(self.classes(y).view(n, 2, 3, -1).permute(0, 3, 1, 2).reshape(n, -1, 3))
            boxes.append(self.boxes(y).view(n, 2, 4, -1).permute(0, 3, 1, 2).reshape(n, -1, 4))
        return torch.cat(classes, 1), torch.cat(boxes, 1)


@entry("detection", quick=True)
def retinanet() -> Made:
    return Pyramid(), (torch.randn(IMAGE),)


class SSD(nn.Module):
    """One head a level, a learned scale for the L2 norm of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(conv(3, 8), conv(8, 12, stride=2)), conv(12, 16, stride=2)
        self.scale = nn.Parameter(torch.full((12,), 20.0))
        self.heads = nn.ModuleList(nn.Conv2d(i, 2 * 7, 3, padding=1) for i in (12, 16))

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        levels = [F.normalize(a) * self.scale.view(1, -1, 1, 1), self.b(a)]
        found = [
            h(level).permute(0, 2, 3, 1).flatten(1).view(x.shape[0], -1, 7)
            for h, level in zip(self.heads, levels, strict=True)
        ]
        return torch.cat(found, 1)


@entry("detection", quick=True)
def ssd() -> Made:
    return SSD(), (torch.randn(IMAGE),)


class CSP(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.into, self.out = conv(c, c), conv(c // 2 * 3, c)
        self.step = nn.Sequential(conv(c // 2, c // 2), conv(c // 2, c // 2))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.into(x).chunk(2, 1)
        return self.out(torch.cat([a, b, b + self.step(b)], 1))


class YOLO(nn.Module):
    """Cross-stage parts, spatial pyramid pooling, boxes as distributions over distances (YOLOv8)."""

    distances: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = (
            conv(3, 8, stride=2),
            nn.Sequential(CSP(8), nn.Conv2d(8, 12, 3, 2, 1), nn.SiLU(), CSP(12)),
        )
        self.pooled, self.classes, self.boxes = conv(36, 12), nn.Conv2d(12, 3, 1), nn.Conv2d(12, 16, 1)
        self.register_buffer("distances", torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x))
        pools = [x]
        for _ in range(2):
            pools.append(F.max_pool2d(pools[-1], 5, 1, 2))
        x = self.pooled(torch.cat(pools, 1))
        boxes = self.boxes(x).flatten(2).view(x.shape[0], 4, 4, -1).softmax(2)
        boxes = (boxes * self.distances.view(1, 1, 4, 1)).sum(2)
        return torch.cat([boxes, self.classes(x).flatten(2).sigmoid()], 1)


@entry("detection", quick=True)
def yolo() -> Made:
    return YOLO(), (torch.randn(IMAGE),)


class Encoder(nn.Module):
    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 7, 2, 3), norm(8)
        self.b, self.out = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)))
        return self.out(F.relu(x + self.b(x)))


class RAFT(nn.Module):
    """Optical flow: correlation of all pairs of positions, lookups around the flow, a convolutional GRU unrolled."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.context = Encoder(nn.InstanceNorm2d), Encoder(nn.BatchNorm2d)
        self.corr, self.motion = nn.Conv2d(18, 8, 1), nn.Conv2d(10, 6, 3, padding=1)
        self.z, self.r, self.q = (nn.Conv2d(6 + 8 + 4, 8, 3, padding=1) for _ in range(3))
        self.hidden, self.inp = nn.Conv2d(12, 8, 1), nn.Conv2d(12, 4, 1)
        self.flow, self.mask = nn.Conv2d(8, 2, 3, padding=1), nn.Conv2d(8, 9 * 4, 1)

    def lookup(self, volume: Tensor, at: Tensor, h: int, w: int) -> Tensor:
        n = at.shape[0]
        dy, dx = torch.meshgrid(torch.arange(-1.0, 2.0), torch.arange(-1.0, 2.0), indexing="ij")
        near = at.permute(0, 2, 3, 1).reshape(n * h * w, 1, 1, 2) + torch.stack([dx, dy], -1).view(1, 3, 3, 2)
        near = near * 2 / torch.tensor([w - 1.0, h - 1.0]) - 1
        found = [
            F.grid_sample(v, near * s, align_corners=True) for v, s in ((volume, 1.0), (F.avg_pool2d(volume, 2), 0.5))
        ]
        return torch.cat([f.view(n, h, w, 9) for f in found], -1).permute(0, 3, 1, 2)

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        a, b = self.features(one), self.features(two)
        n, c, h, w = a.shape
        volume = torch.einsum("ncp,ncq->npq", a.flatten(2), b.flatten(2)).reshape(n * h * w, 1, h, w) / c**0.5
        context = self.context(one)
        hidden, given = torch.tanh(self.hidden(context)), F.relu(self.inp(context))
        ys, xs = torch.meshgrid(torch.arange(float(h)), torch.arange(float(w)), indexing="ij")
        start = torch.stack([xs, ys]).expand(n, 2, h, w)
        at = start
        for _ in range(2):
            seen = F.relu(self.corr(self.lookup(volume, at, h, w)))
            x = torch.cat([F.relu(self.motion(torch.cat([seen, at - start], 1))), given], 1)
            both = torch.cat([hidden, x], 1)
            z, r = torch.sigmoid(self.z(both)), torch.sigmoid(self.r(both))
            hidden = (1 - z) * hidden + z * torch.tanh(self.q(torch.cat([r * hidden, x], 1)))
            at = at + self.flow(hidden)
        weights = self.mask(hidden).view(n, 1, 9, 2, 2, h, w).softmax(2)
        flow = F.unfold(2 * (at - start), 3, padding=1).view(n, 2, 9, 1, 1, h, w)
        return (weights * flow).sum(2).permute(0, 1, 4, 2, 5, 3).reshape(n, 2, 2 * h, 2 * w)


@entry("optical flow")
def raft() -> Made:
    return RAFT(), (torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16))


class Hourglass(nn.Module):
    """Down and up again, with what was there before added at every size."""

    def __init__(self, depth: int, c: int) -> None:
        super().__init__()
        self.side, self.down, self.up = conv(c, c), conv(c, c), conv(c, c)
        self.inner: nn.Module = Hourglass(depth - 1, c) if depth else conv(c, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.side(x) + F.interpolate(self.up(self.inner(self.down(F.max_pool2d(x, 2)))), scale_factor=2.0)


@entry("pose")
def hourglass() -> Made:
    return nn.Sequential(conv(3, 8), Hourglass(1, 8), nn.Conv2d(8, 4, 1)), (torch.randn(IMAGE),)
