"""Scores over seeds: glue.json, the Markdown table beside published models, and the model card's section."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkd import files
from fastkd.glue.tasks import TASKS, Task

if TYPE_CHECKING:
    from fastkd.glue.finetune import FineTuning
    from fastkd.glue.protocol import Protocol

Result = Mapping[str, Any]
Metrics = dict[str, dict[str, Any]]  # metric → mean, std, seeds, values

# Published dev scores, one number a task: for MRPC and QQP not all sources say whether it is accuracy or F1.
ANCHORS: dict[str, dict[str, float]] = {
    "BERT-base": {
        "cola": 56.3, "mnli": 84.7, "mrpc": 88.6, "qnli": 91.8, "qqp": 89.6, "rte": 69.3, "sst2": 92.7,
    },
    "DistilBERT": {
        "cola": 51.3, "mnli": 82.1, "mrpc": 87.5, "qnli": 89.2, "qqp": 88.5, "rte": 59.9, "sst2": 91.3,
    },
    "MiniLMv2 L6-H768": {"mnli": 84.2, "qnli": 90.8, "rte": 72.1, "sst2": 92.4},
    "crammed BERT, 24 h A6000": {
        "cola": 48.9, "mnli": 83.8, "qnli": 90.1, "rte": 55.1, "sst2": 92.3, "average": 78.6,
    },
    "MosaicBERT-base, 9.0 A100-h": {"average": 79.6},
    "MosaicBERT-base, 36.8 A100-h": {"average": 83.2},
}  # fmt: skip
AVERAGE = "average"
BEGIN, END = "<!-- glue: begin -->", "<!-- glue: end -->"


@dataclass(frozen=True)
class TaskScore:
    """A task's chosen configuration: its fine-tunings, one a seed, and their results."""

    task: Task
    fine_tunings: tuple[FineTuning, ...]
    results: tuple[Result, ...]

    @property
    def seeds(self) -> list[int]:
        """The seeds, ascending."""
        return [one.seed for one in self.fine_tunings]

    @property
    def per_seed(self) -> list[float]:
        """For each seed the mean of the task's metrics, from which averages over tasks are made."""
        return [statistics.fmean(result["metrics"].values()) for result in self.results]

    @property
    def metrics(self) -> Metrics:
        """Each metric over the seeds."""
        names = self.results[0]["metrics"]
        return {name: over_seeds(self.seeds, [r["metrics"][name] for r in self.results]) for name in names}

    @property
    def best(self) -> int:
        """Index of the seed with the best dev score."""
        return max(range(len(self.fine_tunings)), key=lambda i: self.per_seed[i])


