"""Rows of a comparison: how --methods names them, which is the base row, and the runs that they mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from fastkd import config_file, recipe
from fastkd.config import Resolved, resolve
from fastkd.run_config import RunConfig

# Options that a row may have for itself: those that are on or off, and what each changes; those of any run that it gives a
# value, besides those of its methods.
ROW_OPTIONS = {
    "as_released": "the released objective, not the paper's formula",
    "init_from_teacher": "the student starts from teacher layers, not at random",
}
ROW_VALUES = ("optimizer", "schedule", "mask_rate")
BudgetOption = dict[str, float]  # budget_gpu_hours or budget_flops, and its value


@dataclass(frozen=True)
class Row:
    """A recipe, with options and a teacher that only this row has."""

    method: str  # one or several, as `recipe.spelled` writes them
    options: tuple[str, ...] = ()
    teacher: str | None = None
    values: tuple[tuple[str, str | float | None], ...] = ()

    @property
    def label(self) -> str:
        """Its name in tables."""
        named = [*self.options, *(f"{name}={value}" for name, value in self.values)]
        extras = "".join(f" {_flag(name)}" for name in named)
        return self.method + extras + (f" @{Path(self.teacher).name}" if self.teacher else "")

    @property
    def slug(self) -> str:
        """Its name in folders."""
        return recipe.slug(self.label).replace(" ", "").replace("+", "-").replace("@", "-at-")

    @property
    def is_plain(self) -> bool:
        """Whether it has no option of its own."""
        return not self.options and not self.values

    @property
    def starts_from_teacher(self) -> bool:
        """Whether its student starts from teacher layers, by an option of this row."""
        return "init_from_teacher" in self.options

    @property
    def control(self) -> Row | None:
        """Scratch training from the same start; None if its student starts at random."""
        values = tuple(each for each in self.values if each[0] in ROW_VALUES)
        return Row("mlm", ("init_from_teacher",), self.teacher, values) if self.starts_from_teacher else None

    @property
    def reads(self) -> set[str]:
        """The names of all options that its run knows."""
        return {f.name for cls in (RunConfig, recipe.options_class(self.method)) for f in dataclasses.fields(cls)}

    def run_options(self, shared: dict[str, Any]) -> dict[str, Any]:
        """The options of its run that are given: the shared ones that its methods read, and its own."""
        known = self.reads
        options = {name: value for name, value in shared.items() if name in known}
        if self.teacher is not None:  # the student keeps the other rows' tokenizer, not that of this teacher
            options["tokenizer"] = Row("mlm").settings(shared)["tokenizer"]
            options["teacher"] = self.teacher
        if not recipe.uses_teacher(self.method) and not self.starts_from_teacher:
            lender = options.pop("teacher", None)
            options.setdefault("tokenizer", lender)
            options = {name: value for name, value in options.items() if value is not None}
        return options | {"method": self.method} | dict.fromkeys(self.options, True) | dict(self.values)

    def resolved(self, shared: dict[str, Any], **more: Any) -> Resolved:
        """Its run, with ``more`` (a budget, a seed, a folder). Only the steps are charged."""
        return resolve(self.run_options(shared) | {"charge": "compute"} | more)

    def settings(self, shared: dict[str, Any]) -> dict[str, Any]:
        """All options of its run, by name; the budget is a stand-in."""
        return dataclasses.asdict(self.resolved(shared, budget_tokens=1).run)

    def default_rates(self, shared: dict[str, Any]) -> list[float]:
        """The learning rate of each of its methods without a search."""
        given = shared.get("lr")
        return [float(given)] if given else recipe.default_rates(self.method)


@dataclass(frozen=True)
class RowRun:
    """One run of a row: under one budget, with one seed."""

    row: Row
    budget: BudgetOption
    seed: int  # from 0: added to --seed
    comparison: Path  # the comparison's folder

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.comparison / "rows" / f"{self._name}-seed{self.seed}"

    @property
    def tuning_folder(self) -> Path:
        """The folder of the search for the learning rate, which all seeds share."""
        return self.comparison / "tuning" / self._name

    @property
    def finished(self) -> bool:
        """Whether the run came to its end and exported a student."""
        from fastkd.run_folder import has_student  # only now: it loads PyTorch, which a mistake in options must not

        return has_student(self.folder)

    @property
    def _name(self) -> str:
        (amount,) = self.budget.values()
        return f"{self.row.slug}-{amount:g}".replace("+", "")  # 1e+18


def parse_rows(specs: str, as_released: bool) -> list[Row]:
    """The rows that --methods names, separated by commas.

    Args:
        as_released: adds a row with the released objective for each plain row whose method has one.

    Raises:
        ValueError: no row, a row named twice, or one that `parse_row` refuses.
    """
    rows = [parse_row(spec) for spec in specs.split(",") if spec.strip()]
    if as_released:
        plain = [row for row in rows if row.is_plain]
        rows += [dataclasses.replace(row, options=("as_released",)) for row in plain if has_released(row.method)]
    if not rows:
        raise ValueError("--methods names no row: give, for example, --methods mlm,minilmv2")
    labels = [row.label for row in rows]
    doubles = [label for label in labels if labels.count(label) > 1]
    if doubles:
        raise ValueError(f"--methods names {doubles[0]} twice: leave one out, and use --seeds for repeats")
    return rows


def controls(rows: Sequence[Row]) -> list[Row]:
    """The rows that are missing beside those that start from a teacher: scratch training from the same start, which tells what
    the start gives without the method."""
    wanted = dict.fromkeys(row.control for row in rows)
    return [row for row in wanted if row is not None and row not in rows]


def parse_row(spec: str) -> Row:
    """A row from METHOD[+option…][+option=value…][@TEACHER], where METHOD may be a recipe such as minilmv2:0.3>mlm.

    Raises:
        ValueError: an unknown method, an option that neither a row nor its methods have, a value that the option does not
            take, or a teacher without use.
    """
    head, _, teacher = spec.strip().partition("@")
    named, *given = (part.strip() for part in head.split("+"))
    method = recipe.spelled(named.replace("-", "_"))
    kinds = config_file.kinds(recipe.options_class(method))
    flags = [name for name in ROW_OPTIONS if name in {*kinds, "init_from_teacher"}]
    kinds = {name: config_file.kinds(RunConfig)[name] for name in ROW_VALUES} | kinds
    valued = {name: kind for name, kind in kinds.items() if kind is not bool}
    options = dict[str, str | float | None]()
    for each in given:
        flag, equals, text = (part.strip() for part in each.partition("="))
        name = flag.replace("-", "_")
        if name in options:
            raise ValueError(f"row {spec!r} has +{flag} twice: leave one out")
        if name not in valued and (equals or name not in flags):
            known = (*flags, *(f"{name}=…" for name in valued))
            raise ValueError(f"row {spec!r}: {method} takes {', '.join(map(_flag, known))}, not +{each}")
        options[name] = _value(spec, name, valued[name], text) if name in valued else None
    values = tuple((name, options[name]) for name in valued if name in options)
    row = Row(method, tuple(name for name in options if name not in valued), teacher or None, values)
    if teacher and not recipe.uses_teacher(method) and not row.starts_from_teacher:
        raise ValueError(f"row {spec!r}: {method} trains without a teacher: leave @{teacher} out")
    return row


def _flag(name: str) -> str:
    return "+" + name.replace("_", "-")


def _value(spec: str, name: str, kind: Any, text: str) -> str | float:
    """An option's value in a row; its range is checked with the row's other options."""
    value: str | float = text
    for number in (float, int):
        if number in (kind, *get_args(kind)):
            with suppress(ValueError):
                value = number(text)
    if config_file.fits(value, kind):
        return value
    raise ValueError(f"row {spec!r}: {_flag(name)}=… takes {config_file.in_words(kind)}, got {text!r}")


def has_released(method: str) -> bool:
    """Whether a method, or one of a recipe, has an ``as_released`` variant."""
    return "as_released" in {f.name for f in dataclasses.fields(recipe.options_class(method))}


def base_row(rows: Sequence[Row]) -> Row:
    """The row that the others are compared with: scratch training, or the first row if there is none."""
    return next((row for row in rows if row.method == "mlm" and row.is_plain), rows[0])


def teachers(rows: Sequence[Row], shared: dict[str, Any]) -> list[str]:
    """The teachers of all rows, each once; the one that most rows have comes first."""
    found = [name for row in rows if (name := row.settings(shared)["teacher"]) is not None]
    return sorted(dict.fromkeys(found), key=found.count, reverse=True)
