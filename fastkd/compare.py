"""The paper's experiment in one command: every method under one matched budget, then one table that can be believed.

``python -m fastkd.compare --budget-gpu-hours 1 --methods mlm,logit_kd,tinybert,minilmv2 --match gpu-seconds``

A row is a run of ``fastkd.run`` in a folder of its own, so it is planned, charged, resumed and reported like any other;
rows differ in their method alone, and whatever else differs is listed beside them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from fastkd import environment, methods, plan, run
from fastkd.comparison import write_results
from fastkd.comparison_report import build_comparison
from fastkd.config import PRESENTATION, Resolved, option, resolve, split_options
from fastkd.distributed import World, any_rank, barrier, finish, start
from fastkd.loop import Interrupted
from fastkd.models import hf
from fastkd.prepare import model_folder, prepare
from fastkd.row import Row, base_row, confounds, parse_row, results_row
from fastkd.run_folder import read_run
from fastkd.scores import Scorer, glue_scores, mlm_scores
from fastkd.train import Trainer
from fastkd.tuning import BUDGET_SHARE, tune


@dataclass(frozen=True)
class CompareConfig:
    """One comparison; all options of a run are taken too, and hold for every row."""

    methods: str = option(
        "mlm,tinybert,minilm,minilmv2",
        "rows, separated by commas: METHOD[+as-released][+init-from-teacher][@TEACHER]",
    )
    match: Literal["gpu-seconds", "flops"] = option("gpu-seconds", "what every row gets the same amount of")
    budget_gpu_hours: list[float] = option([], "GPU-hours a row; several give the crossover curve")
    budget_flops: float | None = option(None, "with --match flops: FLOPs a row (else a scratch run's in that time)")
    seeds: int = option(1, "seeds a row, from --seed on")
    as_released: bool = option(False, "add a row with the paper's released objective for each method that has one")
    tune: int = option(0, "learning rates tried for each row on equal budgets of a tenth, charged separately")
    epochs_cap: float | None = option(
        None, "cut the corpus down so that the scratch row passes over it so many times (the repeated-data experiment)"
    )
    glue: str | None = option(None, "folder of labelled data, or 'hub': fine-tune and score every row")
    glue_tasks: str | None = option(None, "tasks to score, separated by commas; default: all that the folder holds")
    glue_train_rows: str | None = option(None, "at most so many training rows: 10000, or sst2=10000,mnli=50000")
    glue_seeds: int = option(1, "fine-tunings of each task")
    output_dir: str | None = option(None, "folder; default runs/compare-…, the same for the same command")
    plan_only: bool = option(False, "print the plan of every row and stop")

    def check(self) -> None:
        """Refuse what cannot be compared.

        Raises:
            ValueError: naming the option and the remedy.
        """
        if self.match == "flops" and self.budget_flops is not None and self.budget_gpu_hours:
            raise ValueError("--match flops takes --budget-flops or --budget-gpu-hours, not both")
        if self.match == "gpu-seconds" and self.budget_flops is not None:
            raise ValueError("--match gpu-seconds takes --budget-gpu-hours; for --budget-flops use --match flops")
        if not self.budget_gpu_hours and self.budget_flops is None:
            raise ValueError("give a budget: --budget-gpu-hours 1, or --match flops --budget-flops 1e18")
        for name, value in (("seeds", self.seeds), ("glue-seeds", self.glue_seeds)):
            if value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if self.tune < 0 or self.tune == 1:
            raise ValueError(f"--tune takes 0 or at least 2 learning rates, got {self.tune}")


class Comparison:
    """The rows of a comparison, what they share, and where they lie."""

    def __init__(self, own: CompareConfig, shared: dict[str, Any], argv: Sequence[str], world: World) -> None:
        own.check()
        self.own, self.shared, self.argv, self.world = own, shared, list(argv), world
        self.console = Console(highlight=False, soft_wrap=True, quiet=not world.is_main)
        self.folder = Path(own.output_dir or self._default_folder())
        self.rows = self._rows()
        self.scorer = Scorer(own.glue, own.glue_tasks, own.glue_train_rows, own.glue_seeds)

    def _default_folder(self) -> Path:
        content = dataclasses.asdict(self.own) | self.shared
        kept = {k: v for k, v in sorted(content.items()) if k not in (*PRESENTATION, "plan_only")}
        digest = hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:6]
        return Path("runs") / f"compare-{self.own.match}-{digest}"

    def _rows(self) -> list[Row]:
        specs = [parse_row(spec) for spec in self.own.methods.split(",") if spec.strip()]
        if self.own.as_released:
            plain = [row for row in specs if not row.options]
            specs += [dataclasses.replace(row, options=("as_released",)) for row in plain if has_released(row.method)]
        if not specs:
            raise ValueError("--methods names no row: give, for example, --methods mlm,minilmv2")
        doubles = [row.label for row in specs if sum(other == row for other in specs) > 1]
        if doubles:
            raise ValueError(f"--methods names {doubles[0]} twice: leave one out, and use --seeds for repeats")
        return specs

    # ---- a row's configuration ------------------------------------------------------------------------------

    def resolved(self, row: Row, budget: dict[str, float], **more: Any) -> Resolved:
        """The run of a row under a budget; options that its method does not read are left out."""
        return resolve(row.run_options(self.shared) | budget | {"charge": "compute"} | more)

    def budgets(self) -> list[dict[str, float]]:
        """The budget of every row, one a point of the curve; a scratch run's FLOPs are measured once and kept."""
        hours = self.own.budget_gpu_hours
        if self.own.match == "gpu-seconds":
            return [{"budget_gpu_hours": value} for value in hours]
        if self.own.budget_flops is not None:
            return [{"budget_flops": self.own.budget_flops}]
        return [{"budget_flops": self.scratch_plan({"budget_gpu_hours": value})["total_flops"]} for value in hours]

    def scratch_plan(self, budget: dict[str, float]) -> dict[str, float]:
        """FLOPs and tokens of a scratch run under a budget, as first measured (kept in ``scratch.json``)."""
        path = self.folder / "scratch.json"
        known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        key = json.dumps(budget)
        barrier(self.world)
        if key not in known:
            planned = self.plan_of(Row("mlm"), budget)
            known[key] = {"total_flops": sum(planned["flops"].values()), "tokens": planned["tokens"]}
            if self.world.is_main and not self.own.plan_only:
                self.folder.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(known, indent=1))
            barrier(self.world)
        return dict(known[key])

    def plan_of(self, row: Row, budget: dict[str, float]) -> dict[str, Any]:
        """A row's plan, measured."""
        resolved = self.resolved(row, budget)
        parts = prepare(resolved, self.world)
        return plan.make(resolved, parts, plan.measure(Trainer(parts)))

    # ---- doing it -------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Plan every row, run what is not done yet, score, and report."""
        budgets = self.budgets()
        if self.own.epochs_cap is not None:
            self.shared["unique_tokens"] = int(self.scratch_plan(budgets[-1])["tokens"] / self.own.epochs_cap)
        self.print_plans(budgets)
        if self.own.plan_only:
            return
        self.score_references()
        todo = [(row, budget, seed) for budget in budgets for seed in range(self.own.seeds) for row in self.rows]
        errors: dict[Path, str | None] = {}
        for number, (row, budget, seed) in enumerate(todo, start=1):
            folder = self.row_folder(row, budget, seed)
            self.console.print(f"\nrow {number} of {len(todo)}: {row.label}, seed {seed}, {folder}")
            errors[folder] = self.run_row(row, budget, seed, folder)
            if errors[folder] is not None:
                self.console.print(f"row failed: {errors[folder]}")
            if self.world.is_main:
                self.report(todo[:number], errors)
        barrier(self.world)

    def run_row(self, row: Row, budget: dict[str, float], seed: int, folder: Path) -> str | None:
        """Train and score a row, or what is left of it; the error that ended it, if one did."""
        error = None
        try:
            more: dict[str, Any] = {"seed": self.shared.get("seed", 0) + seed, "output_dir": str(folder)}
            if self.own.tune:
                more["lr"], _ = self.tuned(row, budget)
            run.run(self.resolved(row, budget, **more), self.world, self.console)
            if self.world.is_main:
                self.scorer.fine_tune(folder, folder)
        except (Interrupted, KeyboardInterrupt):
            raise
        except Exception as caught:  # whatever a row does, the others go on
            error = f"{type(caught).__name__}: {caught}".splitlines()[0]
        failed = any_rank(self.world, error is not None)
        return error or ("failed on another rank" if failed else None)

    def tuned(self, row: Row, budget: dict[str, float]) -> tuple[float, float]:
        """The row's learning rate by search, and the GPU-seconds that took."""
        unit, amount = next(iter(budget.items()))

        def try_rate(rate: float, where: Path) -> None:
            more = {"lr": rate, "output_dir": str(where), "seed": self.shared.get("seed", 0)}
            run.run(self.resolved(row, {unit: amount * BUDGET_SHARE}, **more), self.world, self.console)

        folder = self.folder / "tuning" / f"{row.slug}-{amount:g}".replace("+", "")
        return tune(self.default_rate(row), self.own.tune, try_rate, folder)

    def default_rate(self, row: Row) -> float:
        """The learning rate of a row that is not tuned."""
        return float(self.shared.get("lr") or methods.load(row.method).METHOD.default_lr)

    def score_references(self) -> None:
        """Fine-tune the teacher and the untrained student, once: what the rows' scores lie between."""
        if self.own.glue is None or not self.world.is_main:
            return
        references = self.folder / "references"
        resolved = self.resolved(self.rows[-1], {"budget_tokens": 1e9})
        if resolved.run.teacher is not None and not (references / "teacher" / "glue.json").exists():
            self.scorer.fine_tune(model_folder(resolved.run.teacher), references / "teacher")
        untrained = references / "untrained"
        if not (untrained / "glue.json").exists():
            export_untrained(resolved, untrained / "final")
            self.scorer.fine_tune(untrained, untrained)

    def row_folder(self, row: Row, budget: dict[str, float], seed: int) -> Path:
        """Where a row's run lies."""
        amount = next(iter(budget.values()))
        return self.folder / "rows" / f"{row.slug}-{amount:g}-seed{seed}".replace("+", "")

    def print_plans(self, budgets: list[dict[str, float]]) -> None:
        """The plan of every row under the largest budget, before anything is spent.

        Raises:
            ValueError, BudgetTooSmall: a row cannot work.
        """
        for row in self.rows:
            planned = self.plan_of(row, budgets[-1])
            self.console.print(
                f"{row.label}: {planned['steps']:,} steps, {planned['tokens']:,} tokens, "
                f"{planned['epochs']:.2f} epochs, "
                f"{sum(planned['flops'].values()):.3e} FLOPs, {planned['tokens_per_s']:,.0f} tokens/s, teacher's share "
                f"{planned['teacher_share']:.1%} of FLOPs and {planned['teacher_seconds_share']:.1%} of seconds, "
                f"learning rate {planned['lr']:g}"
            )

    def report(self, done: list[tuple[Row, dict[str, float], int]], errors: dict[Path, str | None]) -> None:
        """results.json, RESULTS.md and report.html of the rows so far."""
        records = [
            results_row(
                row,
                folder=(folder := self.row_folder(row, budget, seed)),
                seed=seed,
                budget=next(iter(budget.values())),
                scores=self.scorer.of(folder),
                error=errors[folder],
                marks=self.marks(row, budget, folder),
            )
            for row, budget, seed in done
        ]
        teacher = self.resolved(self.rows[-1], {"budget_tokens": 1}).run.teacher
        write_results(
            self.folder,
            records,
            match=self.own.match,
            teacher=teacher,
            environment=environment.describe(),
            command=["python", "-m", "fastkd.compare", *self.argv],
            references=self.references(done),
            headline=headline(records),
        )
        build_comparison(self.folder)

    def marks(self, row: Row, budget: dict[str, float], folder: Path) -> list[str]:
        """Everything besides the method that sets a row apart, and what finding its learning rate took."""
        base = base_row(self.rows)
        rates = {each: self.default_rate(each) for each in (row, base)}
        tuning = []
        if self.own.tune and (folder / "plan.json").exists():
            for each in dict.fromkeys((base, row)):
                rates[each], seconds = self.tuned(each, budget)
            tuning = [f"learning rate chosen among {self.own.tune}, {seconds:.1f} GPU-seconds beside its budget"]
        return confounds(row, self.rows, self.shared, rates[row], rates[base]) + tuning

    def references(self, done: list[tuple[Row, dict[str, float], int]]) -> list[dict[str, Any]]:
        """The teacher and the untrained student as rows without a cost."""
        folders = [self.row_folder(*each) for each in done]
        starts = [read_run(folder).validations[0] for folder in folders if (folder / "metrics.jsonl").exists()]
        untrained = next((found for start in starts if (found := mlm_scores(start))), {})
        where = self.folder / "references"
        return [
            {"label": "teacher", "scores": glue_scores(where / "teacher")},
            {"label": "untrained student", "scores": glue_scores(where / "untrained") | untrained},
        ]


