"""The parity gate: what an exported file computes against what the network computes.

Tolerances. A float file is held to the largest difference relative to the largest output value: other orders of
summation make about 1e-6 a layer. A file with integer activations cannot be held to that: a value near the border of
two steps of a grid may fall to either side, and runtimes that fuse layers skip a rounding here and there. What such
half steps make of the outputs is measured, not guessed: the network is run once more with uniform noise of half a step
of either sign on everything that is rounded. A runtime that skips every rounding departs about as far as that run
does; the tolerance is half as much again, since both are single draws. Inside an LSTM whose inputs stand on grids found
in every run, kernels also round the hidden states, which the graph cannot say: they get the same noise, and since what
rounding does there comes back in every step, another run rounds them in earnest; the larger change counts.

Where it departs. If the outputs are too far apart, the inner values of both are compared in the order of the graph and
the first that departs names the layer.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx

from penjing.errors import ParityError, PenjingError
from penjing.network.graph import QUANTIZE
from penjing.network.integers import dynamically_read
from penjing.runtimes import trace
from penjing.tensors.grids import Grid, affine_grid, fake_quantize
from penjing.tensors.recurrence import lstm_by_steps

if TYPE_CHECKING:
    from penjing.network import Network

Array = np.ndarray[Any, Any]

#: Largest difference of a float file, relative to the largest absolute value of that output.
FLOAT_TOLERANCE = 5e-4
#: Smallest tolerance of a file with integer activations (relative RMS), and the largest that still means anything.
GRID_TOLERANCE = (0.01, 0.5)
_DRAWS = 1.5
_SAMPLES = 32


class Verifiable(Protocol):
    """What the gate needs of a runtime."""

    @property
    def name(self) -> str:
        """How the registry calls it."""
        ...

    def reference(self, path: Path) -> Any:
        """A session that computes floats as exactly as the runtime can."""
        ...

    def trace(self, network: Network) -> torch.export.ExportedProgram:
        """The program that the file was made of: its node names are the names of inner values."""
        ...

    def intermediates(self, path: Path, names: Sequence[str], inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Those of the named inner values that the file has."""
        ...


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far a runtime's outputs are from the network's own, over all outputs of `n` samples.

    `max_abs`: largest absolute difference; `max_rel`: that, relative to the largest absolute value of its output;
    `rms_rel`: root mean square of the difference relative to the output's own; `agreement`: fraction of equal top-1
    choices of the first output (1.0 where it has no classes); `tolerance` of `measure` ("max_rel" or "rms_rel").
    """

    max_abs: float
    max_rel: float
    rms_rel: float
    agreement: float
    tolerance: float
    measure: str
    worst_output: str
    n: int


@dataclass(frozen=True)
class _Gap:
    max_abs: float
    max_rel: float
    rms_rel: float

    def of(self, measure: str) -> float:
        return float(getattr(self, measure))


def verify(runtime: Verifiable, network: Network, path: Path, *, samples: Any = None) -> Parity:
    """Holds the gate; see the module's text. Raises ParityError with the output, the difference and the place."""
    session = runtime.reference(path)
    batches = [network.bind(b) for b in _batches(network, samples)]
    expected = [[_array(t) for t in network.run(b)] for b in batches]
    found: list[list[Array]] = []
    for flat in batches:
        try:
            found.append(session.run(_arrays(flat)))
        except PenjingError:
            raise
        except Exception as error:  # onnxruntime's own exceptions share no base but Exception
            reason = textwrap.shorten((str(error).strip().splitlines() or [""])[0], 300, placeholder=" …")
            raise ParityError(
                f"{network.name} was exported, but {runtime.name} cannot run it: {reason}",
                hint="other runtimes may run this network",
            ) from error
    names = network.output_names
    for index, name in enumerate(names):
        for want, got in zip(expected, found, strict=True):
            if got[index].shape != want[index].shape:
                raise ParityError(
                    f"output '{name}' of {network.name} has the shape {got[index].shape} in {runtime.name}, "
                    f"{want[index].shape} in the network"
                )
    measure, tolerance = _tolerance(network, batches, expected)
    gaps = [_gap([e[i] for e in expected], [f[i] for f in found]) for i in range(len(names))]
    worst = max(range(len(names)), key=lambda i: gaps[i].of(measure))
    parity = Parity(
        max_abs=max(g.max_abs for g in gaps),
        max_rel=max(g.max_rel for g in gaps),
        rms_rel=max(g.rms_rel for g in gaps),
        agreement=_agreement([e[0] for e in expected], [f[0] for f in found]),
        tolerance=tolerance,
        measure=measure,
        worst_output=names[worst],
        n=sum(next(iter(b.values())).shape[0] for b in batches),
    )
    if not gaps[worst].of(measure) <= tolerance:
        place = _departure(runtime, network, path, batches[0], measure, tolerance, worst)
        raise ParityError(
            f"output '{names[worst]}' of {network.name} in {runtime.name} departs from the network's own: "
            f"{_WORDS[measure]} {gaps[worst].of(measure):.3g} (largest difference {gaps[worst].max_abs:.3g}), "
            f"allowed {tolerance:.3g}" + (f"; it departs first {place}" if place else ""),
            hint=_HINTS[measure],
        )
    return parity


