"""One comparison: its rows planned, run, scored and reported."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkd import disk, files, pipeline, quantities, signals
from fastkd.budget import Budget
from fastkd.comparison import differences
from fastkd.comparison.budgets import MatchedBudgets, release_memory
from fastkd.comparison.options import CompareConfig
from fastkd.comparison.references import References
from fastkd.comparison.report import build_comparison
from fastkd.comparison.results import RESULTS, record_of, write_results
from fastkd.comparison.rows import BudgetOption, Row, RowRun, base_row, controls, parse_rows
from fastkd.comparison.scores import Scorer, headline
from fastkd.comparison.tuning import BUDGET_SHARE, Search, searched, tune
from fastkd.device import environment
from fastkd.distributed import World, any_rank, on_main, phase
from fastkd.files import finite
from fastkd.opening import alone_in
from fastkd.plan_lines import rates
from fastkd.run_config import PRESENTATION
from fastkd.run_folder import refuse_links
from fastkd.terminal import Console

if TYPE_CHECKING:
    from fastkd.probes.evaluation import Prober

# Options that change neither what is trained nor the fine-tuned scores: the same folder holds both.
UNTRAINED = ("controls", "plan_only", "json")


class Comparison:
    """The rows of a comparison, the options that they share, and the folder that holds them."""

    def __init__(
        self, own: CompareConfig, shared: dict[str, Any], argv: Sequence[str], world: World, prober: Prober
    ) -> None:
        self.own, self.shared, self.argv, self.world = own, shared, list(argv), world
        self.plans: list[dict[str, Any]] = []
        self.console = Console(quiet=not world.is_main)
        self.folder = Path(own.output_dir or default_folder(own, shared))
        if not own.plan_only:
            files.check_writable(self.folder)
        named = parse_rows(own.methods, own.as_released)
        self.controls = controls(named) if own.controls else []
        self.rows = [*named, *self.controls]
        self.scorer = Scorer(own.glue, own.glue_tasks, own.glue_train_rows, own.glue_seeds, prober)
        self.references = References(self.rows, shared, self.folder / "references", self.scorer)

    def run(self) -> int:
        """Plan every row, run what is not done yet, score, and report; returns how many runs failed.

        Raises:
            ValueError, BudgetTooSmall: a row cannot work, or another process is in the folder; nothing was written.
        """
        if self.own.plan_only:
            return self._run()
        on_main(self.world, lambda: refuse_links(self.folder))
        with alone_in(self.folder, self.world):
            on_main(self.world, lambda: files.clear(self.folder))
            return self._run()

    def _run(self) -> int:
        matched = MatchedBudgets(self.shared, self.folder, self.world)
        budgets = matched.budgets(self.own.match, self.own.budget_gpu_hours, self.own.budget_flops)
        if self.own.epochs_cap is not None:
            unique = self.shared["unique_tokens"] = matched.unique_tokens(budgets[-1], self.own.epochs_cap)
            self.console.print(f"corpus cut to {unique:,} tokens, read {self.own.epochs_cap:g} times by a scratch run")
        self.plan(matched, budgets)
        if self.own.plan_only:
            return 0
        matched.keep()
        on_main(self.world, self.references.score)
        return self.run_rows(budgets)

    def plan(self, matched: MatchedBudgets, budgets: list[BudgetOption]) -> None:
        """Plan every row under every budget, and print the plans."""
        share = BUDGET_SHARE if self.own.tune else 1.0
        for row in self.controls:
            self.console.print(
                f"row added: {row.label}, what the start gives without the method (--controls false: not added)"
            )
        for row in self.rows:
            for planned in self._plans_of(row, matched, budgets, share):
                self.plans.append({"row": row.label} | planned)
                self.console.print(plan_line(row, planned))
        self.console.print(price_line(self.plans, len(self.rows), self.own.seeds))

    def _plans_of(
        self, row: Row, matched: MatchedBudgets, budgets: list[BudgetOption], share: float
    ) -> list[dict[str, Any]]:
        try:
            return matched.plans_of(row, budgets, share)
        except ValueError as error:
            if row not in self.controls:
                raise
            raise ValueError(f"row {row.label}, which was added: {error}; or add none with --controls false") from error

    def run_rows(self, budgets: list[BudgetOption]) -> int:
        """Run every row under every budget with every seed, and report after each; returns how many failed."""
        seeds = range(self.own.seeds)
        runs = [RowRun(row, budget, seed, self.folder) for budget in budgets for seed in seeds for row in self.rows]
        finished = on_main(self.world, lambda: [run for run in runs if run.finished])
        errors: dict[Path, str | None] = {}
        # Finished runs come first and make no report: the last one stays until all their scores are read again.
        for number, run in enumerate(sorted(runs, key=lambda run: run not in finished), start=1):
            self.console.print(f"\nrow {number} of {len(runs)}: {run.row.label}, seed {run.seed}, {run.folder}")
            with phase("a row"):
                errors[run.folder] = self.run_row(run)
            if errors[run.folder] is not None:
                self.console.print(f"row failed: {errors[run.folder]}")
            if number >= len(finished):
                on_main(self.world, lambda: self.report(runs, errors))
        return sum(error is not None for error in errors.values())

    def run_row(self, run: RowRun) -> str | None:
        """Train and score, or do what is left of it; returns the error that ended it, if one did."""
        error = None
        release_memory()
        try:
            more: dict[str, Any] = {"seed": self.shared.get("seed", 0) + run.seed, "output_dir": str(run.folder)}
            if self.own.tune:
                more["lr"] = self.tuned(run).lr
            pipeline.run(run.row.resolved(self.shared, **run.budget, **more), self.world, self.console)
            on_main(self.world, lambda: self.scorer.score(run.folder, run.folder))
        except Exception as caught:  # whatever ends one row, the others go on, but for a signal or the disk
            if signals.asked() or disk.failure(caught):
                raise
            error = f"{type(caught).__name__}: {caught}".splitlines()[0]
        failed = any_rank(self.world, error is not None)
        return error or ("failed on another rank" if failed else None)

    def tuned(self, run: RowRun) -> Search:
        """Search for the learning rate, or read what a search found before."""
        ((option, amount),) = run.budget.items()

        def try_rate(rate: float, where: Path) -> None:
            more = {option: amount * BUDGET_SHARE, "lr": rate, "output_dir": str(where)}
            pipeline.run(run.row.resolved(self.shared, **more), self.world, self.console)

        default = run.row.default_rates(self.shared)[0]
        return tune(default, self.own.tune, try_rate, run.tuning_folder, self.world)

    def report(self, runs: list[RowRun], errors: dict[Path, str | None]) -> None:
        """Write results.json, RESULTS.md and report.html of the runs that were tried, now or before."""
        tried = [run for run in runs if run.folder in errors or run.finished]
        records = [
            record_of(
                run,
                budget=run.row.resolved(self.shared, **run.budget).run.budget.amount,
                scores=self.scorer.of(run.folder),
                items=self.scorer.items_of(run.folder, self.folder),
                error=errors.get(run.folder),
                differences=self.differences_of(run),
            )
            for run in tried
        ]
        write_results(
            self.folder,
            records,
            match=self.own.match,
            ancestors=self.references.ancestors,
            environment=environment.describe(),
            command=["python", "-m", "fastkd.compare", *self.argv],
            references=self.references.records([run.folder for run in tried if not run.row.starts_from_teacher]),
            headline=headline(name for record in records for name in record.get("scores", ())),
        )
        build_comparison(self.folder)

    def differences_of(self, run: RowRun) -> list[str]:
        """How a run differs from the base row's besides the method, and what finding its learning rate took."""
        base = dataclasses.replace(run, row=base_row(self.rows))
        found = differences.of_options(run.row, self.rows, self.shared, self.rates(run), self.rates(base))
        if self.own.tune and (search := searched(run.tuning_folder)):
            found.append(differences.of_search(search, self.own.tune))
        if run.folder.is_dir():
            found += differences.of_start(run.folder)
            found += differences.of_surroundings(run.folder, base.folder, base.row)
        return found

    def rates(self, run: RowRun) -> list[float]:
        """The learning rates of a run's methods; none if one for all is searched for and not found yet."""
        if not self.own.tune:
            return run.row.default_rates(self.shared)
        search = searched(run.tuning_folder)
        return [search.lr] if search else []


