"""Network: a captured network as a value."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx

from penjing.errors import DataError, EditError, InputError
from penjing.network import codebooks, integers, storage
from penjing.network import edits as edits_module
from penjing.network import graph as flat
from penjing.network.channels.groups import Groups, analyse
from penjing.network.codebooks import Codebook
from penjing.network.structure import leaves, structure_from_json, structure_to_json, substitute

TOPOLOGY_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """What one input tensor looks like: `shape` with the batch first, `low`/`high` the range of values seen at capture.

    `dynamic` names the dimensions that may take any size, e.g. {0: "batch"}.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    low: float
    high: float
    dynamic: dict[int, str] = field(default_factory=dict)

    @property
    def look(self) -> str:
        """`N×3×32×32`: the shape, with N for any size."""
        return "×".join("N" if d in self.dynamic else str(s) for d, s in enumerate(self.shape)) or "a number"

    def example(self, batch: int, generator: torch.Generator) -> Tensor:
        """A random tensor of this look, uniform over the range seen at capture."""
        shape = [batch if self.dynamic.get(d) == "batch" else s for d, s in enumerate(self.shape)]
        if self.dtype.is_floating_point:
            unit = torch.rand(shape, generator=generator, dtype=torch.float32)
            return (self.low + unit * (self.high - self.low)).to(self.dtype)
        if self.dtype == torch.bool:
            return torch.randint(int(self.low), int(self.high) + 1, shape, generator=generator).bool()
        return torch.randint(int(self.low), int(self.high) + 1, shape, generator=generator, dtype=self.dtype)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Network:
    """A captured network: a flat graph, its tensors, its inputs and its history.

    A value: every method that changes something returns a new Network and shares the tensors that stay the same. Treat
    `graph_module` and the tensors as read-only; `module()` gives copies that may be trained.
    """

    name: str
    graph_module: fx.GraphModule
    inputs: tuple[InputSpec, ...]
    structure_in: tuple[Any, Any]
    structure_out: Any
    task: str | None = None
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()

    # ------------------------------------------------------------------------------------------------------ looking
    @functools.cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return flat.tensors_of(self.graph_module)

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter, buffer and constant by name; not copied."""
        return dict(self._tensors)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The names of what can be trained."""
        return tuple(n for n, t in self._tensors.items() if isinstance(t, torch.nn.Parameter))

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of the flat outputs: their keys or positions in the original structure."""
        return tuple(leaves(self.structure_out))

    @property
    def batch_is_dynamic(self) -> bool:
        """Whether any number of samples can be run at once."""
        return any("batch" in i.dynamic.values() for i in self.inputs)

    @property
    def is_quantized(self) -> bool:
        """Whether anything is on an integer grid or shares levels."""
        return self.has_integer_grids or bool(self._codebooks)

    @property
    def has_integer_grids(self) -> bool:
        """Whether anything is on an integer grid: such a network cannot be trained. Shared levels can."""
        return any(n.target in flat.DEQUANTIZE for n in self.graph_module.graph.nodes)

    def parameter_count(self) -> int:
        """The number of weights: trainable ones and those stored as integers, not statistics, scales or constants."""
        return sum(t.numel() for n, t in self._tensors.items() if self.is_weight(n))

    def is_weight(self, name: str) -> bool:
        """Whether a tensor is a parameter or was one before it was quantized."""
        beside = {n for book in self._codebooks.values() for n in (book.levels, book.scale)}
        trained = isinstance(self._tensors[name], torch.nn.Parameter) and name not in beside
        return trained or name in self._integer_weights

    @functools.cached_property
    def _integer_weights(self) -> frozenset[str]:
        return frozenset(integers.grids_held(self.graph_module.graph)) | frozenset(self._codebooks)

    @functools.cached_property
    def _codebooks(self) -> dict[str, Codebook]:
        return codebooks.codebooks_held(self.graph_module.graph)

    def shared_levels(self) -> dict[str, Codebook]:
        """The tables of the weights that share levels, by the weight's name."""
        return dict(self._codebooks)

    def code_bits(self) -> dict[str, int]:
        """The bits that each code takes of the weights that are stored as codes, by name (ternary: 2, binary: 1)."""
        held = integers.grids_held(self.graph_module.graph)
        bits = {name: integers.code_bits(self._tensors[name], *limits) for name, limits in held.items()}
        shared = {n: codebooks.level_bits(self._tensors[book.levels]) for n, book in self._codebooks.items()}
        return bits | shared

    def code_kinds(self) -> dict[str, str]:
        """The type of each weight that is stored as codes, by name: "int8", "int4", "ternary" and so on, "16 levels"
        for those that share levels."""
        held = integers.grids_held(self.graph_module.graph)
        kinds = {name: integers.code_kind(self._tensors[name], *limits) for name, limits in held.items()}
        shared = {n: f"{self._tensors[book.levels].shape[-1]} levels" for n, book in self._codebooks.items()}
        return kinds | shared

    def stored_bytes(self) -> dict[str, int]:
        """Bytes of each tensor, codes packed to the width of their grid: 4 bits take half a byte."""
        return integers.stored_bytes(self._tensors, self.graph_module.graph)

    def groups(self, *, heads: Literal["heads", "dims"] = "heads") -> Groups:
        """The channel groups: what must be removed together (docs/tour.md)."""
        cache: dict[str, Groups] = self.__dict__.setdefault("_groups", {})
        if heads not in cache:
            cache[heads] = analyse(
                self.graph_module, self.bind(self.example(1 if self.batch_is_dynamic else 2)), heads=heads
            )
        return cache[heads]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{i.name}: {i.look}" for i in self.inputs)
        return f"Network({self.name!r}, {self.parameter_count():,} parameters, inputs ({shapes}))"

    # ------------------------------------------------------------------------------------------------------ running
    def module(self) -> flat.TrainableModule:
        """An ordinary trainable `nn.Module` in eval mode, with its own copies of all tensors under their original
        names.
        """
        return flat.trainable(self.graph_module, self.structure_in, self.structure_out)

    def example(self, batch: int = 2, seed: int = 0) -> tuple[Any, ...] | dict[str, Any]:
        """Random inputs that fit, as `bind` and `run` take them; a fixed batch stays as it was captured."""
        generator = torch.Generator().manual_seed(seed)
        made = {i.name: i.example(batch, generator) for i in self.inputs}
        args, kwargs = self.structure_in
        if kwargs and args:
            return made
        filled = substitute(kwargs if kwargs else list(args), made)
        return filled if kwargs else tuple(filled)

    def bind(self, inputs: Any) -> dict[str, Tensor]:
        """A batch's inputs (tensor, tuple of positional or dictionary of named inputs) as flat tensors by input name.

        Raises DataError when number, shape or type does not fit; the batch may have any size if the network allows it.
        """
        bound = self._match(inputs)
        for spec in self.inputs:
            given = bound[spec.name]
            if not isinstance(given, Tensor | np.ndarray):
                raise DataError(
                    f"input '{spec.name}' of {self.name} must be a tensor or an array, got {type(given).__name__}"
                )
            value = torch.as_tensor(given)
            fits = value.ndim == len(spec.shape) and all(
                d in spec.dynamic or s == value.shape[d] for d, s in enumerate(spec.shape)
            )
            if not fits:
                raise DataError(
                    f"input '{spec.name}' of {self.name} must have the shape {spec.look}, got "
                    f"{'×'.join(map(str, value.shape)) or 'a single number'}",
                    hint="samples must look like the inputs given to capture",
                )
            if value.dtype != spec.dtype:
                if value.dtype.is_floating_point != spec.dtype.is_floating_point:
                    raise DataError(f"input '{spec.name}' of {self.name} must be {spec.dtype}, got {value.dtype}")
                value = value.to(spec.dtype)
            bound[spec.name] = value
        return {i.name: bound[i.name] for i in self.inputs}

    def _match(self, inputs: Any) -> dict[str, Any]:
        args, kwargs = self.structure_in
        names = [i.name for i in self.inputs]
        if isinstance(inputs, Mapping):
            if set(inputs) >= set(names):
                return {n: inputs[n] for n in names}
            if kwargs and not args and set(inputs) >= set(kwargs):
                return leaves(kwargs, {k: inputs[k] for k in kwargs})
            given: Any = (inputs,)
        else:
            given = inputs if isinstance(inputs, tuple | list) else (inputs,)
        slots: list[Any] = [*args, *kwargs.values()]
        if len(given) != len(slots):
            raise DataError(
                f"{self.name} takes {len(slots)} inputs ({', '.join(names)}), got {len(given)}",
                hint="a batch is (inputs, labels); several inputs go in a tuple or a dictionary",
            )
        try:
            return leaves(slots, list(given))
        except (KeyError, IndexError, TypeError):
            raise DataError(f"the inputs of {self.name} have another structure than those given to capture") from None

    @torch.no_grad()
    def run(self, inputs: Any) -> tuple[Tensor, ...]:
        """Flat outputs in eval mode without gradients."""
        return tuple(self.graph_module(*self.bind(inputs).values()))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs in their original structure, in eval mode without gradients."""
        outputs = self.run(kwargs if kwargs and not args else (*args, *kwargs.values()))
        return substitute(self.structure_out, dict(zip(self.output_names, outputs, strict=True)))

    # ----------------------------------------------------------------------------------------------------- changing
    def apply(self, edits: Iterable[edits_module.Edit]) -> Network:
        """A new Network with `edits` made in order; raises EditError and leaves nothing half done."""
        draft = edits_module.Draft(
            graph_module=flat.copy(self.graph_module),
            masks=dict(self.masks),
            example=self.bind(self.example()),
            groups=dict(self.__dict__.get("_groups", {})),
        )
        edits_module.apply(draft, edits)
        return self.replace(graph_module=draft.graph_module, masks=draft.masks)

    def replace(self, **changes: Any) -> Network:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def record(self, event: Mapping[str, Any]) -> Network:
        """A copy whose history has one more event (plain JSON data)."""
        return self.replace(history=(*self.history, dict(event)))

    # ------------------------------------------------------------------------------------------------- plain values
    def state(self) -> tuple[str, dict[str, np.ndarray[Any, Any]]]:
        """The topology as JSON text and the tensors as arrays: plain values that need no torch to be kept or sent.

        bfloat16 has no numpy type: it appears as uint16 with the same bits, and the topology remembers. A mask that is
        False just where its tensor is 0 is named and not kept.
        Raises InputError for a tensor whose numbers numpy has no type for (float8).
        """
        told = [n for n, mask in self.masks.items() if torch.equal(mask, self._tensors[n] != 0)]
        described: dict[str, Any] = {
            "penjing": TOPOLOGY_VERSION,
            "name": self.name,
            "task": self.task,
            "inputs": [_spec_to_json(i) for i in self.inputs],
            "in": structure_to_json(self.structure_in),
            "out": structure_to_json(self.structure_out),
            "parameters": list(self.parameter_names),
            "bfloat16": [n for n, t in self._tensors.items() if t.dtype == torch.bfloat16],
            "masks": [n for n in self.masks if n not in told],
            "zeros": told,
            "history": list(self.history),
            "graph": flat.graph_to_json(self.graph_module.graph),
        }
        described = {k: v for k, v in described.items() if v not in (None, [])}
        arrays = {n: _to_array(n, t) for n, t in self._tensors.items()}
        arrays |= {f"{n}.mask": m.cpu().numpy() for n, m in self.masks.items() if n not in told}
        return json.dumps(described, separators=(",", ":"), ensure_ascii=False), arrays

    @classmethod
    def from_state(cls, topology: str, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Network:
        """What `state` gave. Raises EditError for a topology that is not one, or tensors that are missing."""
        try:
            described = json.loads(topology)
            version = described["penjing"]
            if version != TOPOLOGY_VERSION:
                raise EditError(f"the network's topology has version {version}; this penjing reads {TOPOLOGY_VERSION}")
            graph = flat.graph_from_json(described["graph"])
            wide, masked = set(described.get("bfloat16", ())), described.get("masks", ())
            zeros = described.get("zeros", ())
            learned = set(described.get("parameters", ()))
            tensors: dict[str, Tensor] = {}
            for name, array in arrays.items():
                tensor = torch.from_numpy(np.array(array))
                if name in wide:
                    tensor = tensor.view(torch.bfloat16)
                tensors[name] = torch.nn.Parameter(tensor) if name in learned else tensor
            return cls(
                name=described["name"],
                graph_module=flat.build(graph, tensors),
                inputs=tuple(_spec_from_json(i) for i in described["inputs"]),
                structure_in=structure_from_json(described["in"]),
                structure_out=structure_from_json(described["out"]),
                task=described.get("task"),
                masks={n: tensors[n].detach() != 0 for n in zeros}
                | {n: torch.from_numpy(np.array(arrays[f"{n}.mask"])) for n in masked},
                history=tuple(described.get("history", ())),
            )
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise EditError(f"the topology of the network is not readable ({type(error).__name__}: {error})") from error

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file that holds tensors and topology; no pickle, no user code."""
        from_here = Path(path)
        if from_here.suffix != ".safetensors":
            raise InputError(
                f"a Network is saved as .safetensors, got {from_here.name}",
                hint="penjing pack writes the small .penjing",
            )
        storage.write(from_here, *self.state(), key="penjing.network")
        return from_here

    @classmethod
    def load(cls, path: str | Path) -> Network:
        """Reads what `save` wrote."""
        return cls.from_state(*storage.read(Path(path), key="penjing.network"))


def _to_array(name: str, tensor: Tensor) -> np.ndarray[Any, Any]:
    held = tensor.detach().cpu()
    held = held.view(torch.uint16) if held.dtype == torch.bfloat16 else held
    try:
        return held.contiguous().numpy()
    except TypeError:  # numpy has no such numbers
        raise InputError(
            f"tensor '{name}' is {str(tensor.dtype).removeprefix('torch.')}, which cannot be kept",
            hint="tensors of bool, integers, or floats of 16 to 64 bits can: convert it in the module",
        ) from None


def _spec_to_json(spec: InputSpec) -> list[Any]:
    return [
        spec.name,
        list(spec.shape),
        str(spec.dtype).removeprefix("torch."),
        spec.low,
        spec.high,
        list(spec.dynamic.items()),
    ]


def _spec_from_json(row: Sequence[Any]) -> InputSpec:
    name, shape, dtype, low, high, dynamic = row
    return InputSpec(
        name=name,
        shape=tuple(shape),
        dtype=getattr(torch, dtype),
        low=low,
        high=high,
        dynamic={int(d): n for d, n in dynamic},
    )
