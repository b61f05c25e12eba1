"""Asked to stop in any phase, a run saves what can be saved, says one line, exits 75, and the same command goes on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import run_case
import shim
from campaign import Places, places, tries
from run_case import INTERRUPTED, Case, Try, lines_of

PROMISE = "one line, exit 75, and the same command goes on to the same bits"


@pytest.mark.parametrize(("how", "name"), [("term", "SIGTERM in every phase"), ("int", "Ctrl-C twice in every phase")])
@places(short=1, shares=2, every=3)
def test_a_signal_in_every_phase(how: str, name: str, places: Places, scratch: Case, tmp_path: Path, fault) -> None:
    with fault(name, PROMISE) as tally:
        for at in places.of(len(scratch.operations)):
            with tally.attempt(f"{at}, {scratch.operations[at - 1]}"):
                place = Try.below(tmp_path / "try")
                armed = shim.faults(place.folder, place.cache, counter=place.counter, how=how, at=at)
                done = scratch.run(place, **armed)
                assert "Traceback" not in done.stderr, run_case.last_line(done)
                # A run that has ended its work by then may say so instead.
                late = done.returncode == 0 and (place.folder / "report.html").is_file()
                assert late or done.returncode == INTERRUPTED, f"exit {done.returncode}: {run_case.last_line(done)}"
                scratch.check(place, scratch.run(place))


@tries(short=1, long=6)
def test_a_stopped_process_is_charged_its_time(numbers: range, scratch: Case, tmp_path: Path, fault) -> None:
    """SIGSTOP between two steps: the seconds are those of a wall clock, and go on from there."""
    with fault("SIGSTOP, then SIGCONT", "the ledger charges the wall clock; same bits") as tally:
        saves = [
            n for n, name in enumerate(scratch.operations, start=1) if name.startswith("rename run/checkpoints/step-")
        ]
        for number in numbers:
            place = Try.below(tmp_path / "try")
            with tally.attempt(f"after checkpoint {1 + number % 4}"):
                armed = shim.faults(place.folder, place.cache, counter=place.counter, how="stop", at=saves[number % 4])
                process = scratch.start(place, **armed)
                while shim.counted(place.counter) < saves[number % 4] and process.poll() is None:
                    process.wait_a_little(0.005)
                process.wait_a_little(0.4)
                process.send_signal(signal.SIGCONT)
                scratch.check(place, process.finish())
                charged = lines_of(place.folder / "ledger.jsonl")[-1]["charged_s"]
                assert charged >= 0.4, f"charged {charged:.2f} s"


@tries(short=1, long=8)
def test_the_wall_clock_jumps(numbers: range, scratch: Case, tmp_path: Path, fault) -> None:
    with fault("the wall clock jumps by a day", "nothing depends on it: same bits, sound ledger") as tally:
        for number in numbers:
            place, jump = Try.below(tmp_path / "try"), (86400, -86400)[number % 2]
            at = 1 + (number * 37 + 120) % len(scratch.operations)
            with tally.attempt(f"{jump} s at operation {at}"):
                armed = shim.faults(place.folder, place.cache, counter=place.counter, at=at, clock=jump)
                scratch.check(place, scratch.run(place, **armed))
                charged = lines_of(place.folder / "ledger.jsonl")[-1]["charged_s"]
                assert 0 < charged < 100, f"charged {charged:.2f} s"
