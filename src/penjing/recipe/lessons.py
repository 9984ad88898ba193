"""What Steps that train share: samples with teachers' answers, batches of them, and the Plan of what was learned."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from penjing.data import Data, concatenate
from penjing.errors import DataError, RecipeError
from penjing.files import appearing
from penjing.network import Network, SetWeights
from penjing.progress import Progress
from penjing.recipe.judging import HELD_OUT
from penjing.recipe.plans import Plan, Reason
from penjing.recipe.steps import Step, matches
from penjing.training import (
    AUGMENTATIONS,
    OPTIMIZERS,
    PRECISIONS,
    SCHEDULES,
    Batch,
    Monitor,
    Trained,
    Training,
    augment,
    call,
    randomness,
)

#: Samples are held in memory together while they stay below this.
_MEMORY = 2 << 30
#: Samples that are read, or that a teacher is asked about, at once.
_BATCH = 100


@dataclass(frozen=True, kw_only=True)
class LearningStep(Step):
    """A Step that trains what `where` selects for `epochs` passes (a fraction is fine) over the samples, in batches of
    `batch_size`: what all such Steps have.

    `held_out` keeps a share of the samples apart and measures the task's metric on them after every epoch (without
    labels or a task, the loss): the result is what measured best. `patience` ends the training after so many epochs
    that were no better (a fifth is held out if nothing else is said).
    """

    learns: ClassVar[bool] = True

    epochs: float = 2
    lr: float = 0.01
    batch_size: int = 64
    optimizer: str = "sgd"
    weight_decay: float = 5e-4
    augment: str | None = None
    precision: str = "f32"
    average: float = 0.0
    schedule: str = "cosine"
    accumulate: int = 1
    held_out: float | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        infinity = float("inf")
        self.require_between("epochs", 0, infinity, open_low=True)
        self.require_between("lr", 0, infinity, open_low=True)
        self.require_between("batch_size", 1, infinity)
        self.require_one_of("optimizer", tuple(OPTIMIZERS))
        self.require_between("weight_decay", 0, infinity)
        self.require_one_of("augment", (None, *AUGMENTATIONS))
        self.require_one_of("precision", PRECISIONS)
        self.require_between("average", 0, 1, open_high=True)
        self.require_one_of("schedule", SCHEDULES.names())
        self.require_whole("accumulate", 1)
        self.require_between("held_out", 0, 1, open_low=True, open_high=True)
        self.require_between("patience", 1, infinity)

    def training(self, seed: int) -> Training:
        """How to train."""
        return Training(
            epochs=self.epochs,
            lr=self.lr,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            seed=seed,
            precision=self.precision,
            average=self.average,
            schedule=self.schedule,
            accumulate=self.accumulate,
        )

    @property
    def watches(self) -> bool:
        """Whether samples are held out, to keep what measured best on them."""
        return self.held_out is not None or self.patience is not None

    def apart(self, data: Data, seed: int) -> tuple[Data, Data | None]:
        """The samples to train on, and those that are held out, if any are."""
        if not self.watches:
            return data, None
        ((rest, held),) = data.split([self.held_out or HELD_OUT], seed=seed)
        return rest, held


def keepable(data: Data, seed: int) -> bool:
    """Whether there are samples of a known number that can be held all at once, and are the same whenever they are
    read."""
    return fits_in_memory(data) and not varies(data, seed)


def varies(data: Data, seed: int) -> bool:
    """Whether samples are others each time they are read; the caller's random numbers stay as they were."""
    with randomness.seeded(seed):
        return data.varies()


def fits_in_memory(data: Data) -> bool:
    """Whether there are samples of a known number that can be held all at once."""
    try:
        samples = len(data)
    except TypeError:
        return False
    inputs = next(data.batches(1, limit=1))[0]
    return samples * sum(t.nbytes for t in _leaves(inputs)) < _MEMORY


def lessons(
    data: Data,
    teachers: Sequence[Callable[[Any], Tensor]],
    progress: Progress,
    *,
    seed: int = 0,
    folder: str | Path | None = None,
    digests: Sequence[str] = (),
) -> Batch:
    """All samples in order, their labels, and what each teacher answers: (inputs, labels or None, (answer, …)).

    With `folder` the answers are kept there, under what `digests` says of the teachers and the samples say of
    themselves, and read where they stand (memory-mapped): another teacher, or other samples, have files of other names;
    a file that is not whole is written anew. Samples that do not fit in memory are put there, too.
    """
    place = None if folder is None else Path(folder)
    with randomness.seeded(seed):  # a DataLoader that shuffles has one order, whenever that is
        inputs, labels = _held(data, place)
    samples = "" if place is None else _digest((inputs, labels))
    answers = []
    for number, ask in enumerate(teachers):
        name = hashlib.sha256(f"{digests[number]} {samples}".encode()).hexdigest() if place is not None else ""
        file = None if place is None else place / f"answers-{name[:32]}.npy"
        found = None if file is None else _mapped(file)
        if found is None:
            found = _asked(ask, inputs, progress, file)
        answers.append(found)
    return inputs, labels, tuple(answers)


