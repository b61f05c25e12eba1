"""The options of ``fastkd.compare`` besides those of its runs, and what it refuses."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastkd.comparison.rows import controls, parse_rows
from fastkd.glue.tasks import choose_tasks, parse_limits
from fastkd.probes import names
from fastkd.run_config import option

MOST_RATES = 20  # each is twice the one before
# Options of a run that a comparison sets itself, or that are for one student only.
FIXED = ("method", "charge", "replay", "budget_tokens", "push_to_hub")


@dataclass(frozen=True)
class CompareConfig:
    """Options of a comparison. Options of a run are taken too and hold for every row."""

    methods: str = option(
        "mlm,tinybert,minilm,minilmv2",
        "rows, separated by commas: METHOD, or a recipe such as 'minilmv2:0.3>mlm', with "
        "[+as-released][+init-from-teacher][+OPTION=VALUE][@TEACHER]; OPTION is optimizer, schedule, mask-rate or of the method",
    )
    match: Literal["gpu-seconds", "flops"] = option("gpu-seconds", "what every row gets the same amount of")
    budget_gpu_hours: list[float] = option([], "GPU-hours a row; several give the crossover curve")
    budget_flops: float | None = option(None, "with --match flops: FLOPs a row (else a scratch run's in that time)")
    seeds: int = option(
        2, "seeds a row, from --seed on; 1 halves the price and leaves differences between seeds unknown"
    )
    as_released: bool = option(False, "add a row with the paper's released objective for each method that has one")
    controls: bool = option(
        True, "add mlm+init-from-teacher where a row starts from its teacher: what the start gives without the method"
    )
    tune: int = option(0, "learning rates tried for each row on equal budgets of a tenth, charged separately")
    epochs_cap: float | None = option(
        None,
        "cut the corpus down so that the scratch row passes over it this many times (the repeated-data experiment)",
    )
    glue: str | None = option(None, "folder of labelled data, or 'hub': fine-tune and score every row")
    glue_tasks: str | None = option(None, "tasks to score, separated by commas; default: all that the folder holds")
    glue_train_rows: str | None = option(None, "training rows at most: 10000, or sst2=10000,mnli=50000")
    glue_seeds: int = option(1, "fine-tunings of each task")
    probes: str | None = option(
        None,
        "tokens, pos, blimp (comma-separated) or none: probe every row; default: tokens, and what --probe-data has files for",
    )
    probe_data: list[str] = option(
        [], "CoNLL-U files (pos), BLiMP's zip or folder (blimp), or a folder that holds any of them"
    )
    output_dir: str | None = option(None, "folder; default runs/compare-…, the same for the same command")
    plan_only: bool = option(False, "print the plan of every row and stop")
    json: bool = option(False, "print one JSON object, and nothing else on standard output")

    def check(self) -> None:
        """Refuse values that are out of range or do not go together.

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
        if self.tune != 0 and not 2 <= self.tune <= MOST_RATES:
            raise ValueError(f"--tune takes 0 or from 2 to {MOST_RATES} learning rates, got {self.tune}")
        if self.epochs_cap is not None and not 0 < self.epochs_cap < float("inf"):
            raise ValueError(f"--epochs-cap must be above zero and finite, got {self.epochs_cap:g}")
        self._check_glue()
        names.check(self.probes)

    def _check_glue(self) -> None:
        parse_limits(self.glue_train_rows, "--glue-train-rows")
        if self.glue is None and (self.glue_tasks or self.glue_train_rows):
            raise ValueError("--glue-tasks and --glue-train-rows need --glue: a folder of labelled data, or hub")
        if self.glue not in (None, "hub") and not Path(str(self.glue)).is_dir():
            raise ValueError(f"--glue {self.glue} is not a folder: give the one that holds SST-2, MRPC, …, or hub")
        choose_tasks(self.glue_tasks.split(",") if self.glue_tasks else (), ())


def check(own: CompareConfig, shared: dict[str, Any], explicit: Collection[str] = ()) -> None:
    """Refuse what cannot be compared: options of the comparison, options that all rows share, and each row with these.

    ``explicit``: options of the command line. Each must be read by a row; a file may have more.

    Raises:
        ValueError: naming the option and the remedy.
    """
    own.check()
    for name in FIXED:
        if name in shared:
            raise ValueError(f"--{name.replace('_', '-')} is no option of a comparison: leave it out")
    if shared.get("init_from_teacher"):
        raise ValueError("--init-from-teacher is a row's own: write METHOD+init-from-teacher in --methods")
    budgets: list[dict[str, Any]] = [{"budget_gpu_hours": hours} for hours in own.budget_gpu_hours]
    rows = parse_rows(own.methods, own.as_released)
    read = {name for row in rows for name in row.reads}
    for name in explicit:
        if name not in read:
            raise ValueError(f"no row of --methods {own.methods} reads --{name.replace('_', '-')}: leave it out")
    for row in (*rows, *(controls(rows) if own.controls else ())):
        for budget in budgets or [{"budget_flops": own.budget_flops}]:
            row.resolved(shared, **budget)
