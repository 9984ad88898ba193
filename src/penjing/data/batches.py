"""Samples: from a Dataset, a DataLoader, an iterable of batches, or arrays."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from penjing.errors import DataError, PenjingError
from penjing.network.source import line_of

#: Samples that tell whether a dataset varies them: what is left to chance half of the time shows.
_LOOKED_AT = 8


class Data:
    """Samples as batches `(inputs, labels)`.

    `source` is a Dataset, a DataLoader, an iterable of batches (or of Data's kind itself), or a tuple of arrays (x,
    y). Inputs are a tensor, a tuple or a dictionary of tensors; labels may be missing (None). uint8 inputs become
    float32 in 0..1, float64 ones float32. Iterables that can be walked only once are kept in memory as they are walked.
    """

    def __init__(self, source: Any) -> None:
        self._source: Any
        if isinstance(source, Data):
            source = source._source
        if isinstance(source, tuple) and source and all(isinstance(s, Tensor | np.ndarray) for s in source):
            if len({s.shape[:1] for s in source}) > 1:
                counts = " and ".join(str(*s.shape[:1]) for s in source)
                raise DataError(f"arrays of {counts} samples do not go together", hint="x and y are equally long")
            source = TensorDataset(*(torch.as_tensor(s) for s in source))
        elif isinstance(source, Tensor | np.ndarray):
            source = TensorDataset(torch.as_tensor(source))
        if not isinstance(source, Dataset | DataLoader | Iterable) or isinstance(source, str | bytes | Mapping):
            raise DataError(
                f"data must be a Dataset, a DataLoader or an iterable of batches, got {type(source).__name__}",
                hint="batches look like (inputs, labels)",
            )
        if isinstance(source, Sequence | Dataset | DataLoader) and _length(source) == 0:
            raise DataError("the data is empty")
        self._source = _Replayed(source) if isinstance(source, Iterator) else source

    def __len__(self) -> int:
        """Number of samples; TypeError if it is not known."""
        source = self._source
        if isinstance(source, DataLoader):
            source = source.dataset
        if isinstance(source, Dataset) and _length(source) is not None:
            return int(_length(source) or 0)
        if isinstance(source, Sequence):
            return sum(_batch_size(_split(b)[0]) for b in source)
        raise TypeError("the number of samples is not known")

    def batches(
        self, batch_size: int, *, shuffle: bool = False, seed: int = 0, limit: int | None = None
    ) -> Iterator[tuple[Any, Any]]:
        """Batches of `batch_size` samples (inputs, labels); a DataLoader's or an iterable's own batches keep their
        size.

        `shuffle` draws a new order by `seed` (of datasets only). `limit` ends after so many samples. Raises
        DataError when there are none, or when a floating-point input is NaN.
        """
        seen = 0
        for batch in _reading(self._raw(batch_size, shuffle, seed)):
            inputs, labels = _split(batch)
            size = _batch_size(inputs)
            if isinstance(labels, Tensor) and labels.ndim and len(labels) != size:
                raise DataError(f"a batch has {size} samples and {len(labels)} labels")
            if limit is not None and seen + size > limit:
                keep = limit - seen
                inputs, labels = _take(inputs, keep), _take(labels, keep)
                size = keep
            _check(inputs, None if shuffle else seen)
            if size:
                yield inputs, labels
            seen += size
            if limit is not None and seen >= limit:
                return
        if seen == 0:
            raise DataError("the data is empty")

    def first(self, samples: int = 2) -> Any:
        """The inputs of the first samples, as example inputs for `capture`."""
        inputs, _ = next(self.batches(samples, limit=samples))
        return inputs if isinstance(inputs, tuple | dict) else (inputs,)

    def varies(self) -> bool:
        """Whether a dataset's samples are others each time they are read, as those of one that augments are: the first
        few are read twice. Draws random numbers if the dataset does."""
        source = self._source.dataset if isinstance(self._source, DataLoader) else self._source
        if not isinstance(source, Dataset) or isinstance(source, TensorDataset):
            return False
        once, again = (list(Data(source).batches(1, limit=_LOOKED_AT)) for _ in range(2))
        leaves = zip(*(pytree.tree_leaves(batches) for batches in (once, again)), strict=False)
        return any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in leaves)

    def split(self, shares: Sequence[float], *, seed: int = 0) -> Iterator[tuple[Data, Data]]:
        """For each of `shares`: (all the other samples, this share of the samples). The shares are disjoint.

        Which samples are where is drawn by `seed`; their order stays. Datasets and DataLoaders are split by samples,
        iterables of batches by batches if there are enough, and those are kept in memory. Raises DataError when there
        are too few.
        """
        count, pick = self._picking(shares)
        if len(shares) > count:
            raise DataError(f"{count} samples are too few for {len(shares)} folds", hint="ask for fewer")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        edges = [round(s * count) for s in itertools.accumulate(shares, initial=0.0)]
        for start, end in itertools.pairwise(edges):
            if not 0 < end - start < count:
                raise DataError(
                    f"{count} samples are too few to hold {100 * shares[0]:.4g}% of them out", hint="give more samples"
                )
            chosen = torch.zeros(count, dtype=torch.bool)
            chosen[order[start:end]] = True
            yield Data(pick(torch.nonzero(~chosen).flatten())), Data(pick(torch.nonzero(chosen).flatten()))

    def _picking(self, shares: Sequence[float]) -> tuple[int, Callable[[Tensor], Any]]:
        """How many samples (or batches) there are, and what makes a source of some of them."""
        source = self._source
        if isinstance(source, TensorDataset):
            return len(source), lambda i: TensorDataset(*(t[i] for t in source.tensors))
        if isinstance(source, Dataset) and _length(source) is not None:
            return len(source), lambda i: Subset(source, i.tolist())  # type: ignore[arg-type]
        if isinstance(source, DataLoader) and source.batch_size is not None and _length(source.dataset) is not None:
            return len(source.dataset), lambda i: DataLoader(  # type: ignore[arg-type]
                Subset(source.dataset, i.tolist()),
                source.batch_size,
                shuffle=isinstance(source.sampler, RandomSampler),
                collate_fn=source.collate_fn,
                num_workers=source.num_workers,
                drop_last=source.drop_last,
            )
        if isinstance(source, IterableDataset):
            samples_of = list(source)
            return len(samples_of), lambda i: Subset(samples_of, i.tolist())  # type: ignore[arg-type]
        batches = list(self.batches(1))
        if len(batches) * min(shares) >= 1:
            return len(batches), lambda i: [batches[n] for n in i]
        sizes = [_batch_size(inputs) for inputs, _ in batches]

        def samples(index: Tensor) -> list[tuple[Any, Any]]:
            chosen = torch.zeros(sum(sizes), dtype=torch.bool)
            chosen[index] = True
            parts = zip(batches, torch.split(chosen, sizes), strict=True)
            return [(_masked(x, mask), _masked(y, mask)) for (x, y), mask in parts if mask.any()]

        return sum(sizes), samples

    def _raw(self, batch_size: int, shuffle: bool, seed: int) -> Iterator[Any]:
        source = self._source
        if isinstance(source, TensorDataset):
            yield from _slices(source.tensors, batch_size, shuffle, seed)
        elif isinstance(source, Dataset):
            generator = torch.Generator().manual_seed(seed)
            stream = isinstance(source, IterableDataset)
            yield from DataLoader(
                source, batch_size, shuffle=shuffle and not stream, generator=generator, collate_fn=_collate
            )
        elif isinstance(source, DataLoader | Sequence):
            yield from source
        else:
            yield from source


def _reading(batches: Iterator[Any]) -> Iterator[Any]:
    """What goes wrong in the user's own dataset is told as such."""
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except PenjingError:
            raise
        except Exception as error:
            raise DataError(f"reading the data raised {type(error).__name__}: {error}", hint=line_of(error)) from error
        yield batch


