"""A long run: memory, open files, threads and the ledger's bytes a step stay what they were."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from run_case import Case, Try, check_books, lines_of

TOKENS_A_STEP = 512


@dataclass(frozen=True)
class Reading:
    """What a process holds."""

    step: int
    memory: int  # KiB, resident
    files: int
    threads: int
    ledger: int  # bytes


def read(pid: int, folder: Path) -> Reading | None:
    """Now; None once it has ended."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        size = (folder / "ledger.jsonl").stat().st_size
        return Reading(0, int(status["VmRSS"].split()[0]), files, int(status["Threads"]), size)
    except (OSError, KeyError):
        return None


@pytest.mark.parametrize("steps", [60, pytest.param(20_000, marks=[pytest.mark.campaign, pytest.mark.timeout(1700)])])
def test_a_long_run_does_not_grow(steps: int, scratch: Case, tmp_path: Path, fault) -> None:
    with fault(
        f"{steps:,} steps in one process", "memory, open files, threads and the ledger's bytes a step stay"
    ) as tally:
        place = Try.below(tmp_path / "try")
        options = ("--budget-tokens", steps * TOKENS_A_STEP, "--checkpoint-minutes", "0.1", "--log-every", "50")
        process, readings = scratch.start(place, *options), []
        while process.poll() is None:
            if found := read(process.pid, place.folder):
                readings.append(found)
            process.wait_a_little(0.2 if steps < 1000 else 1.0)
        done = process.finish()
        with tally.attempt(f"{steps} steps"):
            assert done.returncode == 0, done.stderr
            check_books(place.folder)
            lines = [line for line in lines_of(place.folder / "ledger.jsonl") if "event" not in line]
            assert abs(len(lines) - steps) <= steps // 50, f"{len(lines)} steps"
            half, end = readings[len(readings) // 2], readings[len(readings) * 9 // 10]
            assert end.memory <= half.memory * 1.05 + 8192, f"memory {half.memory} to {end.memory} KiB"
            assert end.files <= half.files + 2, f"open files {half.files} to {end.files}"
            assert end.threads <= half.threads + 1, f"threads {half.threads} to {end.threads}"
            assert (place.folder / "ledger.jsonl").stat().st_size / len(lines) < 1200, "bytes of the ledger a step"
