"""Distill: train a network by what other networks make of the same samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from penjing.errors import DataError, RecipeError
from penjing.network import Network
from penjing.recipe import Context, Plan, step
from penjing.recipe.distilling import Distilling
from penjing.recipe.lessons import (
    LearningStep,
    require_trainable,
)
from penjing.task import class_dimension
from penjing.tensors.distillation import LOGIT_LOSSES
from penjing.tensors.feature_losses import FEATURE_LOSSES


@step
@dataclass(frozen=True, kw_only=True)
class Distill(LearningStep):
    """Train the network by the answers of `teacher`: "original" (what the recipe started from), a name or several of
    `compress(..., teachers=)`, which are averaged by `teacher_weights`, or "self". The student is the network that the
    recipe is at; a teacher may be of any architecture whose main output has the same shape.

    `logits` says how answers are compared where the task has classes: "soft-labels" at `temperature` (the student's own
    may be `student_temperature`), "standardized" (Sun et al. 2024; without a range to copy, 2 is a good temperature),
    "dkd" (Zhao et al. 2022; `target_weight` and `other_weight` are its alpha and beta), "multi-level" (Jin et al.
    2023), "matching" (the values; so, too, where there are no classes). That term weighs `alpha`, the labels 1 - alpha;
    without a task or labels only teachers are followed.

    "self" is the mean teacher (Tarvainen & Valpola 2017): a running average of the student's weights, of which each
    step keeps `self_average`; with `augment` it sees class samples as they are while the student sees them varied. It
    needs labels, or a teacher beside it.

    `features` compares inner values with those of the first teacher, weighed by `feature_weight`: "auto", or
    {student's: teacher's} by names of graph values, paths of layers, or shell patterns of them. `feature_loss` is
    "fitnet" (Romero et al. 2015), "attention" (Zagoruyko & Komodakis 2017), "similarity" (Tung & Mori 2019) or
    "contrast" (after Tian et al. 2020). What must be learned to compare them trains along and is thrown away.

    `mutual` names networks that learn from the student as it learns from them (Zhang et al. 2018, "Deep mutual
    learning"), and from the teacher, unless that is None. The result is the student.

    `sequence` lets the teacher continue the first `prompt` tokens of every sample by so many, the likeliest ones or
    drawn at temperature `sampling`; they take the place of samples and labels (Kim & Rush 2016, "Sequence-level
    knowledge distillation").

    Answers that do not change are asked for once. `cache` is a folder to keep them in, for the next run too.
    """

    keeping: ClassVar[tuple[str, ...]] = ("cache",)

    teacher: str | list[str] | None = "original"
    teacher_weights: list[float] = field(default_factory=list)
    logits: str = "soft-labels"
    temperature: float = 4.0
    student_temperature: float | None = None
    target_weight: float = 1.0
    other_weight: float = 8.0
    alpha: float = 0.9
    self_average: float = 0.999
    features: dict[str, str] | str | None = None
    feature_loss: str = "fitnet"
    feature_weight: float = 1.0
    mutual: list[str] = field(default_factory=list)
    sequence: int = 0
    prompt: int = 8
    sampling: float = 0.0
    cache: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        infinity = float("inf")
        self.require_names("teacher")
        self.require_names("mutual")
        if not isinstance(self.mutual, list):
            raise RecipeError(f"Distill.mutual must be a list of names, got {self.mutual!r}", hint="mutual: [peer]")
        self.require_one_of("logits", LOGIT_LOSSES.names())
        self.require_one_of("feature_loss", FEATURE_LOSSES.names())
        for name in ("temperature", "student_temperature"):
            self.require_between(name, 0, infinity, open_low=True)
        for name in ("target_weight", "other_weight", "feature_weight", "sampling"):
            self.require_between(name, 0, infinity)
        self.require_between("alpha", 0, 1)
        self.require_between("self_average", 0, 1, open_high=True)
        self.require_whole("sequence", 0)
        self.require_whole("prompt", 1)
        if not self.taught_by and not self.mutual:
            raise RecipeError(
                "Distill learns from nobody: teacher is empty", hint="teacher: original, or mutual: [name]"
            )
        weights = self.teacher_weights
        numbers = isinstance(weights, list) and not any(isinstance(w, bool) for w in weights)
        if not numbers or not all(isinstance(w, int | float) and 0 < w < infinity for w in weights):
            raise RecipeError(f"Distill.teacher_weights must be numbers above 0, got {weights!r}", hint="leave it away")
        named = isinstance(self.features, dict) and all(isinstance(n, str) for p in self.features.items() for n in p)
        if not named and self.features not in (None, "auto"):
            raise RecipeError(
                f"Distill.features must be 'auto' or a mapping, got {self.features!r}",
                hint="features: {student's value: teacher's value}",
            )
        if self.features is not None and not self.taught_by:
            raise RecipeError("Distill.features needs a teacher to take them from", hint="teacher: original")
        if self.cache is not None and (not isinstance(self.cache, str) or not self.cache):
            raise RecipeError(f"Distill.cache must be a folder, got {self.cache!r}", hint="cache: answers/")
        if self.cache is not None and (self.augment or self.features is not None or not self._lasting):
            raise RecipeError(
                "Distill.cache keeps answers that do not change, and augment, features or teacher: self change them",
                hint="leave cache away",
            )
        if self.sequence and not self._lasting:
            raise RecipeError("Distill.sequence needs a teacher that continues the prompts", hint="teacher: original")

    @property
    def taught_by(self) -> list[str]:
        """The names of teachers."""
        return [self.teacher] if isinstance(self.teacher, str) else list(self.teacher or [])

    @property
    def _lasting(self) -> bool:
        return bool(self.taught_by) and "self" not in self.taught_by

    def check(self, context: Context) -> None:
        """Samples and teachers are needed; labels, too, where nobody but the student and its peers says anything."""
        if context.data is None:
            raise DataError("Distill needs samples and no data was given", hint="labels are not needed")
        count = sum(len(context.networks(n, "Distill.teacher")) if n != "self" else 1 for n in self.taught_by)
        if self.teacher_weights and len(self.teacher_weights) != count:
            raise RecipeError(
                f"Distill.teacher_weights has {len(self.teacher_weights)} numbers for {count} teachers",
                hint="one for each, in order",
            )
        for name in self.mutual:
            context.networks(name, "Distill.mutual")
        alone = all(name == "self" for name in self.taught_by)
        unlabelled = context.task is None or next(context.data.batches(1, limit=1))[1] is None
        if alone and (unlabelled or self.alpha == 1):
            raise RecipeError(
                "Distill has nothing to learn the truth from: no teacher but the students themselves, and no labels",
                hint="give labels and a task and alpha below 1, or teacher: original",
            )
        if unlabelled and self.alpha == 0 and not self.sequence:
            raise RecipeError(
                "Distill.alpha is 0, by which labels alone are followed, and there are none",
                hint="give labels and a task, or alpha above 0",
            )
        if self.sequence and class_dimension(context.task, context.original.task) != -1:
            raise RecipeError(
                "Distill.sequence continues texts, and the task is no language modelling",
                hint="task='language-modelling', or leave sequence away",
            )

    def plan(self, network: Network, context: Context) -> Plan:
        """Trains copies; the Plan holds the new values of every tensor of the student that changed."""
        self.check(context)
        require_trainable(self, network, self.batch_size)
        return Distilling(self, network, context).plan()
