"""Tables of a comparison: what each method cost and scored, what it gained over scratch, what else differs."""

from collections.abc import Callable, Iterator

from fastkd import quantities
from fastkd.comparison.results import SCRATCH, Group, Results, Spread, differences
from fastkd.files import Record
from fastkd.reports import bars, plots
from fastkd.reports.tables import Cell, Cells, Table, numeric

# field: (head, how it is written)
COST: dict[str, tuple[str, Callable[[float], str]]] = {
    "charged_s": ("GPU-seconds", quantities.number),
    "flops": ("FLOPs", lambda value: f"{value:.3e}"),
    "tokens": ("tokens", quantities.count),
    "epochs": ("epochs", lambda value: quantities.number(value, 3)),
    "tokens_per_s": ("tokens/s", lambda value: f"{value:,.0f}"),
    "mfu": ("MFU", lambda value: f"{value:.1%}"),
    "joules": ("joules", lambda value: quantities.scaled(value, "J")),
    "teacher_share": ("teacher's share", lambda value: f"{value:.1%}"),
}


def agreement(groups: list[Group]) -> Iterator[str]:
    """For each match and budget, how far apart the rows are in what was matched."""
    for match, budget in dict.fromkeys((group.match, group.budget) for group in groups):
        field = "flops" if match == "flops" else "charged_s"
        members = [group for group in groups if (group.match, group.budget) == (match, budget)]
        values = [row[field] for group in members for row in group.rows if row[field] is not None]
        if len(values) > 1:
            apart, unit = max(values) - min(values), "FLOP" if match == "flops" else "GPU-seconds"
            yield (
                f"Matched on {match}: {len(values)} rows between {quantities.number(min(values))} and "
                f"{quantities.number(max(values))} {unit}, {apart / max(values):.2%} apart."
            )


def main_table(results: Results, groups: list[Group]) -> Table:
    """A row for each label, match and budget: what it cost, and the headline scores as mean ± standard deviation."""
    names = [name for name in results.headline if name in results.score_names()]
    rows: list[Cells] = [
        (
            *_labels(groups, group),
            *(_spread_cell(f"{group.key}.{name}", group.spread(name), write) for name, (_, write) in COST.items()),
            *(_score_cell(results, group.key, name, group.score(name)) for name in names),
        )
        for group in groups
    ]
    blanks = [""] * (len(_label_head(groups)) - 1 + len(COST))
    rows += [
        (reference["label"], *blanks, *(_reference_cell(results, reference, name) for name in names))
        for reference in results.references
    ]
    head = (*_label_head(groups), *(title for title, _ in COST.values()), *names)
    return Table(head, rows, sums=len(results.references))


def score_table(results: Results, groups: list[Group]) -> Table:
    """All scores, where there are more than the headline's."""
    names = results.score_names()
    if set(names) <= set(results.headline):
        return Table(("",), [])
    rows: list[Cells] = [
        (
            *_labels(groups, group),
            *(_score_cell(results, f"all/{group.key}", name, group.score(name)) for name in names),
        )
        for group in groups
    ]
    blanks = [""] * (len(_label_head(groups)) - 1)
    rows += [
        (reference["label"], *blanks, *(_reference_cell(results, reference, name, "all/") for name in names))
        for reference in results.references
    ]
    return Table((*_label_head(groups), *names), rows, sums=len(results.references))


def scratch_table(results: Results, groups: list[Group]) -> Table:
    """Each label's scores less those of scratch training under the same budget, seed by seed."""
    scratch = {(group.match, group.budget): group for group in groups if group.label == SCRATCH}
    rows: list[Cells] = []
    for group in groups:
        base = scratch.get((group.match, group.budget))
        if base is not None and group is not base:
            cells = (_difference_cell(results, group, base, name) for name in results.headline)
            rows.append((*_labels(groups, group), *cells))
    return Table((*_label_head(groups), *results.headline), rows)


def seconds_table(groups: list[Group]) -> Table:
    """GPU-seconds by phase, a column for each phase that took any; means over seeds."""
    means = [(group, group.mean_of("phase_s")) for group in groups if group.rows]
    names = sorted({name for _, table in means for name, value in table.items() if value}, key=bars.phase_order)
    largest = max((value for _, table in means for value in table.values()), default=0.0)
    rows: list[Cells] = [
        (*_labels(groups, group), *(_phase_cell(group, name, table.get(name), largest) for name in names))
        for group, table in means
        if table
    ]
    return Table((*_label_head(groups), *names), rows)


