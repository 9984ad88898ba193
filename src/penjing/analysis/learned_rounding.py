"""Rounding that is learned after training, layer by layer or block by block, from samples without labels.

Each part of the quantized network (a layer: "adaround"; a residual block, a few layers of a chain: "brecq") is tuned so
that, on its inputs in the network quantized so far, it gives the float network's value behind it. So each part makes
up for what is wrong before it, and gradients never leave it. What is tuned is which neighbour on its grid a weight goes
to, and with it biases and the steps of activation grids.

Sources: Nagel et al. 2020, "Up or down? Adaptive rounding for post-training quantization" (soft rounding, layers); Li
et al. 2021, "BRECQ" (blocks, learned activation steps); Wei et al. 2022, "QDrop" (activations that are rounded only
with probability one half while learning); Esser et al. 2020 (gradients of steps).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from penjing.analysis.blockwise import find_blocks
from penjing.analysis.fake_quantize import Simulated, WeightGrid, simulate, simulated_value
from penjing.analysis.lane import Lane
from penjing.analysis.placement import Placement
from penjing.network import graph as flat
from penjing.network.network import Network
from penjing.progress import SILENT, Progress
from penjing.tensors.distillation import matching
from penjing.tensors.grids import Grid
from penjing.tensors.learned_grids import (
    OPERATORS,
    annealed,
    choice_for,
    drop_rounding,
    learned_step,
    rectified,
    soft_round,
    spread,
    undecided,
)
from penjing.training import Training, train

METHODS = ("adaround", "brecq")
#: Learning rates of everything but roundings, relative to those: a share of the tensor's own size a step.
_STEP_RATE, _BIAS_RATE = 0.05, 0.05
#: How much a weight that is not yet at one of its neighbours costs, beside an error relative to the target's variance.
_UNDECIDED = 0.01
_PROBABILITY = 0.5


@dataclass
class Rounding:
    """What was learned: weights on their grids, activation grids by number, biases, and relative squared errors of
    every part, by the name of its last node, before (nearest rounding) and after."""

    weights: dict[str, tuple[Tensor, WeightGrid]] = field(default_factory=dict)
    activations: dict[int, Grid] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Part:
    """Nodes of the simulated graph that are tuned together, what they read and give, and the tensors they alone own."""

    nodes: tuple[fx.Node, ...]
    outside: tuple[fx.Node, ...]
    ends: tuple[fx.Node, ...]
    own: frozenset[str]


def learn_rounding(
    network: Network,
    weights: Mapping[str, WeightGrid],
    placement: Placement,
    activations: Mapping[int, Grid],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    others: Mapping[str, Tensor] | None = None,
    how: str = "brecq",
    steps: int = 300,
    lr: float = 0.1,
    drop: bool = True,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Rounding:
    """Tunes the rounding of `weights` (and biases, and the steps of `activations`) of a float `network`.

    `network` has its batch norms folded; `activations` are the grids of `placement`'s quantizers by number (empty:
    activations stay float); `others` are weights that stand on their grids already; `batches` are bound inputs. Each
    part takes `steps` steps of Adam, one batch each, at the rate `lr`; one that is no better than nearest rounding on
    all batches stays as it was. With `drop`, activations are rounded at random while learning (QDrop). `how` is
    "adaround" (layer by layer) or "brecq" (block by block). Scales of weights stay as given; binary weights have no
    neighbours to choose from: they move, their signs taken on the way forward.
    """
    fixed = {name: replace(weight, widest=False) for name, weight in weights.items()}
    made = simulate(network, fixed, placement.quantizers, activations)
    parts = _parts(network, made.network, layers=how == "adaround")
    wanted = Lane(network, batches, hold=_values(parts))
    given = Lane(made.network, batches, hold={n.name for p in parts for n in p.outside})
    given.tensors.update(others or {})
    result, last = Rounding(), _last_use(parts)
    read = {n.name: place for place, part in enumerate(parts) for n in part.outside}
    with progress.task("learning to round", len(parts)) as advance:
        for place, part in enumerate(parts):
            tuner = _Tuner(part, given.tensors, made)
            if tuner.rates:
                samples = _samples(part, wanted, given, len(batches))
                changed, errors = tuner.tune(samples, steps, lr, drop, seed)
                result.errors[part.ends[0].name] = errors
                given.tensors.update(changed)
            for value in _values([part]):
                if last[value] == place:
                    wanted.release(value)
            for source in part.outside:
                if read[source.name] == place:
                    given.release(source.name)
            advance(1)
    tensors = given.tensors
    result.weights = made.weights(tensors)
    result.activations = made.activations(tensors)
    before = network.tensors()
    result.biases = {
        n: tensors[n].detach()
        for n, t in before.items()
        if n not in weights and n not in (others or {}) and not torch.equal(t, tensors[n])
    }
    return result


# ------------------------------------------------------------------------------------------------------------ parts
def _parts(network: Network, simulated: Network, *, layers: bool) -> list[_Part]:
    """The blocks of the float network (or its single layers), each with the grids that belong to it."""
    groups = [block.nodes for block in find_blocks(network)]
    if layers:
        groups = [run for nodes in groups for run in _single(nodes, set(network.parameter_names))]
    home = {node.name: place for place, nodes in enumerate(groups) for node in nodes}
    members: list[list[fx.Node]] = [[] for _ in groups]
    for node in simulated.graph_module.graph.nodes:
        place = home.get(node.name)
        if place is None and node.target in OPERATORS:
            value = simulated_value(node)
            places = [home[u.name] for u in node.users if u.name in home]
            place = home.get(value.name) if value is not node else min(places, default=None)
        if place is not None and node.op == "call_function":
            members[place].append(node)
    trained = set(simulated.parameter_names)
    reads = [{str(a.target) for n in nodes for a in n.all_input_nodes if a.op == "get_attr"} for nodes in members]
    found = []
    for nodes, read in zip(members, reads, strict=True):
        inside = set(nodes)
        sources = (a for n in nodes for a in n.all_input_nodes)
        outside = tuple(dict.fromkeys(a for a in sources if a not in inside and a.op != "get_attr"))
        ends = tuple(n for n in nodes if _is_value(n) and any(u not in inside for u in n.users))
        own = frozenset(n for n in read & trained if sum(n in other for other in reads) == 1)
        found.append(_Part(tuple(nodes), outside, ends, own))
    return [p for p in found if p.ends]


def _is_value(node: fx.Node) -> bool:
    """Whether a node gives a tensor that is no weight: not a size, nor a rounded weight that other parts read, too."""
    if node.target in OPERATORS:
        return simulated_value(node) is not node
    return node.target is operator.getitem or (
        isinstance(node.target, torch._ops.OpOverload) and node.target is not torch.ops.aten.sym_size.int
    )


def _plain(node: fx.Node) -> str:
    """The name, in the float network, of what a node of the simulated one stands for."""
    source = node.args[0] if node.target in OPERATORS else node
    return source.name if isinstance(source, fx.Node) else node.name


def _single(nodes: Sequence[fx.Node], trainable: set[str]) -> Iterator[tuple[fx.Node, ...]]:
    """A block cut in front of every layer but the first: what follows a layer stays with it."""
    run: list[fx.Node] = []
    seen = False
    for node in nodes:
        layer = any(
            a.op == "get_attr"
            and str(a.target) in trainable
            and flat.get_tensor(node.graph.owning_module, str(a.target)).ndim > 1  # type: ignore[arg-type]
            for a in node.all_input_nodes
        )
        if layer and seen:
            yield tuple(run)
            run = []
        seen = seen or layer
        run.append(node)
    yield tuple(run)


def _values(parts: Sequence[_Part]) -> set[str]:
    """The names, in the float network, of what the parts read and give."""
    return {_plain(n) for p in parts for n in (*p.outside, *p.ends)}


def _last_use(parts: Sequence[_Part]) -> dict[str, int]:
    return {value: place for place, part in enumerate(parts) for value in _values([part])}


Sample = tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]  # inputs: rounded, plain; targets


def _samples(part: _Part, wanted: Lane, given: Lane, count: int) -> list[Sample]:
    rounded = [given.value(n.name) for n in part.outside]
    plain = [wanted.value(_plain(n)) for n in part.outside]
    targets = [wanted.value(_plain(n)) for n in part.ends]
    return [tuple(tuple(v[i] for v in values) for values in (rounded, plain, targets)) for i in range(count)]  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------------------ tuning
class _Tuner:
    """One part with its trainable tensors, twice: as it will be, and as it learns."""

    def __init__(self, part: _Part, tensors: Mapping[str, Tensor], made: Simulated) -> None:
        self.part, self.made = part, made
        self.tensors = {n: t.detach() for n, t in tensors.items()}
        self.weights = {n: made.started[n] for n in sorted(part.own) if n in made.started}
        self.choices: dict[str, str] = {}
        self.rates: dict[str, float] = {}
        # A range's two numbers, and the one that says how large a small change is.
        ranges = {f"{value}_{n}": f"{value}_step" for value, _ in made.quantizers.values() for n in ("step", "offset")}
        for name in sorted(part.own):
            tensor = self.tensors[name]
            if name in self.weights:
                self._weight(name)
            elif tensor.ndim == 1 and name.removesuffix("_step") not in made.started:
                self.rates[name] = _BIAS_RATE * float(tensor.abs().mean() + 1e-3)
            elif name in ranges:
                self.rates[name] = _STEP_RATE * float(self.tensors[ranges[name]])

    def _weight(self, name: str) -> None:
        if self.weights[name].binary:
            self.rates[name] = float(self.tensors[f"{name}_step"].mean())
        else:
            self.choices[name] = f"{name}_choice"
            self.rates[f"{name}_choice"] = 1.0

    def tune(
        self, samples: Sequence[Sample], steps: int, lr: float, drop: bool, seed: int
    ) -> tuple[dict[str, Tensor], tuple[float, float]]:
        """The tensors that changed, and the errors before and after."""
        before = _error(self._module({}, learning=False, drop=False), samples)
        if not math.isfinite(before) or before < 1e-12:
            return {}, (before, before)
        own = {n: nn.Parameter(self._start(n)) for n in self.rates}
        module = self._module(own, learning=True, drop=drop)
        count = max(1, sum(own[c].numel() for c in self.choices.values()))
        done = [0.0]

        def shuffled(epoch: int) -> Iterator[Any]:
            order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed * 7919 + epoch))
            for i in order.tolist():
                yield samples[i]

        def loss(m: nn.Module, sample: Sample) -> Tensor:
            rounded, plain, targets = sample
            if drop:
                rounded = tuple(
                    drop_rounding(p, r, _PROBABILITY) if _floats(r) else r for p, r in zip(plain, rounded, strict=True)
                )
            value = _distance(m(*rounded), targets)
            beta = annealed(done[0])
            if beta is None or not self.choices:
                return value
            costs = [undecided(own[c], beta) for c in self.choices.values()]
            return value + _UNDECIDED * torch.stack(costs).sum() / count

        def after_step(_: nn.Module, share: float, __: float) -> None:
            done[0] = share

        train(
            module,
            shuffled,
            loss,
            Training(epochs=steps / len(samples), lr=lr, optimizer="adamw", weight_decay=0.0, clip=None, seed=seed),
            steps_per_epoch=len(samples),
            alone=True,
            frozen=lambda name: name not in self.rates,
            after_step=after_step,
            rates=self.rates,
        )
        changed = self._hard(own)
        after = _error(self._module(changed, learning=False, drop=False), samples)
        return (changed, (before, after)) if after < before else ({}, (before, before))

    def _start(self, name: str) -> Tensor:
        weight = name.removesuffix("_choice")
        if self.choices.get(weight) != name:
            return self.tensors[name].clone()
        grid = self.weights[weight].grid
        axis = None if grid.group else grid.axis
        return choice_for(self.tensors[weight], self.tensors[f"{weight}_step"], axis, grid.group)

    def _hard(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the simulated network: choices become weights on the nearer of their neighbours."""
        found = {n: t.detach().clone() for n, t in own.items() if n not in self.choices.values()}
        for name, choice in self.choices.items():
            weight, grid = self.tensors[name], self.weights[name].grid
            axis = None if grid.group else grid.axis
            step = spread(self.tensors[f"{name}_step"], weight, axis, grid.group)
            up = (rectified(own[choice].detach()) >= 0.5).to(weight.dtype)
            found[name] = torch.where(weight == 0, weight, (torch.floor(weight / step) + up) * step)
        return found

    def _module(self, own: Mapping[str, Tensor], *, learning: bool, drop: bool) -> fx.GraphModule:
        """The part as a module; `learning` with soft rounding, `drop` with activations rounded at random."""
        part, graph = self.part, fx.Graph()
        copies: dict[fx.Node, fx.Node] = {source: graph.placeholder(source.name) for source in part.outside}
        for node in part.nodes:
            for source in node.all_input_nodes:
                if source not in copies and source.op == "get_attr":
                    copies[source] = graph.create_node("get_attr", str(source.target))
            copies[node] = self._copy(graph, node, copies, learning)
            if drop and node.target in OPERATORS and node not in part.ends and simulated_value(node) is not node:
                source = copies[simulated_value(node)]
                copies[node] = graph.call_function(drop_rounding, (source, copies[node], _PROBABILITY))
        graph.output(tuple(copies[e] for e in part.ends))
        return flat.build(graph, {**self.tensors, **own})

    def _copy(self, graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, fx.Node], learning: bool) -> fx.Node:
        read = node.args[0] if node.args else None
        name = str(read.target) if isinstance(read, fx.Node) and read.op == "get_attr" else ""
        if not (learning and node.target is learned_step and name in self.choices):
            return graph.node_copy(node, copies.__getitem__)
        step, zero, *layout = node.args[1:-1]
        held = (copies[n] if isinstance(n, fx.Node) else None for n in (step, zero))
        choice = graph.create_node("get_attr", self.choices[name])
        return graph.call_function(soft_round, (copies[read], choice, *held, *layout))  # type: ignore[index]


def _distance(got: Sequence[Any], targets: Sequence[Any]) -> Tensor:
    parts = [matching(g, t) for g, t in zip(got, targets, strict=True) if _floats(t)]
    return torch.stack(parts).mean()


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@torch.no_grad()
def _error(module: nn.Module, samples: Sequence[Sample]) -> float:
    return sum(float(_distance(module(*x), t)) for x, _, t in samples) / len(samples)
