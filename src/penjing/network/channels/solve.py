"""From recorded constraints to classes: which labels go together, and which must stay."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from penjing.network.channels.labels import FREE, Collapse, Heads, Tape

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_ROUNDS = 60


@dataclass(frozen=True)
class Solution:
    """A class for every label; classes that must stay; for every value, the one dimension its classes depend on."""

    classes: Ints
    pinned: Bools
    axes: dict[str, tuple[int, Ints]]


class _Solver:
    def __init__(self, tape: Tape, heads: str) -> None:
        self.tape, self.heads = tape, heads
        self.edges = list(tape.edges)
        self.anchors = np.array([pin.label for pin in tape.pins], dtype=np.int64)
        self.values = _distinct(tape)
        self.solve()

    def solve(self) -> None:
        """Components of all edges; class 0 is FREE, and all that must stay is one class for comparisons (`view`)."""
        pairs = np.concatenate(self.edges, axis=1) if self.edges else np.zeros((2, 0), np.int64)
        self.edges = [pairs]
        n = self.tape.count
        graph = coo_array((np.ones(pairs.shape[1], np.int8), (pairs[0], pairs[1])), shape=(n, n))
        _, components = connected_components(graph, directed=False)
        lowest = np.full(n, n, np.int64)
        np.minimum.at(lowest, components, np.arange(n))
        self.classes: Ints = lowest[components]
        self.pinned: Bools = np.zeros(n, np.bool_)
        self.pinned[self.classes[self.anchors]] = True
        self.stay = int(self.anchors[0]) if len(self.anchors) else n
        self.view = np.where(self.pinned[self.classes], self.stay, self.classes)

    def join(self, a: Ints, b: Ints) -> bool:
        """Add edges between different classes; FREE asks nothing."""
        a, b = np.broadcast_arrays(a, b)
        chosen = (a != b) & (a != FREE) & (b != FREE)
        if not chosen.any():
            return False
        pairs = np.unique(np.stack([a[chosen], b[chosen]]), axis=1)
        self.edges.append(pairs)
        return True

    # steps ------------------------------------------------------------------------------------------------------------
    def choose_heads(self, record: Heads) -> bool:
        labels = self.view[record.labels]
        whole, single = (record.other, record.batch) if self.heads == "heads" else (record.batch, record.other)
        if self.heads == "heads":
            merged = _after_joining(labels, record.other)
            if len(np.unique(merged[(merged != FREE) & (merged != self.stay)])) <= 1:
                whole = single  # one head is not a group of heads
        return self.join(labels, _largest(labels, whole))

    def follow(self, record: Collapse) -> bool:
        source = self.view[record.source]
        agreed, first = _agree(source, record.dims)
        target = self.view[record.target]
        return self.join(np.where(agreed, first, FREE), target)

    def unresolved(self, record: Collapse) -> bool:
        """Whether part of the target still leads a life of its own."""
        source = self.view[record.source]
        agreed, _ = _agree(source, record.dims)
        target = self.view[record.target]
        alone = (~agreed) & (target != FREE) & (target != self.stay)
        return bool(alone.any()) and self.join(np.where(alone, target, FREE), np.int64(self.stay))  # type: ignore[arg-type]

    def close(self, labels: Ints) -> bool:
        """A value's classes may depend on one dimension only: join along the others, choosing the most classes."""
        classes = self.view[labels]
        over = [d for d in range(classes.ndim) if classes.shape[d] > 1]
        if not over:
            kept = classes.reshape(-1)
            return self.join(kept, np.full_like(kept, self.stay))
        if len(over) == 1:
            flat = classes.reshape(-1)
            if (flat == flat[0]).all() and flat[0] != FREE:
                return self.join(flat[:1], np.array([self.stay]))
            return False
        best: Ints | None = None
        count = -1
        for d in over:
            others = tuple(o for o in over if o != d)
            agreed, first = _agree(classes, others)
            if agreed.all():
                flat = first.reshape(-1)
                if (flat == flat[0]).all() and flat[0] != FREE:
                    return self.join(flat[:1], np.array([self.stay]))
                return False
            merged = _after_joining(classes, others)
            found = len(np.unique(merged))
            if found > count:
                best, count = _largest(classes, others), found
        return best is not None and self.join(classes, best)

    def run(self) -> None:
        for _ in range(_ROUNDS):
            changed = False
            for record in self.tape.heads:
                changed |= self.choose_heads(record)
            if changed:
                self.solve()
            followed = [self.follow(record) for record in self.tape.collapses]
            if any(followed):
                self.solve()
                continue
            closed = False
            for labels in self.values:
                if self.close(labels):
                    closed = True
                    self.solve()
            if changed or closed:
                continue
            if not any([self.unresolved(record) for record in self.tape.collapses]):
                return
            self.solve()


def solve(tape: Tape, heads: str = "heads") -> Solution:
    """Classes of labels that can only be removed together, closed so that every value stays a rectangular tensor."""
    solver = _Solver(tape, heads)
    solver.run()
    axes: dict[str, tuple[int, Ints]] = {}
    for name, (_, labels) in tape.values.items():
        classes = solver.classes[labels]
        for d in range(classes.ndim):
            others = tuple(o for o in range(classes.ndim) if o != d)
            agreed, first = _agree(solver.view[labels], others)
            if classes.shape[d] > 1 and agreed.all() and not (first == first.reshape(-1)[0]).all():
                axes[name] = (d, first.reshape(-1))
                break
    return Solution(solver.classes, solver.pinned, axes)


def _distinct(tape: Tape) -> list[Ints]:
    """The label arrays of all values without repetition: most nodes repeat the labels of the one before."""
    seen: set[tuple[tuple[int, ...], bytes]] = set()
    found: list[Ints] = []
    for _, labels in tape.values.values():
        squeezed = labels.reshape([n for n in labels.shape if n > 1])
        key = (squeezed.shape, squeezed.tobytes())
        if key not in seen:
            seen.add(key)
            found.append(squeezed)
    return found


def _largest(classes: Ints, dims: tuple[int, ...]) -> Ints:
    result: Ints = classes.max(axis=dims, keepdims=True)
    return result


def _agree(classes: Ints, dims: tuple[int, ...]) -> tuple[Bools, Ints]:
    """Where all classes along `dims` are one (FREE agrees with anything), and which."""
    if not dims:
        return np.ones(classes.shape, np.bool_), classes
    high = classes.max(axis=dims, keepdims=True)
    low = np.where(classes == FREE, np.iinfo(np.int64).max, classes).min(axis=dims, keepdims=True)
    return (low >= high), high


def _after_joining(classes: Ints, dims: tuple[int, ...]) -> Ints:
    """The classes there would be if all along `dims` were joined."""
    names, inverse = np.unique(classes, return_inverse=True)
    inverse = inverse.reshape(classes.shape)
    root = np.broadcast_to(inverse.max(axis=dims, keepdims=True), inverse.shape)
    chosen = (classes != FREE) & (names[root] != FREE)
    n = len(names)
    graph = coo_array((np.ones(int(chosen.sum()), np.int8), (inverse[chosen], root[chosen])), shape=(n, n))
    _, components = connected_components(graph, directed=False)
    lowest = np.full(n, np.iinfo(np.int64).max)
    np.minimum.at(lowest, components, names)
    result: Ints = lowest[components][inverse]
    return result
