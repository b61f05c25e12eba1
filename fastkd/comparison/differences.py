"""What differs between the rows of a comparison besides their method: the confounds of results.json.

`Comparison.differences_of` in experiment.py joins them for each run; `differences_table` in this folder's tables.py makes the
table "What else differs between the rows" of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkd import recipe
from fastkd.comparison.rows import ROW_OPTIONS, Row, base_row, teachers
from fastkd.run_folder import INPUTS, Run, find_run

if TYPE_CHECKING:
    from fastkd.comparison.tuning import Search
    from fastkd.files import Record

# Options that are compared in a way of their own, or that are no difference: method, place, seed, matched budget.
NOT_COMPARED = {
    "method",
    "teacher",
    "tokenizer",
    "output_dir",
    "seed",
    "lr",
    "budget_gpu_hours",
    "budget_flops",
    "budget_tokens",
    *ROW_OPTIONS,
}
# Of environment.json; packages are compared one by one, and of a row's inputs the corpus.
NOT_SURROUNDINGS = ("command", "packages", "teacher_revision", *(INPUTS.keys() - {"corpus_version"}))


def of_options(
    row: Row, rows: Sequence[Row], shared: dict[str, Any], rates: list[float], base_rates: list[float]
) -> list[str]:
    """How a row's options differ from those of the base row.

    Args:
        rates, base_rates: learning rates of the methods of the row and of the base row, empty if not known yet.
    """
    base = base_row(rows)
    mine, theirs = (each.settings(shared) for each in (row, base))
    found = [ROW_OPTIONS[name] for name in row.options]
    of_methods = {each.name: each.default for each in dataclasses.fields(recipe.options_class(row.method))}
    for name, value in row.values:
        if name in of_methods and value != (usual := shared.get(name, of_methods[name])):
            found.append(f"{name} {value}, otherwise {'not set' if usual is None else usual}")
    if row.control is not None and row.control != row and row.control in rows:
        found.append(f"the same start as {row.control.label}")
    if rates and base_rates and rates != base_rates:
        found.append(f"learning rate {in_words(rates)}, {base.label} has {in_words(base_rates)}")
    teacher = next(iter(teachers(rows, shared)), None)
    if mine["teacher"] is not None and mine["teacher"] != teacher:
        found.append(f"teacher {mine['teacher']}, other rows have {teacher}")
    return found + [
        f"{name} {value}, {base.label} has {theirs[name]}"
        for name, value in mine.items()
        if name not in NOT_COMPARED and value != theirs[name]
    ]


def in_words(rates: Sequence[float]) -> str:
    """The learning rates of a recipe's methods, in their order."""
    return f" {recipe.THEN} ".join(f"{rate:g}" for rate in rates)


def of_search(search: Search, count: int) -> str:
    """What the search for a learning rate among ``count`` took."""
    return f"learning rate chosen among {count}, {search.charged_s:.1f} GPU-seconds beside its budget"


def of_start(folder: Path) -> list[str]:
    """What of its teacher a run's student started with, where it is not all of it."""
    run = find_run(folder)
    remark = run.plan.get("student", {}).get("start_remark") if run else None
    return [f"start: {remark}"] if remark else []


def of_surroundings(folder: Path, base_folder: Path, base: Row) -> list[str]:
    """How a run differed from the base row's run besides its options: another device, version or dtype, slowed clocks.

    Args:
        folder, base_folder: run folders; the base row's may be missing.
    """
    run, other = find_run(folder), find_run(base_folder)
    if run is None:
        return []
    found = []
    for name, value in _surroundings(run).items():
        theirs = _surroundings(other).get(name, value) if other is not None else value
        if value != theirs:
            found.append(f"{name} {value}, {base.label} had {theirs}")
    slowed = {reason: part for reason, part in (run.throttle_shares or {}).items() if part > 0}
    return found + [f"clocks held down by {reason} in {part:.0%} of readings" for reason, part in slowed.items()]


def _surroundings(run: Run) -> Record:
    """Where a run ran, its packages, and what it chose for options that were ``auto``."""
    facts = {name: value for name, value in run.environment.items() if name not in NOT_SURROUNDINGS}
    chosen = {name: run.plan[name] for name in ("dtype", "attention", "compile") if name in run.plan}
    return facts | run.environment.get("packages", {}) | chosen
