"""Inner values of two networks side by side: which are compared, and what learns to make them comparable."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from penjing.analysis.expose import is_sum
from penjing.analysis.operators import CONVOLUTIONS, VIEWS, operator_name
from penjing.errors import RecipeError
from penjing.network import Network
from penjing.registry import did_you_mean
from penjing.tensors.feature_losses import FEATURE_LOSSES

_NORMS_OF_CHANNELS = {"aten::batch_norm", "aten::group_norm", "aten::instance_norm"}
_LAST = {"aten::linear", "aten::layer_norm", "aten::rms_norm", "aten::embedding", "aten::addmm", "aten::matmul"}
#: Of values without places (tokens) at most so many are compared, evenly spread over the depth.
_MOST = 4
#: The length of vectors that are contrasted.
_VECTOR = 128


@dataclass(frozen=True)
class Value:
    """A graph value: its node's name, shape, the dimension of its channels, and whether it is only a view of another,
    the sum of two, or the same everywhere (a state that begins with zeros)."""

    name: str
    shape: tuple[int, ...]
    channels: int
    view: bool = False
    sum: bool = False
    constant: bool = False

    @property
    def width(self) -> int:
        """How many channels it has."""
        return self.shape[self.channels]

    @property
    def places(self) -> tuple[int, ...]:
        """Its positions: all but samples and channels."""
        return tuple(s for d, s in enumerate(self.shape) if d not in (0, self.channels))


Pair = tuple[Value, Value]  #: what a student has, and what of the teacher it is compared with


def feature_pairs(
    student: Network, teacher: Network, inputs: Any, features: Mapping[str, str] | str, loss: str, *, field: str
) -> list[Pair]:
    """The pairs that `features` names ({student's: teacher's}; names of graph values or of layers, or shell patterns of
    them, which pair in order), or that "auto" finds: the last values at each resolution that both have, or, in networks
    of tokens, as many sums of the residual stream, evenly spread.

    `inputs` are of two samples or more. Raises RecipeError, beginning with `field`, where nothing fits.
    """
    mine, theirs = values_of(student, inputs), values_of(teacher, inputs)
    if features == "auto":
        varying = [{n: v for n, v in values.items() if not v.constant} for values in (mine, theirs)]
        pairs = _tokens(*varying) or _stages(*varying)
        hint = "name them: features: {student's value: teacher's value}"
        if not pairs:
            raise RecipeError(f"{field}: {student.name} and {teacher.name} share no resolution to compare", hint=hint)
    else:
        pairs = []
        for one, other in dict(features).items():  # type: ignore[arg-type]
            found = _named(student, mine, one, field), _named(teacher, theirs, other, field)
            if len(found[0]) != len(found[1]):
                raise RecipeError(
                    f"{field}: {one!r} selects {len(found[0])} values and {other!r} {len(found[1])}",
                    hint="patterns pair in order, so both must select as many",
                )
            pairs += zip(*found, strict=True)
        same = next((v.name for pair in pairs for v in pair if v.constant), None)
        if same is not None:
            raise RecipeError(f"{field}: {same} is the same everywhere", hint="name a value that samples change")
    if FEATURE_LOSSES.get(loss).positions:
        flat = next((v for pair in pairs for v in pair if math.prod(v.places) < 2), None)
        if flat is not None:
            raise RecipeError(
                f"{field}: {flat.name} has one position only, and '{loss}' compares positions",
                hint="take 'fitnet', 'similarity' or 'contrast' there",
            )
    return pairs


@torch.no_grad()
def values_of(network: Network, inputs: Any) -> dict[str, Value]:
    """The floating-point values of a graph that have channels, by their nodes' names, in order."""
    walk = _Shapes(network.graph_module)
    walk.run(*network.bind(inputs).values())
    return {
        n.name: Value(
            n.name, shape, _channels(n, len(shape)), operator_name(n) in VIEWS, is_sum(n), n.name in walk.constant
        )
        for n in network.graph_module.graph.nodes
        if (shape := walk.seen.get(n.name)) is not None
    }


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shapes of what its operators make."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, tuple[int, ...]] = {}
        self.constant: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        if n.op == "call_function" and isinstance(made, Tensor) and made.is_floating_point() and made.ndim > 1:
            self.seen[n.name] = tuple(made.shape)
            if made.numel() and bool((made == made.flatten()[0]).all()):
                self.constant.add(n.name)
        return made


