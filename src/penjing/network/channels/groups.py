"""Channel groups: what can be removed from a network, and everything that goes with it.

The graph is run once on labels (`penjing.network.channels.labels`, `penjing.network.channels.rules`); labels that
must go together form classes; classes with the same members form a `Group`. Nothing here depends on layer types,
only on ATen operators.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx

from penjing.errors import EditError
from penjing.network.channels.labels import FREE, Axis, Role, Tape
from penjing.network.channels.rules import trace
from penjing.network.channels.solve import Solution, solve

Ints = NDArray[np.int64]
_ROLES: tuple[Role, ...] = ("producer", "consumer", "other")


@dataclass(frozen=True, eq=False)
class Member:
    """One dimension of one parameter (or buffer) in a group.

    Attributes:
        parameter: its name in the original module.
        dim: the dimension the group lies on.
        indices: `(units, k)` positions along `dim`; row u goes when unit u goes.
        role: "producer" (rows of a weight), "consumer" (columns), "other" (norms, biases, depthwise kernels).
        roles: all roles, where a tied weight has several.
    """

    parameter: str
    dim: int
    indices: Ints
    role: Role
    roles: tuple[Role, ...] = ()


@dataclass(frozen=True, eq=False)
class Group:
    """Units of the same making, each a set of positions in several parameters that can only be removed together.

    Attributes:
        name: the path of the main producing layer.
        size: the number of units.
        members: the dimensions of parameters concerned.
        inexact: the operator by which a statistic crosses these channels (`aten::layer_norm`), so that removing one
            changes the others; None where removing a unit is the same as setting it to zero.
        classes: `(units,)` the class number of every unit.
        sums: the operator that sums over these channels without weights (a product of two activations), so that a
            unit and its copy count twice; None where equal units may be replaced by one with larger weights behind it.
        heads: whether the units are attention heads (with grouped queries: key-value heads and all that ask them).
    """

    name: str
    size: int
    members: tuple[Member, ...]
    inexact: str | None
    classes: Ints
    sums: str | None = None
    heads: bool = False

    @property
    def producers(self) -> tuple[Member, ...]:
        """Members whose rows make the channels."""
        return tuple(m for m in self.members if m.role == "producer")

    @property
    def consumers(self) -> tuple[Member, ...]:
        """Members whose columns read the channels."""
        return tuple(m for m in self.members if "consumer" in m.roles)

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the layers concerned."""
        return tuple(dict.fromkeys(_layer(m.parameter) for m in self.members))

    @property
    def axes(self) -> tuple[tuple[str, int], ...]:
        """(parameter, dimension) of all members."""
        return tuple((m.parameter, m.dim) for m in self.members)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.size} units in {len(self.layers)} layers"]
        if self.inexact:
            lines[0] += f" (a statistic crosses them: {self.inexact})"
        for m in self.members:
            each = "" if m.indices.shape[1] == 1 else f", {m.indices.shape[1]} positions a unit"
            lines.append(f"  {m.role:<8} {m.parameter} dim {m.dim}{each}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Pinned:
    """Why dimensions of parameters stay: a reason, the operator without a rule if that is it, and what it keeps."""

    reason: str
    node: str
    operator: str | None
    axes: tuple[tuple[str, int], ...]


class Groups:
    """The channel groups of a graph, with what is needed to remove units of them."""

    def __init__(self, tape: Tape, solution: Solution, example: Mapping[str, Tensor]) -> None:
        self.tape_axes: tuple[Axis, ...] = tuple(tape.axes)
        self.solution = solution
        self.example = dict(example)
        self.shapes = dict(tape.shapes)
        self._axis_of = {(a.tensor, a.dim): a for a in self.tape_axes}
        self._groups = _build(tape, solution)
        self._by_axis: dict[tuple[str, int], list[Group]] = {}
        for group in self._groups:
            for axis in group.axes:
                self._by_axis.setdefault(axis, []).append(group)
        self.pinned: tuple[Pinned, ...] = _explain(tape, solution)

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, key: int | str) -> Group:
        if isinstance(key, int):
            return self._groups[key]
        for group in self._groups:
            if group.name == key:
                return group
        raise EditError(f"there is no channel group {key!r}", hint="print(network.groups()) lists them")

    def __str__(self) -> str:
        lines = [str(group) for group in self._groups]
        lines += [f"no rule for {name}: {', '.join(nodes)}" for name, nodes in self.reasons.items()]
        return "\n".join(lines)

    @property
    def reasons(self) -> dict[str, tuple[str, ...]]:
        """Operators without a rule, each with `parameter dim` of what it keeps (or its nodes, where it keeps no
        parameter)."""
        table: dict[str, dict[str, None]] = {}
        for pinned in self.pinned:
            if pinned.operator is not None:
                kept = [f"{p} dim {d}" for p, d in pinned.axes] or [pinned.node]
                table.setdefault(pinned.operator, {}).update(dict.fromkeys(kept))
        return {name: tuple(kept) for name, kept in table.items()}

    def why(self, parameter: str, dim: int) -> tuple[str, ...]:
        """The reasons that keep (part of) a dimension of a parameter."""
        return tuple(p.reason for p in self.pinned if (parameter, dim) in p.axes)

    def groups_of(self, parameter: str, dim: int) -> tuple[Group, ...]:
        """All groups on a dimension of a parameter: a concatenation's reader has one for every part."""
        return tuple(self._by_axis.get((parameter, dim), ()))

    def group_of(self, parameter: str, dim: int) -> Group | None:
        """The group on a dimension of a parameter (the one with most positions there), or None if that stays."""
        found = self.groups_of(parameter, dim)
        return max(
            found,
            key=lambda g: next(m.indices.size for m in g.members if (m.parameter, m.dim) == (parameter, dim)),
            default=None,
        )

    def classes_of(self, parameter: str, dim: int) -> Ints | None:
        """The class of every position of a dimension, or None if it has no labels."""
        axis = self._axis_of.get((parameter, dim))
        return None if axis is None else self.solution.classes[axis.base : axis.base + axis.size]


