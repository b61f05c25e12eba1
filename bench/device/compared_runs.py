"""Runs under equal budgets, one after the other: ``python -m bench.device.compared_runs JSON``, for ``comparison``.

Each is a run of ``fastkd.run`` in a folder of its own, with the options that ``fastkd.compare`` gives a row. ``compare``
itself plans every row before the first one trains, which measures each twice: a minute has no room for that.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.device import part, worker
from bench.device.alone import beside_others
from bench.device.part import Row
from fastkd import pipeline
from fastkd.budget import BudgetTooSmall
from fastkd.comparison.budgets import release_memory
from fastkd.comparison.rows import parse_row
from fastkd.distributed import World
from fastkd.models import hf
from fastkd.run_folder import read_run
from fastkd.setup import prepare
from fastkd.terminal import Console

GPU_SECONDS, FLOPS = "gpu-seconds", "flops"
ROWS = ("mlm", "minilmv2", "logit_kd", "tinybert", "minilm", "logit_kd+as-released")  # the worthiest first
SEEDS = 3  # of runs matched by FLOPs
FIRST_S = 25.0  # of a process's first run at least


@dataclass(frozen=True)
class Entry:
    """A run: its row as in --methods, what it is matched by, its seed."""

    row: str
    match: str
    seed: int = 0


def lanes(tiny: bool) -> list[list[Entry]]:
    """The runs matched by FLOPs, a process a row: its seeds share what the first one compiled."""
    rows, seeds = (ROWS[:2], 2) if tiny else (ROWS, SEEDS)
    return [[Entry(row, FLOPS, seed) for seed in range(seeds)] for row in rows]


def timed(tiny: bool) -> list[Entry]:
    """The runs matched by GPU-seconds."""
    return [Entry(row, GPU_SECONDS) for row in (ROWS[:1] if tiny else ROWS)]


def flops_of(options: dict[str, Any], tokens: float) -> float:
    """FLOPs of training from scratch on ``tokens`` tokens, by the lengths of its first steps."""
    shared = options | {"dtype": "float32", "compile": False}
    setup = prepare(parse_row("mlm").resolved(shared, budget_tokens=1e15), World(device=torch.device("cpu")))
    stream = setup.stream()
    costs = [setup.step_cost(stream.tokens_of(number)) for number in range(8)]
    return tokens * sum(sum(cost.flops.values()) for cost in costs) / sum(cost.real for cost in costs)


@dataclass
class Comparison:
    """What some runs share, and which they are: the fields of `Entry`, a list a run."""

    folder: str
    device: str
    tiny: bool
    seconds: float
    budget_s: float
    budget_flops: float
    options: dict[str, Any]
    runs: list[list[Any]]

    def __post_init__(self) -> None:
        self.started, self.last = time.monotonic(), 0.0 if self.tiny else FIRST_S

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self.started)

    def rows(self) -> Iterator[Row]:
        """A row a run, or why there is none."""
        for entry in (Entry(*fields) for fields in self.runs):
            row = parse_row(entry.row)
            names: Row = {"what": "run", "label": row.label, "method": row.method}
            names |= {"match": entry.match, "seed": entry.seed}
            try:
                yield {**names, **self.run(entry)}
            except (Skipped, BudgetTooSmall) as reason:
                yield {**names, "skipped": str(reason)}
            except Exception as error:
                yield {**names, "error": part.in_one_line(error)}

    def run(self, entry: Entry) -> Row:
        """Train one row under its budget, or what is left of it, and say what came of it."""
        if not self.tiny and self.last > self.left:
            raise Skipped(f"takes about {self.last:.0f} s, {self.left:.0f} s were left")
        row = parse_row(entry.row)
        if row.method == "logit_kd" and not self.teacher_has_head():
            raise Skipped("the teacher has no MLM head")
        began = time.monotonic()
        release_memory()
        if self.options["compile"]:
            torch.compiler.reset()  # the graphs of earlier models would count against the limit of recompilations
        by_time = entry.match == GPU_SECONDS
        budget = {"budget_gpu_hours": self.budget_s / 3600} if by_time else {"budget_flops": self.budget_flops}
        folder = Path(self.folder) / f"{row.slug}-{entry.match}-{next(iter(budget.values())):.6g}-seed{entry.seed}"
        resolved = row.resolved(self.options, **budget, seed=entry.seed, output_dir=str(folder))
        pipeline.run(resolved, World(device=torch.device(self.device)), Console(quiet=True))
        if not self.tiny:
            self.last = time.monotonic() - began
        return {**summary(folder), "seconds": time.monotonic() - began}

    def teacher_has_head(self) -> bool:
        """Whether the teacher has logits to teach."""
        return hf.load(self.options["teacher"]).encoder.head is not None


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
    """Print the rows. Runs matched by FLOPs go on beside others; for those matched by seconds the starter keeps others out."""
    comparison = Comparison(**json.loads(sys.argv[1]))
    timed = any(Entry(*fields).match == GPU_SECONDS for fields in comparison.runs)
    with nullcontext() if timed else beside_others():
        for row in comparison.rows():
            worker.hand_over(row)


if __name__ == "__main__":
    main()
