"""Scores of a comparison's rows: held-out masked-language-modelling, and fine-tuning where labelled data is given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastkd.glue.evaluation import evaluate, require_extra
from fastkd.glue.scores import AVERAGE
from fastkd.glue.tasks import TASKS, parse_limits
from fastkd.run_folder import read_run

MLM_LOSS, MLM_ACCURACY = "held-out MLM loss", "held-out MLM accuracy"


class Scorer:
    """Scores models and finds what was scored before."""

    def __init__(self, data: str | None, tasks: str | None, train_rows: str | None, seeds: int) -> None:
        """Options as ``CompareConfig`` describes and checks them.

        Raises:
            ValueError: fine-tuning needs a package that is not installed.
        """
        self.data, self.seeds = data, seeds
        self._fine_tuned: dict[Path, dict[str, float]] = {}
        self.tasks = tasks.split(",") if tasks else None
        self.train_rows = parse_limits(train_rows, "--glue-train-rows")
        if data is not None:
            require_extra()

    def fine_tune(self, model: Path | str, output_dir: Path) -> None:
        """Fine-tune and score a model into ``output_dir/glue.json``; what is there already is not repeated."""
        if self.data is not None:
            data = None if self.data == "hub" else self.data
            found = evaluate(model, self.tasks, data, "headline", self.seeds, output_dir, train_rows=self.train_rows)
            self._fine_tuned[output_dir] = _means(found["scores"])

    def glue(self, folder: Path) -> dict[str, float]:
        """Scores of this process's fine-tuning, of the data, rows and seeds asked for; without data, what lies there."""
        if self.data is not None:
            return self._fine_tuned.get(folder, {})
        path = folder / "glue.json"
        return _means(json.loads(path.read_text())) if path.exists() else {}

    def of(self, folder: Path) -> dict[str, float]:
        """All scores of a run folder, fine-tuning first."""
        found = self.glue(folder)
        validations = read_run(folder).validations if (folder / "metrics.jsonl").exists() else []
        return found | (mlm_scores(validations[-1]) if validations else {})


def mlm_scores(validation: Mapping[str, Any]) -> dict[str, float]:
    """The scores of one validation, where a head was trained."""
    if validation.get("mlm_loss") is None:
        return {}
    return {MLM_LOSS: validation["mlm_loss"], MLM_ACCURACY: 100 * validation["accuracy"]}


def _means(glue: Mapping[str, Any]) -> dict[str, float]:
    """Means of what glue.json holds, named by task and metric."""
    return {
        f"{TASKS[name].title if name in TASKS else name} {metric.replace('_', ' ')}": values["mean"]
        for name, metrics in glue.items()
        if name != AVERAGE
        for metric, values in metrics.items()
    }
