"""Tables of a comparison: what each method cost and scored, which differences hold, what else differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, get_args

from fastkd import quantities
from fastkd.comparison import claims
from fastkd.comparison.results import Arm, Results, Spread
from fastkd.reports import bars, plots
from fastkd.reports.tables import Cell, Cells, Table, numeric

if TYPE_CHECKING:
    from fastkd.comparison.claims import Claim
    from fastkd.files import Record

# field of a row: (head of its column, how it is written)
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


def agreement(results: Results) -> Iterator[str]:
    """For each match and budget, how far apart the rows are in what was matched."""
    for match, budget in dict.fromkeys((arm.match, arm.budget) for arm in results.arms):
        field = "flops" if match == "flops" else "charged_s"
        members = [arm for arm in results.arms if (arm.match, arm.budget) == (match, budget)]
        values = [row[field] for arm in members for row in arm.rows if row[field] is not None]
        if len(values) > 1:
            apart, unit = max(values) - min(values), "FLOP" if match == "flops" else "GPU-seconds"
            yield (
                f"Matched on {match}: {len(values)} rows between {quantities.number(min(values))} and "
                f"{quantities.number(max(values))} {unit}, {apart / max(values):.2%} apart."
            )


def main_table(results: Results) -> Table:
    """A line for each label, match and budget: its cost, and the headline scores as mean ± standard deviation."""
    names = [name for name in results.headline if name in results.score_names()]
    rows: list[Cells] = [
        (
            *_arm_cells(results, arm),
            *(_spread_cell(f"{arm.key}.{name}", arm.spread(name), write) for name, (_, write) in COST.items()),
            *(_score_cell(results, arm.key, name, arm.score(name)) for name in names),
        )
        for arm in results.arms
    ]
    rows += _reference_rows(results, names, blanks=len(COST))
    head = (*_arm_head(results), *(title for title, _ in COST.values()), *names)
    return Table(head, rows, sums=len(results.references))


def score_table(results: Results) -> Table:
    """All scores; empty if the headline has them all."""
    names = results.score_names()
    if set(names) <= set(results.headline):
        return Table(("",), [])
    rows: list[Cells] = [
        (
            *_arm_cells(results, arm),
            *(_score_cell(results, f"all/{arm.key}", name, arm.score(name)) for name in names),
        )
        for arm in results.arms
    ]
    rows += _reference_rows(results, names, prefix="all/")
    return Table((*_arm_head(results), *names), rows, sums=len(results.references))


def claims_table(results: Results, score: str) -> Table:
    """A score's differences from scratch training and from the best row; empty if there is no second row to compare."""
    found = {side: claims.against(results, side, score) for side in get_args(claims.Side)}
    sides = {side: {id(claim.arm): claim for claim in made} for side, made in found.items() if made}
    has_intervals = any(claim.difference.half_width is not None for side in sides.values() for claim in side.values())
    rows: list[Cells] = []
    for arm in results.arms if sides else []:
        cells: list[Cell | str] = []
        for side, made in sides.items():
            own = side if claims.base_of(results, arm, side, score) is arm else ""
            cells += (
                _claim_cells(results, side, made.get(id(arm)), has_intervals) or (own, "", "")[: 1 + 2 * has_intervals]
            )
        rows.append((*_arm_cells(results, arm), *cells))
    columns = ("95% interval", "P(better)") if has_intervals else ()
    head = (*_arm_head(results), *(title for side in sides for title in (f"less {side}", *columns)))
    return Table(head, rows, kind="" if has_intervals else "narrow")


def seconds_table(results: Results) -> Table:
    """GPU-seconds by phase, means over seeds; a column for each phase that took any."""
    means = [(arm, arm.mean_of("phase_s")) for arm in results.arms if arm.rows]
    names = sorted({name for _, phases in means for name, value in phases.items() if value}, key=bars.phase_order)
    largest = max((value for _, phases in means for value in phases.values()), default=0.0)
    rows: list[Cells] = [
        (*_arm_cells(results, arm), *(_phase_cell(arm, name, phases.get(name), largest) for name in names))
        for arm, phases in means
        if phases
    ]
    return Table((*_arm_head(results), *names), rows)