def analyse(
    graph_module: fx.GraphModule, example: Mapping[str, Tensor], heads: Literal["heads", "dims"] = "heads"
) -> Groups:
    """Find the channel groups of a flat graph of ATen calls in eval form.

    Args:
        graph_module: the graph.
        example: a tensor for every placeholder, batch first.
        heads: whether attention loses whole heads, or dimensions of all heads alike.
    """
    if heads not in ("heads", "dims"):
        raise EditError(f'heads must be "heads" or "dims", got {heads!r}')
    try:
        tape = trace(graph_module, single(example))
    except (RuntimeError, IndexError, ValueError):  # a batch size written into the graph
        tape = trace(graph_module, example)
    return Groups(tape, solve(tape, heads), example)


def single(example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first sample of every input that has the batch's size."""
    sizes = [t.shape[0] for t in example.values() if isinstance(t, Tensor) and t.dim() > 0]
    batch = max(set(sizes), key=sizes.count, default=1)
    return {
        k: t[:1] if isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == batch else t for k, t in example.items()
    }


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter


def _build(tape: Tape, solution: Solution) -> tuple[Group, ...]:
    """Classes with the same number of positions on the same dimensions become one group."""
    if not tape.axes:
        return ()
    roles = {role: np.zeros(tape.count, np.bool_) for role in _ROLES}
    touched = np.zeros(tape.count, np.bool_)
    for name, labels in tape.roles:
        roles[name][labels] = True
        touched[solution.classes[labels]] = True
    label = np.concatenate([np.arange(a.base, a.base + a.size) for a in tape.axes])
    axis = np.repeat(np.arange(len(tape.axes)), [a.size for a in tape.axes])
    owner = solution.classes[label]
    # What only consumers know of is made by no parameter (similarities of activations): there is nothing to cut.
    made = np.zeros(tape.count, np.bool_)
    made[owner[~roles["consumer"][label] | roles["producer"][label]]] = True
    chosen = touched[owner] & made[owner] & ~solution.pinned[owner]
    label, axis, owner = label[chosen], axis[chosen], owner[chosen]
    order = np.lexsort((label, axis, owner))
    label, axis, owner = label[order], axis[order], owner[order]
    if not len(label):
        return ()
    starts = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
    mixed = np.random.default_rng(0).integers(1, 2**62, len(tape.axes), dtype=np.int64)
    signature = np.add.reduceat(mixed[axis], starts)
    _, first, inverse = np.unique(signature, return_index=True, return_inverse=True)
    crossing, sums = _by_class(solution, tape.inexact), _by_class(solution, tape.sums)
    heads = _heads(tape, solution)
    sizes = np.diff(np.r_[starts, len(label)])
    groups, used = [], dict[str, int]()
    for kind in np.argsort(first):
        units = np.flatnonzero(inverse == kind)
        width = int(sizes[units[0]])
        rows = starts[units][:, None] + np.arange(width)
        members = []
        for a in dict.fromkeys(axis[rows[0]].tolist()):
            columns = np.flatnonzero(axis[rows[0]] == a)
            positions = label[rows[:, columns]]
            found: tuple[Role, ...] = tuple(role for role in _ROLES if roles[role][positions].any()) or ("other",)
            found = found[:-1] if len(found) > 1 and found[-1] == "other" else found
            members.append(
                Member(tape.axes[a].tensor, tape.axes[a].dim, positions - tape.axes[a].base, found[0], found)
            )
        members.sort(key=lambda m: ("producer", "other", "consumer").index(m.role))
        path = _layer(members[0].parameter)
        used[path] = used.get(path, 0) + 1
        classes = owner[starts[units]]
        inexact, summed = (next((table[c] for c in classes.tolist() if c in table), None) for table in (crossing, sums))
        numbered = path if used[path] == 1 else f"{path}#{used[path]}"
        whole = heads.issuperset(classes.tolist())
        groups.append(Group(numbered, len(units), tuple(members), inexact, classes, summed, whole))
    return tuple(groups)


def _heads(tape: Tape, solution: Solution) -> set[int]:
    """The classes that are whole heads: along the batch of a product of activations, one class each across the rest."""
    found: set[int] = set()
    for record in tape.heads:
        classes = np.where(record.labels == FREE, -1, solution.classes[record.labels])
        high = classes.max(axis=record.other, keepdims=True)
        if ((classes == high) | (classes < 0)).all():
            found.update(np.unique(high[high >= 0]).tolist())
    return found


def _by_class(solution: Solution, noted: Sequence[tuple[str, Ints]]) -> dict[int, str]:
    """The first operator noted for every class."""
    found: dict[int, str] = {}
    for operator, labels in noted:
        for c in np.unique(solution.classes[labels]).tolist():
            found.setdefault(c, operator)
    return found


def _explain(tape: Tape, solution: Solution) -> tuple[Pinned, ...]:
    """For every reason to keep something, the dimensions of parameters in its class."""
    owners: dict[int, list[tuple[str, int]]] = {}
    for axis in tape.axes:
        for c in np.unique(solution.classes[axis.base : axis.base + axis.size]):
            if solution.pinned[c]:
                owners.setdefault(int(c), []).append((axis.tensor, axis.dim))
    seen: set[tuple[str, str]] = set()
    found = []
    for pin in tape.pins:
        axes = tuple(owners.get(int(solution.classes[pin.label]), ()))
        if (pin.reason, pin.node) not in seen and (axes or pin.operator):
            seen.add((pin.reason, pin.node))
            found.append(Pinned(pin.reason, pin.node, pin.operator, axes))
    return tuple(found)


def units_of(groups: Groups, removals: Sequence[tuple[str, int, Sequence[int]]]) -> NDArray[np.bool_]:
    """Which classes go, for removals given as (parameter, dimension, indices), each closed over its units.

    Raises:
        EditError: a position does not exist or must stay, or a group would lose its last unit.
    """
    gone = np.zeros(len(groups.solution.classes), np.bool_)
    owned = np.zeros(len(groups.solution.classes), np.bool_)
    for group in groups:
        owned[group.classes] = True
    for parameter, dim, indices in removals:
        classes = groups.classes_of(parameter, dim)
        if classes is None:
            raise EditError(
                f"{parameter} has no channels on dimension {dim}", hint="print(network.groups()) lists what has"
            )
        chosen = np.asarray(list(indices), dtype=np.int64)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= len(classes)):
            raise EditError(
                f"{parameter} has {len(classes)} positions on dimension {dim}, so {int(chosen.max())} cannot be removed"
            )
        taken = classes[chosen]
        if not owned[taken].all():
            why = "; ".join(groups.why(parameter, dim)[:3]) or "it is not a channel"
            position = int(chosen[~owned[taken]][0])
            raise EditError(f"position {position} of {parameter} dimension {dim} must stay: {why}")
        gone[taken] = True
    for group in groups:
        if gone[group.classes].all():
            raise EditError(f"group {group.name} would lose all its {group.size} units", hint="keep at least one")
    return gone


def kept_indices(groups: Groups, removals: Sequence[tuple[str, int, Sequence[int]]]) -> dict[str, dict[int, Ints]]:
    """For every tensor that shrinks, the positions kept along each dimension that does."""
    return kept_by(groups, units_of(groups, removals))


def kept_by(groups: Groups, gone: NDArray[np.bool_]) -> dict[str, dict[int, Ints]]:
    """The same, for classes that go."""
    kept: dict[str, dict[int, Ints]] = {}
    for axis in groups.tape_axes:
        removed = gone[groups.solution.classes[axis.base : axis.base + axis.size]]
        if removed.any():
            kept.setdefault(axis.tensor, {})[axis.dim] = np.flatnonzero(~removed)
    return kept


def kept_values(groups: Groups, removals: Sequence[tuple[str, int, Sequence[int]]]) -> dict[str, tuple[int, Ints]]:
    """For every activation that shrinks, by its node's name: the dimension, and the positions kept along it."""
    gone = units_of(groups, removals)
    axes = {name: axis for name, axis in groups.solution.axes.items() if name in groups.shapes}
    return {name: (dim, np.flatnonzero(~gone[classes])) for name, (dim, classes) in axes.items() if gone[classes].any()}
