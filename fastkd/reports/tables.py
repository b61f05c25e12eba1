"""Tables of a report. Each number carries its exact value; `templates/tables.html` writes a table as HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from markupsafe import Markup

from fastkd import quantities

SPECIAL = re.compile(r"[\\`*~|\[\]<>&]|(?<!\w)_|_(?!\w)")  # what Markdown reads as more than a character; not a_b


@dataclass(frozen=True)
class Cell:
    """A text, and the number that it stands for.

    `name` marks a number (`<data data-name="…" value="…">`), so that a program finds it in the page; a marked number
    that is None is not known. `colour` puts a swatch before the text: the table is then the legend of a plot.
    """

    text: str
    value: float | None = None
    name: str | None = None
    colour: str | None = None


Cells = tuple[Cell | str, ...]  # a row of a table; a string is a cell without a number


def numeric(name: str, value: float | None, text: str | None = None) -> Cell:
    """A cell for a number, blank if it is None."""
    if value is None:
        return Cell("–", None, name)
    return Cell(quantities.number(value) if text is None else text, value, name)


def percent(part: float, whole: float) -> str:
    """`part` / `whole` in percent; empty if the whole is 0."""
    return f"{part / whole:.1%}".replace("-0.0%", "0.0%") if whole else ""


def signed_percent(value: float | None) -> str:
    """A relative difference with its sign: +4.6%, 0.0%."""
    return "" if value is None else re.sub(r"^[+-](?=0\.0%)", "", f"{value:+.1%}")


def share(name: str, part: float, whole: float) -> Cell:
    """A cell for `part` / `whole` in percent, blank if the whole is 0."""
    return numeric(name, part / whole if whole else None, percent(part, whole))


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; columns of numbers are aligned right. The last `sums` rows are totals."""

    head: tuple[str, ...]
    rows: list[Cells]
    sums: int = 0
    kind: str = field(default="", kw_only=True)  # a class of the style sheet

    @cached_property
    def sides(self) -> list[str]:
        """Each column's alignment: right if it holds a number, else left."""
        columns = max(map(len, (self.head, *self.rows)))
        return ["right" if any(_is_number(row, column) for row in self.rows) else "left" for column in range(columns)]

    def markdown(self) -> str:
        """The table in Markdown; texts are escaped unless they are `Markup`."""
        rules = ("---:" if side == "right" else "---" for side in self.sides)
        texts = ((cell if isinstance(cell, str) else cell.text for cell in row) for row in self.rows)
        return "".join((_markdown_row(self.head), f"| {' | '.join(rules)} |\n", *map(_markdown_row, texts)))


def _is_number(row: Cells, column: int) -> bool:
    cell = row[column] if column < len(row) else ""
    return isinstance(cell, Cell) and cell.name is not None


def _markdown_row(texts: Iterable[str]) -> str:
    return "| " + " | ".join(text if isinstance(text, Markup) else escape_markdown(text) for text in texts) + " |\n"


def escape_markdown(text: str) -> str:
    """A text as Markdown that shows it, on one line, in a table's cell too: no tag, link, code or new column comes of it."""
    return SPECIAL.sub(_escaped, re.sub(r"\s+", " ", text))


def _escaped(found: re.Match[str]) -> str:
    return {"<": "&lt;", ">": "&gt;", "&": "&amp;"}.get(found[0], f"\\{found[0]}")


def settings_table(settings: Mapping[str, Any], head: str) -> Table:
    """Nested settings as rows of name and value, without those that are empty."""
    return Table((head, "value"), list(_flat(settings)), kind="settings")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[Cells]:
    for key in sorted(settings):
        value = settings[key]
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value not in (None, "", [], ()):
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield f"{prefix}{key}", text
