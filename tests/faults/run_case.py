"""A run to disturb, and what must be there when it is done, whatever disturbed it."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import processes
import shim
import torch
from safetensors.torch import load_file

INTERRUPTED = 75
REFUSED = (1, 2, 3, INTERRUPTED)
# What a file system leaves beside a file that is being written, and what is set aside on purpose.
DEBRIS = re.compile(r"\.partial$|\.tmp|\.building|\.final-|\.rescue|-old$")
SET_ASIDE = re.compile(r"\.damaged(-\d+)?(/|$)")


@dataclass(frozen=True)
class Try:
    """A run folder and a cache for one try."""

    folder: Path
    cache: Path
    counter: Path

    @classmethod
    def below(cls, where: Path) -> Try:
        """Fresh ones; what was in this folder is removed."""
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir(parents=True)
        return cls(where / "run", where / "cache", where / "counter")


@dataclass(frozen=True)
class Case:
    """A command, and what it leaves behind undisturbed."""

    options: list[str]
    where: Path  # of the undisturbed run
    tensors: dict[str, torch.Tensor]
    names: set[str]
    operations: list[str]  # of files below the run's folder and its cache: "write …/ledger.jsonl"

    def start(self, place: Try, *more: object, **environment: str) -> processes.Command:
        """Begin a try."""
        given = {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(place.cache)} | environment
        return processes.Command("fastkd.run", *self.options, "--output-dir", place.folder, *more, **given)

    def run(self, place: Try, *more: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """A try from its start to its end."""
        return self.start(place, *more, **environment).finish(timeout=120)

    def copied(self, where: Path) -> Try:
        """The finished run and its cache, copied: for tries of what is damaged afterwards."""
        place = Try.below(where)
        shutil.copytree(self.where / "run", place.folder)
        shutil.copytree(self.where / "cache", place.cache)
        return place

    def check(self, place: Try, done: subprocess.CompletedProcess[str]) -> None:
        """After the same command again: as if nothing had happened."""
        assert done.returncode == 0, f"exit {done.returncode}: {last_line(done)}"
        assert "Traceback" not in done.stderr, last_line(done)
        self.check_bits(place.folder)
        report = place.folder / "report.html"
        assert report.is_file() and report.read_text("utf-8").rstrip().endswith("</html>"), "no whole report"
        check_books(place.folder)
        found = names(place)
        left = sorted(found - self.names)
        assert not left, f"debris: {left[:4]}"
        missing = sorted(self.names - found)
        assert not missing, f"missing: {missing[:4]}"

    def check_bits(self, folder: Path) -> None:
        """The student is the undisturbed one."""
        student = load_file(folder / "final" / "model.safetensors")
        assert student.keys() == self.tensors.keys(), "another student"
        other = [name for name, tensor in self.tensors.items() if not torch.equal(student[name], tensor)]
        assert not other, f"other bits: {other[:2]}"


def undisturbed(options: list[str], where: Path) -> Case:
    """Do the run without a fault, and count its file operations."""
    place, log = Try.below(where), where / "operations"
    case = Case(options, where, {}, set(), [])
    armed = shim.faults(place.folder, place.cache, counter=place.counter, log=log)
    done = case.run(place, **armed)
    assert done.returncode == 0, done.stderr
    operations = [line.split(" ", 2)[2].replace(f"{where}/", "") for line in log.read_text().splitlines()]
    tensors = load_file(place.folder / "final" / "model.safetensors")
    return Case(options, where, tensors, names(place), operations)


def names(place: Try) -> set[str]:
    """Files and folders below a try's, those that were set aside left out."""
    roots = (place.folder, place.cache)
    found = {f"{root.name}/{path.relative_to(root)}" for root in roots for path in root.rglob("*")}
    return {name for name in found if not SET_ASIDE.search(name)}


def debris(folder: Path) -> list[str]:
    """What no finished command may leave."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if DEBRIS.search(path.name))


def lines_of(ledger: Path) -> list[dict[str, Any]]:
    """Its lines, read by nothing of fastkd's."""
    return [json.loads(line) for line in ledger.read_text("utf-8").splitlines()]


def surviving(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps that count: a crash takes those after its own step."""
    steps: list[dict[str, Any]] = []
    for line in lines:
        if line.get("event") == "crash":
            steps = [step for step in steps if step["step"] <= line["step"]]
        elif "event" not in line:
            steps.append(line)
    return steps


def check_books(folder: Path, devices: int = 1) -> None:
    """The ledger has every step once, and charges their sum on all devices, which falls where a policy forgives a crash."""
    lines = lines_of(folder / "ledger.jsonl")
    steps = surviving(lines)
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1)), "steps of the ledger"
    charged = [line["charged_s"] for line in lines]
    forgiven = [line.get("event") == "crash" and not line["charged"] for line in lines[1:]]
    rises = [a <= b + 1e-9 for a, b in itertools.pairwise(charged)]
    assert all(rise or forgive for rise, forgive in zip(rises, forgiven, strict=True)), "what is charged falls"
    parts = sum(sum(step["phase_s"].values()) for step in steps)
    parts += sum(line["seconds"] for line in lines if line.get("charged"))
    parts *= devices
    assert abs(parts - charged[-1]) <= 0.01 * charged[-1], f"charged {charged[-1]:.4f} s for {parts:.4f} s"
    metrics = [line["step"] for line in lines_of(folder / "metrics.jsonl") if "event" not in line]
    assert metrics == sorted(set(metrics)), "metrics of a step twice"


def check_refusal(done: subprocess.CompletedProcess[str], *codes: int) -> None:
    """It ended by one line and an exit code for scripts."""
    assert "Traceback" not in done.stderr, f"traceback: {last_line(done)}"
    assert done.returncode in (codes or REFUSED), f"exit {done.returncode}: {last_line(done)}"
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, f"{len(errors)} lines of error: {last_line(done)}"


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """The last that it said."""
    said = done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or ["nothing"]
    return said[-1]
