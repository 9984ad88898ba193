"""Latency as a cost of channels, or of the types of weights: a network's layers, measured on a target alone and at
several widths, or quantized in several ways.

What the layers do not account for (norms, pooling, attention, the runtime's own overhead) counts as constant, so the
table only leads; what a network takes is always measured on the whole of it, in turns with the original.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from penjing.analysis.costs import Cost, owners_of
from penjing.network import Network, capture
from penjing.network.channels.groups import Group
from penjing.progress import SILENT, Progress
from penjing.runtimes.base import Target, get_runtime
from penjing.runtimes.timing import LatencySettings, interleave
from penjing.tensors.allocation import CostModel
from penjing.tensors.tables import Table, TableShare

aten = torch.ops.aten
#: Operator → (dimension of its input that channels lie along, place of `groups` among its arguments).
_LAYERS: dict[Any, tuple[int, int | None]] = {
    aten.conv1d.default: (1, 6),
    aten.conv2d.default: (1, 6),
    aten.linear.default: (-1, None),
}
W = TypeVar("W")
_WIDTHS = (0.25, 0.5, 1.0)
_LAYER = LatencySettings(warm_up=5, seconds=0.1, least_rounds=5, most_rounds=15)
_WHOLE = LatencySettings(warm_up=5, seconds=1.0, least_rounds=9, most_rounds=30)


def latency_cost(
    network: Network, groups: Sequence[Group], target: Target, keep: float, progress: Progress = SILENT
) -> Cost:
    """The latency of one sample on `target`, in milliseconds, as a function of the units that go from `groups`.

    The limit is the share `keep` of what `network` takes. Raises MissingExtraError, TargetError.
    """
    owners = owners_of(groups)
    layers = [layer for layer in _layers(network) if layer.weight in owners]
    kinds = {layer.kind: layer for layer in layers}
    tables: dict[str, Table] = {}
    with _Bench(target) as bench, progress.task(f"timing layers on {target}", len(kinds) + 1) as advance:
        whole = interleave({"network": bench.opened(network)}, settings=_WHOLE)["network"].p50
        advance(1)
        nothing = bench.opened(capture(_Nothing(), inputs=(torch.randn(2, 4),), name="nothing"))
        for kind, layer in kinds.items():
            tables[kind] = Table.of(bench.widths(layer, nothing))
            advance(1)
    full = sum(tables[layer.kind](*layer.sizes) for layer in layers)
    factor = min(1.0, whole / max(full, 1e-12))
    shares = [TableShare(tables[layer.kind], layer.sizes, owners[layer.weight], factor) for layer in layers]

    model = CostModel(whole - factor * full, shares)
    return Cost(f"latency on {target}", whole, keep * whole, model, _measure(network, whole, target), timed=True)


@dataclass(frozen=True)
class WayLatency:
    """Milliseconds of one sample on a target: of the `whole` network as it is, of whole networks with all layers in
    each way (`wholes`), and by weight of each layer in each way (`layers`); `constant` is what layers have no part in.
    `measure` says what a whole network really takes."""

    whole: float
    wholes: tuple[float, ...]
    constant: float
    layers: Mapping[str, tuple[float, ...]]
    measure: Callable[[Network], float]


def latency_by_way(
    network: Network,
    folded: Network,
    weights: Collection[str],
    wholes: Sequence[Network],
    alone: Sequence[Callable[[Network], Network]],
    target: Target,
    progress: Progress = SILENT,
) -> WayLatency:
    """What the layers of `network` that read `weights` take in several ways, such as quantized.

    `folded` is the network with its batch norms folded, in which its layers are found. `wholes` are whole networks, all
    layers in one way each; `alone` makes of one layer by itself what it is in that way. A layer alone also pays for
    what its neighbours would share with it (quantizing its inputs), so each way's layers are scaled to what their whole
    network takes: networks of one way are right, those in between are led by the table. Layers that cannot stand alone
    (grouped, transposed, recurrent) take no time in it. Raises MissingExtraError, TargetError.
    """
    layers = [layer for layer in _layers(folded) if layer.weight in weights]
    kinds = {layer.kind: layer for layer in layers}
    rows: dict[str, list[float]] = {}
    with _Bench(target) as bench, progress.task(f"timing layers on {target}", len(kinds) + 1) as advance:
        whole, *several = bench.timed([network, *wholes], _WHOLE)
        advance(1)
        nothing = bench.opened(capture(_Nothing(), inputs=(torch.randn(2, 4),), name="nothing"))
        for kind, layer in kinds.items():
            single = layer.at(*layer.sizes)
            rows[kind] = bench.timed([single, *(way(single) for way in alone)], _LAYER, nothing)
            advance(1)
    plain, *ways = ([rows[layer.kind][i] for layer in layers] for i in range(len(alone) + 1))
    constant = max(0.0, whole - sum(plain))
    factors = [max(w - constant, 0.0) / max(sum(way), 1e-12) for w, way in zip(several, ways, strict=True)]
    table = {
        layer.weight: tuple(f * way[i] for f, way in zip(factors, ways, strict=True)) for i, layer in enumerate(layers)
    }
    return WayLatency(whole, tuple(several), constant, table, _measure(network, whole, target))


def latency_of_each(
    network: Network,
    ways: Mapping[str, W],
    alone: Callable[[Network, W], Network],
    target: Target,
    progress: Progress = SILENT,
) -> dict[str, tuple[float, float]]:
    """Milliseconds of one sample by weight: its layer by itself as it is, and as `alone` makes it in its way.

    Left out: layers that cannot stand alone (grouped, transposed, three-dimensional, embeddings). Layers that take
    equally long are measured once. Raises MissingExtraError, TargetError.
    """
    layers = [layer for layer in _layers(network) if layer.weight in ways]
    kinds = {f"{layer.kind} {ways[layer.weight]}": layer for layer in layers}
    taken: dict[str, tuple[float, float]] = {}
    with _Bench(target) as bench, progress.task(f"timing layers on {target}", len(kinds)) as advance:
        for kind, layer in kinds.items():
            single = layer.at(*layer.sizes)
            before, after = bench.timed([single, alone(single, ways[layer.weight])], _LAYER)
            taken[kind] = before, after
            advance(1)
    return {layer.weight: taken[f"{layer.kind} {ways[layer.weight]}"] for layer in layers}


def _measure(network: Network, whole: float, target: Target) -> Callable[[Network], float]:
    """Says what other networks take on `target`, in turns with `network`, which takes `whole`."""

    def measure(other: Network) -> float:
        with _Bench(target) as bench:
            taken = interleave({"before": bench.opened(network), "after": bench.opened(other)}, settings=_WHOLE)
        return whole * taken["after"].p50 / taken["before"].p50

    return measure


@dataclass(frozen=True)
class _Layer:
    """A layer of the graph: its weight's name, and all that its latency depends on."""

    weight: str
    operator: Any
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    rest: tuple[Any, ...]

    @property
    def kind(self) -> str:
        """Equal for layers that take equally long."""
        return str((self.operator, self.input_shape, self.weight_shape, self.rest))

    @property
    def sizes(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.weight_shape[0], self.weight_shape[1]

    def at(self, outputs: int, inputs: int) -> Network:
        """The layer by itself with other sizes."""
        axis, place = _LAYERS[self.operator]
        shape, rest = list(self.input_shape), list(self.rest)
        shape[axis] = inputs
        if _groups(self.operator, self.rest) > 1 and place is not None:
            shape[axis] = rest[place - 3] = outputs  # depthwise
        weight = torch.randn(outputs, inputs, *self.weight_shape[2:])
        return capture(_Alone(self.operator, weight, rest), inputs=(torch.randn(2, *shape[1:]),), name="layer")


class _Alone(nn.Module):
    def __init__(self, operator: Any, weight: Tensor, rest: Sequence[Any]) -> None:
        super().__init__()
        self.operator, self.rest = operator, list(rest)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(len(weight)))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.operator(x, self.weight, self.bias, *self.rest)
        return result


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


