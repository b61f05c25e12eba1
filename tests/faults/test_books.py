"""What the ledger charges, beside what a clock outside of it measured, after several kills and signals."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import run_case
import shim
from campaign import tries
from run_case import Case, Try, lines_of

CHARGES = ("loop", "compute", "all")


def times_of(log: Path) -> list[float]:
    """When each line of the ledger was written, by the shim's clock."""
    found = [line.split(" ", 3) for line in log.read_text().splitlines()] if log.exists() else []
    return [float(at) for _, at, name, path in found if name == "write" and path.endswith("/run/ledger.jsonl")]


def in_the_loop(lines: list[dict[str, Any]], times: list[float]) -> float:
    """Seconds from the first step's begin to the last thing that one process did between steps, as seen from outside."""
    steps = [number for number, line in enumerate(lines) if "event" not in line]
    if not steps:
        return 0.0
    ends = [at for line, at in zip(lines, times, strict=True) if "event" not in line or line["charged"]]
    return max(ends) - times[steps[0] - 1]


@tries(short=1, long=24, shares=2)
def test_the_ledger_is_what_was_spent(numbers: range, scratch: Case, tmp_path: Path, fault) -> None:
    """Under ``loop`` all seconds between the first step and the last, lost ones too; under ``compute`` the surviving steps."""
    with fault(
        "what is charged after three ends", "within 1% or a step a kill of what a clock outside measured"
    ) as tally:
        for number in numbers:
            drawn, place = random.Random(2000 + number), Try.below(tmp_path / "try")
            options = ("--charge", CHARGES[number % 3], "--checkpoint-minutes", drawn.choice(("0", "60")))
            at = sorted(drawn.sample(range(100, len(scratch.operations)), 3))
            with tally.attempt(f"seed {number}, {' '.join(options)}, at {at}"):
                seconds, longest = measured(scratch, place, options, at, drawn)
                run_case.check_books(place.folder)
                charged = lines_of(place.folder / "ledger.jsonl")[-1]["charged_s"]
                if options[1] == "loop":
                    allowed = max(0.01 * seconds, 3 * longest)
                    assert abs(charged - seconds) <= allowed, f"charged {charged:.3f} s, measured {seconds:.3f} s"
                scratch.check_bits(place.folder)


def measured(
    case: Case, place: Try, options: tuple[str, ...], at: list[int], drawn: random.Random
) -> tuple[float, float]:
    """Disturb a run at operations, then finish it; (seconds in its loops, its longest step or event)."""
    seconds, longest, known = 0.0, 0.0, 0
    for number, operation in enumerate([*at, 0]):
        log = place.folder.parent / f"log-{number}"
        how = drawn.choice(("kill", "term")) if operation else ""
        armed = shim.faults(place.folder, place.cache, counter=place.counter, how=how, at=operation, log=log)
        done = case.run(place, *options, **armed)
        assert operation or done.returncode == 0, run_case.last_line(done)
        path = place.folder / "ledger.jsonl"
        lines = lines_of(path) if path.exists() else []
        mine = lines[known:]
        known, times = len(lines), times_of(log)
        seconds += in_the_loop(mine, times[-len(mine) :] if mine else [])
        longest = max([longest, *(sum(line["phase_s"].values()) for line in mine if "phase_s" in line)])
        longest = max([longest, *(line["seconds"] for line in mine if line.get("charged"))])
    return seconds, longest
