"""One comparison: its rows planned, run, scored and reported."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastkd import files, methods, pipeline
from fastkd.budget import Budget
from fastkd.comparison.budgets import Matching, release_memory
from fastkd.comparison.options import CompareConfig
from fastkd.comparison.references import References
from fastkd.comparison.report import build_comparison
from fastkd.comparison.results import RESULTS, write_results
from fastkd.comparison.rows import Row, base_row, circumstances, confounds, parse_rows, results_row
from fastkd.comparison.scores import Scorer
from fastkd.comparison.tuning import BUDGET_SHARE, Search, searched, tune
from fastkd.device import environment
from fastkd.distributed import World, any_rank, on_main
from fastkd.files import finite
from fastkd.loop import Interrupted
from fastkd.run_config import PRESENTATION
from fastkd.terminal import Console


class Comparison:
    """The rows of a comparison, what they share, and where they are."""

    def __init__(self, own: CompareConfig, shared: dict[str, Any], argv: Sequence[str], world: World) -> None:
        self.own, self.shared, self.argv, self.world = own, shared, list(argv), world
        self.plans: list[dict[str, Any]] = []
        self.console = Console(quiet=not world.is_main)
        self.folder = Path(own.output_dir or self._default_folder())
        if not own.plan_only:
            files.check_writable(self.folder)
        self.rows = parse_rows(own.methods, own.as_released)
        self.scorer = Scorer(own.glue, own.glue_tasks, own.glue_train_rows, own.glue_seeds)
        self.references = References(self.rows, shared, self.folder / "references", self.scorer)

    def _default_folder(self) -> Path:
        content = dataclasses.asdict(self.own) | self.shared
        kept = {k: v for k, v in sorted(content.items()) if k not in (*PRESENTATION, "plan_only", "json")}
        digest = hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:6]
        return Path("runs") / f"compare-{self.own.match}-{digest}"

    # ---- doing it -------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Plan every row, run what is not done yet, score, and report; returns how many rows failed.

        Raises:
            ValueError, BudgetTooSmall: a row cannot work; nothing was written.
        """
        matching = Matching(self.shared, self.folder, self.world)
        budgets = matching.budgets(self.own.match, self.own.budget_gpu_hours, self.own.budget_flops)
        if self.own.epochs_cap is not None:
            unique = self.shared["unique_tokens"] = matching.unique_tokens(budgets[-1], self.own.epochs_cap)
            self.console.print(f"corpus cut to {unique:,} tokens, read {self.own.epochs_cap:g} times by a scratch run")
        for row in self.rows:
            for planned in matching.plans_of(row, budgets):
                self.plans.append({"row": row.label} | planned)
                self.console.print(plan_line(row, planned))
        if self.own.plan_only:
            return 0
        matching.keep()
        on_main(self.world, self.references.fine_tune)
        todo = [(row, budget, seed) for budget in budgets for seed in range(self.own.seeds) for row in self.rows]
        finished = on_main(self.world, lambda: [each for each in todo if (self.row_folder(*each) / "final").is_dir()])
        errors: dict[Path, str | None] = {}
        # What is finished comes first: the report that is there keeps their scores until all of them are read again.
        for number, (row, budget, seed) in enumerate(sorted(todo, key=lambda each: each not in finished), start=1):
            folder = self.row_folder(row, budget, seed)
            self.console.print(f"\nrow {number} of {len(todo)}: {row.label}, seed {seed}, {folder}")
            errors[folder] = self.run_row(row, budget, seed, folder)
            if errors[folder] is not None:
                self.console.print(f"row failed: {errors[folder]}")
            if number >= len(finished):
                on_main(self.world, lambda: self.report(todo, errors))
        return sum(error is not None for error in errors.values())

    def run_row(self, row: Row, budget: dict[str, float], seed: int, folder: Path) -> str | None:
        """Train and score a row, or what is left of it; the error that ended it, if one did."""
        error = None
        release_memory()
        try:
            more: dict[str, Any] = {"seed": self.shared.get("seed", 0) + seed, "output_dir": str(folder)}
            if self.own.tune:
                more["lr"] = self.tuned(row, budget).lr
            pipeline.run(row.resolved(self.shared, **budget, **more), self.world, self.console)
            on_main(self.world, lambda: self.scorer.fine_tune(folder, folder))
        except (Interrupted, KeyboardInterrupt):
            raise
        except Exception as caught:  # whatever a row does, the others go on
            error = f"{type(caught).__name__}: {caught}".splitlines()[0]
        failed = any_rank(self.world, error is not None)
        return error or ("failed on another rank" if failed else None)

    def tuned(self, row: Row, budget: dict[str, float]) -> Search:
        """The row's learning rate by search."""
        unit, amount = next(iter(budget.items()))

        def try_rate(rate: float, where: Path) -> None:
            more = {unit: amount * BUDGET_SHARE, "lr": rate, "output_dir": str(where)}
            pipeline.run(row.resolved(self.shared, **more), self.world, self.console)

        return tune(self.default_rate(row), self.own.tune, try_rate, self.tuning_folder(row, budget), self.world)

    def tuning_folder(self, row: Row, budget: dict[str, float]) -> Path:
        """Where the search for a row's learning rate is."""
        return self.folder / "tuning" / f"{row.slug}-{next(iter(budget.values())):g}".replace("+", "")

    def default_rate(self, row: Row) -> float:
        """The learning rate of a row that is not tuned."""
        return float(self.shared.get("lr") or methods.load(row.method).METHOD.default_lr)

    def row_folder(self, row: Row, budget: dict[str, float], seed: int) -> Path:
        """Where a row's run is."""
        amount = next(iter(budget.values()))
        return self.folder / "rows" / f"{row.slug}-{amount:g}-seed{seed}".replace("+", "")

    def report(self, todo: list[tuple[Row, dict[str, float], int]], errors: dict[Path, str | None]) -> None:
        """results.json, RESULTS.md and report.html of the rows that were tried, now or before."""
        folders = [self.row_folder(*each) for each in todo]
        tried = [
            (each, folder)
            for each, folder in zip(todo, folders, strict=True)
            if folder in errors or (folder / "final").is_dir()
        ]
        records = [
            results_row(
                row,
                folder=folder,
                seed=seed,
                budget=row.resolved(self.shared, **budget).run.budget.amount,
                scores=self.scorer.of(folder),
                error=errors.get(folder),
                marks=self.marks(row, budget, seed),
            )
            for (row, budget, seed), folder in tried
        ]
        write_results(
            self.folder,
            records,
            match=self.own.match,
            ancestors=self.references.ancestors,
            environment=environment.describe(),
            command=["python", "-m", "fastkd.compare", *self.argv],
            references=self.references.records([folder for (row, *_), folder in tried if not row.starts_from_teacher]),
            headline=headline(records),
        )
        build_comparison(self.folder)

    def marks(self, row: Row, budget: dict[str, float], seed: int) -> list[str]:
        """Everything besides the method that sets a row apart, and what finding its learning rate took."""
        base = base_row(self.rows)
        rates: list[float | None] = [self.default_rate(each) for each in (row, base)]
        tuning = []
        if self.own.tune:
            found = [searched(self.tuning_folder(each, budget)) for each in (row, base)]
            rates = [search.lr if search else None for search in found]
            if found[0] is not None:
                cost = f"{found[0].charged_s:.1f} GPU-seconds beside its budget"
                tuning = [f"learning rate chosen among {self.own.tune}, {cost}"]
        folder, base_folder = (self.row_folder(each, budget, seed) for each in (row, base))
        apart = circumstances(folder, base_folder, base) if folder.is_dir() else []
        return confounds(row, self.rows, self.shared, *rates) + tuning + apart


