"""Generators, discriminators, autoencoders and denoisers, written by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penjing.testing.networks.base import IMAGE, Made, entry
from penjing.testing.networks.layers import conv


@entry("generative", quick=True)
def dcgan_discriminator() -> Made:
    body = [
        nn.Conv2d(3, 8, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True), nn.Conv2d(8, 16, 4, 2, 1, bias=False),
        nn.BatchNorm2d(16), nn.LeakyReLU(0.2, True), nn.Conv2d(16, 1, 4, bias=False), nn.Flatten(), nn.Sigmoid(),
    ]  # fmt: skip
    return nn.Sequential(*body), (torch.randn(IMAGE),)


@entry("generative")
def spectral_discriminator() -> Made:
    spectral = nn.utils.parametrizations.spectral_norm
    body = [
        spectral(nn.Conv2d(3, 8, 3, 2, 1)),
        nn.LeakyReLU(0.2),
        spectral(nn.Conv2d(8, 12, 3, 2, 1)),
        nn.LeakyReLU(0.2),
    ]
    return nn.Sequential(*body, nn.Flatten(), spectral(nn.Linear(192, 1))).eval(), (torch.randn(IMAGE),)


class Conditional(nn.Module):
    """A generator told the class by an embedding, with conditional batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.table = nn.Linear(6, 8 * 4), nn.Embedding(4, 16)
        self.norm, self.up, self.out = nn.BatchNorm2d(8, affine=False), conv(8, 8), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        x = self.norm(self.first(z).view(-1, 8, 2, 2))
        gain, shift = self.table(label).chunk(2, 1)
        x = F.relu(x * (1 + gain[..., None, None]) + shift[..., None, None])
        return torch.tanh(self.out(self.up(F.interpolate(x, scale_factor=2.0))))


@entry("generative")
def conditional_generator() -> Made:
    return Conditional(), (torch.randn(2, 6), torch.randint(0, 4, (2,)))


class CycleGenerator(nn.Module):
    """Reflection padding, instance norms and residual blocks (CycleGAN, style transfer)."""

    def __init__(self) -> None:
        super().__init__()

        def part(i: int, o: int, stride: int = 1) -> nn.Module:
            return nn.Sequential(
                nn.ReflectionPad2d(1), nn.Conv2d(i, o, 3, stride), nn.InstanceNorm2d(o, affine=True), nn.ReLU(True)
            )

        self.down = nn.Sequential(part(3, 8), part(8, 12, 2))
        self.a, self.b = part(12, 12), part(12, 12)
        self.up = nn.ConvTranspose2d(12, 8, 3, 2, 1, output_padding=1)
        self.out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        x = x + self.b(self.a(x))
        return torch.tanh(self.out(F.relu(self.up(x))))


@entry("generative", quick=True)
def cyclegan() -> Made:
    return CycleGenerator(), (torch.randn(IMAGE),)


