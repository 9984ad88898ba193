"""PyTorch itself: a `.pt2` file of torch.export, run eagerly. The reference, and the runtime that takes everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed

from penjing.runtimes import trace
from penjing.runtimes.base import Array, Executed, Port, Runtime, Session, Target, Widened, register

if TYPE_CHECKING:
    from penjing.network import Network


class TorchSession(Session):
    """An exported program run node by node in this process."""

    precision = "f32"

    def __init__(
        self, program: torch.export.ExportedProgram, target: Target, names: tuple[list[str], list[str]]
    ) -> None:
        self._program = program
        self._module = program.module(check_guards=False)
        values = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"}
        signature = program.graph_signature
        ports = [
            Port(name, _shape(values[node].shape), _numpy(values[node].dtype))
            for name, node in zip(names[0], signature.user_inputs, strict=True)
            if isinstance(node, str)
        ]
        super().__init__(target, ports, names[1])

    def _run(self, inputs: Mapping[str, Array]) -> list[Array]:
        before = torch.get_num_threads()
        if before != self.threads:
            torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                given = [torch.from_numpy(np.ascontiguousarray(inputs[p.name])) for p in self.ports]
                return [t.numpy() for t in self._module(*given)]
        finally:
            if before != self.threads:
                torch.set_num_threads(before)

    def executed(self) -> list[Executed]:
        """The operators of the graph; integer weights are widened before they are used, so all run in floats."""
        calls = [n for n in self._program.graph.nodes if n.op == "call_function"]
        return [Executed(op=str(n.target), name=n.name, precision="f32") for n in calls]


def _shape(shape: Sequence[Any]) -> tuple[int | None, ...]:
    return tuple(d if isinstance(d, int) else None for d in shape)


def _numpy(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=dtype).numpy().dtype


@register
class Torch(Runtime):
    """`.pt2` files in PyTorch."""

    name: ClassVar[str] = "torch"
    suffix: ClassVar[str] = ".pt2"

    def _write(self, network: Network, path: Path) -> tuple[Widened, ...]:
        names = "\n".join((*(i.name for i in network.inputs), "", *network.output_names))
        with trace.quiet():
            torch.export.save(trace.program(network), str(path), extra_files={_NAMES: names})
        kinds, tensors = network.code_kinds(), network.tensors()
        narrow = [n for n, bits in network.code_bits().items() if bits not in (8, 16)]
        stored = {n: str(tensors[n].dtype).removeprefix("torch.") for n in narrow}
        return tuple(Widened(n, kinds[n], stored[n], "a .pt2 holds bytes") for n in narrow)

    def _open(self, path: Path, target: Target) -> Session:
        program, names = self._read(path)
        return TorchSession(program, target, names)

    def _read(self, path: Path) -> tuple[torch.export.ExportedProgram, tuple[list[str], list[str]]]:
        extra = {_NAMES: ""}
        try:
            with trace.quiet():
                program = torch.export.load(str(path), extra_files=extra)
        except Exception as error:  # zip, JSON and schema errors of many kinds
            raise self._damaged(path, error) from error
        if extra[_NAMES]:
            first, _, second = extra[_NAMES].partition("\n\n")
            return program, (first.split("\n"), second.split("\n"))
        signature = program.graph_signature
        return program, ([str(n) for n in signature.user_inputs], [str(n) for n in signature.user_outputs])

    def intermediates(self, path: Path, names: Sequence[str], inputs: Mapping[str, Array]) -> dict[str, Array]:
        program, (ports, _) = self._read(path)
        values = trace.record(program, tuple(torch.from_numpy(inputs[p]) for p in ports))
        return {n: values[n] for n in names if n in values}


_NAMES = "penjing.names"