def _channels(node: fx.Node, ndim: int) -> int:
    """The dimension of the channels: that of the layer which made the value, followed through what turned it since."""
    turns: list[fx.Node] = []
    at: fx.Node | None = node
    while at is not None and at.op == "call_function":
        name = operator_name(at)
        if name in CONVOLUTIONS or name in _NORMS_OF_CHANNELS or name in _LAST:
            dim = 1 if name not in _LAST else ndim - 1
            for turn in reversed(turns):
                dim = _turned(turn, dim, ndim)
            return dim
        if name in ("aten::permute", "aten::transpose"):
            turns.append(at)
        at = next((a for a in at.all_input_nodes if a.op == "call_function"), None)
    return 1 if ndim == 4 else ndim - 1


def _turned(node: fx.Node, dim: int, ndim: int) -> int:
    if operator_name(node) == "aten::permute":
        order = [int(d) % ndim for d in node.args[1]]  # type: ignore[union-attr, arg-type]
        return order.index(dim) if len(order) == ndim and dim in order else dim
    one, other = (int(d) % ndim for d in node.args[1:3])  # type: ignore[arg-type]
    return {one: other, other: one}.get(dim, dim)


def _stages(mine: Mapping[str, Value], theirs: Mapping[str, Value]) -> list[Pair]:
    """The last values at each resolution that both networks have."""
    one, other = (
        {v.places: v for v in values.values() if math.prod(v.places) > 1 and not v.view} for values in (mine, theirs)
    )
    return [(value, other[places]) for places, value in one.items() if places in other]


def _tokens(mine: Mapping[str, Value], theirs: Mapping[str, Value]) -> list[Pair]:
    """Sums of residual streams of tokens, as many of both networks, the last among them."""
    both = [
        [v for v in values.values() if v.sum and len(v.places) == 1 and v.channels == 2] for values in (mine, theirs)
    ]
    count = min(_MOST, *map(len, both))
    spread = [[values[round((i + 1) * len(values) / count) - 1] for i in range(count)] for values in both]
    return [(a, b) for a, b in zip(*spread, strict=True) if a.places == b.places]


def _named(network: Network, values: Mapping[str, Value], pattern: str, field: str) -> list[Value]:
    """The values that a pattern of their names selects, or of the paths of the layers that make them."""
    paths = {
        str(source.target).rpartition(".")[0]: node.name
        for node in network.graph_module.graph.nodes
        for source in node.all_input_nodes
        if source.op == "get_attr" and node.name in values
    }
    names = {**paths, **{name: name for name in values}}
    chosen = dict.fromkeys(v for name, v in names.items() if fnmatch.fnmatchcase(name, pattern))
    if not chosen:
        raise RecipeError(f"{field}: {network.name} has no value called {pattern!r}", hint=did_you_mean(pattern, names))
    return [value for name, value in values.items() if name in chosen]


class Comparison(nn.Module):
    """Makes pairs of values comparable: (samples, …, channels) each, at the teacher's positions, the student's with the
    teacher's channels where `loss` asks for that, by a linear map at every position that trains with the student and is
    thrown away (Romero et al. 2015, "FitNets"); or both as vectors, the mean over positions mapped (Tian et al. 2020).

    A map between as many channels begins as the identity.
    """

    def __init__(self, pairs: Sequence[Pair], loss: str) -> None:
        super().__init__()
        self.pairs, self.how = list(pairs), FEATURE_LOSSES.get(loss)
        self.mine, self.theirs = nn.ModuleList(), nn.ModuleList()
        for one, other in pairs:
            if self.how.adapts == "values":
                self.mine.append(_identity(nn.Linear(one.width, other.width)))
            elif self.how.adapts == "vectors":
                self.mine.append(nn.Linear(one.width, _VECTOR))
                self.theirs.append(nn.Linear(other.width, _VECTOR))

    def forward(self, seen: Mapping[str, Tensor], told: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        made = []
        for number, (one, other) in enumerate(self.pairs):
            a, b = _at(seen[one.name], one, other), told[other.name].movedim(other.channels, -1)
            if self.how.adapts == "values":
                a = self.mine[number](a)
            elif self.how.adapts == "vectors":
                a, b = (
                    m[number](x.flatten(1, -2).mean(1) if x.ndim > 2 else x)
                    for m, x in ((self.mine, a), (self.theirs, b))
                )
            made.append((a, b))
        return made

    def loss(self, compared: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The mean over pairs of what `forward` gave, as a scalar."""
        return torch.stack([self.how.compute(a.float(), b.float()) for a, b in compared]).mean()


def _at(seen: Tensor, one: Value, other: Value) -> Tensor:
    """A student's value at the teacher's positions (means over areas), channels last."""
    places = len(one.places)
    if one.places != other.places and places == len(other.places) and places in (1, 2, 3):
        moved = F.interpolate(seen.movedim(one.channels, 1), size=other.places, mode="area")
        return moved.movedim(1, -1)
    return seen.movedim(one.channels, -1)


def _identity(layer: nn.Linear) -> nn.Linear:
    if layer.in_features == layer.out_features:
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    return layer
