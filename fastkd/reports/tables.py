"""Tables of a report: cells that carry their exact number, written as HTML or as Markdown."""

import re
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from fastkd import quantities


@dataclass(frozen=True)
class Cell:
    """Text for people beside the number it stands for; no number is a blank.

    `name` identifies the number in the page (`<data data-name="…" value="…">`), so that a program finds it
    there; `colour` puts a swatch before the text, which makes the table a plot's legend.
    """

    text: str
    value: float | None = None
    name: str | None = None
    colour: str | None = None

    def html(self) -> Markup:
        """The cell's content."""
        if self.name is None:
            swatch = Markup('<i class="swatch" style="background:{}"></i>').format(self.colour)
            return (swatch if self.colour else Markup()) + escape(self.text)
        if self.value is None:
            return Markup('<span class="blank" title="not known">–</span>')
        return Markup('<data data-name="{}" value="{}">{}</data>').format(self.name, self.value, self.text)


def numeric(name: str, value: float | None, text: str | None = None) -> Cell:
    """A cell for a number, blank where it is None."""
    if value is None:
        return Cell("–", None, name)
    return Cell(quantities.number(value) if text is None else text, value, name)


def percent(part: float, whole: float) -> str:
    """`part` / `whole` in percent; nothing where there is no whole."""
    return f"{part / whole:.1%}".replace("-0.0%", "0.0%") if whole else ""


def signed_percent(value: float | None) -> str:
    """A relative difference with its sign: +4.6%, 0.0%."""
    return "" if value is None else re.sub(r"^[+-](?=0\.0%)", "", f"{value:+.1%}")


def share(name: str, part: float, whole: float) -> Cell:
    """A cell for `part` / `whole` in percent, blank where there is no whole."""
    return numeric(name, part / whole if whole else None, percent(part, whole))


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; columns of numbers are set right. `sums`: the last so many rows."""

    head: tuple[str, ...]
    rows: list[tuple[Cell | str, ...]]
    caption: str = ""
    sums: int = 0
    kind: str = field(default="", kw_only=True)  # a class for the style sheet

    def html(self) -> Markup:
        """The table as HTML."""
        parts = [Markup('<table class="{}">').format(self.kind)]
        if self.caption:
            parts.append(Markup("<caption>{}</caption>").format(self.caption))
        if any(self.head):
            cells = Markup("").join(
                Markup('<th class="{}">{}</th>').format(self._side(column), title)
                for column, title in enumerate(self.head)
            )
            parts.append(Markup("<thead><tr>{}</tr></thead>").format(cells))
        parts.append(Markup("<tbody>"))
        parts += [self._row(row, i >= len(self.rows) - self.sums) for i, row in enumerate(self.rows)]
        parts.append(Markup("</tbody></table>"))
        return Markup("\n").join(parts)

    def _row(self, row: tuple[Cell | str, ...], is_sum: bool) -> Markup:
        cells = Markup("").join(
            Markup('<{0} class="{1}">{2}</{0}>').format(
                "th" if column == 0 else "td", self._side(column), _cell(cell).html()
            )
            for column, cell in enumerate(row)
        )
        return Markup('<tr class="{}">{}</tr>').format("sum" if is_sum else "", cells)

    def _side(self, column: int) -> str:
        named = any(_cell(row[column]).name for row in self.rows if column < len(row))
        return "right" if named else "left"

    def markdown(self) -> str:
        """The table in Markdown."""
        sides = ["---:" if self._side(column) == "right" else "---" for column in range(len(self.head))]
        lines = [_markdown_row(self.head), _markdown_row(sides)]
        lines += [_markdown_row([_cell(cell).text for cell in row]) for row in self.rows]
        return "\n".join(lines) + "\n"


def _cell(cell: Cell | str) -> Cell:
    return Cell(cell) if isinstance(cell, str) else cell


def _markdown_row(texts: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(re.sub(r"\s+", " ", text).replace("|", "\\|") for text in texts) + " |"