def seed_table(results: Results) -> Table:
    """Every row as it ran: its cost and the headline scores of each seed."""
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


def differences_table(results: Results) -> Table:
    """The confounds: what differs between rows besides the method, each once for a label (see `differences`)."""
    found = {(arm.label, text): None for arm in results.arms for row in arm.rows for text in row["confounds"]}
    return Table(("label", "differs from the other rows in"), list(found), kind="settings")


def failure_table(results: Results) -> Table:
    """Rows that failed, and why."""
    failed = [row for row in results.rows if row["status"] != "ok"]
    return Table(
        ("label", "seed", "error"), [(row["label"], str(row["seed"]), str(row["error"] or "")) for row in failed]
    )


def _arm_head(results: Results) -> tuple[str, ...]:
    return ("method", *results.varied, "seeds")


def _arm_cells(results: Results, arm: Arm) -> Cells:
    """The cells under `_arm_head`."""
    colour = plots.LINE_STYLES[results.labels.index(arm.label) % len(plots.LINE_STYLES)][0]
    seeds = f"{len(arm.rows)}" + (f", {arm.failed} failed" if arm.failed else "")
    varied = {"match": arm.match, "budget": arm.budget_text}
    return (Cell(arm.label, colour=colour), *(varied[name] for name in results.varied), seeds)


def _reference_rows(results: Results, names: list[str], *, blanks: int = 0, prefix: str = "") -> list[Cells]:
    """Rows of the references: the label, nothing in the columns of `_arm_head` and in `blanks` more, the scores."""
    blank = [""] * (len(_arm_head(results)) - 1 + blanks)
    return [
        (reference["label"], *blank, *(_reference_cell(results, reference, name, prefix) for name in names))
        for reference in results.references
    ]


def _written(name: str, value: float | None, write: Callable[[float], str]) -> Cell:
    return numeric(name, value, None if value is None else write(value))


def _spread_cell(name: str, value: Spread | None, write: Callable[[float], str]) -> Cell:
    return _written(name, value.mean if value else None, write)


def _score_cell(results: Results, key: str, name: str, value: Spread | None) -> Cell:
    text = spread_text(value, results.largest(name))
    return numeric(f"{key}.score.{name}", value.mean if value else None, text)


def _seed_score_cell(results: Results, place: int, name: str, value: float | None) -> Cell:
    return numeric(f"row.{place}.score.{name}", value, quantities.aligned(value or 0.0, results.largest(name)))


def _phase_cell(arm: Arm, name: str, seconds: float | None, largest: float) -> Cell:
    return numeric(f"{arm.key}.phase.{name}", seconds, quantities.aligned(seconds or 0.0, largest))


def _claim_cells(results: Results, side: str, claim: Claim | None, has_intervals: bool) -> Cells:
    """The cells of a difference: the mean and, if any row has one, its interval and P(better); none without a claim."""
    if claim is None:
        return ()
    key, largest, found = f"{claim.arm.key}.%s.{side}.{claim.score}", results.largest(claim.score), claim.difference
    mean = numeric(key % "difference", found.mean, claims.signed(found.mean, largest))
    if not has_intervals:
        return (mean,)
    half, p = found.half_width, found.p_better
    ends = [claims.signed(found.mean + sign * (half or 0.0), largest) for sign in (-1, 1)]
    chance = claims.probability(p or 0.0) + (", holds" if claim.holds else "")
    return (mean, numeric(key % "half_width", half, " to ".join(ends)), numeric(key % "p_better", p, chance))


def _reference_cell(results: Results, reference: Record, name: str, prefix: str) -> Cell:
    value = reference["scores"].get(name)
    text = quantities.aligned(value or 0.0, results.largest(name))
    return numeric(f"{prefix}{reference['label']}.score.{name}", value, text)


def spread_text(value: Spread | None, largest: float) -> str:
    """Mean ± standard deviation, "78.61 ± 0.42"; only the mean for one seed. Decimals are those of `largest`."""
    if value is None:
        return ""
    text = quantities.aligned(value.mean, largest)
    return text if value.deviation is None else f"{text} ± {quantities.aligned(value.deviation, largest)}"