def plan_line(row: Row, planned: dict[str, Any]) -> str:
    """A row's plan in one line."""
    return (
        f"{row.label}: {Budget(**planned['budget'])}, {planned['steps']:,} steps, {planned['tokens']:,} tokens, "
        f"{planned['epochs']:.2f} epochs, {sum(planned['flops'].values()):.3e} FLOPs, "
        f"{planned['tokens_per_s']:,.0f} tokens/s, teacher's share {planned['teacher_share']:.1%} of FLOPs and "
        f"{planned['teacher_seconds_share']:.1%} of seconds, learning rate {planned['lr']:g}"
    )


def headline(records: list[dict[str, Any]]) -> list[str]:
    """The scores of the main table: the first metric of each fine-tuning task, else the held-out ones."""
    names = list(dict.fromkeys(name for record in records for name in record.get("scores", ())))
    tasks: dict[str, str] = {}
    for name in names:
        tasks.setdefault(name.split()[0], name)
    fine_tuned = [name for task, name in tasks.items() if task != "held-out"]
    return fine_tuned or names


def to_json(comparison: Comparison, failed: int) -> str:
    """What ``--json`` prints: ``plans`` (a row's label beside what plan.json holds), the ``folder``, how many rows
    ``failed``, and ``results``, which is results.json; the last three are null where only plans were asked for."""
    path = None if comparison.own.plan_only else comparison.folder / RESULTS
    content = {
        "plans": comparison.plans,
        "folder": path and str(path.parent),
        "failed": path and failed,
        "results": path and json.loads(path.read_text(encoding="utf-8")),
    }
    return json.dumps(finite(content), allow_nan=False)
