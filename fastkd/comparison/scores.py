"""Scores of a comparison's models: masked-language-modelling on held-out text, and fine-tuning on labelled data."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkd.comparison.items import TITLES, scores_of
from fastkd.glue.evaluation import evaluate, require_extra
from fastkd.glue.scores import AVERAGE
from fastkd.glue.tasks import TASKS, parse_limits
from fastkd.run_folder import find_run

if TYPE_CHECKING:
    from fastkd.probes.evaluation import Prober

log = logging.getLogger(__name__)
MLM_LOSS, MLM_ACCURACY = "held-out MLM loss", "held-out MLM accuracy"


class Scorer:
    """Scores models, and reads scores of before."""

    def __init__(
        self, data: str | None, tasks: str | None, train_rows: str | None, seeds: int, prober: Prober | None = None
    ) -> None:
        """Options as ``CompareConfig`` describes and checks them.

        Raises:
            ValueError: fine-tuning needs a package that is not installed.
        """
        self.data, self.seeds, self.prober = data, seeds, prober
        self._fine_tuned: dict[Path, dict[str, float]] = {}  # by output folder
        self.tasks = tasks.split(",") if tasks else None
        self.train_rows = parse_limits(train_rows, "--glue-train-rows")
        if data is not None:
            require_extra()

    @property
    def makes_any(self) -> bool:
        """Whether `score` does anything."""
        return self.data is not None or bool(self.prober and self.prober.wanted)

    def score(self, model: Path | str, output_dir: Path) -> None:
        """Probe a model and fine-tune it, into ``output_dir``; scores that are there already are not made again."""
        if self.prober is not None:
            self.prober.probe(model, output_dir)
        if self.data is not None:
            data = None if self.data == "hub" else self.data
            found = evaluate(model, self.tasks, data, "headline", self.seeds, output_dir, train_rows=self.train_rows)
            self._fine_tuned[output_dir] = _means(found["scores"])

    def fine_tuned(self, folder: Path) -> dict[str, float]:
        """Scores of fine-tuning into a folder by this process; without labelled data, those of its glue.json."""
        if self.data is not None:
            return self._fine_tuned.get(folder, {})
        path = folder / "glue.json"
        try:
            return _means(json.loads(path.read_bytes())) if path.exists() else {}
        except (ValueError, TypeError, KeyError, AttributeError):
            log.warning("%s is damaged, its scores are left out: python -m fastkd.glue %s makes it again", path, folder)
            return {}

    def of_model(self, folder: Path) -> dict[str, float]:
        """What `score` made in a folder."""
        record = self.prober.record_of(folder) if self.prober else None
        return self.fine_tuned(folder) | (scores_of(record) if record else {})

    def items_of(self, folder: Path, comparison: Path) -> str | None:
        """The file of a run's scores item by item, as results.json names it; None if there is none."""
        probed = self.prober is not None and self.prober.record_of(folder) is not None
        return (folder / "probes.json").relative_to(comparison).as_posix() if probed else None

    def of(self, folder: Path) -> dict[str, float]:
        """All scores of a run folder, those of fine-tuning first."""
        found = self.of_model(folder)
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
    """The scores for the main table: the first metric of each fine-tuning task and probe; without fine-tuning, those of held-out
    text too."""
    first: dict[str, str] = {}
    found = list(dict.fromkeys(names))
    held_out = [name for name in found if name in (MLM_LOSS, MLM_ACCURACY)]
    for name in found:
        if name not in held_out:
            first.setdefault(name.split()[0], name)
    return [*first.values(), *([] if set(first.values()) - set(TITLES.values()) else held_out)]
