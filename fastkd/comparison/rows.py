"""Rows of a comparison: how one is written, which run it means, what sets it apart, and what came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd import methods
from fastkd.comparison.results import row_from_run
from fastkd.config import Resolved, resolve
from fastkd.files import Record
from fastkd.run_config import RunConfig
from fastkd.run_folder import Run, read_run

# What a row may differ in without being marked: its method, and where and when it ran.
FREE = {
    "method",
    "teacher",
    "tokenizer",
    "output_dir",
    "seed",
    "lr",
    "budget_gpu_hours",
    "budget_flops",
    "budget_tokens",
}
ROW_OPTIONS = {
    "as_released": "the released objective, not the paper's formula",
    "init_from_teacher": "the student starts from teacher layers, not at random",
}
NO_SURROUNDINGS = ("command", "packages", "teacher_version")  # of environment.json


@dataclass(frozen=True)
class Row:
    """A method, options of this row alone, and a teacher of this row alone."""

    method: str
    options: tuple[str, ...] = ()
    teacher: str | None = None

    @property
    def label(self) -> str:
        """How tables call it."""
        extras = "".join(f" +{name.replace('_', '-')}" for name in self.options)
        return self.method + extras + (f" @{Path(self.teacher).name}" if self.teacher else "")

    @property
    def slug(self) -> str:
        """How its folder is called."""
        return self.label.replace(" ", "").replace("+", "-").replace("@", "-at-")

    @property
    def starts_from_teacher(self) -> bool:
        """Whether its student alone starts from its teacher's layers."""
        return "init_from_teacher" in self.options

    def run_options(self, shared: dict[str, Any]) -> dict[str, Any]:
        """Explicit options of its run: the shared ones that its method reads, and its own."""
        module = methods.load(self.method)
        known = {f.name for cls in (RunConfig, module.Config) for f in dataclasses.fields(cls)}
        options = {name: value for name, value in shared.items() if name in known}
        if self.teacher is not None:  # the student stays that of the other rows: their tokenizer, not this teacher's
            options["tokenizer"] = _settings(Row("mlm"), shared)["tokenizer"]
            options["teacher"] = self.teacher
        if not module.METHOD.uses_teacher and not self.starts_from_teacher:
            lender = options.pop("teacher", None)
            options.setdefault("tokenizer", lender)
            options = {name: value for name, value in options.items() if value is not None}
        return options | {"method": self.method} | dict.fromkeys(self.options, True)

    def resolved(self, shared: dict[str, Any], **more: Any) -> Resolved:
        """Its run: steps alone are charged, and ``more`` (a budget, a seed, a folder) is added."""
        return resolve(self.run_options(shared) | {"charge": "compute"} | more)


def parse_rows(specs: str, as_released: bool) -> list[Row]:
    """The rows that --methods names, separated by commas.

    Args:
        as_released: adds a row with the released objective for each plain row whose method has one.

    Raises:
        ValueError: no row, a row named twice, or one that `parse_row` refuses.
    """
    rows = [parse_row(spec) for spec in specs.split(",") if spec.strip()]
    if as_released:
        plain = [row for row in rows if not row.options]
        rows += [dataclasses.replace(row, options=("as_released",)) for row in plain if has_released(row.method)]
    if not rows:
        raise ValueError("--methods names no row: give, for example, --methods mlm,minilmv2")
    labels = [row.label for row in rows]
    doubles = [label for label in labels if labels.count(label) > 1]
    if doubles:
        raise ValueError(f"--methods names {doubles[0]} twice: leave one out, and use --seeds for repeats")
    return rows


