"""The budgets that all rows of a comparison get, and each row's plan under them."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import torch

from fastkd import files, planning
from fastkd.budget import BudgetTooSmall
from fastkd.comparison.rows import BudgetOption, Row
from fastkd.distributed import World, on_main, phase
from fastkd.files import SUM, sum_holds, with_sum
from fastkd.setup import prepare
from fastkd.train import Trainer


class MatchedBudgets:
    """Budgets that match. A scratch run's plan under one is measured once and kept in ``scratch.json``."""

    def __init__(self, shared: dict[str, Any], folder: Path, world: World) -> None:
        self.shared, self.world, self.path = shared, world, folder / "scratch.json"
        self.scratch: dict[str, dict[str, float]] = on_main(world, self._read)

    def _read(self) -> dict[str, dict[str, float]]:
        if not self.path.exists():
            return {}
        try:
            found = dict(json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{self.path} holds no JSON object: remove it, and it is measured again") from error
        if not sum_holds(found):
            raise ValueError(f"{self.path} is damaged: remove it, and it is measured again")
        return {key: value for key, value in found.items() if key != SUM}

    def keep(self) -> None:
        """Write scratch.json, if a scratch run was planned."""
        if self.scratch and self.world.is_main:
            files.write(self.path, json.dumps(with_sum(self.scratch), indent=1) + "\n")

    def budgets(self, match: str, hours: list[float], flops: float | None) -> list[BudgetOption]:
        """The budgets that every row gets, the largest last.

        Args:
            match: "gpu-seconds" or "flops".
            hours: GPU-hours; with "flops", the FLOPs of a scratch run in that time.
            flops: the FLOPs themselves, None to take ``hours``.
        """
        times = [{"budget_gpu_hours": value} for value in sorted(set(hours))]
        if match == "gpu-seconds":
            return times
        if flops is not None:
            return [{"budget_flops": flops}]
        return [{"budget_flops": self.scratch_plan(time)["flops"]} for time in times]

    def scratch_plan(self, budget: BudgetOption) -> dict[str, float]:
        """FLOPs and tokens of a scratch run under a budget, as first planned, and the tokens of the corpus."""
        key = json.dumps(budget)
        if key not in self.scratch:
            (planned,) = self.plans_of(Row("mlm"), [budget])
            self.scratch[key] = {
                "flops": sum(planned["flops"].values()),
                "tokens": planned["tokens"],
                "corpus_tokens": planned["corpus"]["unique_tokens"],
            }
        return self.scratch[key]

    def unique_tokens(self, budget: BudgetOption, epochs: float) -> int:
        """The tokens of the part of the corpus that a scratch run under the budget reads ``epochs`` times.

        Raises:
            ValueError: the corpus holds fewer.
        """
        scratch = self.scratch_plan(budget)
        unique, held = int(scratch["tokens"] / epochs), int(scratch["corpus_tokens"])
        if unique > held:
            raise ValueError(
                f"--epochs-cap {epochs:g} needs {unique:,} tokens, the corpus has {held:,}: give more text, "
                "a smaller budget or a larger cap"
            )
        return unique

    def plans_of(self, row: Row, budgets: list[BudgetOption], share: float = 1.0) -> list[dict[str, Any]]:
        """A row's plan under each budget, from one measurement, the same on every rank.

        Args:
            share: of each budget, what a run of the search for a learning rate gets, and must pay for one step.

        Raises:
            ValueError, BudgetTooSmall: the row cannot work.
        """
        release_memory()
        with phase("set-up"):
            trainer = Trainer(prepare(row.resolved(self.shared, **budgets[-1]), self.world))
            measured = planning.measure(trainer)
        for ((option, amount),) in map(dict.items, budgets):
            searching = row.resolved(self.shared, **{option: share * amount}).run.budget
            try:
                planning.require_steps(searching, trainer, measured)
            except BudgetTooSmall as error:
                tuned = f"--tune tries each rate with {share:.0%} of the budget: " if share < 1 else ""
                raise BudgetTooSmall(f"{tuned}{error}") from error
        return [planning.make(row.resolved(self.shared, **budget), trainer, measured) for budget in budgets]


def release_memory() -> None:
    """Free what earlier rows held, so that each row finds the same device and counts its own peak of memory.

    Compiled graphs go too: with those of other rows, a row could reach the limit of recompilations.
    """
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
