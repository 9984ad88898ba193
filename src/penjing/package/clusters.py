"""Which rows of the integer grids share a histogram: k-means in the space of code lengths.

Chou, Lookabaugh and Gray's entropy-constrained clustering (1989) with code lengths as the distance: a row goes to the
model that codes it in the fewest bits, the bits that name the model counted in.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_MOST = 12
_MODEL_BITS = 2.2  # what a model costs to send for each value that occurs, about
_ROUNDS = 8
_STEP = 4096.0  # costs are multiples of 1/4096 bit, so that sums are exact and every machine groups alike


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clusters:
    """bits: (models, 256), cost of each byte value; prior: (models,), cost of naming the model."""

    bits: Floats
    prior: Floats

    def assign(self, histograms: Floats) -> tuple[NDArray[np.uint8], bool]:
        """The model of each row of a tensor, and whether they are all one.

        histograms: (rows, 256). One model for all rows needs no map, and is taken where that is cheaper.
        """
        costs = histograms @ self.bits.T
        whole = costs.sum(axis=0)
        single = int(whole.argmin())
        costs = costs + self.prior
        best = costs.argmin(axis=1)
        if whole[single] <= costs[np.arange(len(best)), best].sum():
            return np.full(len(best), single, dtype=np.uint8), True
        return best.astype(np.uint8), bool((best == best[0]).all())


def fit(histograms: Floats, *, share: float) -> Clusters:
    """Clusters of the rows given, as many as pay for themselves.

    histograms: (rows, 256) counts of byte values; share: the part of the network's symbols that these rows are.
    """
    if not len(histograms):
        return Clusters(bits=np.full((1, 256), 8.0), prior=np.zeros(1))
    size = np.maximum(histograms.sum(axis=1), 1)
    order = np.argsort(_entropies(histograms, size), kind="stable")
    labels = _lloyd(histograms, _shares(size, order, min(_MOST, len(histograms))))
    rows = np.bincount(labels)
    used = np.flatnonzero(rows)
    counts = (labels == used[:, None]).astype(np.float64) @ histograms
    return centres(*_merged(counts, rows[used], share))


def _merged(counts: Floats, rows: NDArray[np.intp], share: float) -> tuple[Floats, NDArray[np.intp]]:
    """Puts together, pair by pair, the models that differ by less than one of them and its name cost to send."""
    model_bits = share * (50 + _MODEL_BITS * np.count_nonzero(counts.sum(axis=0)))
    while len(counts) > 1:
        own, named = _information(counts), rows * np.log2(rows)
        first, second = np.triu_indices(len(counts), 1)
        both = rows[first] + rows[second]
        loss = _information(counts[first] + counts[second]) - own[first] - own[second]
        # Half of the names: a tensor whose rows all agree needs none.
        loss -= (both * np.log2(both) - named[first] - named[second]) / 2
        loss = np.rint(loss * _STEP) / _STEP
        best = int(loss.argmin())
        if loss[best] >= model_bits:
            break
        a, b = first[best], second[best]
        counts[a] += counts[b]
        rows[a] += rows[b]
        counts, rows = np.delete(counts, b, axis=0), np.delete(rows, b)
    return counts, rows


def _information(counts: Floats) -> Floats:
    """Bits that symbols with these counts take under their own histogram."""
    total = counts.sum(axis=1)
    logs = np.log2(counts, where=counts > 0, out=np.zeros_like(counts))
    return np.asarray(total * np.log2(np.maximum(total, 1)) - (counts * logs).sum(axis=1))


def _lloyd(histograms: Floats, labels: NDArray[np.intp]) -> NDArray[np.intp]:
    previous = np.inf
    for _ in range(_ROUNDS):
        clusters = _centres(histograms, labels)
        costs = histograms @ clusters.bits.T + clusters.prior
        labels = costs.argmin(axis=1)
        total = float(costs[np.arange(len(labels)), labels].sum())
        if total >= previous * (1 - 1e-4):
            break
        previous = total
    return labels


def _entropies(histograms: Floats, size: Floats) -> Floats:
    return np.asarray(np.rint(_information(histograms) / size * _STEP))


def _shares(size: Floats, order: NDArray[np.intp], number: int) -> NDArray[np.intp]:
    """Starting labels: rows in order of their own entropy, cut into shares of equally many symbols."""
    passed = np.cumsum(size[order]) - size[order] / 2
    labels = np.empty(len(size), dtype=np.intp)
    labels[order] = np.minimum(number - 1, passed * number // size.sum()).astype(np.intp)
    return labels


def _centres(histograms: Floats, labels: NDArray[np.intp]) -> Clusters:
    rows = np.bincount(labels)
    used = np.flatnonzero(rows)
    return centres((labels == used[:, None]).astype(np.float64) @ histograms, rows[used])


def centres(counts: Floats, rows: NDArray[np.intp]) -> Clusters:
    """Clusters from the (models, 256) symbols and the number of rows that each model was given."""
    everything = counts.sum(axis=0)
    # A value that a model has not seen costs as much as its rarity in the whole network suggests.
    counts = counts + 0.5 * everything / max(everything.sum(), 1) + 2.0**-10
    bits = np.log2(counts.sum(axis=1, keepdims=True)) - np.log2(counts)
    prior = np.log2(rows.sum()) - np.log2(rows)
    return Clusters(bits=np.rint(bits * _STEP) / _STEP, prior=np.rint(prior * _STEP) / _STEP)