def headline(records: list[dict[str, Any]]) -> list[str]:
    """The scores of the main table: the first metric of each fine-tuning task, else the held-out ones."""
    names = list(dict.fromkeys(name for record in records for name in record.get("scores", ())))
    tasks: dict[str, str] = {}
    for name in names:
        tasks.setdefault(name.split()[0], name)
    fine_tuned = [name for task, name in tasks.items() if task != "held-out"]
    return fine_tuned or names


def export_untrained(resolved: Resolved, folder: Path) -> None:
    """The student of a row before its first step, as a Hugging Face folder."""
    parts = prepare(resolved, World())
    card = "# An untrained encoder\n\nRandom weights: the reference that a comparison's students start from.\n"
    hf.export(parts.student, parts.tokenizer, folder, card=card, mlm_head=False)


def has_released(method: str) -> bool:
    """Whether a method has an ``as_released`` variant."""
    return "as_released" in {f.name for f in dataclasses.fields(methods.load(method).Config)}


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 (a row that failed stands in the table), 2 bad configuration, 3 budget too small, 75."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    world = World()
    try:
        own, shared = split_options(arguments, CompareConfig, "python -m fastkd.compare")
        world = start()
        comparison = Comparison(own, shared, arguments, world)
        comparison.run()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return run.EXIT_CONFIGURATION
    except plan.BudgetTooSmall as error:
        print(f"error: {error}", file=sys.stderr)
        return run.EXIT_BUDGET
    except (Interrupted, KeyboardInterrupt):
        print("interrupted; issue the same command again to resume")
        return run.EXIT_INTERRUPTED
    finally:
        finish(world)
    if world.is_main and not own.plan_only:
        print(f"table {comparison.folder}/RESULTS.md · report {comparison.folder}/report.html")
    return run.EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main())
