"""Multiply-accumulates of layers, and of the chains that could stand in their place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from penjing.analysis.factorization import Factorable
from penjing.network.network import Network
from penjing.tensors.low_rank import Option

aten = torch.ops.aten


class Work:
    """Multiply-accumulates of one sample, counted as `footprint` does: `of_layer`, and `of` an option in its place."""

    def __init__(self, network: Network, layers: Iterable[Factorable]) -> None:
        self._layers = {layer.weight: layer for layer in layers}
        self._sizes = {weight: network.tensors()[weight].numel() for weight in self._layers}
        bound = network.bind(network.example(batch=2))
        self._batch = next((t.shape[0] for t in bound.values() if t.ndim), 1)
        watching = _Shapes(network.graph_module, {n for layer in self._layers.values() for n in layer.nodes})
        with torch.no_grad():
            watching.run(*bound.values(), enable_io_processing=False)
        self._seen: Mapping[fx.Node, tuple[torch.Size, torch.Size]] = watching.seen

    def of_layer(self, weight: str) -> int:
        """What the layer takes as it is; rows that are looked up take nothing."""
        layer, size = self._layers[weight], self._sizes[weight]
        return sum(size * self._positions(node, layer.transposed) for node in layer.nodes if not _looks(node))

    def of(self, weight: str, option: Option) -> int:
        """What the chain takes."""
        layer, total = self._layers[weight], 0
        factors = [math.prod(shape) for shape in option.shapes]
        for node in layer.nodes:
            if _looks(node):
                total += factors[0] * self._positions(node, False)
            elif node.target is aten.linear.default:
                total += sum(factors) * self._positions(node, False)
            else:
                first, last = (self._positions(node, inputs) for inputs in (True, False))
                # The factor that has the stride reads at the inputs' positions if transposed, else writes the outputs'.
                strided = option.core + layer.transposed
                places = [first if i < strided else last for i in range(len(factors))]
                if option.form == "spatial":
                    places[0] = self._between(node)
                total += sum(size * place for size, place in zip(factors, places, strict=True))
        return total

    def _positions(self, node: fx.Node, inputs: bool) -> int:
        """Positions of a sample that a layer reads (`inputs`) or writes."""
        shape = self._seen[node][0 if inputs else 1]
        if _looks(node) or node.target is aten.linear.default:
            return math.prod(shape[:-1]) // self._batch
        return math.prod((shape[0], *shape[2:])) // self._batch

    def _between(self, node: fx.Node) -> int:
        """Positions behind the k×1 half of a spatial separation: rows of the outputs, columns of the inputs."""
        given, made = self._seen[node]
        return made[0] * made[2] * given[3] // self._batch


def _looks(node: fx.Node) -> bool:
    return node.target is aten.embedding.default


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shapes that some nodes read and write."""

    def __init__(self, graph_module: fx.GraphModule, nodes: set[fx.Node]) -> None:
        super().__init__(graph_module)
        self._nodes = {node.name: node for node in nodes}
        self.seen: dict[fx.Node, tuple[torch.Size, torch.Size]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self._nodes and isinstance(result, Tensor):
            given = self.fetch_args_kwargs_from_env(n)[0][1 if _looks(n) else 0]
            self.seen[self._nodes[n.name]] = given.shape, result.shape
        return result