class _Replayed(Iterable[Any]):
    """A one-time iterable that can be walked again: what has been walked is kept in memory."""

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._kept: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        for number in itertools.count():
            while number >= len(self._kept):
                try:
                    self._kept.append(next(self._source))
                except StopIteration:
                    return
            yield self._kept[number]


def _slices(tensors: Sequence[Tensor], batch_size: int, shuffle: bool, seed: int) -> Iterator[tuple[Tensor, ...]]:
    count = len(tensors[0])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)) if shuffle else None
    for start in range(0, count, batch_size):
        chosen = slice(start, start + batch_size) if order is None else order[start : start + batch_size]
        yield tuple(t[chosen] for t in tensors)


def _collate(samples: list[Any]) -> Any:
    try:
        return default_collate(samples)
    except (TypeError, RuntimeError, ValueError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"the samples of the dataset cannot be put together into a batch: {line}",
            hint="every sample must have the same shape; give a DataLoader with its own collate_fn otherwise",
        ) from error


def _split(batch: Any) -> tuple[Any, Any]:
    """(inputs, labels) of a batch; a batch without labels has None."""
    if isinstance(batch, Mapping):
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "label")}
        return _to_tensors(inputs), _to_labels(batch.get("labels", batch.get("label")))
    if isinstance(batch, tuple | list):
        if len(batch) == 1:
            return _to_tensors(batch[0]), None
        if len(batch) == 2:
            return _to_tensors(batch[0]), _to_labels(batch[1])
        raise DataError(
            f"a batch must be (inputs, labels), got {len(batch)} parts",
            hint="several inputs go in a tuple: ((a, b), labels)",
        )
    return _to_tensors(batch), None


