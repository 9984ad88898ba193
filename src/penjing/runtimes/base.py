"""What every runtime has in common: Target, Artifact, Session, Runtime and the registry of runtimes.

A Runtime turns a Network into a file in its own dialect (`export`), compares what that file computes with the network's
own outputs (`verify`: the parity gate) and opens it for running (`load`). Optional packages are imported inside the
methods that need them, never by importing this package.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from penjing.errors import ExportError, InputError, MissingExtraError, TargetError
from penjing.files import appearing
from penjing.progress import SILENT, Progress
from penjing.registry import Registry, did_you_mean
from penjing.runtimes.cpu import available_cores
from penjing.runtimes.parity import Parity, verify
from penjing.runtimes.trace import program, refuse_other_precisions

if TYPE_CHECKING:
    from penjing.network import Network

Array = np.ndarray[Any, Any]

#: Arithmetic that a Target may ask for; None leaves the choice to the runtime.
PRECISIONS = ("f32", "bf16", "f16")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A runtime with its options.

    `threads`: None means the physical cores available to the process. `precision`: what uncompressed arithmetic is done
    in ("f32", "bf16", "f16"); None leaves it to the runtime (OpenVINO takes bf16 by itself where the CPU has it).
    """

    runtime: str
    threads: int | None = None
    precision: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not isinstance(self.runtime, str) or not self.runtime:
            raise TargetError(f"a Target needs the name of a runtime, got {self.runtime!r}", hint=_known())
        if self.threads is not None and (type(self.threads) is not int or not 1 <= self.threads <= 4096):
            raise TargetError(
                f"Target.threads must be a whole number from 1 to 4096, got {self.threads!r}",
                hint="for example threads=2",
            )
        if self.precision is not None and self.precision not in PRECISIONS:
            raise TargetError(
                f"Target.precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}",
                hint="int8 comes from the Quantize step; precision says how what is left in float is computed",
            )
        if self.device != "cpu":
            raise TargetError(f"Target.device must be cpu, got {self.device!r}", hint="leave device away")

    @classmethod
    def several(cls, given: Any) -> tuple[Target, ...]:
        """One target or several, as texts or Targets; raises TargetError for none at all or anything else."""
        listed = list(given) if isinstance(given, list | tuple) else [given]
        if not listed:
            raise TargetError("there is no target", hint="for example target='onnxruntime'")
        return tuple(cls.parse(each) for each in listed)

    @classmethod
    def parse(cls, text: str | Target) -> Target:
        """Reads `runtime` or `runtime:key=value,key=value`; raises TargetError for anything else."""
        if isinstance(text, Target):
            return text
        if not isinstance(text, str):
            raise TargetError(
                f"a target is a text such as 'openvino:threads=2', got {type(text).__name__}", hint=_known()
            )
        runtime, _, options = text.strip().partition(":")
        RUNTIMES.get(runtime)
        given: dict[str, Any] = {}
        for option in filter(None, (o.strip() for o in options.split(","))):
            key, equals, value = (part.strip() for part in option.partition("="))
            if not equals or not value:
                raise TargetError(f"target option {option!r} is not of the form key=value", hint=f"in {text!r}")
            if key not in ("threads", "precision", "device"):
                known = ("threads", "precision", "device")
                raise TargetError(f"a target has no option called {key!r}", hint=did_you_mean(key, known))
            if key in given:
                raise TargetError(f"target option {key!r} is given twice in {text!r}", hint="give it once")
            if key == "threads":
                if not value.isdecimal():
                    raise TargetError(f"threads must be a whole number, got {value!r}", hint=f"in {text!r}")
                given[key] = int(value)
            else:
                given[key] = value
        return cls(runtime=runtime, **given)

    @property
    def thread_count(self) -> int:
        """The number of threads that a session of this target uses."""
        return self.threads or available_cores()

    def __str__(self) -> str:
        """What `parse` reads."""
        options = [f"{k}={v}" for k, v in (("threads", self.threads), ("precision", self.precision)) if v is not None]
        return self.runtime + (":" + ",".join(options) if options else "")


@dataclass(frozen=True)
class Widened:
    """A tensor of a type that a file or the runtime's kernels do not have: `kind` ("int3") became `stored` ("int4"),
    the numbers stay the same; `why` in a few words."""

    tensor: str
    kind: str
    stored: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A file that a runtime opens; `bytes` and `sha256` are those of the file, `parity` how it compares, `widened` what
    it could not hold as narrow as the network does."""

    path: Path
    runtime: str
    bytes: int
    sha256: str
    parity: Parity
    widened: tuple[Widened, ...] = ()

    def row(self) -> dict[str, Any]:
        """What reports say of it, as plain data."""
        described = asdict(self)
        return {**described, "path": self.path.name, "widened": [asdict(w) for w in self.widened]}


@dataclass(frozen=True, kw_only=True)
class Executed:
    """One operation as the runtime really runs it: its own name for the kind, the node, and the arithmetic.

    `origins`: the nodes of the file that it stands for, where the runtime names them; else `name` is one of them.
    """

    op: str
    name: str
    precision: str
    origins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Port:
    """An input of an opened artefact: a dimension that may take any size is None."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]