def _phase_cell(group: Group, name: str, seconds: float | None, largest: float) -> Cell:
    return numeric(f"{group.key}.phase.{name}", seconds, quantities.aligned(seconds or 0.0, largest))


def seed_table(results: Results) -> Table:
    """Every row as it ran: what it cost and the headline scores of each seed."""
    rows: list[Cells] = [
        (
            row["label"],
            str(row["match"]),
            str(row["seed"]),
            *(_written(f"row.{place}.{name}", row[name], write) for name, (_, write) in COST.items()),
            *(_seed_score_cell(results, place, name, row["scores"].get(name)) for name in results.headline),
        )
        for place, row in enumerate(results.rows)
    ]
    return Table(("label", "match", "seed", *(title for title, _ in COST.values()), *results.headline), rows)


def confound_table(groups: list[Group]) -> Table:
    """What differs between rows besides the method."""
    found = {(group.label, text): None for group in groups for row in group.rows for text in row["confounds"]}
    return Table(("label", "differs from the other rows in"), [(label, text) for label, text in found], kind="settings")


def failure_table(results: Results) -> Table:
    """Rows that failed, and why."""
    failed = [row for row in results.rows if row["status"] != "ok"]
    return Table(
        ("label", "seed", "error"), [(row["label"], str(row["seed"]), str(row["error"] or "")) for row in failed]
    )


def _label_head(groups: list[Group]) -> tuple[str, ...]:
    several = [name for name in ("match", "budget") if len({getattr(group, name) for group in groups}) > 1]
    return ("method", *several, "seeds")


def _labels(groups: list[Group], group: Group) -> Cells:
    colour = plots.LINE_STYLES[_style(groups, group.label)][0]
    seeds = f"{len(group.rows)}" + (f", {group.failed} failed" if group.failed else "")
    cells: dict[str, Cell | str] = {
        "method": Cell(group.label, colour=colour),
        "match": group.match,
        "budget": budget_text(group),
        "seeds": seeds,
    }
    return tuple(cells[name] for name in _label_head(groups))


def budget_text(group: Group) -> str:
    """The budget of a group's rows, with its unit."""
    if group.budget is None:
        return ""
    scale, unit = quantities.budget_scale(group.budget, group.match)
    return f"{group.budget / scale:,.4g} {unit}"


def _style(groups: list[Group], label: str) -> int:
    return list(dict.fromkeys(group.label for group in groups)).index(label) % len(plots.LINE_STYLES)


def _written(name: str, value: float | None, write: Callable[[float], str]) -> Cell:
    return numeric(name, value, None if value is None else write(value))


def _spread_cell(name: str, value: Spread | None, write: Callable[[float], str]) -> Cell:
    return _written(name, value.mean if value else None, write)


def _score_cell(results: Results, key: str, name: str, value: Spread | None) -> Cell:
    text = spread_text(value, results.largest(name))
    return numeric(f"{key}.score.{name}", value.mean if value else None, text)


def _seed_score_cell(results: Results, place: int, name: str, value: float | None) -> Cell:
    return numeric(f"row.{place}.score.{name}", value, quantities.aligned(value or 0.0, results.largest(name)))


def _difference_cell(results: Results, group: Group, base: Group, name: str) -> Cell:
    value = differences(group, base, name)
    sign = "+" if value and value.mean > 0 else ""
    text = sign + spread_text(value, results.largest(name))
    return numeric(f"{group.key}.difference.{name}", value.mean if value else None, text)


def _reference_cell(results: Results, reference: Record, name: str, prefix: str = "") -> Cell:
    value = reference["scores"].get(name)
    text = quantities.aligned(value or 0.0, results.largest(name))
    return numeric(f"{prefix}{reference['label']}.score.{name}", value, text)


def spread_text(value: Spread | None, largest: float) -> str:
    """Mean ± standard deviation, "78.61 ± 0.42", the mean alone for one seed; decimals as for `largest`."""
    if value is None:
        return ""
    text = quantities.aligned(value.mean, largest)
    return text if value.deviation is None else f"{text} ± {quantities.aligned(value.deviation, largest)}"
