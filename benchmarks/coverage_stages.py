"""What coverage.py does with one network: capture, channel groups, pruning, two checks of it, two runtimes."""

from __future__ import annotations

import re
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

import penjing as pj
from penjing.network import graph as flat
from penjing.network.channels.groups import units_of
from penjing.runtimes import get_runtime
from penjing.testing.networks import ZOO, build
from penjing.testing.oracles import (
    TOLERANCE,
    Case,
    copyable,
    distance,
    duplicated,
    fresh,
    inputs_of,
    larger,
    maskable,
    run,
)

RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
Row = dict[str, Any]
Removals = list[tuple[str, int, tuple[int, ...]]]


class Examination:
    """The stages of one network: each may fail, and only what needs its result is left out then."""

    def __init__(self, name: str, ratio: float) -> None:
        self.row: Row = {"name": name, "kind": ZOO[name].kind, "seconds": {}, "failures": {}}
        self.ratio = ratio

    def run(self) -> Row:
        made = self.stage("build", lambda: build(self.row["name"]))
        network = made and self.stage("capture", lambda: self.capture(*made))
        groups = network and self.stage("groups", lambda: self.look(network))
        result = groups is not None and self.stage("prune", lambda: self.prune(network))
        if result:
            removals = [(e.parameter, e.dim, e.indices) for e in result.plans[0].edits]
            self.stage("masked", lambda: self.masked(network, removals))
            self.stage("crossed", lambda: self.crossed(network, removals, result.network))
            for runtime in RUNTIMES:
                self.stage(runtime, lambda runtime=runtime: self.export(runtime, network, result.network))
        return self.row

    def stage(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        try:
            return work()
        except Exception as error:
            own = [f for f in traceback.extract_tb(error.__traceback__) if "penjing" in f.filename]
            place = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
            self.row["failures"][name] = {"reason": sentence(error), "place": place}
            return None
        finally:
            self.row["seconds"][name] = round(time.perf_counter() - start, 2)

    def capture(self, model: torch.nn.Module, inputs: Any) -> pj.Network:
        network = pj.capture(model, inputs=inputs, name=self.row["name"])
        self.row["parameters"] = network.parameter_count()
        return network

    def look(self, network: pj.Network) -> Any:
        groups = network.groups()
        self.row |= {"groups": sum(g.size > 1 for g in groups), "prunable": prunable_share(network)}
        self.row |= {"without_rule": sorted(groups.reasons), "crossed_groups": sum(map(needs_statistics, groups))}
        return groups

    def prune(self, network: pj.Network) -> Any:
        result = pj.compress(network, pj.Recipe(pj.PruneChannels(ratio=self.ratio, reconstruct=False)))
        self.row["after"] = result.network.parameter_count() / self.row["parameters"]
        assert self.row["after"] < 1, "no parameter went"
        for before, after in zip(network.run(network.example()), result.network.run(network.example()), strict=True):
            assert before.shape == after.shape, (
                f"an output has the shape {tuple(after.shape)} not {tuple(before.shape)}"
            )
            assert before.dtype == after.dtype and bool(torch.isfinite(after).any()), "an output has no finite number"
        return result

    def masked(self, network: pj.Network, removals: Removals) -> None:
        """What PruneChannels chose in the groups where removing is masking: removed, and set to zero."""
        groups = network.groups()
        exact = [g for g in groups if maskable(g)]
        mine = {
            (g.members[0].parameter, g.members[0].dim, i) for g in exact for i in g.members[0].indices.ravel().tolist()
        }
        chosen = [(p, d, at) for p, d, at in removals if all((p, d, i) in mine for i in at)]
        if not chosen:
            return
        twin = flat.copy(network.graph_module, tensors=zeroed(network, exact, removals))
        small = network.apply(pj.network.RemoveChannels(parameter=p, dim=d, indices=at) for p, d, at in chosen)
        error = max(distance(run(twin, x), run(small.graph_module, x)) for x in batches(network))
        changed = distance(run(network.graph_module, inputs_of(network)), run(twin, inputs_of(network)))
        self.row |= {"masked": error, "mask_changes": changed}
        hold(error)
        assert changed > 1e-6, "the mask changes nothing, so this says nothing"

    def crossed(self, network: pj.Network, removals: Removals, small: pj.Network) -> None:
        """The whole choice, where statistics cross channels of it: against the network with the removed channels at
        zero and statistics of the others; or else copies of channels against none."""
        groups = network.groups()
        if not self.row["crossed_groups"]:
            return
        twin = Twin(network, groups, removals)
        self.row["crossed"] = max(distance(twin.outputs(x), run(small.graph_module, x)) for x in batches(network))
        if self.row["crossed"] > TOLERANCE and all(map(copyable, filter(needs_statistics, groups))):
            example = inputs_of(network)
            big, less = duplicated(Case(self.row["name"], network.graph_module, example, groups))
            self.row |= {"crossed": distance(run(big, example), run(less, example)), "copied": True}
        hold(self.row["crossed"])

    def export(self, runtime: str, network: pj.Network, small: pj.Network) -> None:
        """The parity gate: the file's outputs on two batches are the pruned network's own."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                made = get_runtime(runtime).export(small, Path(folder) / "small.onnx")
            except Exception as error:
                self.row[runtime] = {"unpruned": unpruned(runtime, network, Path(folder) / "whole.onnx")}
                raise error
        self.row[runtime] = {"max_rel": made.parity.max_rel, "tolerance": made.parity.tolerance, "bytes": made.bytes}


def prunable_share(network: pj.Network) -> float:
    """The share of parameter entries that belong to at least one unit that can be removed."""
    tensors = network.tensors()
    marked = {n: torch.zeros(tensors[n].shape, dtype=torch.bool) for n in tensors if network.is_weight(n)}
    for group in network.groups():
        for m in group.members if group.size > 1 else ():
            if m.parameter in marked:
                marked[m.parameter].index_fill_(m.dim, torch.as_tensor(m.indices.reshape(-1)), True)
    return sum(int(m.sum()) for m in marked.values()) / max(1, sum(m.numel() for m in marked.values()))


def needs_statistics(group: Any) -> bool:
    return group.size > 1 and not maskable(group)


def batches(network: pj.Network) -> list[dict[str, Tensor]]:
    """Inputs of two sizes, if the network takes them."""
    example = inputs_of(network)
    return [example, larger(example)] if network.batch_is_dynamic else [example]


def zeroed(network: pj.Network, groups: Sequence[Any], removals: Removals) -> dict[str, Tensor]:
    """The tensors, with the removed units of these groups at zero."""
    gone, tensors = units_of(network.groups(), removals), fresh(network.graph_module)
    for group in groups:
        units = gone[group.classes].nonzero()[0]
        for m in group.members:
            gains = tensors.get(m.parameter.removesuffix("original1") + "original0")
            if gains is not None and m.parameter.endswith("1") and gains.shape[m.dim] > 1 and m.role != "consumer":
                continue  # a row of norm zero has no direction, but its gain is zero too
            tensors[m.parameter].index_fill_(m.dim, torch.as_tensor(m.indices[units].reshape(-1)), 0)
    return tensors


class Twin(fx.Interpreter):
    """A network with removed channels at zero, whose statistics across channels see the others only."""

    NORMS = ("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "group_norm", "native_group_norm")
    REDUCTIONS = ("mean", "var", "std", "var_mean", "softmax", "_softmax", "_safe_softmax", "amax", "amin", "logsumexp")

    def __init__(self, network: pj.Network, groups: Any, removals: Removals) -> None:
        tensors = {k: double(t) for k, t in zeroed(network, list(groups), removals).items()}
        graph = flat.copy(network.graph_module, tensors=tensors)
        flat.set_mode(graph.graph, False)
        super().__init__(graph)
        gone, axes = units_of(groups, removals), groups.solution.axes
        # What is made of parameters alone has an axis for each of its dimensions: `name@0`, `name@1`.
        self.kept = {
            name.partition("@")[0]: (dim, (~gone[classes]).nonzero()[0])
            for name, (dim, classes) in axes.items()
            if gone[classes].any()
        }

    def outputs(self, example: dict[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [t for t in super().run(*map(double, example.values())) if isinstance(t, Tensor)]

    def fetch_args_kwargs_from_env(self, node: fx.Node) -> Any:
        return fx.node.map_aggregate(super().fetch_args_kwargs_from_env(node), double)

    def run_node(self, node: fx.Node) -> Any:
        source = node.args[0] if node.args else None
        name = getattr(getattr(node.target, "_schema", None), "name", "").removeprefix("aten::")
        if not isinstance(source, fx.Node) or source.name not in self.kept or node.op != "call_function":
            return super().run_node(node)
        dim, kept = self.kept[source.name]
        (x, *rest), kwargs = self.fetch_args_kwargs_from_env(node)
        if name in self.NORMS:
            first = x.dim() - len(rest[0]) if isinstance(rest[0], list | tuple) else dim
            over = dim >= first and rest[0] != x.shape[1]  # as many groups as channels: each has its own statistic
        elif name in self.REDUCTIONS:
            dims = rest[0] if rest else None
            over = dims is None or dim in [d % x.dim() for d in (dims if isinstance(dims, list | tuple) else [dims])]
        else:
            over = False
        if not over:
            return super().run_node(node)
        at = torch.as_tensor(kept)
        few = x.index_select(dim, at)
        if name in self.NORMS:
            if isinstance(rest[0], list | tuple):
                rest[0] = list(few.shape[first:])
            rest[1:] = [r.index_select(dim - first, at) if isinstance(r, Tensor) else r for r in rest[1:]]
        y = node.target(few, *rest, **kwargs)
        same = isinstance(y, Tensor) and y.shape == few.shape
        return x.new_zeros(x.shape).index_copy(dim, at, y) if same else y


def double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype == torch.float32 else value
    return torch.float64 if value is torch.float32 else value


def unpruned(runtime: str, network: pj.Network, path: Path) -> str:
    try:
        get_runtime(runtime).export(network, path)
    except Exception as error:
        return sentence(error)
    return "runs"


def hold(error: float) -> None:
    assert error <= TOLERANCE, f"relative difference {error:.2g}, allowed {TOLERANCE:.0e}"


def sentence(error: BaseException) -> str:
    """One line without paths."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    known = type(error).__module__.startswith("penjing") or isinstance(error, AssertionError)
    text = re.sub(r"(/[\w.+-]+){2,}", "…", first if known else f"{type(error).__name__}: {first}")
    text = re.sub(r"'\.\w+\.part\.onnx'", "the file", text)
    return text.replace("|", "¦")[:240]
