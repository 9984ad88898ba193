"""Images varied at random, so that a network sees more of them than there are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from penjing.errors import DataError

AUGMENTATIONS = ("flip-crop",)


def augment(inputs: Tensor, how: str, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W), each flipped or not and shifted by up to an eighth of its side with zeros coming in.

    `flip-crop` is what CIFAR networks are usually trained with (He et al. 2016, "Deep residual learning", §4.2).
    """
    if how not in AUGMENTATIONS or inputs.ndim != 4:
        raise DataError(
            f"augment={how!r} takes images (samples × channels × height × width), got {inputs.ndim} dimensions",
            hint="leave augment empty for other data",
        )
    count, _, height, width = inputs.shape
    top, left = max(1, height // 8), max(1, width // 8)
    flip = torch.rand(count, generator=generator) < 0.5
    images = torch.where(flip.view(-1, 1, 1, 1), inputs.flip(3), inputs)
    padded = nn.functional.pad(images, (left, left, top, top))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    rows = torch.randint(0, 2 * top + 1, (count,), generator=generator)
    columns = torch.randint(0, 2 * left + 1, (count,), generator=generator)
    return windows[torch.arange(count), :, rows, columns]
