"""Which products of an ONNX file stand on integer grids, and by what names a runtime may speak of them.

What a file says is not what runs: a runtime without a kernel for a product of integers computes it in float, and says
nothing. Laid beside what it executed, this tells which layers those are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from penjing.runtimes.base import Session
from penjing.runtimes.onnx_graph import read
from penjing.runtimes.onnx_views import VIEWS

_PRODUCTS = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "MatMulNBits": 1, "LSTM": 2, "GRU": 2, "RNN": 2}
_WORDS = ("conv", "gemm", "matmul", "fullyconnected", "deconvolution", "rnn", "lstm", "gru")  # in every runtime's kinds
_ENDINGS = ("/", "_token_")  # what runtimes put behind the names of nodes that they changed


def in_float(path: Path, session: Session, stored: Collection[str]) -> dict[str, str]:
    """Layers whose factors stand on integer grids in the file while `session` computes them in float → its arithmetic.

    `stored`: the names of the network's tensors that are codes. A product of two activations goes by the name of its
    value. What cannot be found again in the executed graph is not spoken of. Raises InputError for a damaged file.
    """
    rows: dict[str, set[str]] = {}
    for each in session.executed():
        if any(word in each.op.lower() for word in _WORDS):
            for name in each.origins or (each.name,):
                for ending in _ENDINGS:
                    name = name.partition(ending)[0]
                rows.setdefault(name, set()).add(each.precision)
    found: dict[str, str] = {}
    for label, names in _integer_products(read(path).graph, stored):
        ran = set().union(*(rows.get(name, ()) for name in names))
        if ran and "int8" not in ran:
            found[label] = min(ran)
    return found


def _integer_products(graph: Any, stored: Collection[str]) -> list[tuple[str, tuple[str, ...]]]:
    """(layer, names of the node and of its value) of every product whose factors both stand on integer grids."""
    makers = {name: node for node in graph.node for name in node.output}
    held = {i.name for i in graph.initializer}
    found = []
    for node in graph.node:
        factors = node.input[1 : 1 + _PRODUCTS.get(node.op_type, 0)]
        if not factors or not _stands_on_grid(node.input[0], makers):
            continue
        weights = [_stored_behind(f, makers, held, stored) for f in factors]
        label = weights[0].rpartition(".")[0] or weights[0] if weights[0] else node.output[0]
        if all(w or _stands_on_grid(f, makers) for w, f in zip(weights, factors, strict=True)):
            found.append((label, (node.name, *node.output[:1])))
    return found


def _stands_on_grid(name: str, makers: Mapping[str, Any]) -> bool:
    """Whether an activation comes out of DequantizeLinear, behind what only moves values or not."""
    node = makers.get(name)
    if node is None:
        return False
    if node.op_type == "DequantizeLinear":
        return node.input[0] in makers
    moved = node.input if node.op_type == "Concat" else node.input[:1] if node.op_type in VIEWS else ()
    return bool(moved) and all(_stands_on_grid(each, makers) for each in moved)


def _stored_behind(name: str, makers: Mapping[str, Any], held: Collection[str], stored: Collection[str]) -> str:
    """The tensor of codes that a value is made of, and of nothing but constants; "" for none."""
    queue, seen, found = [name], {name}, ""
    while queue:
        now = queue.pop()
        if now in held:
            found = found or _named(now, stored)
            continue
        node = makers.get(now)
        if node is None:
            return ""
        fresh = [each for each in node.input if each and each not in seen]
        seen.update(fresh)
        queue += fresh
    return found


def _named(name: str, stored: Collection[str]) -> str:
    """The tensor whose codes an initializer holds: its name without the endings that its forms have; "" for none."""
    while name and name not in stored:
        name = name[: max(name.rfind("."), name.rfind("_"), 0)]
    return name


__all__ = ["in_float"]
