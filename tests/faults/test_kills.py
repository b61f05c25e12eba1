"""Killed anywhere, the same command goes on, to the same bits: at every file operation, with torn writes, at random times."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
import shim
from campaign import Places, places, tries
from run_case import Case, Try

PROMISE = "the same command goes on; same bits, report there, ledger sound, nothing left over"


def disturb(case: Case, place: Try, how: str, at: int) -> int:
    """A run that ends at an operation; its exit code."""
    armed = shim.faults(place.folder, place.cache, counter=place.counter, how=how, at=at)
    return case.run(place, **armed).returncode


@pytest.mark.parametrize(
    ("how", "name"),
    [("kill", "kill -9 at the n-th file operation"), ("torn", "kill -9 in the n-th write, half of it done")],
)
@places(short=2, shares=4)
def test_killed_at_a_file_operation(how: str, name: str, places: Places, scratch: Case, tmp_path: Path, fault) -> None:
    with fault(name, PROMISE) as tally:
        # Torn are writes: any other operation is done or not, and that is a kill before it or before the next.
        numbers = [n for n, name in enumerate(scratch.operations, start=1) if how == "kill" or name.startswith("write")]
        for at in (numbers[place - 1] for place in places.of(len(numbers))):
            with tally.attempt(f"{at}, {scratch.operations[at - 1]}"):
                place = Try.below(tmp_path / "try")
                code = disturb(scratch, place, how, at)
                assert code == -signal.SIGKILL or (code == 0 and shim.counted(place.counter) < at), f"exit {code}"
                scratch.check(place, scratch.run(place))


@pytest.mark.campaign
@pytest.mark.timeout(1700)
def test_killed_at_a_file_operation_with_the_quickstart_teacher(taught: Case, tmp_path: Path, fault) -> None:
    with fault("the same with the quickstart teacher", PROMISE) as tally:
        for at in Places(count=12).of(len(taught.operations)):
            with tally.attempt(f"{at}, {taught.operations[at - 1]}"):
                place = Try.below(tmp_path / "try")
                disturb(taught, place, "kill" if at % 2 else "torn", at)
                taught.check(place, taught.run(place))


@places(short=4, shares=1)
def test_killed_in_any_stage(places: Places, recipe: Case, tmp_path: Path, fault) -> None:
    """Before each line of the ledger: the steps of both stages, the change between them."""
    with fault("kill -9 in any stage of a recipe", PROMISE) as tally:
        lines = [at for at, name in enumerate(recipe.operations, start=1) if name.endswith("write run/ledger.jsonl")]
        for at in (lines[place - 1] for place in places.of(len(lines))):
            with tally.attempt(f"{at}, {recipe.operations[at - 1]}"):
                place = Try.below(tmp_path / "try")
                assert disturb(recipe, place, "kill", at) == -signal.SIGKILL
                recipe.check(place, recipe.run(place))


@tries(short=0, long=20, shares=2)
def test_killed_again_and_again(numbers: range, scratch: Case, tmp_path: Path, fault) -> None:
    """Three kills in one run, each at another operation of what is left; some stopped by SIGTERM between."""
    with fault("three kills in one run", PROMISE) as tally:
        for number in numbers:
            drawn, place = random.Random(number), Try.below(tmp_path / "try")
            at = [drawn.randint(1, len(scratch.operations)) for _ in range(3)]
            with tally.attempt(f"seed {number}, {at}"):
                for operation in at:
                    disturb(scratch, place, drawn.choice(("kill", "torn")), operation)
                scratch.check(place, scratch.run(place))


@tries(short=0, long=24, shares=2)
def test_killed_at_a_random_time(numbers: range, scratch: Case, tmp_path: Path, fault) -> None:
    """From outside, some moment after an operation: within a step, a validation, a wait."""
    with fault("kill -9 at a random time", PROMISE) as tally:
        for number in numbers:
            drawn, place = random.Random(1000 + number), Try.below(tmp_path / "try")
            at, delay = drawn.randint(1, len(scratch.operations)), drawn.random() * 0.1
            with tally.attempt(f"seed {number}, {delay:.3f} s after operation {at}"):
                armed = shim.faults(place.folder, place.cache, counter=place.counter)
                process = scratch.start(place, **armed)
                while process.poll() is None and shim.counted(place.counter) < at:
                    process.wait_a_little(0.002)
                process.wait_a_little(delay)
                if process.poll() is None:
                    process.kill()
                process.finish()
                scratch.check(place, scratch.run(place))