def parse_row(spec: str) -> Row:
    """A row from METHOD[+option…][@TEACHER].

    Raises:
        ValueError: an unknown method, or an option that its method or a row does not have.
    """
    head, _, teacher = spec.strip().partition("@")
    method, *options = (part.strip().replace("-", "_") for part in head.split("+"))
    module = methods.load(method)
    read = {f.name for f in dataclasses.fields(module.Config)} | {"init_from_teacher"}
    for name in options:
        if name not in ROW_OPTIONS or name not in read:
            allowed = ", ".join("+" + known.replace("_", "-") for known in ROW_OPTIONS if known in read)
            raise ValueError(f"row {spec!r}: {method} takes {allowed}, not +{name.replace('_', '-')}")
    row = Row(method, tuple(options), teacher or None)
    if teacher and not module.METHOD.uses_teacher and not row.starts_from_teacher:
        raise ValueError(f"row {spec!r}: {method} trains without a teacher: leave @{teacher} out")
    return row


def has_released(method: str) -> bool:
    """Whether a method has an ``as_released`` variant."""
    return "as_released" in {f.name for f in dataclasses.fields(methods.load(method).Config)}


def base_row(rows: Sequence[Row]) -> Row:
    """The row that the others are set against: scratch training, or the first where there is none."""
    return next((row for row in rows if row.method == "mlm" and not row.options), rows[0])


def teachers(rows: Sequence[Row], shared: dict[str, Any]) -> list[str]:
    """The teachers of all rows, each once, that of most rows first."""
    found = [name for row in rows if (name := _settings(row, shared)["teacher"]) is not None]
    return sorted(dict.fromkeys(found), key=found.count, reverse=True)


def confounds(
    row: Row, rows: Sequence[Row], shared: dict[str, Any], lr: float | None, base_lr: float | None
) -> list[str]:
    """What sets a row apart from the comparison's first (scratch) row besides its method. A rate may be unknown yet."""
    base = base_row(rows)
    mine, theirs = (_settings(each, shared) for each in (row, base))
    found = [ROW_OPTIONS[name] for name in row.options]
    if lr is not None and base_lr is not None and lr != base_lr:
        found.append(f"learning rate {lr:g}, {base.label} has {base_lr:g}")
    common = next(iter(teachers(rows, shared)), None)
    if mine["teacher"] is not None and mine["teacher"] != common:
        found.append(f"teacher {mine['teacher']}, other rows have {common}")
    named = {*FREE, *ROW_OPTIONS}
    return found + [
        f"{k} {mine[k]}, {base.label} has {theirs[k]}" for k in mine if k not in named and mine[k] != theirs[k]
    ]


def circumstances(folder: Path, base_folder: Path, base: Row) -> list[str]:
    """What set a finished row's run apart besides its options: another device, version or dtype, clocks held down."""
    run, other = read_run(folder), read_run(base_folder) if base_folder.is_dir() else None
    found = []
    for name, value in _surroundings(run).items():
        theirs = _surroundings(other).get(name, value) if other is not None else value
        if value != theirs:
            found.append(f"{name} {value}, {base.label} had {theirs}")
    held = {reason: part for reason, part in (run.throttle_shares or {}).items() if part > 0}
    return found + [f"clocks held down by {reason} in {part:.0%} of readings" for reason, part in held.items()]


def _surroundings(run: Run) -> Record:
    """Where a run ran, and what ``auto`` came to there."""
    facts = {name: value for name, value in run.environment.items() if name not in NO_SURROUNDINGS}
    chosen = {name: run.plan[name] for name in ("dtype", "attention", "compile") if name in run.plan}
    return facts | run.environment.get("packages", {}) | chosen


def _settings(row: Row, shared: dict[str, Any]) -> dict[str, Any]:
    return dataclasses.asdict(row.resolved(shared, budget_tokens=1).run)


def results_row(
    row: Row, *, folder: Path, seed: int, budget: float, scores: dict[str, float], error: str | None, marks: list[str]
) -> Record:
    """A row as results.json holds it: what its run's ledger says, its scores, and what sets it apart."""
    head: Record = {"method": row.method, "label": row.label, "seed": seed, "budget": budget, "confounds": marks}
    if error is not None or not (folder / "final").is_dir():
        return head | {"status": "failed", "error": error or "not finished"}
    return row_from_run(folder) | head | {"scores": scores}