def default_folder(own: CompareConfig, shared: dict[str, Any]) -> Path:
    """The folder of a comparison without --output-dir: the same for the same options."""
    content = dataclasses.asdict(own) | shared
    kept = {k: v for k, v in sorted(content.items()) if k not in (*PRESENTATION, *UNTRAINED)}
    digest = hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:6]
    return Path("runs") / f"compare-{own.match}-{digest}"


def plan_line(row: Row, planned: dict[str, Any]) -> str:
    """A row's plan in one line."""
    return (
        f"{row.label}: {Budget(**planned['budget'])}, {planned['steps']:,} steps, {planned['tokens']:,} tokens, "
        f"{planned['epochs']:.2f} epochs, {sum(planned['flops'].values()):.3e} FLOPs, "
        f"{planned['tokens_per_s']:,.0f} tokens/s, teacher's share {planned['teacher_share']:.1%} of FLOPs and "
        f"{planned['teacher_seconds_share']:.1%} of seconds, learning rate {rates(planned)}"
    )


def price_line(plans: list[dict[str, Any]], rows: int, seeds: int) -> str:
    """How many runs a comparison is, and what they take together by its plans, searches and fine-tuning not included."""
    seconds = seeds * sum(planned["seconds"] for planned in plans)
    each = f"{seeds} seeds" if seeds > 1 else "1 seed"
    return f"{seeds * len(plans)} runs: {rows} rows, {each} each, about {quantities.duration(seconds)} of training"


def to_json(comparison: Comparison, failed: int) -> str:
    """What ``--json`` prints: ``plans`` (a row's label and what plan.json holds), the ``folder``, how many runs
    ``failed``, and ``results``, which is results.json. With ``--plan-only`` the last three are null."""
    path = None if comparison.own.plan_only else comparison.folder / RESULTS
    content = {
        "plans": comparison.plans,
        "folder": path and str(path.parent),
        "failed": path and failed,
        "results": path and json.loads(path.read_text(encoding="utf-8")),
    }
    return json.dumps(finite(content), allow_nan=False)
