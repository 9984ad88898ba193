"""From an `nn.Module`, a `file.py:callable`, a `package.module:callable` or a `.pt2` file to a Network."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from penjing.errors import CaptureError
from penjing.network import graph as flat
from penjing.network.flatten import flatten
from penjing.network.network import InputSpec, Network
from penjing.network.source import line_of, load_callable
from penjing.network.structure import leaves


def capture(
    model: torch.nn.Module | Network | ExportedProgram | str | Path,
    inputs: tuple[Any, ...] | Mapping[str, Any] | Tensor | None = None,
    *,
    name: str | None = None,
    dynamic_batch: bool = True,
) -> Network:
    """Captures a network as a graph of ATen operators.

    `model`: a module, an ExportedProgram, `"file.py:callable"` or `"package.module:callable"` (called without
    arguments, must return a module), or the path of a `.pt2` file. `inputs`: example inputs, a tuple of positional
    ones or a dictionary of named ones (tensors, or containers of tensors), batch first; not needed for `.pt2`. The
    batch may be any size afterwards unless `dynamic_batch` is false or the network itself fixes it. The module is
    not changed and nothing is shared with it.

    The graph is taken in training mode so that it can be fine-tuned, then switched to eval and compared with the
    module's own outputs; networks that only capture in eval mode are taken so, and the history says it.

    Raises CaptureError with the source line at fault and a remedy.
    """
    if isinstance(model, Network):
        return model
    if isinstance(model, str | Path):
        label = name or str(model)
        model, name = _from_text(str(model)), name or _short(label)
        if isinstance(model, Network):
            return model
    if isinstance(model, ExportedProgram):
        return _from_program(model, name=name or "network")
    if not isinstance(model, torch.nn.Module):
        raise CaptureError(
            f"expected an nn.Module, got {type(model).__name__}",
            hint="a callable named on the command line must return a module",
        )
    if inputs is None:
        raise CaptureError(
            "a module is captured by running it once, and no example inputs were given",
            hint="capture(model, inputs=(x,))",
        )
    _check_weights(model)
    args, kwargs = _normalise(inputs)
    args, kwargs = _at_least_two(args, kwargs) if dynamic_batch else (args, kwargs)
    return _from_module(model, args, kwargs, name or type(model).__name__.lower(), dynamic_batch)


def _from_module(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, dynamic: bool
) -> Network:
    held = [*model.parameters(), *model.buffers()]
    device = held[0].device if held else torch.device("cpu")
    # Clones, since one tensor given twice would be taken for one input.
    args, kwargs = pytree.tree_map(lambda x: x.detach().to(device, copy=True), (args, kwargs))
    with _kept_modes(model):
        model.eval()
        try:
            with torch.no_grad(), _quiet():
                expected = model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        except Exception as error:
            raise CaptureError(
                f"{name} fails on the example inputs: {_last_line(error)}{_where(error)}",
                hint="the example inputs must be such that model(*inputs) works",
            ) from error
        notes: list[str] = []
        failures: list[Exception] = []
        for training in (True, False):
            for batch_dynamic in (True, False) if dynamic else (False,):
                model.train(training)
                try:
                    with _quiet():
                        shapes = _dynamic(model, args, kwargs) if batch_dynamic else None
                        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
                    network = _from_program(program, name=name)
                    _check_outputs(network, args, kwargs, expected)
                    if network.batch_is_dynamic:
                        more = _one_more(args, kwargs)
                        model.eval()
                        with torch.no_grad(), _quiet():
                            _check_outputs(network, *more, model(*copy.deepcopy(more[0]), **copy.deepcopy(more[1])))
                except Exception as error:
                    failures.append(error)
                    continue
                if not training:
                    notes.append(f"captured in eval mode, since in training mode: {_last_line(failures[0])}")
                if dynamic and not network.batch_is_dynamic:
                    notes.append("the network fixes its batch size")
                return network.record({"event": "capture", "torch": torch.__version__, "notes": notes})
    first = failures[-1]
    if isinstance(first, CaptureError):
        raise first
    raise CaptureError(
        f"{name} cannot be captured: {_last_line(first)}{_where(first)}", hint=_remedy(str(first))
    ) from first


def _from_program(program: ExportedProgram, *, name: str) -> Network:
    with _quiet():
        module = program.module(check_guards=False)
    args, kwargs = program.example_inputs or ((), {})
    examples = [x for x in pytree.tree_leaves((args, kwargs))]
    if not examples:
        raise CaptureError("the exported program holds no example inputs", hint="export it again with example inputs")
    if not isinstance(module, fx.GraphModule):
        raise CaptureError(f"{name} does not export to one graph")
    graph, tensors, structure_out = flatten(module, program, examples)
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    by_leaf: Iterator[fx.Node] = iter(placeholders)
    structure_in = pytree.tree_map(lambda _: next(by_leaf).name, _plain((tuple(args), dict(kwargs))))
    specs = tuple(
        _describe(n.name, x, {d for d, s in enumerate(_shape_of(n)) if not _is_fixed(s)})
        for n, x in zip(placeholders, examples, strict=True)
    )
    owned = {
        n: torch.nn.Parameter(t.detach().cpu().clone(), requires_grad=t.requires_grad)
        if isinstance(t, torch.nn.Parameter)
        else t.detach().cpu().clone()
        for n, t in tensors.items()
    }
    flat.set_mode(graph, training=True)  # remembers the dropout of attention
    flat.set_mode(graph, training=False)
    for node in graph.nodes:
        node.meta = {k: v for k, v in node.meta.items() if k in ("penjing", "nn_module_stack", "stack_trace")}
    return Network(
        name=name,
        graph_module=flat.build(graph, owned),
        inputs=specs,
        structure_in=structure_in,
        structure_out=structure_out,
    )


# ------------------------------------------------------------------------------------------------------- the inputs
def _normalise(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        args, kwargs = (), {str(k): v for k, v in inputs.items() if v is not None}
    else:
        args, kwargs = (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}
    for leaf in pytree.tree_leaves((args, kwargs)):
        if not isinstance(leaf, Tensor):
            raise CaptureError(
                f"the inputs of a network must be tensors, got {type(leaf).__name__}",
                hint="fix other arguments in a small nn.Module around the network",
            )
        if leaf.numel() == 0:
            raise CaptureError(f"an example input is empty: its shape is {tuple(leaf.shape)}")
        if leaf.is_floating_point() and not torch.isfinite(leaf).all():
            raise CaptureError("an example input holds NaN or infinite numbers")
    return args, kwargs


def _at_least_two(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch of one would be taken for a constant: show two samples."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if x.ndim]
    if not tensors or any(x.shape[0] != 1 for x in tensors):
        return args, kwargs
    doubled = pytree.tree_map(lambda x: torch.cat([x, x]) if x.ndim else x, (args, kwargs))
    return doubled[0], doubled[1]


def _one_more(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The batch with its first sample once more."""
    size = next(x.shape[0] for x in pytree.tree_leaves((args, kwargs)) if x.ndim)
    grown = pytree.tree_map(lambda x: torch.cat([x, x[:1]]) if x.ndim and x.shape[0] == size else x, (args, kwargs))
    return grown[0], grown[1]