class VAE(nn.Module):
    """Mean and log variance from one trunk; the noise is an input, so that it can be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(conv(3, 8, stride=2), conv(8, 12, stride=2), nn.Flatten())
        self.mean, self.spread = nn.Linear(192, 6), nn.Linear(192, 6)
        self.grow, self.up = nn.Linear(6, 12 * 16), nn.ConvTranspose2d(12, 8, 4, 2, 1)
        self.out = nn.ConvTranspose2d(8, 3, 4, 2, 1)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.trunk(x)
        mean, spread = self.mean(x), self.spread(x)
        z = mean + noise * torch.exp(0.5 * spread)
        x = F.relu(self.up(F.relu(self.grow(z)).view(-1, 12, 4, 4)))
        return torch.sigmoid(self.out(x)), mean, spread


@entry("generative", quick=True)
def vae() -> Made:
    return VAE(), (torch.randn(IMAGE), torch.randn(2, 6))


@entry("generative", quick=True)
def autoencoder() -> Made:
    body = [nn.Linear(30, 20), nn.ELU(), nn.Linear(20, 8), nn.ELU(), nn.Linear(8, 20), nn.ELU(), nn.Linear(20, 30)]
    return nn.Sequential(*body), (torch.randn(2, 30),)


class TimedBlock(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, i), nn.Conv2d(i, o, 3, padding=1)
        self.time = nn.Linear(12, o)
        self.norm2, self.conv2 = nn.GroupNorm(4, o), nn.Conv2d(o, o, 3, padding=1)
        self.short = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(t))[:, :, None, None]
        return self.short(x) + self.conv2(F.silu(self.norm2(y)))


class Denoiser(nn.Module):
    """A U-Net of a diffusion model: sines of the time, attention over positions, skips by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 12))
        self.first, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), TimedBlock(8, 8), TimedBlock(8, 16)
        self.norm, self.qkv, self.proj = nn.GroupNorm(4, 16), nn.Conv2d(16, 48, 1), nn.Conv2d(16, 16, 1)
        self.up, self.c, self.out = nn.Conv2d(16, 8, 3, padding=1), TimedBlock(16, 8), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] * torch.exp(-torch.arange(4.0))
        time = self.time(torch.cat([angle.sin(), angle.cos()], 1))
        high = self.a(self.first(x), time)
        x = self.b(F.avg_pool2d(high, 2), time)
        n, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, 3, 2, c // 2, h * w).unbind(1)
        weights = torch.einsum("bhcp,bhcq->bhpq", q, k).mul((c // 2) ** -0.5).softmax(-1)
        x = x + self.proj(torch.einsum("bhpq,bhcq->bhcp", weights, v).reshape(n, c, h, w))
        x = self.c(torch.cat([self.up(F.interpolate(x, scale_factor=2.0)), high], 1), time)
        return self.out(F.silu(x))


@entry("generative")
def diffusion_unet() -> Made:
    return Denoiser(), (torch.randn(IMAGE), torch.rand(2) * 5)


class Modulated(nn.Module):
    """A diffusion transformer: the shift, scale and gate of every block come from the condition."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.embed, self.condition = nn.Conv2d(3, c, 4, 4), nn.Linear(5, c)
        self.norm, self.modulate = nn.LayerNorm(c, elementwise_affine=False), nn.Linear(c, 6 * c)
        self.attend = nn.MultiheadAttention(c, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(c, 24), nn.GELU(approximate="tanh"), nn.Linear(24, c))
        self.out = nn.Linear(c, 4 * 4 * 3)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        parts = self.modulate(F.silu(self.condition(given)))[:, None].chunk(6, -1)
        y = self.norm(x) * (1 + parts[1]) + parts[0]
        x = x + parts[2] * self.attend(y, y, y, need_weights=False)[0]
        x = x + parts[5] * self.mlp(self.norm(x) * (1 + parts[4]) + parts[3])
        n = x.shape[0]
        return self.out(x).view(n, 4, 4, 4, 4, 3).permute(0, 5, 1, 3, 2, 4).reshape(n, 3, 16, 16)


@entry("generative")
def diffusion_transformer() -> Made:
    return Modulated(), (torch.randn(IMAGE), torch.randn(2, 5))


class ESPCN(nn.Module):
    """Super-resolution with dense residual blocks and pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.steps = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ModuleList(nn.Conv2d(8 + 4 * i, 4 if i < 2 else 8, 3, padding=1) for i in range(3)),
        )
        self.up, self.out = nn.Conv2d(8, 32, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        start = self.first(x)
        parts = [start]
        for step in self.steps:
            parts.append(F.leaky_relu(step(torch.cat(parts, 1)), 0.2))
        return self.out(F.pixel_shuffle(self.up(start + 0.2 * parts[-1]), 2)) + F.interpolate(x, scale_factor=2.0)


@entry("generative", quick=True)
def esrgan() -> Made:
    return ESPCN(), (torch.randn(IMAGE),)
