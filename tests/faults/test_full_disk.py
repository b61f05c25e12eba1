"""A disk that is full from the n-th write on, or fails once: one line, exit 75, and the same command goes on."""

from __future__ import annotations

import subprocess
from pathlib import Path

import processes
import pytest
import run_case
import shim
from campaign import Places, Tally, places
from run_case import INTERRUPTED, Case, Try, names

PROMISE = "one line, exit 75, and the same command goes on to the same bits"
GROWING = ("open", "write", "writev", "pwrite", "mkdir", "ftruncate", "link", "symlink")


def check_full(done: subprocess.CompletedProcess[str]) -> None:
    """One line and exit 75; a command that could do without the file has nothing to say."""
    if done.returncode != 0:
        run_case.check_refusal(done, INTERRUPTED)


@pytest.mark.parametrize(
    ("how", "name"), [("full", "full disk from the n-th write on"), ("eio", "one write that fails")]
)
@places(short=1, shares=2, every=3)
def test_a_run(how: str, name: str, places: Places, scratch: Case, tmp_path: Path, fault) -> None:
    numbers = [n for n, name in enumerate(scratch.operations, start=1) if name.split()[0] in GROWING]
    with fault(name, PROMISE) as tally:
        for at in (numbers[place - 1] for place in places.of(len(numbers))):
            with tally.attempt(f"{at}, {scratch.operations[at - 1]}"):
                place = Try.below(tmp_path / "try")
                done = scratch.run(
                    place, **shim.faults(place.folder, place.cache, counter=place.counter, how=how, at=at)
                )
                check_full(done)
                scratch.check(place, scratch.run(place))


class Another:
    """Another command than a run, tried again and again: ``options`` without the output folder."""

    def __init__(self, module: str, options: list[str], where: Path) -> None:
        self.module, self.options, self.log = module, options, where / "operations"
        place = Try.below(where / "undisturbed")
        armed = shim.faults(place.folder, place.cache, counter=place.counter, log=self.log)
        done = self.start(place, **armed).finish()
        assert done.returncode == 0, done.stderr
        self.operations = [line.split(" ", 3)[2:] for line in self.log.read_text().splitlines()]
        self.names = names(place)

    def start(self, place: Try, **environment: str) -> processes.Command:
        """Begin a try."""
        where = () if self.module == "fastkd.prepare" else ("--output-dir", place.folder)
        given = {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(place.cache)} | environment
        return processes.Command(self.module, *self.options, *where, **given)

    def fill(self, place: Try, at: int) -> None:
        """A full disk from an operation on, then the same command on one with space."""
        armed = shim.faults(place.folder, place.cache, counter=place.counter, how="full", at=at)
        check_full(self.start(place, **armed).finish())
        again = self.start(place).finish()
        assert again.returncode == 0 and "Traceback" not in again.stderr, run_case.last_line(again)
        found = names(place)
        assert found == self.names, sorted(found ^ self.names)[:4]

    def tried(self, tally: Tally, places: Places, where: Path) -> None:
        """All places of a test."""
        numbers = [n for n, (name, _) in enumerate(self.operations, start=1) if name in GROWING]
        for at in (numbers[place - 1] for place in places.of(len(numbers))):
            with tally.attempt(f"{at}, {' '.join(self.operations[at - 1])[-60:]}"):
                self.fill(Try.below(where / "try"), at)


@places(short=1, shares=1)
def test_preparing_a_corpus(places: Places, from_scratch: list[str], shimmed: None, tmp_path: Path, fault) -> None:
    with fault("full disk while a corpus is prepared", "one line, exit 75, and the same command goes on") as tally:
        Another("fastkd.prepare", from_scratch, tmp_path).tried(tally, places, tmp_path)


@pytest.mark.campaign
@pytest.mark.timeout(1700)
def test_a_comparison(light: list[str], shimmed: None, tmp_path: Path, fault) -> None:
    options = [
        *light,
        "--student",
        "1L-24H-12A",
        "--batch-tokens",
        "512",
        "--methods",
        "mlm,minilmv2",
        "--match",
        "flops",
    ]
    options += ["--budget-flops", "4e9", "--seeds", "1", "--checkpoint-minutes", "0"]
    with fault("full disk in a comparison", "one line, exit 75, and the same command goes on") as tally:
        Another("fastkd.compare", options, tmp_path).tried(tally, Places(count=12), tmp_path)
