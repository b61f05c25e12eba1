"""Test predictions in the format that gluebenchmark.com takes: ``SST-2.tsv`` with the columns index and prediction."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fastkd import files
from fastkd.glue.tasks import SCORE_RANGE, Task

if TYPE_CHECKING:
    from fastkd.glue.scores import TaskScore

FOLDER = "submission"


def write_submission(scores: Mapping[str, TaskScore], output_dir: Path) -> list[Path]:
    """Write the test predictions of each task's seed with the best dev score; returns the files."""
    written = []
    for score in scores.values():
        best = score.best
        for split in score.fine_tunings[best].test:
            path = output_dir / FOLDER / f"{score.task.test[split]}.tsv"
            files.write(path, _format(score.task, score.results[best]["predictions"][split]))
            written.append(path)
    return written


def _format(task: Task, predictions: list[int] | list[float]) -> str:
    lines = (f"{i}\t{_answer(task, prediction)}\n" for i, prediction in enumerate(predictions))
    return "index\tprediction\n" + "".join(lines)


def _answer(task: Task, prediction: int | float) -> str:
    if task.is_regression:
        low, high = SCORE_RANGE
        return f"{min(max(prediction, low), high) if task.official else prediction:.3f}"
    return task.labels[int(prediction)] if task.submits_names else str(prediction)