_HINTS = {
    "max_rel": "leave that layer out of the step that changed it, or export for another runtime",
    "rms_rel": "more samples, another `symmetric` or `granularity` of the step that quantized it, that layer left out "
    "of it (where), or another runtime",
}
_WORDS = {"max_rel": "relative difference", "rms_rel": "relative RMS difference"}


def _batches(network: Network, samples: Any) -> list[Any]:
    """Two batches of different size: real samples if there are any."""
    if samples is None:
        return [network.example(2), network.example(3, seed=1)] if network.batch_is_dynamic else [network.example(2)]
    if hasattr(samples, "batches"):
        samples = next(iter(samples.batches(_SAMPLES)))[0]
    flat = network.bind(samples)
    if not network.batch_is_dynamic:
        return [flat]

    def first(count: int) -> dict[str, Tensor]:
        return {i.name: flat[i.name][:count] if i.dynamic.get(0) == "batch" else flat[i.name] for i in network.inputs}

    return [first(_SAMPLES), first(1)]


def _tolerance(
    network: Network, batches: Sequence[dict[str, Tensor]], expected: Sequence[Sequence[Array]]
) -> tuple[str, float]:
    if not any(node.target in QUANTIZE for node in network.graph_module.graph.nodes):
        return "max_rel", FLOAT_TOLERANCE
    count = range(len(expected[0]))
    runs: list[_Rounded] = [_Noisy(network.graph_module)]
    if any(_rounds_within(node) for node in network.graph_module.graph.nodes):
        runs.append(_Rounded(network.graph_module))
    change = 0.0
    with torch.no_grad():
        for run in runs:
            moved = [[_array(t) for t in run.run(*b.values())] for b in batches]
            change = max(change, *(_gap([e[i] for e in expected], [v[i] for v in moved]).rms_rel for i in count))
    low, high = GRID_TOLERANCE
    return "rms_rel", float(min(high, max(low, _DRAWS * change)))


