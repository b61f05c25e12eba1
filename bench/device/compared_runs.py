"""Runs under equal budgets, one after the other: ``python -m bench.device.compared_runs JSON``, for ``comparison``.

Each is a run of ``fastkd.run`` in a folder of its own, with the options that ``fastkd.compare`` gives a row. ``compare``
itself plans every row before the first one trains, which measures each twice: a minute has no room for that. So here the
FLOPs that a scratch run of this comparison spent are the budget of those rows that are matched by FLOPs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.device import part, worker
from bench.device.part import Row
from fastkd import run
from fastkd.config import resolve
from fastkd.distributed import World
from fastkd.loop import Interrupted
from fastkd.matching import release_memory
from fastkd.models import hf
from fastkd.plan import BudgetTooSmall
from fastkd.row import parse_row
from fastkd.run_folder import read_run
from fastkd.terminal import Console

GPU_SECONDS, FLOPS = "gpu-seconds", "flops"
TEACHER_RATE = 3e-4  # to go on from a teacher's weights with a new head
OVERHEAD_S = 14.0  # of a run beside its budget, until one was timed
LARGER = "larger"  # in a row's place of a teacher: the one with an MLM head


@dataclass(frozen=True)
class Entry:
    """A run: its row as in --methods, what it is matched by, its share of the budget, its seed."""

    row: str
    match: str = GPU_SECONDS
    share: float = 1.0
    seed: int = 0

    @property
    def needs_head(self) -> bool:
        """Whether its teacher must have an MLM head."""
        return "@" in self.row


def entries(tiny: bool) -> list[Entry]:
    """All runs, the worthiest first."""
    rows = ["mlm", "minilmv2", f"logit_kd@{LARGER}", "tinybert", f"logit_kd+as-released@{LARGER}", "minilm"]
    if tiny:
        return [*(Entry(row) for row in rows[:2]), Entry("minilmv2", FLOPS)]
    points = [(GPU_SECONDS, 1.0, 0), (FLOPS, 1.0, 0), (GPU_SECONDS, 3.0, 0), (GPU_SECONDS, 1.0, 1), (FLOPS, 3.0, 0)]
    return [Entry(row, *point) for point in points for row in rows if row != "mlm" or point[0] == GPU_SECONDS]


@dataclass
class Comparison:
    """What all runs share. ``budget_s``: GPU-seconds of a share of 1."""

    folder: str
    device: str
    tiny: bool
    seconds: float
    budget_s: float
    options: dict[str, Any]

    def __post_init__(self) -> None:
        self.started, self.overhead = time.monotonic(), 0.0 if self.tiny else OVERHEAD_S
        self.larger: str | None = None

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self.started)

    def rows(self) -> Iterator[Row]:
        """A row a run, or why there is none."""
        for entry in entries(self.tiny):
            label = parse_row(entry.row).label
            names: Row = {"what": "run", "label": label, "method": parse_row(entry.row).method, "match": entry.match}
            names |= {"share": entry.share, "seed": entry.seed}
            try:
                if entry.needs_head and self.larger is None:
                    yield from self.train_larger()
                yield {**names, **self.run(entry)}
            except Interrupted:
                raise
            except (Skipped, BudgetTooSmall) as reason:
                yield {**names, "skipped": str(reason)}
            except Exception as error:
                yield {**names, "error": part.in_one_line(error)}

    def train_larger(self) -> Iterator[Row]:
        """A teacher with an MLM head: the given one with a new head, trained on for a share of 1."""
        given = hf.load(self.options["teacher"])
        if given.encoder.head is not None:
            self.larger = self.options["teacher"]
            return
        config = given.config
        student = f"{config.num_layers}L-{config.hidden_size}H-{config.num_heads}A-{config.intermediate_size}I"
        options = self.options | {"method": "mlm", "init_from_teacher": True, "student": student, "lr": TEACHER_RATE}
        self.require(self.budget_s)
        self.larger = str(Path(self.folder) / f"teacher-{self.budget_s:g}")
        names = {
            "what": "run",
            "label": "teacher with an MLM head",
            "method": "mlm",
            "match": GPU_SECONDS,
            "share": 1.0,
        }
        yield {**names, "seed": 0, **self.train(options | self.seconds_of(1.0), self.larger)}

    def run(self, entry: Entry) -> Row:
        """Train one row under its budget."""
        row = parse_row(entry.row.replace(f"@{LARGER}", f"@{self.larger}"))
        self.require(self.budget_s * entry.share)
        budget = self.seconds_of(entry.share) if entry.match == GPU_SECONDS else self.flops_of(entry)
        options = row.run_options(self.options) | {"seed": entry.seed} | budget
        return self.train(options, str(self.place(entry)))

    def train(self, options: dict[str, Any], folder: str) -> Row:
        """One run, or what is left of it, and what came of it."""
        began = time.monotonic()
        release_memory()
        if self.options["compile"]:
            torch.compiler.reset()  # the graphs of earlier models would count against the limit of recompilations
        resolved = resolve(options | {"charge": "compute", "output_dir": folder})
        run.run(resolved, World(device=torch.device(self.device)), Console(quiet=True))
        found = summary(Path(folder))
        wall = time.monotonic() - began
        if not self.tiny:
            self.overhead = max(4.0, 1.2 * (wall - (found["charged_s"] or 0.0)))
        return {**found, "exit": 0, "seconds": wall, "wall_s": wall}

    def require(self, budget_s: float) -> None:
        """Raises Skipped where a run would not end in time."""
        needed = self.overhead + budget_s
        if not self.tiny and needed > self.left:
            raise Skipped(f"takes about {needed:.0f} s, {self.left:.0f} s were left")

    def seconds_of(self, share: float) -> dict[str, float]:
        """The budget option."""
        return {"budget_gpu_hours": share * self.budget_s / 3600}

    def flops_of(self, entry: Entry) -> dict[str, float]:
        """What the scratch run of the same share and seed spent."""
        scratch = self.place(Entry("mlm", GPU_SECONDS, entry.share, entry.seed))
        if not (scratch / "final").is_dir():
            raise Skipped("there is no scratch run whose FLOPs it could have")
        last = read_run(scratch).last
        assert last is not None
        return {"budget_flops": float(sum(last["flops"].values()))}

    def place(self, entry: Entry) -> Path:
        """The run's folder: the same for the same run, which is then taken up again."""
        name = f"{parse_row(entry.row).slug}-{entry.match}-{entry.share * self.budget_s:g}s-seed{entry.seed}"
        return Path(self.folder) / name


class Skipped(Exception):
    """Why a run was not begun."""


def summary(folder: Path) -> Row:
    """What a finished run's files say."""
    found = read_run(folder)
    last, first, end = found.last, found.validations[0], found.validations[-1]
    assert last is not None
    budget = found.plan["budget"]
    return {
        "budget": budget["amount"], "unit": budget["unit"],
        "budget_s": budget["amount"] if budget["unit"] == GPU_SECONDS else None,
        "charged_s": found.charged_s, "flops": sum(last["flops"].values()),
        "steps": last["step"], "steps_planned": found.plan["steps"],
        "tokens": last["tokens"]["real"], "tokens_planned": found.plan["tokens"], "tokens_per_s": found.tokens_per_s,
        "teacher_share": found.teacher_share, "joules": last["joules"],
        "loss_first": first["loss"], "loss_last": end["loss"], "mlm_loss": end["mlm_loss"], "accuracy": end["accuracy"],
    }  # fmt: skip


def main() -> None:
    """Print the rows."""
    for row in Comparison(**json.loads(sys.argv[1])).rows():
        worker.hand_over(row)


if __name__ == "__main__":
    main()
