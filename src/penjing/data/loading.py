"""Samples that a command line names."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from penjing.data.batches import Data
from penjing.errors import DataError, InputError, MissingExtraError
from penjing.network.source import load_callable

try:
    from PIL import Image
except ImportError:  # the extra `images`
    Image = None  # type: ignore[assignment]

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


def load_data(text: str) -> Data:
    """`file.py:callable` or `module:callable` (a Dataset or DataLoader), `samples.npz` (arrays x and y), a folder
    of class folders of images, or `digits` (scikit-learn's 1797 handwritten digits, 1×8×8; `digits:train` is
    4/5 of them, `digits:test` the rest).
    """
    if text in ("digits", "digits:train", "digits:test"):
        return Data(digits(text.partition(":")[2] or None))
    path = Path(text)
    if path.suffix == ".npz":
        return Data(_npz(path))
    if path.is_dir():
        return Data(_ImageFolder(path))
    if ":" in text:
        return Data(load_callable(text)())
    if path.exists():
        raise InputError(
            f"{text} is not data that penjing can read",
            hint="file.py:callable, samples.npz, a folder of class folders of images, or digits",
        )
    raise InputError(
        f"there is no data at {text}",
        hint="file.py:callable, samples.npz, a folder of class folders of images, or digits",
    )


def digits(split: str | None = None) -> TensorDataset:
    """scikit-learn's handwritten digits as float32 1×8×8 in 0..1, in a fixed shuffled order."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    if split is not None:
        edge = len(order) * 4 // 5
        order = order[:edge] if split == "train" else order[edge:]
    images = torch.from_numpy(found.images[order].astype(np.float32) / 16)[:, None]
    return TensorDataset(images, torch.from_numpy(found.target[order].astype(np.int64)))


def _npz(path: Path) -> TensorDataset:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not a readable .npz file: {error}") from error
    if "x" not in arrays:
        raise DataError(f"{path} has no array 'x'", hint=f"it holds: {', '.join(sorted(arrays)) or 'nothing'}")
    found = [arrays[n] for n in ("x", "y") if n in arrays]
    if len(found) == 2 and (found[1].ndim == 0 or len(found[0]) != len(found[1])):
        raise DataError(f"{path} has {len(found[0])} samples in 'x' but {found[1].shape} in 'y'")
    if len(found[0]) == 0:
        raise DataError(f"{path} holds no samples")
    return TensorDataset(*(torch.from_numpy(a) for a in found))


class _ImageFolder(Dataset[tuple[Tensor, int]]):
    """Folders of images, one a class, classes in sorted order; RGB, 3×H×W in 0..1."""

    def __init__(self, root: Path) -> None:
        classes = sorted(p for p in root.iterdir() if p.is_dir())
        self._files = [
            (f, i) for i, c in enumerate(classes) for f in sorted(c.iterdir()) if f.suffix.lower() in _IMAGES
        ]
        if not self._files:
            raise DataError(f"{root} holds no class folders with images", hint="expected root/class_name/image.png")
        if Image is None:
            raise MissingExtraError("reading images needs Pillow", hint="pip install 'penjing[images]'")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, label = self._files[index]
        try:
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("RGB"))
        except OSError as error:
            raise DataError(f"cannot read the image {file}: {error}") from error
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255, label
