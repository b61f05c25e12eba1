"""results.json of a comparison: a record for each run of a row, written and read back; means and differences over seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkd import files, quantities
from fastkd.comparison import intervals
from fastkd.comparison.items import read_items
from fastkd.files import Record, finite
from fastkd.run_folder import read_run

if TYPE_CHECKING:
    from fastkd.comparison.rows import RowRun

RESULTS = "results.json"
SCRATCH = "mlm"  # the label that gains are measured against
NUMBERS = ("charged_s", "flops", "tokens", "epochs", "tokens_per_s", "mfu", "joules", "teacher_share")


@dataclass(frozen=True)
class Spread:
    """Mean over seeds; `deviation` is the sample standard deviation, None for one seed."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Arm:
    """One arm of the experiment: a label under one match and one budget, over its seeds."""

    label: str
    match: str
    budget: float | None  # in the unit of the match
    rows: tuple[Record, ...]  # those that ran to their end
    failed: int

    @property
    def key(self) -> str:
        """Names its numbers in the page: label, match and budget."""
        return "/".join(str(part) for part in (self.label, self.match, self.budget) if part is not None)

    def spread(self, field: str) -> Spread | None:
        """Mean and deviation of a field over the seeds that have it; None if none has."""
        return spread(row.get(field) for row in self.rows)

    def score(self, name: str) -> Spread | None:
        """Mean and deviation of a score over the seeds that have it; None if none has."""
        return spread(row["scores"].get(name) for row in self.rows)

    def mean_of(self, field: str) -> dict[str, float]:
        """Means of a field that is an object of numbers, such as `phase_s`."""
        tables = [row[field] for row in self.rows if row.get(field)]
        return {name: mean(table.get(name, 0.0) for table in tables) for table in tables[:1] for name in table}

    def difference(self, other: Arm, score: str) -> intervals.Difference | None:
        """A score minus another arm's, over the seeds that both have; None if there is no such seed.

        Over items too, if all these rows have as many of them.
        """
        theirs = {row["seed"]: row for row in other.rows if row["scores"].get(score) is not None}
        mine = {row["seed"]: row for row in self.rows if row["scores"].get(score) is not None and row["seed"] in theirs}
        if not mine:
            return None
        sides = [list(mine.values()), [theirs[seed] for seed in mine]]
        known = [[row["items"].get(score) for row in side] for side in sides]
        sizes = {None if items is None else len(items) for side in known for items in side}
        if None in sizes or len(sizes) > 1:
            known = [[row["scores"][score] for row in side] for side in sides]
        own, base = (np.array(side, dtype=np.float64) for side in known)
        return intervals.paired(own, base, lower_is_better=lower_is_better(score))

    @property
    def budget_text(self) -> str:
        """Its budget with the unit; empty if it is not known."""
        if self.budget is None:
            return ""
        scale, unit = quantities.budget_scale(self.budget, self.match)
        return f"{self.budget / scale:,.4g} {unit}"


@dataclass(frozen=True)
class Results:
    """results.json, read back."""

    match: str
    ancestors: tuple[str, ...]
    environment: Record
    command: list[str]
    rows: tuple[Record, ...]
    references: tuple[Record, ...]
    headline: tuple[str, ...]

    @cached_property
    def arms(self) -> list[Arm]:
        """The rows by label, match and budget, in order of first appearance."""
        members: dict[tuple[str, str, float | None], list[Record]] = {}
        for row in self.rows:
            members.setdefault((row["label"], row["match"], row["budget"]), []).append(row)
        return [
            Arm(*key, tuple(row for row in rows if row["status"] == "ok"), sum(row["status"] != "ok" for row in rows))
            for key, rows in members.items()
        ]

    @property
    def labels(self) -> list[str]:
        """The labels of the rows, each once."""
        return list(dict.fromkeys(arm.label for arm in self.arms))

    @property
    def varied(self) -> list[str]:
        """Which of "match" and "budget" is not the same for all arms."""
        return [name for name in ("match", "budget") if len({getattr(arm, name) for arm in self.arms}) > 1]

    def name_of(self, arm: Arm) -> str:
        """An arm's label, with its match and budget where these vary."""
        varied = {"match": arm.match, "budget": arm.budget_text}
        return ", ".join(filter(None, (arm.label, *(varied[name] for name in self.varied))))

    def largest(self, score: str) -> float:
        """The largest absolute value of a score: all its values are written with as many decimals as it needs."""
        known = [row["scores"].get(score) for row in (*self.rows, *self.references)]
        return max((abs(value) for value in known if value is not None), default=0.0)

    def score_names(self) -> list[str]:
        """Every score that a row or a reference has, the headline's first."""
        found = [name for row in (*self.rows, *self.references) for name in row["scores"]]
        return list(dict.fromkeys([*(name for name in self.headline if name in found), *found]))


def lower_is_better(score: str) -> bool:
    """Whether a score is a loss, by the last word of its name."""
    return score.split()[-1:] in (["loss"], ["perplexity"])


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean and sample standard deviation of the values that are not None; None if all are."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(mean(known), stdev(known) if len(known) > 1 else None)