class Session(ABC):
    """An opened artefact, ready to run."""

    #: What really runs: "int8" if any product is computed in integers, else the float arithmetic.
    precision: str
    threads: int

    def __init__(self, target: Target, ports: Sequence[Port], output_names: Sequence[str]) -> None:
        self.target = target
        self.threads = target.thread_count
        self.ports = tuple(ports)
        self.output_names = tuple(output_names)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names that `run` wants."""
        return tuple(p.name for p in self.ports)

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """One array an output, in the order of `output_names`. Raises InputError for inputs that do not fit."""
        if len(inputs) != len(self.ports):
            unknown = next((n for n in inputs if n not in self.input_names), None)
            if unknown is not None:
                raise InputError(f"there is no input called {unknown!r}", hint=did_you_mean(unknown, self.input_names))
        for port in self.ports:
            value = inputs.get(port.name)
            if value is None:
                raise InputError(f"input '{port.name}' is missing", hint=f"inputs: {', '.join(self.input_names)}")
            _check(port, value)
        return self._run(inputs)

    @abstractmethod
    def _run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """Runs inputs that are known to fit."""

    @abstractmethod
    def executed(self) -> list[Executed]:
        """What the runtime executes, from its own evidence (its optimized or executed graph)."""


class Runtime(ABC):
    """One way to run networks. Subclasses say how a file is written, opened, and looked into."""

    name: ClassVar[str]
    suffix: ClassVar[str]
    #: Module that must be importable, and the extra of penjing that brings it.
    requires: ClassVar[str | None] = None
    extra: ClassVar[str | None] = None

    @classmethod
    def available(cls) -> bool:
        """Whether the runtime's package is installed; loads nothing."""
        return cls.requires is None or importlib.util.find_spec(cls.requires) is not None

    @classmethod
    def need(cls) -> Any:
        """The runtime's package; raises MissingExtraError with the command that installs it."""
        try:
            return importlib.import_module(cls.requires or "torch")
        except ImportError:
            raise MissingExtraError(
                f"the runtime '{cls.name}' needs the package {cls.requires}, which is not installed",
                hint=f"pip install 'penjing[{cls.extra}]'",
            ) from None

    @abstractmethod
    def _write(self, network: Network, path: Path) -> tuple[Widened, ...]:
        """Writes the network in this runtime's dialect; returns what had to be widened."""

    @abstractmethod
    def _open(self, path: Path, target: Target) -> Session:
        """Opens a file that exists."""

    def trace(self, network: Network) -> torch.export.ExportedProgram:
        """The program that the file is made of: its node names are the names of inner values."""
        return program(network)

    @abstractmethod
    def intermediates(self, path: Path, names: Sequence[str], inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Those of the named inner values that the file has, as this runtime computes them."""

    def skeleton(self, network: Network, arrays: Mapping[str, Array], held: str) -> Skeleton:
        """The graph of this runtime's file as plain values that name `arrays`, the network's, and arrays that it needs
        besides, whose names begin with `held`. Raises TargetError where the file is no ONNX file, ExportError."""
        raise TargetError(
            f"a package holds no graph for the runtime '{self.name}'", hint="it can for onnxruntime and openvino"
        )

    def in_float(self, network: Network, path: Path, session: Session) -> dict[str, str]:
        """Layers of `network` that stand on integer grids in its file while `session` of it computes them in float, and
        the arithmetic, as far as the runtime tells. Raises InputError for a damaged file."""
        return {}

    def reference(self, path: Path) -> Session:
        """A session that leaves floats as they are (f32), for comparing."""
        return self._open(path, Target(runtime=self.name, precision="f32"))

    def float_precisions(self) -> tuple[str, ...]:
        """The float arithmetic that this runtime really has on this machine, plainest first."""
        return ("f32",)

    def export(
        self, network: Network, path: str | Path, *, samples: Any = None, progress: Progress = SILENT
    ) -> Artifact:
        """Writes the network as this runtime's file and holds the parity gate before the file appears under its name.

        `samples`: real inputs as `Network.bind` takes them, or Data; without them, random ones of the captured look.
        Raises ExportError, ParityError, MissingExtraError, OutputError.
        """
        self.need()
        refuse_other_precisions(network)
        final = Path(path)
        if final.suffix != self.suffix:
            raise InputError(f"a file for {self.name} ends in {self.suffix}, got {final.name!r}")
        with appearing(final) as aside, progress.task(f"exporting for {self.name}", 2) as advance:
            widened = self._write(network, aside)
            advance(1)
            try:
                parity = verify(self, network, aside, samples=samples)
            except _Unopened as error:
                raise ExportError(
                    f"penjing's file of {network.name} is not one that {self.name} opens: {error.reason}",
                    hint="this is a fault of penjing's export; please report it. Other runtimes may run the network",
                ) from error
            advance(1)
            digest = hashlib.sha256(aside.read_bytes()).hexdigest()
            size = aside.stat().st_size
        return Artifact(path=final, runtime=self.name, bytes=size, sha256=digest, parity=parity, widened=widened)

    def verify(self, network: Network, path: str | Path, *, samples: Any = None) -> Parity:
        """The parity gate on a file that is there already; raises ParityError naming where it departs."""
        self.need()
        return verify(self, network, self._existing(path), samples=samples)

    def load(self, path: str | Path, target: Target | str | None = None) -> Session:
        """Opens an artefact. Raises InputError for a missing or damaged file, TargetError for an impossible option."""
        chosen = Target(runtime=self.name) if target is None else Target.parse(target)
        if chosen.runtime != self.name:
            raise TargetError(f"the target '{chosen}' is not one of the runtime '{self.name}'")
        self.need()
        if chosen.thread_count > (os.cpu_count() or 1):
            raise TargetError(
                f"{chosen.thread_count} threads are more than this machine can run at once",
                hint=f"threads={os.cpu_count() or 1} or fewer",
            )
        if chosen.precision is not None and chosen.precision not in self.float_precisions():
            raise TargetError(
                f"{self.name} cannot compute in {chosen.precision} on this machine",
                hint=f"here it has: {', '.join(self.float_precisions())}",
            )
        return self._open(self._existing(path), chosen)

    def _existing(self, path: str | Path) -> Path:
        found = Path(path)
        if not found.is_file():
            raise InputError(f"there is no file {str(found)!r}", hint=f"a {self.suffix} file that penjing deploy wrote")
        return found

    def _damaged(self, path: Path, error: Exception) -> InputError:
        return _Unopened(self.name, path, _reason(error, path))


class _Unopened(InputError):
    """A file that its runtime does not open, and why in the runtime's words."""

    def __init__(self, runtime: str, path: Path, reason: str) -> None:
        self.reason = reason
        message = f"{runtime} cannot open {path.name!r}: {reason}"
        super().__init__(message, hint="the file is damaged or not one of its kind")


_PREAMBLE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")


def _reason(error: Exception, path: Path) -> str:
    """The last line of what a runtime says, without codes and the path that the caller knows, cut between words."""
    last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    last = _PREAMBLE.sub("", last).replace(f"Load model from {path} failed:", "").replace(str(path), "the file")
    return textwrap.shorten(last, 300, placeholder=" …")


Skeleton = tuple[dict[str, Any], dict[str, Array]]
RUNTIMES: Registry[Runtime] = Registry("runtime", error=TargetError)


def register(runtime: type[Runtime]) -> type[Runtime]:
    """Class decorator: makes a runtime known under its name."""
    RUNTIMES.register(runtime.name)(runtime())
    return runtime


def get_runtime(name: str | Target) -> Runtime:
    """The runtime of this name (or of this Target, or of a target's text)."""
    return RUNTIMES.get(Target.parse(name).runtime)


def load(path: str | Path, target: Target | str) -> Session:
    """Opens an artefact on a target."""
    chosen = Target.parse(target)
    return RUNTIMES.get(chosen.runtime).load(path, chosen)


def uncompressed_settings(target: Target | str) -> list[Target]:
    """Every float setting of a target's runtime that a compressed network must be compared with, f32 first.

    On a CPU with bf16 arithmetic OpenVINO's bf16 is one of them: being faster than f32 alone is no merit there.
    """
    chosen = Target.parse(target)
    runtime = RUNTIMES.get(chosen.runtime)
    runtime.need()
    return [replace(chosen, precision=p) for p in runtime.float_precisions()]


def _known() -> str:
    return did_you_mean("", RUNTIMES.names())


def _check(port: Port, value: Any) -> None:
    if not isinstance(value, np.ndarray):
        raise InputError(f"input '{port.name}' must be a numpy array, got {type(value).__name__}")
    if value.dtype != port.dtype:
        raise InputError(f"input '{port.name}' must be {port.dtype}, got {value.dtype}")
    if value.ndim != len(port.shape) or any(
        w is not None and w != s for w, s in zip(port.shape, value.shape, strict=True)
    ):
        wanted = "×".join("N" if w is None else str(w) for w in port.shape)
        got = "×".join(map(str, value.shape)) or "a single number"
        raise InputError(f"input '{port.name}' must have the shape {wanted}, got {got}")