def _held(data: Data, folder: Path | None) -> tuple[Any, Any]:
    """All samples and labels as one batch: in memory, or in files of `folder` where they are too many."""
    batches = data.batches(_BATCH)
    if folder is None or fits_in_memory(data):
        parts = list(batches)
        without = sum(y is None for _, y in parts)
        if 0 < without < len(parts):
            raise DataError(f"{without} of {len(parts)} batches have no labels", hint="label every sample, or none")
        labels = None if without else concatenate(y for _, y in parts)
        return concatenate(x for x, _ in parts), labels
    first = next(batches)
    count = sum(size_of(x) for x, _ in data.batches(_BATCH))
    leaves, structure = pytree.tree_flatten(first)
    files = [folder / f"samples-{number}.npy" for number in range(len(leaves))]
    rows = (pytree.tree_leaves(batch) for batch in data.batches(_BATCH))
    inputs, labels = pytree.tree_unflatten(_written(files, count, rows), structure)
    return inputs, labels


def _asked(ask: Callable[[Any], Tensor], inputs: Any, progress: Progress, file: Path | None) -> Tensor:
    count = size_of(inputs)

    def rows() -> Iterator[list[Tensor]]:
        with torch.no_grad(), progress.task("asking the teacher", count) as advance:
            for start in range(0, count, _BATCH):
                chosen = slice(start, min(start + _BATCH, count))
                yield [ask(_part(inputs, chosen)).detach()]
                advance(chosen.stop - start)

    if file is None:
        return torch.cat([row[0] for row in rows()])
    return _written([file], count, rows())[0]


def _written(files: Sequence[Path], count: int, rows: Iterator[Sequence[Tensor]]) -> list[Tensor]:
    """Rows of tensors (n, …), `count` in all, each to its file, and beside it the file's SHA-256; the files' tensors,
    memory-mapped."""
    with ExitStack() as stack:
        # Not through a memory map: there a full disk kills the process.
        opened = [stack.enter_context(stack.enter_context(appearing(file)).open("wb")) for file in files]
        for number, row in enumerate(rows):
            for out, values in zip(opened, (t.cpu().contiguous().numpy() for t in row), strict=True):
                if number == 0:
                    described = {"descr": np.lib.format.dtype_to_descr(values.dtype), "fortran_order": False}
                    np.lib.format.write_array_header_1_0(out, {**described, "shape": (count, *values.shape[1:])})
                out.write(values.data)
    for file in files:
        with appearing(_sum_of(file)) as aside:
            aside.write_text(_sha256(file), encoding="ascii")
    return [torch.from_numpy(np.load(file, mmap_mode="c", allow_pickle=False)) for file in files]


def _mapped(file: Path) -> Tensor | None:
    """The tensor in a file, if that is as it was written; nothing that is written to it comes to the file."""
    try:
        if _sum_of(file).read_text(encoding="ascii") != _sha256(file):
            return None
        return torch.from_numpy(np.load(file, mmap_mode="c", allow_pickle=False))
    except (OSError, ValueError):
        return None


def _sum_of(file: Path) -> Path:
    return file.with_suffix(".sha256")


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _digest(samples: Any) -> str:
    found = hashlib.sha256()
    for path, value in pytree.tree_leaves_with_path(samples):
        if isinstance(value, Tensor):
            found.update(f"{pytree.keystr(path)} {value.dtype} {tuple(value.shape)}".encode())
            for rows in torch.split(value, _BATCH * _BATCH):
                found.update(rows.contiguous().numpy().tobytes())
    return found.hexdigest()


def _part(value: Any, chosen: slice | Tensor) -> Any:
    return pytree.tree_map(lambda x: x[chosen] if isinstance(x, Tensor) else x, value)


