"""Any file of a run, its student or its cache damaged: healed and said, or refused in one line; never other bits in silence."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import processes
import pytest
import run_case
import shim
from campaign import Tally, tries
from run_case import Case, Try

HEALED = "healed and said, or refused in one line whose remedy works; never other bits in silence"
BATCH = 25  # damages that one process tries


@dataclass(frozen=True)
class States:
    """Folders with `run` and `cache`: a run that was killed with one step to go, and a finished one."""

    half: Path
    whole: Path


@pytest.fixture(scope="module")
def states(scratch: Case, tmp_path_factory: pytest.TempPathFactory) -> States:
    """Killed before the last checkpoint: two sound ones are there, and a line of the ledger after them."""
    half = tmp_path_factory.mktemp("half")
    place = Try.below(half)
    at = next(number for number, name in enumerate(scratch.operations, start=1) if "step-5" in name)
    armed = shim.faults(place.folder, place.cache, counter=place.counter, how="kill", at=at)
    assert scratch.run(place, **armed).returncode == -signal.SIGKILL
    assert sorted(path.name for path in (place.folder / "checkpoints").glob("step-*")) == ["step-3", "step-4"]
    shutil.rmtree(place.folder / "checkpoints" / ".building-step-5", ignore_errors=True)
    return States(half, scratch.where)


def damage(tally: Tally, seeds: Sequence[int], where: Path, **spec: object) -> None:
    """Each seed's damage, in processes of some each."""
    for number in range(0, len(seeds), BATCH):
        batch, path = list(seeds[number : number + BATCH]), where / f"spec-{number}.json"
        path.write_text(json.dumps({"work": str(where / "work"), "seeds": batch} | spec))
        done = processes.run("damage", path, OMP_NUM_THREADS="1")
        answers = [json.loads(line) for line in path.with_suffix(".out").read_text().splitlines()]
        for answer in answers:
            with tally.attempt(answer["label"]):
                assert answer["error"] is None, answer["error"]
        for seed in batch[len(answers) :][:1]:
            with tally.attempt(f"{seed}"):
                raise AssertionError(f"the process ended, exit {done.returncode}: {run_case.last_line(done)}")


def of_half(states: States, scratch: Case, *files: str) -> dict[str, object]:
    """What is tried on the run that has a step to go."""
    places = {"from": str(states.half), "whole": str(states.whole / "run"), "folders": ["run", "cache"]}
    return places | {"what": "run", "options": scratch.options, "files": files}


@pytest.mark.parametrize(
    "name", ["ledger.jsonl", "metrics.jsonl", "plan.json", "environment.json", "config.toml", "checkpoints"]
)
@tries(short=1, long=200, shares=2)
def test_a_damaged_file_of_a_run(
    name: str, numbers: range, states: States, scratch: Case, tmp_path: Path, fault
) -> None:
    files = ["run/checkpoints/*/*"] if name == "checkpoints" else [f"run/{name}"]
    with fault(f"damaged `{name}`", HEALED) as tally:
        damage(tally, numbers, tmp_path, **of_half(states, scratch, *files))


@tries(short=1, long=60)
def test_a_damaged_cache_under_a_run(numbers: range, states: States, scratch: Case, tmp_path: Path, fault) -> None:
    with fault("damaged shards, then the run", "the part is built again, same bits") as tally:
        damage(tally, [7 * number for number in numbers], tmp_path, **of_half(states, scratch, "cache/fastkd/*/*/*"))


@tries(short=11, long=220)
def test_a_damaged_cache(numbers: range, states: States, tmp_path: Path, fault) -> None:
    with fault("damaged shards", "the part is refused in one line, and the next run builds it again") as tally:
        spec = {"what": "shards", "from": str(states.whole), "folders": ["cache"], "files": ["cache/fastkd/*/part-*/*"]}
        damage(tally, numbers, tmp_path, **spec)


@tries(short=11, long=220)
def test_a_damaged_student_as_teacher(numbers: range, states: States, tmp_path: Path, fault) -> None:
    with fault("damaged `final/`, as a teacher", "refused in one line; never another teacher in silence") as tally:
        spec = {"what": "model", "from": str(states.whole), "folders": ["run"], "files": ["run/final/**/*"]}
        damage(tally, numbers, tmp_path, whole=str(states.whole / "run"), **spec)


@tries(short=1, long=200)
def test_a_damaged_file_of_a_finished_run(numbers: range, states: States, scratch: Case, tmp_path: Path, fault) -> None:
    with fault("damaged `final/` or report, then the same command", HEALED) as tally:
        spec = of_half(states, scratch, "run/report.html", "run/final/model.safetensors", "run/final/config.json")
        damage(tally, [5 * number for number in numbers], tmp_path, **spec | {"from": str(states.whole)})