def _groups(operator: Any, rest: Sequence[Any]) -> int:
    place = _LAYERS[operator][1]
    return int(rest[place - 3]) if place is not None and len(rest) > place - 3 else 1


def _layers(network: Network) -> list[_Layer]:
    """Plain and depthwise convolutions and linear layers, by one run on one sample."""
    found: list[_Layer] = []

    class Watcher(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.target in _LAYERS and isinstance(n.args[1], fx.Node) and n.args[1].op == "get_attr":
                x, weight = self.fetch_args_kwargs_from_env(n)[0][:2]
                rest = tuple(tuple(a) if isinstance(a, list) else a for a in n.args[3:])
                plain = not any(isinstance(a, fx.Node) for a in rest)
                if plain and (_groups(n.target, rest) == 1 or weight.shape[1] == 1):
                    found.append(_Layer(str(n.args[1].target), n.target, tuple(x.shape), tuple(weight.shape), rest))
            return super().run_node(n)

    bound = network.bind(network.example(1))
    with torch.no_grad():
        Watcher(network.graph_module).run(*bound.values(), enable_io_processing=False)
    return found


class _Bench:
    """Exports to a folder of its own, and opens what it wrote there."""

    def __init__(self, target: Target) -> None:
        self._runtime, self._target, self._count = get_runtime(target), target, 0
        self._folder = tempfile.TemporaryDirectory(prefix="penjing-")

    def __enter__(self) -> _Bench:
        self._runtime.need()
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()

    def opened(self, network: Network) -> Callable[[], object]:
        """What runs one sample of `network`."""
        self._count += 1
        path = Path(self._folder.name) / f"{self._count}{self._runtime.suffix}"
        self._runtime._write(network, path)
        session = self._runtime.load(path, self._target)
        bound = network.bind(network.example(1))
        arrays = {name: bound[name].numpy() for name in session.input_names}
        return lambda: session.run(arrays)

    def widths(self, layer: _Layer, nothing: Callable[[], object]) -> Mapping[tuple[int, int], float]:
        """Milliseconds by (outputs, inputs), less those of running nothing."""
        rows, columns = (sorted({max(1, round(size * part)) for part in _WIDTHS}) for size in layer.sizes)
        runs = {f"{r} {c}": self.opened(layer.at(r, c)) for r in rows for c in columns}
        taken = interleave({"nothing": nothing, **runs}, settings=_LAYER)
        return {(r, c): max(taken[f"{r} {c}"].p50 - taken["nothing"].p50, 1e-6) for r in rows for c in columns}

    def timed(
        self, networks: Sequence[Network], settings: LatencySettings, nothing: Callable[[], object] | None = None
    ) -> list[float]:
        """Milliseconds of each network, in turns, less those of running `nothing`; what is there twice runs once."""
        runs = {str(id(n)): self.opened(n) for n in {id(n): n for n in networks}.values()}
        if nothing is not None:
            runs["nothing"] = nothing
        taken = {name: t.p50 for name, t in interleave(runs, settings=settings).items()}
        return [max(taken[str(id(n))] - taken.get("nothing", 0.0), 1e-6) for n in networks]