def _rounds_within(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.lstm.input and dynamically_read(node)


class _Rounded(fx.Interpreter):
    """Runs a graph with the hidden states of LSTMs whose inputs stand on grids found in every run on such grids too."""

    def run_node(self, n: fx.Node) -> Any:
        if not _rounds_within(n):
            return super().run_node(n)
        x, state, weights, biases, layers, _, _, bidirectional, batch_first = self.fetch_args_kwargs_from_env(n)[0]
        settings = {"biases": biases, "layers": layers, "bidirectional": bidirectional, "batch_first": batch_first}
        return lstm_by_steps(x, state, weights, **settings, read=lambda value: self.put(value, _byte_grid(value)))

    def put(self, value: Tensor, grid: Grid) -> Tensor:
        """A value on a grid."""
        return fake_quantize(value, grid)


def _byte_grid(value: Tensor) -> Grid:
    return affine_grid(value.amin(), value.amax(), 0, 255)


class _Noisy(_Rounded):
    """Runs a graph with up to half a step of uniform noise before everything that is rounded to a grid."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self._generator = torch.Generator().manual_seed(0)

    def put(self, value: Tensor, grid: Grid) -> Tensor:
        """A value moved by noise instead of being rounded."""
        return self._moved(value, float(grid.scale)) if value.any() else value  # zero is a point of every grid

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in QUANTIZE:
            value, scale, *rest = args
            args = (self._moved(value, float(scale)), scale, *rest)
        return super().call_function(target, args, kwargs)

    def _moved(self, value: Tensor, step: float) -> Tensor:
        return value + (torch.rand(value.shape, generator=self._generator, dtype=value.dtype) - 0.5) * step


def _gap(expected: Sequence[Array], found: Sequence[Array]) -> _Gap:
    a = np.concatenate([e.astype(np.float64).ravel() for e in expected])
    b = np.concatenate([f.astype(np.float64).ravel() for f in found])
    if expected[0].dtype.kind not in "fc":  # choices, not numbers: the fraction that differs
        wrong = float((a != b).mean()) if a.size else 0.0
        return _Gap(float(np.abs(a - b).max(initial=0)), wrong, wrong)
    same = (a == b) | (np.isnan(a) & np.isnan(b))  # equal infinities have no difference either
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(a - b))
    if not np.isfinite(difference).all():
        return _Gap(np.inf, np.inf, np.inf)
    reference = a[np.isfinite(a)]
    scale = max(float(np.abs(reference).max(initial=0)), 1e-12)
    rms = max(float(np.sqrt(np.mean(reference**2))) if reference.size else 0.0, 1e-12)
    largest = float(difference.max(initial=0))
    return _Gap(largest, largest / scale, float(np.sqrt(np.mean(difference**2))) / rms if a.size else 0.0)


def _agreement(expected: Sequence[Array], found: Sequence[Array]) -> float:
    first = expected[0]
    if first.dtype.kind != "f" or first.ndim < 2:
        return 1.0
    axis = 1 if first.ndim >= 4 else -1
    if first.shape[axis] < 2:
        return 1.0
    equal = [(e.argmax(axis) == f.argmax(axis)).ravel() for e, f in zip(expected, found, strict=True)]
    return float(np.concatenate(equal).mean())


# ----------------------------------------------------------------------------------------------------- where it departs
def _departure(
    runtime: Verifiable,
    network: Network,
    path: Path,
    inputs: dict[str, Tensor],
    measure: str,
    tolerance: float,
    worst: int,
) -> str | None:
    """ "at layer1.0.conv1 (conv2d_3)": the first inner value of the runtime that is too far from the network's."""
    try:
        traced = runtime.trace(network)
        values = trace.record(traced, tuple(inputs.values()))
        nodes = [n for n in _behind_inputs(traced) if n.name in values]
        found = runtime.intermediates(path, [n.name for n in nodes], _arrays(inputs))
    except Exception:  # the place is a help on top of an error that is raised anyway
        return None
    compared: set[fx.Node] = set()
    for node in nodes:
        want, got = values[node.name], found.get(node.name)
        if got is None or want.dtype.kind != "f" or got.shape != want.shape:
            continue
        compared.add(node)
        if not _gap([want], [got]).of(measure) <= tolerance:
            owner = _owner(traced, node, compared - {node})
            return f"at {owner} ({node.name})" if owner else f"at {node.name}"
    # All that could be looked at is right, so the fault lies between it and the output itself.
    last = str(traced.graph_signature.user_outputs[worst])
    owner = next((_owner(traced, n, compared) for n in traced.graph.nodes if n.name == last), None)
    return f"at {owner} (the output)" if owner else None


def _behind_inputs(traced: torch.export.ExportedProgram) -> list[fx.Node]:
    """The calls whose values depend on the inputs, in order (not what is made of weights alone)."""
    reached = {n for n in traced.graph.nodes if n.name in set(traced.graph_signature.user_inputs)}
    calls = []
    for node in traced.graph.nodes:
        if node.op == "call_function" and any(s in reached for s in node.all_input_nodes):
            reached.add(node)
            calls.append(node)
    return calls


def _owner(traced: torch.export.ExportedProgram, node: fx.Node, known: set[fx.Node]) -> str | None:
    """The layer of the largest tensor used between the last values that were still right and this one."""
    names = trace.tensor_names(traced)
    tensors = {**traced.state_dict, **traced.constants}
    queue, seen, best = [node], {node}, (0, "")
    while queue:
        now = queue.pop(0)
        for source in now.all_input_nodes:
            if source in known or source in seen:
                continue
            seen.add(source)
            if source.op != "placeholder":
                queue.append(source)
            elif source.name in names:
                full = names[source.name]
                best = max(best, (tensors[full].numel(), full))
    return best[1].rpartition(".")[0] or best[1] or None


def _array(tensor: Any) -> Array:
    held: Tensor = torch.as_tensor(tensor).detach()
    return np.ascontiguousarray((held.float() if held.dtype == torch.bfloat16 else held).numpy())


def _arrays(flat: Mapping[str, Tensor]) -> dict[str, Array]:
    return {name: _array(t) for name, t in flat.items()}


__all__ = ["FLOAT_TOLERANCE", "GRID_TOLERANCE", "Parity", "verify"]