def _dynamic(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Which dimensions may vary: the first, of every input that has as many entries there as the first input."""
    tensors = pytree.tree_leaves((args, kwargs))
    size = next((x.shape[0] for x in tensors if x.ndim), None)
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
    for x in tensors:
        if x.ndim and x.shape[0] == size:
            shapes[x] = {0: Dim.AUTO}
    return shapes.dynamic_shapes(model, args, kwargs)


def _shape_of(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _is_fixed(size: Any) -> bool:
    """A symbolic size may have turned out to be one number."""
    return isinstance(size, int) or bool(size.node.expr.is_number)


def _describe(name: str, value: Tensor, dynamic: set[int]) -> InputSpec:
    number = value.float() if value.is_floating_point() else value.long()
    return InputSpec(
        name=name,
        shape=tuple(value.shape),
        dtype=value.dtype,
        low=number.min().item(),
        high=number.max().item(),
        dynamic={d: "batch" if d == 0 else f"{name}_{d}" for d in sorted(dynamic)},
    )


def _plain(value: Any) -> Any:
    """Containers as plain tuples, lists and dicts."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value)) if isinstance(value, tuple) else [*map(_plain, value)]
    return value


# ------------------------------------------------------------------------------------------------------- the checks
def _check_weights(model: torch.nn.Module) -> None:
    for name, value in model.named_parameters():
        held = value.detach()
        held = held.float() if held.is_floating_point() and held.itemsize == 1 else held  # float8 knows no isfinite
        if not torch.isfinite(held).all():
            raise CaptureError(
                f"the weights of {name} hold NaN or infinite numbers",
                hint="check how the network was trained or loaded",
            )


def _check_outputs(network: Network, args: tuple[Any, ...], kwargs: dict[str, Any], expected: Any) -> None:
    """The graph in eval mode must give what the module gives in eval mode, twice."""
    wanted = {n: t for n, t in _output_leaves(expected).items() if n in network.output_names}
    inputs = leaves(network.structure_in, (args, kwargs))
    for _ in range(2):
        with torch.no_grad():
            got = dict(
                zip(network.output_names, network.graph_module(*(t.cpu() for t in inputs.values())), strict=True)
            )
        for n, t in got.items():
            reference = wanted.get(n)
            if reference is None or reference.shape != t.shape:
                raise CaptureError(f"the captured graph of {network.name} gives another output '{n}' than the module")
            reference = reference.cpu()
            if not torch.allclose(
                t.float(), reference.float(), rtol=1e-3, atol=1e-4 * _scale(reference), equal_nan=True
            ):
                raise CaptureError(
                    f"the captured graph of {network.name} departs from the module in output '{n}' by "
                    f"{(t.float() - reference.float()).abs().max().item():.3g}",
                    hint="the module may be random in eval mode or depend on state outside of its tensors",
                )


def _scale(value: Tensor) -> float:
    finite = value.float()[torch.isfinite(value.float())]
    return max(1e-3, float(finite.abs().max()) if finite.numel() else 1.0)


def _output_leaves(value: Any) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}

    def walk(part: Any, path: str) -> None:
        if isinstance(part, Tensor):
            named[path or "output"] = part
        elif isinstance(part, Mapping):
            for k, v in part.items():
                walk(v, f"{path}_{k}" if path else str(k))
        elif isinstance(part, tuple | list):
            keys = getattr(part, "_fields", None) or [f"output_{i}" if not path else str(i) for i in range(len(part))]
            for k, v in zip(keys, part, strict=True):
                walk(v, f"{path}_{k}" if path else str(k))

    walk(value, "")
    return named


