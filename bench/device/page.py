"""The page of a run: what it ran on, what is claimed beside what was measured, and every part's table and picture.

python -m bench.device.page DIR       writes DIR/README.md again
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.device import goals, part
from bench.device.part import Row
from fastkd import files
from fastkd.reports.tables import Table

NAME = "README.md"
OUTCOMES = "suite.jsonl"  # what became of each part
VERDICTS, UNKNOWN = {True: "met", False: "not met", None: "measured"}, "not measured"
OUTPUT_LINES = 12  # of a log, for a part that did not end well


def write(out: Path) -> Path:
    """Write the page of a folder with rows; it may be that of a run that was cut off."""
    outcomes = {row["part"]: row for row in part.read(out / OUTCOMES)}  # the last of each
    rows = {name: part.read(out / f"{name}.jsonl") for name in outcomes}
    sections = [
        _head(outcomes, rows),
        "## Claims and goals\n\n" + _goals(outcomes, rows),
        "## Parts\n\n" + _outcomes(outcomes, rows),
        *(_section(out, name, outcome) for name, outcome in outcomes.items()),
    ]
    return files.write(out / NAME, "\n\n".join(section.strip() for section in sections) + "\n")


def _head(outcomes: Mapping[str, Row], rows: Mapping[str, Sequence[Row]]) -> str:
    lines = ["# Measured by `python -m bench.device`"]
    if rehearsed := [name for name, row in outcomes.items() if row["device"] == "cpu"]:
        lines.append(f"**A rehearsal in tiny sizes on a CPU ({', '.join(rehearsed)}): it settles no claim.**")
    facts = goals.Results(rows).last("environment", "facts")
    if facts:
        lines.append(f"{facts['in_words']}.")
    commits = {row["commit"] for row in outcomes.values() if row.get("commit")} - {facts.get("commit")}
    if commits:
        lines.append(f"Parts were measured at commit {', '.join(sorted(commits))} (+: with changes) too.")
    if outcomes and not any(row["bundle"] for row in outcomes.values()):
        lines.append("Without a bundle: teachers are random and text is generated, so losses mean nothing.")
    return "\n\n".join(lines)


def _goals(outcomes: Mapping[str, Row], rows: Mapping[str, Sequence[Row]]) -> str:
    """Every goal with what was expected and measured. Rows of a rehearsal do not count."""
    measured = {name: found for name, found in rows.items() if outcomes[name]["device"] == "cuda"}
    results = goals.Results(measured, [name for name, row in outcomes.items() if row["outcome"] == "done"])
    predictions, note = _predictions(results)
    lines: list[tuple[str, ...]] = []
    for goal in goals.GOALS:
        finding = goal.settle(results)
        verdict = VERDICTS[finding.met] if finding else UNKNOWN
        lines.append((goal.claim, _predicted(goal, predictions), finding.text if finding else "", verdict))
    count = ", ".join(
        f"{sum(line[3] == verdict for line in lines)} {verdict.strip('*')}" for verdict in VERDICTS.values()
    )
    count += f", {sum(line[3] == UNKNOWN for line in lines)} {UNKNOWN}"
    return Table(("claim", "predicted", "measured", ""), list(lines)).markdown() + f"\n{count}. {note}\n"


def _predictions(results: goals.Results) -> tuple[Callable[[goals.Goal], str] | None, str]:
    """What gives a goal's prediction, and a line about where it is from; None where there are none to be had."""
    try:
        predictions = importlib.import_module("bench.predictions")
        # an H100 where the device is not known
        gpu = predictions.gpu_named(str(results.last("environment", "facts").get("device", ""))) or "H100"
    except Exception as error:
        return None, f"No predictions: {part.in_one_line(error)}."
    note = f"Predicted by `bench.predictions` for {gpu}, from data sheets alone."
    return lambda goal: goal.predicted(predictions, gpu), note


def _predicted(goal: goals.Goal, predict: Callable[[goals.Goal], str] | None) -> str:
    """A goal's prediction; that there is none costs no page."""
    try:
        return "" if predict is None else predict(goal)
    except Exception as error:
        return f"none ({part.in_one_line(error)})"


def _outcomes(outcomes: Mapping[str, Row], rows: Mapping[str, Sequence[Row]]) -> str:
    lines: list[tuple[str, ...]] = [
        (name, row["outcome"], f"{row['seconds']:.0f} of {row['limit_s']:.0f}", str(len(rows[name])), row["line"])
        for name, row in outcomes.items()
    ]
    return Table(("part", "outcome", "seconds", "rows", "last line"), list(lines)).markdown()


def _section(out: Path, name: str, outcome: Row) -> str:
    """A part's own table and picture; of one that did not end well also the end of what it printed."""
    blocks = [f"## {name}"]
    table, picture, log = (out / f"{name}{suffix}" for suffix in (".md", ".png", ".log"))
    if table.exists():
        blocks.append(table.read_text(encoding="utf-8").strip())
    elif rows := len(part.read(out / f"{name}.jsonl")):
        blocks.append(f"No table could be made of the {rows} rows in `{name}.jsonl`.")
    if picture.exists():
        blocks.append(f"![{name}]({picture.name})")
    if outcome["outcome"] != "done" and log.exists():
        lines = _end(log.read_text(encoding="utf-8", errors="replace").splitlines())
        blocks.append("\n".join([f"{outcome['outcome']}; `{log.name}` ends:", "", "```", *lines, "```"]))
    return "\n\n".join(blocks)


def _end(lines: list[str]) -> list[str]:
    """The last lines of a log; where it ends with the stacks of a process that was asked to end, where that one was."""
    stacks = [i for i, line in enumerate(lines) if line.startswith(("Thread 0x", "Current thread 0x"))]
    if not stacks:
        return lines[-OUTPUT_LINES:]
    return lines[max(0, stacks[0] - OUTPUT_LINES // 2) : stacks[0]] + lines[stacks[-1] :][:OUTPUT_LINES]


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