def record_of(
    run: RowRun,
    *,
    budget: float,
    scores: dict[str, float],
    items: str | None,
    error: str | None,
    differences: list[str],
) -> Record:
    """The record of a row's run: what its ledger says, its scores, and what differs besides the method.

    Args:
        budget: in the unit of the match.
        items: the file of its scores item by item, within the comparison's folder.
        error: what ended the run, if anything did.
    """
    row: Record = {"method": run.row.method, "label": run.row.label, "seed": run.seed, "budget": budget}
    row["confounds"] = differences
    if error is not None or not run.finished:
        return row | {"status": "failed", "error": error or "not finished"}
    return row_from_run(run.folder) | row | {"scores": scores, "items": items}


def row_from_run(run_folder: Path) -> Record:
    """What a run's ledger says, as a row of `write_results`; seed and method come from its configuration.

    Raises:
        ValueError: no such folder, or a run without a step.
    """
    run = read_run(run_folder)
    if run.last is None:
        raise ValueError(f"{run_folder} has no step yet: issue its command again")
    lines = {step["step"]: step for step in run.steps}
    ends = [(point, lines[point.steps[1]]) for point in run.bins()]
    return {
        "method": run.config["method"],
        "seed": run.config["seed"],
        "status": "ok" if run.finished else "failed",
        "charged_s": run.charged_s,
        "flops": dict(run.last["flops"]),
        "tokens": run.last["tokens"]["real"],
        "epochs": run.last["epoch"],
        "tokens_per_s": run.tokens_per_s,
        "mfu": run.flops_per_s / run.peak_flops if run.peak_flops and run.flops_per_s else None,
        "joules": run.last["joules"],
        "teacher_share": run.teacher_share,
        "phase_s": run.seconds_by_kind,
        "curves": [
            (end["charged_s"], sum(end["flops"].values()), end["tokens"]["real"], point.loss) for point, end in ends
        ],
    }


def write_results(
    folder: Path,
    rows: Iterable[Mapping[str, Any]],
    *,
    match: str,
    ancestors: Iterable[str],
    environment: Mapping[str, Any],
    command: list[str],
    references: Iterable[Mapping[str, Any]] = (),
    headline: Iterable[str] = (),
) -> Path:
    """Writes results.json whole or not at all.

    Args:
        rows: method, seed and status ("ok" or "failed"), and if known: label, match, budget, charged_s, flops (by
            part), tokens, epochs, tokens_per_s, mfu, joules, teacher_share, phase_s, scores, items (as in `items`),
            curves (points of charged_s, flops, tokens, loss), confounds, error. In the file `flops` is the sum of
            `flops_by_part`.
        ancestors: the rows' teachers, and the models that they were made from.
        references: label and scores of models that were not trained here: the teachers, the untrained student.
        headline: the scores that the main table and the plots show; default: the first three.
    """
    content = {
        "match": match,
        "ancestors": list(ancestors),
        "command": command,
        "environment": dict(environment),
        "headline": list(headline),
        "rows": [_row(row, match) for row in rows],
        "references": [{"label": row["label"], "scores": dict(row["scores"])} for row in references],
    }
    return files.write(Path(folder) / RESULTS, json.dumps(finite(content), indent=1, allow_nan=False) + "\n")


def read_results(folder: Path) -> Results:
    """Reads results.json.

    Raises:
        ValueError: there is none.
    """
    path = Path(folder) / RESULTS
    if not path.exists():
        raise ValueError(f"no {path}: python -m fastkd.compare writes it")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): issue the comparison's command again") from error
    names = content["headline"] or _first_scores(content["rows"])
    return Results(
        match=content["match"],
        ancestors=tuple(content["ancestors"]),
        environment=content["environment"],
        command=content["command"],
        rows=tuple(
            row | {"items": items}
            for row, items in zip(content["rows"], read_items(Path(folder), content["rows"]), strict=True)
        ),
        references=tuple(content["references"]),
        headline=tuple(names),
    )


def _first_scores(rows: list[Record]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["scores"]))[:3]


def _row(row: Mapping[str, Any], match: str) -> Record:
    parts = row.get("flops")
    if isinstance(parts, Mapping):
        row = {**row, "flops": sum(parts.values()), "flops_by_part": dict(parts)}
    return {
        "method": row["method"],
        "label": row.get("label") or row["method"],
        "seed": row["seed"],
        "match": row.get("match") or match,
        "budget": row.get("budget"),
        "status": row["status"],
        "error": row.get("error"),
        **{name: row.get(name) for name in NUMBERS},
        "flops_by_part": row.get("flops_by_part") or {},
        "phase_s": dict(row.get("phase_s") or {}),
        "scores": dict(row.get("scores") or {}),
        "items": row.get("items") or {},
        "confounds": list(row.get("confounds") or []),
        "curves": [list(point) for point in row.get("curves") or []],
    }
