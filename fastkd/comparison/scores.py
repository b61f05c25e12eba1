"""Scores of a comparison's models: masked-language-modelling on held-out text, and fine-tuning on labelled data."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastkd.glue.evaluation import evaluate, require_extra
from fastkd.glue.scores import AVERAGE
from fastkd.glue.tasks import TASKS, parse_limits
from fastkd.run_folder import find_run

log = logging.getLogger(__name__)
MLM_LOSS, MLM_ACCURACY = "held-out MLM loss", "held-out MLM accuracy"


class Scorer:
    """Scores models, and reads scores of before."""

    def __init__(self, data: str | None, tasks: str | None, train_rows: str | None, seeds: int) -> None:
        """Options as ``CompareConfig`` describes and checks them.

        Raises:
            ValueError: fine-tuning needs a package that is not installed.
        """
        self.data, self.seeds = data, seeds
        self._fine_tuned: dict[Path, dict[str, float]] = {}  # by output folder
        self.tasks = tasks.split(",") if tasks else None
        self.train_rows = parse_limits(train_rows, "--glue-train-rows")
        if data is not None:
            require_extra()

    def fine_tune(self, model: Path | str, output_dir: Path) -> None:
        """Fine-tune and score a model into ``output_dir/glue.json``; scores that it holds already are not made again."""
        if self.data is not None:
            data = None if self.data == "hub" else self.data
            found = evaluate(model, self.tasks, data, "headline", self.seeds, output_dir, train_rows=self.train_rows)
            self._fine_tuned[output_dir] = _means(found["scores"])

    def fine_tuned(self, folder: Path) -> dict[str, float]:
        """Scores of `fine_tune` into a folder by this process; without labelled data, those of its glue.json."""
        if self.data is not None:
            return self._fine_tuned.get(folder, {})
        path = folder / "glue.json"
        try:
            return _means(json.loads(path.read_bytes())) if path.exists() else {}
        except (ValueError, TypeError, KeyError, AttributeError):
            log.warning("%s is damaged, its scores are left out: python -m fastkd.glue %s makes it again", path, folder)
            return {}

    def of(self, folder: Path) -> dict[str, float]:
        """All scores of a run folder, those of fine-tuning first."""
        found = self.fine_tuned(folder)
        run = find_run(folder)
        validations = run.validations if run else []
        return found | (mlm_scores(validations[-1]) if validations else {})


def mlm_scores(validation: Mapping[str, Any]) -> dict[str, float]:
    """The scores of one validation; empty if no head was trained."""
    if validation.get("mlm_loss") is None:
        return {}
    return {MLM_LOSS: validation["mlm_loss"], MLM_ACCURACY: 100 * validation["accuracy"]}


def _means(glue: Mapping[str, Any]) -> dict[str, float]:
    """The means in glue.json, named by task and metric."""
    return {
        f"{TASKS[name].title if name in TASKS else name} {metric.replace('_', ' ')}": values["mean"]
        for name, metrics in glue.items()
        if name != AVERAGE
        for metric, values in metrics.items()
    }


def headline(names: Iterable[str]) -> list[str]:
    """The scores for the main table: the first metric of each fine-tuning task, or all if there is none."""
    tasks: dict[str, str] = {}
    found = list(dict.fromkeys(names))
    for name in found:
        tasks.setdefault(name.split()[0], name)
    return [name for task, name in tasks.items() if task != "held-out"] or found