def slices(whole: Batch, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Batches of all samples in an order that `generator` draws."""
    for chosen in torch.split(torch.randperm(size_of(whole[0]), generator=generator), batch_size):
        yield _part(whole, chosen)


def one_pass(
    data: Data, kept: Batch | None, batch_size: int, *, seed: int, free: bool, augmentation: str | None
) -> Iterator[Batch]:
    """Batches (inputs, labels, answers, inputs as they were before `augmentation`) of one pass, in an order of `seed`:
    of what `lessons` gave, or of `data` without answers; only whole batches unless the networks are `free` in that."""
    generator = torch.Generator().manual_seed(seed)
    with randomness.seeded(seed):
        size = size_of(next(data.batches(batch_size))[0])  # a DataLoader's batches have its own
    whole: Iterator[Batch] = (
        slices(kept, size, generator)
        if kept is not None
        else ((x, y, ()) for x, y in data.batches(batch_size, shuffle=True, seed=seed))
    )
    for number, (plain, labels, answers) in enumerate(whole):
        if (number and size_of(plain) == 1) or (not free and size_of(plain) != batch_size):
            continue  # one sample has no variance: it would spoil the statistics of batch norms
        inputs = plain
        if augmentation is not None:
            inputs = pytree.tree_map(lambda x: augment(x, augmentation, generator), plain)
        yield inputs, labels, answers, plain


def count_batches(data: Data, batch_size: int) -> int:
    """How many batches a pass over `data` has."""
    try:
        samples = len(data)
    except TypeError:
        return sum(1 for _ in data.batches(batch_size))
    first = size_of(next(data.batches(batch_size))[0])
    return max(1, math.ceil(samples / first))


def size_of(inputs: Any) -> int:
    """The number of samples in a batch's inputs."""
    return len(_leaves(inputs)[0])


def _leaves(inputs: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]


def channels_last(data: Data, *modules: nn.Module) -> bool:
    """Lay convolutional networks out as channels-last, which CPUs run faster, if their graphs can be run that way."""
    inputs = next(data.batches(2, limit=2))[0]
    if not any(x.ndim == 4 for x in _leaves(inputs)):
        return False
    if any(t.ndim == 5 for module in modules for t in module.state_dict().values()):
        return False  # volumes have a layout of their own
    for module in modules:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        with torch.no_grad():
            for module in modules:
                call(module, laid_out(inputs, True))
    except RuntimeError:  # a view in the graph that wants rows
        for module in modules:
            module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return False
    return True


def laid_out(inputs: Any, fast: bool) -> Any:
    """A batch's inputs in the layout of its modules (`fast`: channels-last)."""

    def there(value: Any) -> Any:
        four = isinstance(value, Tensor) and value.ndim == 4
        return value.contiguous(memory_format=torch.channels_last) if four else value

    return pytree.tree_map(there, inputs) if fast else inputs


def rates_of(network: Network) -> dict[str, float]:
    """Learning rates of shared levels: a level's gradient is the sum of as many as share it, which grows at least as
    fast as the root of their number."""
    tensors = network.tensors()
    return {
        name: math.sqrt(tensors[name].numel() / max(1, tensors[book.codes].numel()))
        for book in network.shared_levels().values()
        for name in (book.scale or book.levels,)
    }


def require_trainable(step: Step, network: Network, batch_size: int) -> None:
    """Raises RecipeError unless `step` can train something of `network` with batches of that size."""
    if network.has_integer_grids:
        raise RecipeError(
            f"{step.name} cannot train a network that is already quantized", hint=f"put {step.name} before Quantize"
        )
    require_batch_size(step, network, batch_size)
    if not any(matches(step.where, name) for name in network.parameter_names):
        raise RecipeError(
            f"{step.name}.where selects no parameter, got {step.where!r}",
            hint=f"for example where={next(iter(network.parameter_names), '*')!r}",
        )


def require_batch_size(step: Step, network: Network, batch_size: int) -> None:
    """Raises RecipeError unless `network` runs batches of that size."""
    fixed = network.inputs[0].shape[0]
    if not network.batch_is_dynamic and fixed != batch_size:
        raise RecipeError(
            f"{step.name}.batch_size must be {fixed}, got {batch_size}: {network.name} takes no other number",
            hint="capture the network with a batch size that may change",
        )


def learned(
    step: Step,
    network: Network,
    student: nn.Module,
    trained: Trained,
    notes: Sequence[str] = (),
    monitor: Monitor | None = None,
) -> Plan:
    """The Plan that gives `network` what `student`, its trained copy, has learned where `step.where` selects it."""
    if monitor is not None:
        kept = f"the weights after epoch {trained.best} are kept" if trained.best else "none is a number"
        notes = [*notes, f"{monitor.metric} on held-out samples by epochs: {row(trained.metrics)}; {kept}"]
    before = network.tensors()
    after = {**dict(student.named_parameters()), **dict(student.named_buffers())}
    edits, reasons = [], []
    for name, old in before.items():
        new = after[name].detach().contiguous() if name in after else old
        if not old.is_floating_point() or not matches(step.where, name) or torch.equal(new, old):
            continue
        edits.append(SetWeights(parameter=name, value=new.clone(memory_format=torch.contiguous_format)))
        moved = float((new - old.detach()).norm() / old.detach().norm().clamp_min(1e-12))
        reasons.append(Reason(layer=name, score=moved, choice="trained", why="relative change"))
    said = f"{trained.steps} steps; mean loss by tenths: {row(trained.losses)}"
    return Plan(step=step, edits=tuple(edits), reasons=tuple(reasons), notes=(said, *notes))


def row(values: Sequence[float]) -> str:
    """Numbers for a note."""
    return ", ".join(f"{value:.4g}" for value in values)
