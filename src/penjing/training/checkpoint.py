"""A checkpoint: all that a training needs to go on after it was killed, and end as if it had not been."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from penjing.errors import InputError, RecipeError
from penjing.network import storage

#: A training writes a checkpoint every so many seconds, and spends no more than a twentieth of its time on that.
SECONDS = 30.0
_MOST = 20


@dataclass(frozen=True)
class Snapshot:
    """A training at the end of a step: `numbers` (plain data for JSON) and `tensors`."""

    numbers: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)


class Watcher(Protocol):
    """Who is called after each step of a training and remembers more than the last call."""

    def state(self) -> dict[str, Any]:
        """What it remembers: plain data for JSON."""

    def put_back(self, state: Mapping[str, Any]) -> None:
        """Remembers that again; the last call is then repeated."""


class Checkpoint:
    """The file of one training. Whoever names the file sees to it that another training has another name.

    A file appears whole or not at all, so that a kill while it is written leaves the one before. What `watcher`
    remembers is kept in it, too.
    """

    def __init__(self, file: Path, watcher: Watcher | None = None) -> None:
        self.file, self._watcher = file, watcher
        self._last = time.monotonic()
        self._took = 0.0

    def load(self) -> Snapshot | None:
        """What was kept, or None at the beginning. Raises RecipeError for a file that is not readable."""
        if not self.file.exists():
            return None
        try:
            text, arrays = storage.read(self.file, key="penjing.training")
            found = Snapshot(json.loads(text), {n: torch.from_numpy(a) for n, a in arrays.items()})
        except (InputError, ValueError) as error:
            raise RecipeError(
                f"the checkpoint {self.file} cannot be read ({error})", hint="delete it to train anew"
            ) from error
        if self._watcher is not None:
            self._watcher.put_back(found.numbers["watcher"])
        return found

    def due(self) -> bool:
        """Whether it is time for another one."""
        return time.monotonic() - self._last >= max(SECONDS, _MOST * self._took)

    def save(self, snapshot: Snapshot) -> None:
        """Writes the file anew."""
        started = time.monotonic()
        arrays = {n: t.detach().cpu().numpy() for n, t in snapshot.tensors.items()}
        own = {} if self._watcher is None else {"watcher": self._watcher.state()}
        storage.write(self.file, json.dumps({**snapshot.numbers, **own}), arrays, key="penjing.training")
        self._last = time.monotonic()
        self._took = self._last - started


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {n: t.detach() for n, t in (*module.named_parameters(), *module.named_buffers())}


@torch.no_grad()
def put_back(module: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Copies what was kept into the tensors of `module`, which keep their layout in memory."""
    for name, tensor in tensors_of(module).items():
        tensor.copy_(kept[name])


def optimizer_state(optimizer: Any) -> dict[str, Tensor]:
    """What an optimizer remembers of each parameter, by the parameter's number."""
    return {
        f"optimizer/{i}/{name}": torch.as_tensor(value)
        for i, parameter in enumerate(_parameters(optimizer))
        for name, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def restore_optimizer(optimizer: Any, kept: Mapping[str, Tensor]) -> None:
    """Gives an optimizer back what `optimizer_state` took."""
    parameters = _parameters(optimizer)
    for path in (p for p in kept if p.startswith("optimizer/")):
        _, number, name = path.split("/")
        value, parameter = kept[path], parameters[int(number)]
        if value.ndim:  # in the parameter's own layout: sums over another one could round differently
            value = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
        optimizer.state[parameter][name] = value


def _parameters(optimizer: Any) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


class Signals:
    """Ctrl-C and termination that came while a step was under way."""

    def __init__(self) -> None:
        self.came: int | None = None
        self._before: dict[int, Any] = {}

    def deliver(self) -> None:
        """Does what the signal would have done at once."""
        number = int(signal.SIGINT) if self.came is None else self.came
        self.came = None
        handler = self._before.get(number)
        if not callable(handler):
            raise KeyboardInterrupt
        handler(number, None)

    @classmethod
    @contextmanager
    def deferred(cls, wanted: bool = True) -> Iterator[Signals]:
        """Inside, the first signal waits for whoever looks at `came`; the second acts at once, as do signals for which
        nobody has a handler."""
        signals = cls()

        def wait(number: int, frame: Any) -> None:
            if signals.came is not None:
                signals.deliver()
            signals.came = number

        if wanted and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if callable(before := signal.getsignal(number)):
                    signals._before[number] = before
                    signal.signal(number, wait)
        try:
            yield signals
        finally:
            for caught, handler in signals._before.items():
                signal.signal(caught, handler)
        if signals.came is not None:  # after the last look
            signals.deliver()
