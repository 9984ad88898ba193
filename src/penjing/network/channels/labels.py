"""Labels: one integer for every position that could be removed from a network, and the constraints between them.

A channel analysis runs the graph once, with an int64 tensor of labels beside every activation. An element's label
names the
channel it belongs to; two labels that must go together are joined by an edge. Labels of activations are stored with
stride 0
along every dimension on which they do not depend, so `[1, 256, 56, 56]` costs 256 integers.

* ``FREE`` (0) marks constants, masks and reduced dimensions: nothing is known and nothing is asked.
* A parameter with several dimensions has a label for each (dimension, index): it is a `Slots`, one layer of labels
for every dimension.
* A pinned label stands for something that must stay, and carries the reason why.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FREE = 0
Role = Literal["producer", "consumer", "other"]


@dataclass(frozen=True)
class Slots:
    """Labels of a weight-like value: several layers of one shape; an element goes when any of its layers' labels
    goes."""

    shape: tuple[int, ...]
    layers: tuple[Tensor, ...]


Labels = Tensor | Slots


@dataclass(frozen=True)
class Collapse:
    """If the classes of `source` agree along `dims`, they are joined with `target` (size 1 there); else `target` is
    pinned."""

    source: NDArray[np.int64]
    dims: tuple[int, ...]
    target: NDArray[np.int64]


@dataclass(frozen=True)
class Heads:
    """Labels that depend on a batch dimension of a matrix product and on another: one of the two may be removed."""

    labels: NDArray[np.int64]
    batch: tuple[int, ...]
    other: tuple[int, ...]


@dataclass(frozen=True)
class Pin:
    """Why something must stay. `operator` is set where an operator has no rule."""

    label: int
    reason: str
    node: str
    operator: str | None


@dataclass(frozen=True)
class Axis:
    """The labels `base … base + size - 1` of one dimension of one tensor."""

    tensor: str
    dim: int
    base: int
    size: int


def free(shape: Sequence[int]) -> Tensor:
    """Labels that ask nothing, of a given shape."""
    return torch.zeros((), dtype=torch.int64).expand(tuple(shape))


def varying(labels: Tensor) -> list[int]:
    """The dimensions on which compact labels depend."""
    return [d for d in range(labels.dim()) if labels.size(d) > 1 and labels.stride(d) != 0]


def core(labels: Tensor) -> Tensor:
    """The labels with every dimension on which they do not depend narrowed to size 1."""
    for d in range(labels.dim()):
        if labels.size(d) > 1 and labels.stride(d) == 0:
            labels = labels.narrow(d, 0, 1)
    return labels


def compact(labels: Tensor) -> Tensor:
    """The same labels, with stride 0 along every dimension on which they do not depend."""
    shape = labels.shape
    if labels.numel() == 0:
        return free(shape)
    labels = core(labels)
    for d in range(labels.dim()):
        if labels.size(d) > 1:
            first = labels.narrow(d, 0, 1)
            if bool((labels == first).all()):
                labels = first
    return labels.contiguous().expand(shape)


def is_free(labels: Tensor) -> bool:
    """Whether nothing is known of any element."""
    return not bool(core(labels).any())


def along(vector: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """A vector of labels laid along one dimension of a value of the given shape."""
    view = [1] * len(shape)
    view[dim] = vector.numel()
    return vector.reshape(view).expand(tuple(shape))


def aligned(labels: Tensor, ndim: int) -> Tensor:
    """The labels with dimensions of size 1 put in front, as broadcasting does."""
    return labels[(None,) * (ndim - labels.dim())] if labels.dim() < ndim else labels


@dataclass
class Tape:
    """What one labelled run of a graph recorded: label ranges, edges, pins, deferred constraints, roles, the labels
    of each node."""

    tensors: dict[str, Tensor]
    parameters: frozenset[str]
    count: int = 1
    axes: list[Axis] = field(default_factory=list)
    edges: list[NDArray[np.int64]] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    collapses: list[Collapse] = field(default_factory=list)
    heads: list[Heads] = field(default_factory=list)
    roles: list[tuple[Role, NDArray[np.int64]]] = field(default_factory=list)
    inexact: list[tuple[str, NDArray[np.int64]]] = field(default_factory=list)
    sums: list[tuple[str, NDArray[np.int64]]] = field(default_factory=list)
    values: dict[str, tuple[tuple[int, ...], NDArray[np.int64]]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _slots: dict[str, Slots] = field(default_factory=dict)

    # labels -----------------------------------------------------------------------------------------------------------
    def fresh(self, shape: Sequence[int]) -> Tensor:
        """New labels, all different."""
        size = int(np.prod(shape)) if len(shape) else 1
        base, self.count = self.count, self.count + size
        return torch.arange(base, base + size).reshape(tuple(shape))

    def slots(self, name: str) -> Slots:
        """The labels of a parameter or buffer: a layer for every dimension larger than 1."""
        if name not in self._slots:
            shape = tuple(self.tensors[name].shape)
            layers = []
            for dim, size in enumerate(shape):
                if size > 1:
                    self.axes.append(Axis(name, dim, self.count, size))
                    layers.append(along(self.fresh((size,)), dim, shape))
            self._slots[name] = Slots(shape, tuple(layers))
            if len(layers) == 1:
                self.mark("other", layers[0])
        return self._slots[name]

    def attribute(self, name: str) -> Labels:
        """The labels of a tensor as the graph meets it: buffers are constants until an operator knows better."""
        slots = self.slots(name) if name in self.parameters else None
        if slots is None or not slots.layers:
            return free(self.tensors[name].shape)
        return slots.layers[0] if len(slots.layers) == 1 else slots

    def as_slots(self, labels: Labels) -> Slots:
        """Weight-like labels of any value."""
        if isinstance(labels, Slots):
            return labels
        return Slots(tuple(labels.shape), () if is_free(labels) else (labels,))

    def axis(self, slots: Slots, dim: int) -> Tensor:
        """The label vector of one dimension of a weight-like value."""
        size = slots.shape[dim]
        vector: Tensor | None = None
        for layer in slots.layers:
            over = varying(layer)
            if dim not in over:
                continue
            if over == [dim]:
                other = core(layer).reshape(-1)
                if vector is not None:
                    self.union(vector, other)
                vector = other
        for layer in slots.layers:
            over = varying(layer)
            if dim in over and len(over) > 1:
                if vector is None:
                    vector = self.fresh((size,))
                self.collapse(core(layer), [d for d in over if d != dim], core(along(vector, dim, slots.shape)))
        return torch.zeros(size, dtype=torch.int64) if vector is None else vector

    def elements(self, labels: Labels) -> Tensor:
        """One label for every element of a weight-like value; each dimension follows if the elements turn out to
        agree."""
        if isinstance(labels, Tensor):
            return labels
        if len(labels.layers) <= 1:
            return labels.layers[0] if labels.layers else free(labels.shape)
        over = sorted({d for layer in labels.layers for d in varying(layer)})
        result = self.fresh([n if d in over else 1 for d, n in enumerate(labels.shape)]).expand(labels.shape)
        for dim in over:
            vector = core(along(self.axis(labels, dim), dim, labels.shape))
            self.collapse(core(result), [d for d in over if d != dim], vector)
        return result

    # constraints ------------------------------------------------------------------------------------------------------
    def union(self, a: Tensor, b: Tensor) -> None:
        """Join labels elementwise (broadcasting; FREE joins with anything)."""
        if a.dim() == b.dim():
            a, b = core(a), core(b)
        shape = np.broadcast_shapes(a.shape, b.shape)
        left, right = a.expand(shape), b.expand(shape)
        chosen = (left != right) & (left != FREE) & (right != FREE)
        if bool(chosen.any()):
            self.edges.append(torch.stack([left[chosen], right[chosen]]).numpy())

    def join_along(self, labels: Tensor, dim: int) -> Tensor:
        """Join all labels along one dimension; returns them with that dimension narrowed to 1."""
        labels = core(labels)
        if labels.size(dim) == 1:
            return labels
        first = labels.amax(dim, keepdim=True)
        self.union(labels, first.expand(labels.shape).contiguous())
        return first

    def pin(self, labels: Labels, reason: str, node: str, operator: str | None = None) -> int:
        """Keep all of these for the given reason; returns the label that stands for the reason."""
        label = int(self.fresh(()))
        self.pins.append(Pin(label, reason, node, operator))
        for layer in labels.layers if isinstance(labels, Slots) else (labels,):
            flat = torch.unique(core(layer))
            flat = flat[flat != FREE]
            if flat.numel():
                self.edges.append(torch.stack([flat, torch.full_like(flat, label)]).numpy())
        return label

    def collapse(self, source: Tensor, dims: Iterable[int], target: Tensor) -> None:
        """Record that `target` follows `source` if that agrees along `dims`."""
        self.collapses.append(Collapse(source.numpy().copy(), tuple(dims), target.numpy().copy()))

    def mark(self, role: Role, labels: Tensor) -> None:
        """Note that these labels are rows that produce, columns that consume, or another per-channel quantity."""
        self.roles.append((role, torch.unique(core(labels)).numpy()))

    def crossed(self, operator: str, labels: Tensor) -> None:
        """Note that a statistic over these channels enters what the others compute."""
        self.inexact.append((operator, torch.unique(core(labels)).numpy()))

    def summed(self, operator: str, labels: Tensor) -> None:
        """Note that these channels are summed up without weights, so that a channel and its copy count twice."""
        self.sums.append((operator, torch.unique(core(labels)).numpy()))

    # the algebra the rules share --------------------------------------------------------------------------------------
    def reduce(self, labels: Tensor, dims: Sequence[int]) -> Tensor:
        """Labels of a reduction over `dims` (kept with size 1)."""
        over = varying(labels)
        crossing = [d for d in dims if d in over]
        full = [1 if d in dims else n for d, n in enumerate(labels.shape)]
        if len(crossing) == len(over) > 0:
            return free(full)
        labels = core(labels)
        if not crossing:
            return labels.expand(full)
        result = self.fresh([1 if d in dims else n for d, n in enumerate(labels.shape)])
        self.collapse(labels, crossing, result)
        return result.expand(full)

    def combine(
        self, operands: Sequence[Tensor], shape: Sequence[int], node: str, operator: str, static: bool = False
    ) -> Tensor:
        """Labels of an elementwise operation with broadcasting."""
        ndim = len(shape)
        known = [aligned(labels, ndim) for labels in operands if not is_free(labels)]
        if not known:
            return free(shape)
        over = [set(varying(labels)) for labels in known]
        result: Tensor | None = None
        deferred: list[tuple[Tensor, list[int]]] = []
        for i, labels in enumerate(known):
            others = set().union(*(o for j, o in enumerate(over) if j != i)) - over[i]
            blocked = [d for d in others if labels.size(d) == 1 and shape[d] > 1]
            if blocked:
                deferred.append((core(labels), blocked))
            elif result is None:
                result = core(labels)
            else:
                self.union(result, core(labels))
                result = torch.where(result == FREE, core(labels), result)
        if result is None:  # an outer product: two families of channels in one value
            for labels in known:
                label = self.pin(labels, f"{operator} spreads two families of channels over one value", node, operator)
            return torch.tensor(label).expand(tuple(shape))
        for labels, blocked in deferred:
            if varying(labels):
                self.collapse(result, blocked, labels)
            else:
                self.pin(labels, f"{operator} broadcasts a single channel", node)
        result = compact(result.expand(tuple(shape)))
        if not static and 0 in varying(result):
            wide = [t for t in operands if is_free(t) and t.dim() == ndim and t.size(0) == shape[0]]
            if wide:  # the batch is in this dimension too, so that no fixed positions of the constant could be kept
                self.pin(result, f"{operator} adds a computed constant over batch and channels", node)
        return result
