"""Models that a comparison's rows are scored against: the teachers, and the student before its first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fastkd.comparison.rows import Row, base_row, teachers
from fastkd.comparison.scores import Scorer, mlm_scores
from fastkd.distributed import World
from fastkd.files import Record
from fastkd.models import hf
from fastkd.run_folder import ancestors, find_run, has_student
from fastkd.setup import model_folder, prepare


class References:
    """The teachers and the untrained student, each with a label and scores, but no cost."""

    def __init__(self, rows: Sequence[Row], shared: dict[str, Any], folder: Path, scorer: Scorer) -> None:
        """``folder``: holds a folder for each reference."""
        self.rows, self.shared, self.folder, self.scorer = rows, shared, folder, scorer

    def teachers(self) -> dict[str, str]:
        """The rows' teachers by label; the one that most rows have comes first."""
        found = teachers(self.rows, self.shared)
        labels = ["teacher", *(f"teacher {Path(name).name}" for name in found[1:])]
        return dict(zip(labels, found, strict=False))  # empty if no row has a teacher

    @cached_property
    def ancestors(self) -> list[str]:
        """The teachers, and the models that they were made from."""
        return list(dict.fromkeys(model for name in self.teachers().values() for model in ancestors(name)))

    def score(self) -> None:
        """Probe and fine-tune all references; what was done before is not repeated."""
        if not self.scorer.makes_any:
            return
        untrained = self._folder_of("untrained")
        if not has_student(untrained):
            self._export_untrained(untrained / "final")
        if self.scorer.prober is not None:
            settings = base_row(self.rows).settings(self.shared)
            self.scorer.prober.prepare(untrained, settings["corpus"], settings["text_field"])
        for label, teacher in self.teachers().items():
            self.scorer.score(model_folder(teacher), self._folder_of(label))
        self.scorer.score(untrained, untrained)

    def records(self, run_folders: Sequence[Path]) -> list[Record]:
        """Labels and scores. The untrained student's held-out scores are those that a run began with.

        Args:
            run_folders: of rows whose student starts at random.
        """
        starts = [run.validations[:1] for folder in run_folders if (run := find_run(folder))]
        untrained = next((found for start in starts if start and (found := mlm_scores(start[0]))), {})
        return [
            *({"label": label, "scores": self.scorer.of_model(self._folder_of(label))} for label in self.teachers()),
            {"label": "untrained student", "scores": self.scorer.of_model(self._folder_of("untrained")) | untrained},
        ]

    def _folder_of(self, label: str) -> Path:
        return self.folder / label.replace(" ", "-")

    def _export_untrained(self, folder: Path) -> None:
        plain = dataclasses.replace(base_row(self.rows), options=())
        setup = prepare(plain.resolved(self.shared, budget_tokens=1), World())
        card = "# An untrained encoder\n\nRandom weights: the reference that a comparison's students start from.\n"
        longest = setup.config.seq_length  # as in the trained students
        hf.export(setup.student, setup.tokenizer, folder, card=card, mlm_head=False, max_length=longest)
