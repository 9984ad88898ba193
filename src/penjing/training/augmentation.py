"""Images varied at random, so that a network sees more of them than there are."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from penjing.errors import DataError

AUGMENTATIONS = ("flip-crop", "affine")


def augment(inputs: Tensor, how: str, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W), each varied at random, with zeros coming in.

    "flip-crop": flipped or not and shifted by up to an eighth of its side, as is usual for CIFAR networks (He et al.
    2016, "Deep residual learning", §4.2). "affine": turned by up to 10 degrees, scaled by up to a tenth and shifted by
    up to 1/28 of its side (Simard et al. 2003, "Best practices for convolutional neural networks applied to visual
    document analysis", §3).
    """
    if how not in AUGMENTATIONS or inputs.ndim != 4:
        raise DataError(
            f"augment={how!r} takes images (samples × channels × height × width), got {inputs.ndim} dimensions",
            hint="leave augment empty for other data",
        )
    if how == "affine":
        return _affine(inputs, generator)
    count, _, height, width = inputs.shape
    top, left = max(1, height // 8), max(1, width // 8)
    flip = torch.rand(count, generator=generator) < 0.5
    images = torch.where(flip.view(-1, 1, 1, 1), inputs.flip(3), inputs)
    padded = nn.functional.pad(images, (left, left, top, top))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    rows = torch.randint(0, 2 * top + 1, (count,), generator=generator)
    columns = torch.randint(0, 2 * left + 1, (count,), generator=generator)
    return windows[torch.arange(count), :, rows, columns]


def _affine(inputs: Tensor, generator: torch.Generator) -> Tensor:
    angle, scale, right, down = torch.rand(4, len(inputs), generator=generator).mul_(2).sub_(1)
    angle, scale = angle * math.radians(10), 1 + 0.1 * scale
    # Coordinates run from -1 to 1: a 28th of the side is 1/14 of them.
    across = torch.stack([scale * angle.cos(), -scale * angle.sin(), right / 14], dim=1)
    along = torch.stack([scale * angle.sin(), scale * angle.cos(), down / 14], dim=1)
    where = torch.stack([across, along], dim=1).to(inputs.dtype)
    grid = nn.functional.affine_grid(where, list(inputs.shape), align_corners=False)
    return nn.functional.grid_sample(inputs, grid, align_corners=False)