# ----------------------------------------------------------------------------------------------- sources and errors
def _from_text(text: str) -> Any:
    if not text.endswith(".pt2"):
        return load_callable(text)()
    if not Path(text).exists():
        raise CaptureError(f"there is no file {text}")
    try:
        with _quiet():
            return torch.export.load(text)
    except Exception as error:
        raise CaptureError(
            f"{text} is not a readable .pt2 file: {_last_line(error)}",
            hint=f"write it with torch.export.save of torch {torch.__version__}",
        ) from error


def _short(text: str) -> str:
    path, _, called = text.rpartition(":")
    return called if path else Path(text).stem


@contextlib.contextmanager
def _kept_modes(model: torch.nn.Module) -> Iterator[None]:
    """Puts training flags back afterwards; meanwhile transformers models return no key-value cache, which is no
    tensor.
    """
    modes = [(m, m.training) for m in model.modules()]
    config: Any = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    try:
        if cache:
            config.use_cache = False
        yield
    finally:
        if cache:
            config.use_cache = cache
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export warns about what the person at the keyboard cannot change, and prints whole graphs when it fails."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]


def _where(error: BaseException) -> str:
    line = line_of(error)
    return f" ({line})" if line else ""


def _remedy(message: str) -> str:
    if any(
        w in message
        for w in ("data-dependent", "GuardOnDataDependent", "is_nonzero", "item()", "_local_scalar_dense", "guard on")
    ):
        return "the path through the network depends on values: use torch.where instead of if"
    if "dynamic" in message or "specializ" in message.lower() or "Constraints violated" in message:
        return "the network ties sizes together: capture(..., dynamic_batch=False) fixes the batch"
    return (
        "move what torch.export cannot follow out of forward(), or capture the part of the network that has the weights"
    )
