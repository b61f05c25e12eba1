"""The stages of a run with what they compute: each one's method, and the teacher as long as a stage needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fastkd import recipe

if TYPE_CHECKING:
    from fastkd.methods import Method
    from fastkd.models.needs import Needs
    from fastkd.models.teacher import Teacher
    from fastkd.recipe import Stage


class Stages:
    """All stages, of which a run is in one. Their methods are made and checked before anything is spent.

    Attributes:
        all: the stages by number.
        methods: one for each.
        number: of the stage that the run is in.
        teacher: what that stage's method reads, None where it reads none.
        last_teacher: the one that was used last, as long as a stage may come that reads it.
    """

    def __init__(
        self, stages: Sequence[Stage], methods: Sequence[Method], teacher_of: Callable[[Needs], Teacher]
    ) -> None:
        """``teacher_of``: makes the teacher that computes what a method needs. It holds the loaded model."""
        self.all, self.methods = tuple(stages), tuple(methods)
        self.teacher: Teacher | None = None
        self.last_teacher: Teacher | None = None
        self._teacher_of: Callable[[Needs], Teacher] | None = teacher_of
        self.enter(0, for_good=len(self.all) == 1)

    @property
    def stage(self) -> Stage:
        """The stage that the run is in."""
        return self.all[self.number]

    @property
    def method(self) -> Method:
        """Its method."""
        return self.methods[self.number]

    @property
    def trains_mlm_head(self) -> bool:
        """Whether any stage does: the student then has a head."""
        return any(method.trains_mlm_head for method in self.methods)

    def at(self, progress: float) -> int:
        """The number of the stage that a step of this progress belongs to."""
        return recipe.at(self.all, progress)

    def enter(self, number: int, *, for_good: bool) -> None:
        """Go over to a stage. ``for_good``: no earlier one is entered again, so what only those read is freed."""
        self.number = number
        needs = self.method.teacher_needs
        if needs is not None and (self.last_teacher is None or self.last_teacher.needs != needs):
            assert self._teacher_of is not None
            self.teacher = self.last_teacher = None  # before another takes its place on the device
            self.last_teacher = self._teacher_of(needs)
        self.teacher = self.last_teacher if needs is not None else None
        if for_good:
            for earlier in self.methods[:number]:
                earlier.modules.clear()
            self._forget([each.teacher_needs for each in self.methods[number:] if each.teacher_needs is not None])

    def _forget(self, later: list[Needs]) -> None:
        """Free the teacher if no needs of ``later`` are its own, and the loaded model if none are others."""
        if self.last_teacher is not None and self.last_teacher.needs not in later:
            self.last_teacher = None
        if all(self.last_teacher is not None and needs == self.last_teacher.needs for needs in later):
            self._teacher_of = None