def _to_labels(value: Any) -> Any:
    return _to_tensors(value, {torch.uint8: torch.int64})


def _to_tensors(value: Any, types: Mapping[torch.dtype, torch.dtype] | None = None) -> Any:
    """Arrays as tensors. Of inputs, bytes become 0..1 and numpy's double precision single; `types` says otherwise."""
    if isinstance(value, Mapping):
        return {k: _to_tensors(v, types) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_to_tensors(v, types) for v in value)
    if isinstance(value, np.ndarray | np.generic):
        value = torch.as_tensor(value)
    if isinstance(value, Tensor) and types is not None:
        return value.to(types.get(value.dtype, value.dtype))
    if isinstance(value, Tensor) and value.dtype == torch.uint8:
        return value.float() / 255
    if isinstance(value, Tensor) and value.dtype == torch.float64:
        return value.float()
    if value is None or isinstance(value, Tensor):
        return value
    raise DataError(f"a batch must hold tensors or arrays, got {type(value).__name__}")


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, tuple):
        return [t for v in value for t in _tensors(v)]
    return [value] if isinstance(value, Tensor) else []


def _batch_size(inputs: Any) -> int:
    found = _tensors(inputs)
    if not found or found[0].ndim == 0:
        raise DataError("a batch must hold at least one tensor with the samples along its first dimension")
    return len(found[0])


def _take(value: Any, count: int) -> Any:
    if isinstance(value, Mapping):
        return {k: _take(v, count) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_take(v, count) for v in value)
    return value[:count] if isinstance(value, Tensor) else value


def _masked(value: Any, chosen: Tensor) -> Any:
    if isinstance(value, Mapping):
        return {k: _masked(v, chosen) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_masked(v, chosen) for v in value)
    return value[chosen] if isinstance(value, Tensor) else value


def _check(inputs: Any, seen: int | None) -> None:
    for tensor in _tensors(inputs):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            which = "some samples" if seen is None else f"the samples from number {seen} on"
            raise DataError(f"{which} hold NaN or infinite numbers", hint="leave them out, or replace these numbers")


def _length(source: Any) -> int | None:
    try:
        return len(source)
    except TypeError:
        return None


def concatenate(parts: Iterable[Any]) -> Any:
    """Batches of inputs (or labels) of one structure as one batch."""
    gathered = list(parts)
    first = gathered[0]
    if isinstance(first, Mapping):
        return {k: concatenate([p[k] for p in gathered]) for k in first}
    if isinstance(first, tuple):
        return tuple(concatenate(list(p)) for p in zip(*gathered, strict=True))
    return torch.cat(gathered) if isinstance(first, Tensor) else list(itertools.chain(*gathered))
