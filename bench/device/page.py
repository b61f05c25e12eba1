"""The page of a run: what it ran on, what is claimed beside what was measured, and every part's table and picture.

python -m bench.device.page DIR       writes DIR/README.md again
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.device import goals, part
from bench.device.part import Row
from fastkd import atomic
from fastkd.tables import Table

NAME = "README.md"
OUTCOMES = "suite.jsonl"  # what became of each part
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
    return atomic.write(out / NAME, "\n\n".join(section.strip() for section in sections) + "\n")


def _head(outcomes: Mapping[str, Row], rows: Mapping[str, Sequence[Row]]) -> str:
    lines = ["# Measured by `python -m bench.device`"]
    if rehearsed := [name for name, row in outcomes.items() if row["device"] == "cpu"]:
        lines.append(f"**A rehearsal in tiny sizes on a CPU ({', '.join(rehearsed)}): it settles no claim.**")
    facts = goals.Results(rows).last("environment", "facts")
    if facts:
        lines.append(f"{facts.get('in_words', '')}.")
    if commits := {row["commit"] for row in outcomes.values() if row.get("commit")}:
        lines.append(f"Commit {', '.join(sorted(commits))}; {max(row['date'] for row in outcomes.values())}.")
    if outcomes and not any(row["bundle"] for row in outcomes.values()):
        lines.append("Without a bundle: teachers are random and text is generated, so losses mean nothing.")
    return "\n\n".join(lines)


def _goals(outcomes: Mapping[str, Row], rows: Mapping[str, Sequence[Row]]) -> str:
    """Every goal with what was expected and measured. Rows of a rehearsal do not count."""
    measured = {name: found for name, found in rows.items() if outcomes[name]["device"] == "cuda"}
    results, predictions, gpu = goals.Results(measured), *_predictions(measured)
    lines: list[tuple[str, ...]] = []
    for goal in goals.GOALS:
        finding = goal.settle(results)
        verdict = {True: "met", False: "**not met**", None: "measured"}[finding.met] if finding else "not measured"
        lines.append((goal.claim, _predicted(goal, predictions, gpu), finding.text if finding else "", verdict))
    note = "" if predictions is None else f"\nPredicted: `bench.predictions` for {gpu}, before anything was measured.\n"
    return Table(("claim", "predicted", "measured", ""), list(lines)).markdown() + note


def _predictions(rows: Mapping[str, Sequence[Row]]) -> tuple[Any, str]:
    """The module of predictions, if it can be had, and the GPU to ask it for: an H100 where it does not know this one."""
    try:
        predictions = importlib.import_module("bench.predictions")
        name = str(goals.Results(rows).last("environment", "facts").get("device", ""))
        return predictions, predictions.gpu_named(name) or "H100"
    except Exception as error:  # a page without predictions is better than none
        print(f"no predictions: {part.in_one_line(error)}")
        return None, ""


def _predicted(goal: goals.Goal, predictions: Any, gpu: str) -> str:
    if predictions is None:
        return ""
    try:
        return goal.predicted(predictions, gpu)
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
    if picture.exists():
        blocks.append(f"![{name}]({picture.name})")
    if outcome["outcome"] != "done" and log.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-OUTPUT_LINES:]
        blocks.append("\n".join([f"{outcome['outcome']}; `{log.name}` ends:", "", "```", *lines, "```"]))
    return "\n\n".join(blocks)


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