def over_seeds(seeds: Sequence[int], values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (0 for one seed) of a metric, with the seeds and their values."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std, "seeds": list(seeds), "values": list(values)}


def choose(results: Iterable[tuple[FineTuning, Result]]) -> dict[str, TaskScore]:
    """For each task the grid's configuration with the best mean over seeds (the first of equals)."""
    groups: dict[str, dict[tuple[float, int], list[tuple[FineTuning, Result]]]] = {}
    for one, result in results:
        group = groups.setdefault(one.task.name, {})
        group.setdefault((one.learning_rate, one.batch_size), []).append((one, result))
    chosen = {}
    for name, grid in groups.items():
        ordered = [sorted(pairs, key=lambda pair: pair[0].seed) for pairs in grid.values()]
        scores = [TaskScore(pairs[0][0].task, *map(tuple, zip(*pairs, strict=True))) for pairs in ordered]
        chosen[name] = max(scores, key=lambda score: statistics.fmean(score.per_seed))
    return chosen


def missing_tasks(scores: Mapping[str, TaskScore], protocol: Protocol) -> list[str]:
    """Titles of the protocol's tasks without a score."""
    return [TASKS[name].title for name in protocol.tasks if name not in scores]


def average(scores: Mapping[str, TaskScore], protocol: Protocol) -> dict[str, Any] | None:
    """Mean over the protocol's tasks, each the mean of its metrics; None where one is missing."""
    if missing_tasks(scores, protocol):
        return None
    tasks = [scores[name] for name in protocol.tasks]
    by_seed = zip(*(task.per_seed for task in tasks), strict=True)
    return over_seeds(tasks[0].seeds, [statistics.fmean(values) for values in by_seed])


def to_json(scores: Mapping[str, TaskScore], protocol: Protocol) -> dict[str, Metrics]:
    """glue.json: task → metric → mean, std, seeds, values; with ``average`` where no task of the protocol is missing."""
    tasks = {name: score.metrics for name, score in scores.items()}
    mean = average(scores, protocol)
    return tasks | ({AVERAGE: {"score": mean}} if mean else {})


def markdown(scores: Mapping[str, TaskScore], protocol: Protocol, notes: Sequence[str] = ()) -> str:
    """The table: one row a task, beside the published models that have a score for at least one of the rows."""
    mean = average(scores, protocol)
    rows = [(name, score.task.title, _metric_names(score), _values(score.metrics)) for name, score in scores.items()]
    if mean:
        rows.append((AVERAGE, "average", f"{len(protocol.tasks)} tasks", _values({"score": mean})))
    shown = [name for name, anchors in ANCHORS.items() if any(row[0] in anchors for row in rows)]
    lines = [_row("task", "metric", "this model", *shown), _row(*["---"] * (3 + len(shown)))]
    for name, title, metric, value in rows:
        anchors = [ANCHORS[model].get(name) for model in shown]
        lines.append(_row(title, metric, value, *("" if anchor is None else f"{anchor:.1f}" for anchor in anchors)))
    return "\n".join([*lines, "", *(f"* {note}" for note in _notes(scores, protocol, notes))]) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _metric_names(score: TaskScore) -> str:
    return " / ".join("F1" if name == "f1" else name for name in score.metrics)


def _values(metrics: Metrics) -> str:
    one = [f"{m['mean']:.1f}" + (f" ± {m['std']:.1f}" if len(m["seeds"]) > 1 else "") for m in metrics.values()]
    return " / ".join(one)


def _notes(scores: Mapping[str, TaskScore], protocol: Protocol, notes: Sequence[str]) -> list[str]:
    count = max(len(score.seeds) for score in scores.values())
    seeds = f"{count} seeds, mean ± standard deviation" if count > 1 else "1 seed"
    found = [f"Dev sets, times 100. Protocol {protocol.description}; {seeds}."]
    if len(protocol.grid) > 1:
        chosen = [score.fine_tunings[0] for score in scores.values()]
        best = [f"{one.task.title} {one.learning_rate:g}, batch {one.batch_size}" for one in chosen]
        found.append(f"Best of the grid: {'; '.join(best)}.")
    for score in scores.values():
        rows = score.fine_tunings[0].rows[score.task.train]
        if rows == score.fine_tunings[0].train_rows:
            found.append(f"{score.task.title} was trained on a fixed random subset of {rows:,} rows.")
    dtypes = sorted({result["dtype"] for score in scores.values() for result in score.results if "dtype" in result})
    if len(dtypes) > 1:
        found.append(f"Fine-tunings ran in {' and '.join(dtypes)}: they may differ a little for that.")
    missing = missing_tasks(scores, protocol)
    if missing:
        found.append(f"No average: {', '.join(missing)} missing of the protocol's {len(protocol.tasks)} tasks.")
    if any(anchors.keys() & scores.keys() for anchors in ANCHORS.values()):
        found.append("The other models' scores are the published ones, under their own protocols.")
    return [*found, *notes]


def update_card(card: Path, section: str) -> None:
    """Put ``section`` into a model card, in place of an earlier one, else at the end."""
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    block = f"{BEGIN}\n## GLUE\n\n{section}{END}\n"
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}\n?", re.DOTALL)
    text, replaced = pattern.subn(lambda _: block, text)
    files.write(card, text if replaced else f"{text.rstrip()}\n\n{block}".lstrip())
