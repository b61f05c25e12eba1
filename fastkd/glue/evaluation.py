"""Evaluate a model: check everything, fine-tune what is not finished, and write scores, table, card and ledger line."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastkd import files
from fastkd.files import drop_torn_line, to_line
from fastkd.glue import rows as row_files
from fastkd.glue.cells import FOLDER, Cell
from fastkd.glue.encoded import load_rows
from fastkd.glue.finetune import Job, check_model, fast_bf16
from fastkd.glue.protocol import PROTOCOLS, Protocol
from fastkd.glue.scores import average, choose, markdown, missing_tasks, to_json, update_card
from fastkd.glue.source import Source, find_model
from fastkd.glue.submission import FOLDER as SUBMISSION
from fastkd.glue.submission import write_submission
from fastkd.glue.tasks import Task, choose_tasks
from fastkd.glue.workers import run_cells, visible_gpus
from fastkd.reports import model_card

EXTRA = ("accelerate", "sklearn", "scipy")
SAW_PAIRS = (
    "The quickstart teacher (all-MiniLM-L6-v2) was fine-tuned on NLI and paraphrase pairs (SNLI, MultiNLI and Quora "
    "among them): its own and its students' RTE, MRPC, QQP and MNLI scores are helped by that."
)


@dataclass(frozen=True)
class Plan:
    """An evaluation that was checked: nothing is left that a file or an option could be wrong about."""

    source: Source
    protocol: Protocol
    output_dir: Path
    jobs: int
    saw_pairs: bool  # as Source.saw_pairs says, read before anything is spent
    bf16: bool  # measured once for all fine-tunings
    cells: list[Cell] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # oddities of the data, in one line each

    def add(self, task: Task, data: Path | None, seeds: int, train_rows: int | None, predict_test: bool) -> None:
        """Read a task's files and plan its fine-tunings. Raises ValueError for a file that is wrong."""
        test, absent = _test_splits(task, data, predict_test)
        splits = load_rows(task, data, train_rows, test)
        for split in task.dev:
            if task.is_regression and len(splits[split]) < 2:
                raise ValueError(f"{splits[split].source}: a correlation needs two rows at least; download it again")
        self.notes.extend([*absent, *_oddities(task, splits, train_rows)])
        sizes = {split: len(rows) for split, rows in splits.items()}
        content = tuple((split, rows.sha256) for split, rows in splits.items())
        model, digest = self.source.folder, self.source.sha256
        for rate, size in self.protocol.grid:
            for seed in range(seeds):
                job = Job(
                    model, task, data, train_rows, self.protocol, rate, size, seed, self.bf16, test, digest, content
                )
                self.cells.append(Cell(job, sizes, self.output_dir))


def evaluate(
    model: str | Path,
    tasks: Sequence[str] | None = None,
    data: str | Path | None = None,
    protocol: str = "headline",
    seeds: int | None = None,
    output_dir: str | Path | None = None,
    *,
    task_files: Iterable[str | Path] = (),
    train_rows: int | Mapping[str, int] | None = None,
    predict_test: bool = False,
    jobs: int | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Fine-tune ``model`` on GLUE and score it on the dev sets; what finished before is not repeated.

    model: a run folder, a Hugging Face folder, a hub id, or ``quickstart``.
    tasks: names; None: those of the protocol that ``data`` holds (only those of ``task_files`` where these are given).
    data: a folder with the official files, or in the hub's column names; None: the hub.
    protocol: ``headline`` or ``paper``. seeds: how many, from 0; None: the protocol's.
    output_dir: where glue.json, glue.md and finished fine-tunings go; None: the run folder, or ``runs/glue-…``. A run's
    ledger and model card are kept up wherever that is.
    train_rows: training rows at most, a fixed random subset, of all tasks or of those named.
    jobs: fine-tunings side by side; None: one a GPU.

    Returns ``scores`` (as glue.json: task → metric → mean, std, seeds, values, times 100), ``average`` (float or
    None), ``missing`` (titles of the protocol's tasks without a score), ``markdown``, ``seconds`` of this call,
    ``device_seconds`` of all fine-tunings behind the scores, ``submission`` (files), ``output_dir``.

    Raises:
        ValueError: the user's mistakes, in one line, before anything is written.
    """
    require_extra()
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}: choose from {', '.join(PROTOCOLS)}")
    for option, value in (("seeds", seeds), ("jobs", jobs)):
        if value is not None and value < 1:
            raise ValueError(f"--{option} must be at least 1, not {value}")
    source = find_model(model)
    folder = Path(output_dir) if output_dir is not None else source.output_dir
    for written in (folder, source.run or folder):
        files.check_writable(written / FOLDER, written / "glue.json", written / "glue.md")
    if predict_test:
        files.check_writable(folder / SUBMISSION)
    _check_card(source)
    data = Path(data) if data is not None else None
    chosen = _choose(tasks, [Path(path) for path in task_files], PROTOCOLS[protocol], data)
    limits = _limits(train_rows, chosen)
    check_model(source.folder)
    jobs = jobs or max(1, len(visible_gpus()))
    plan = Plan(source, PROTOCOLS[protocol], folder, jobs, source.saw_pairs, fast_bf16())
    for task in chosen.values():
        plan.add(task, data, seeds or plan.protocol.seeds, limits.get(task.name), predict_test)
    return carry_out(plan, log)


def _check_card(source: Source) -> None:
    """Raises ValueError where a run's model card cannot be read, before hours are spent on what goes in."""
    card = source.folder / "README.md"
    if source.run is not None and card.exists():
        try:
            card.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"{card} is no text file in UTF-8 ({error}): restore it, or remove it") from error


def require_extra() -> None:
    """Raises ValueError where a package of the extra ``glue`` is missing."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        name = {"sklearn": "scikit-learn"}.get(missing[0], missing[0])
        raise ValueError(f'GLUE needs {name}: pip install "fastkd[glue]"')


def _choose(
    names: Sequence[str] | None, task_files: Sequence[Path], protocol: Protocol, data: Path | None
) -> dict[str, Task]:
    """The tasks asked for, or those of the protocol that the folder holds."""
    if data is not None and not data.is_dir():
        raise ValueError(f"--data {data} is not a folder; give the one that holds SST-2, MRPC, …")
    if names is not None or task_files:
        return choose_tasks(names or (), task_files)
    chosen = choose_tasks(protocol.tasks, ())
    if data is None:
        return chosen
    held = {name: task for name, task in chosen.items() if row_files.task_folder(task, data)}
    if not held:
        titles = ", ".join(task.title for task in chosen.values())
        raise ValueError(f"--data {data} holds none of the folders {titles}")
    return held


def _limits(train_rows: int | Mapping[str, int] | None, chosen: Mapping[str, Task]) -> dict[str, int]:
    limits = dict(train_rows) if isinstance(train_rows, Mapping) else {}
    if isinstance(train_rows, int):
        limits = dict.fromkeys(chosen, train_rows)
    for name, limit in limits.items():
        if name not in chosen:
            raise ValueError(f"--train-rows names {name!r}, which is not evaluated: choose from {', '.join(chosen)}")
        if limit < 1:
            raise ValueError(f"--train-rows must be at least 1, not {limit} ({name})")
    return limits


def _test_splits(task: Task, data: Path | None, predict_test: bool) -> tuple[tuple[str, ...], list[str]]:
    """The test splits to predict, and notes on the diagnostic set, which may be absent."""
    if not predict_test:
        return (), []
    if not task.test:
        raise ValueError(f"task {task.name!r} has no test file: name one in its task file, or leave out --predict-test")
    if "diagnostic" in task.test and data is not None:
        try:
            row_files.find_files(task, "diagnostic", data)
        except ValueError as error:
            return tuple(split for split in task.test if split != "diagnostic"), [f"no AX.tsv: {error}"]
    return tuple(task.test), []


def _oddities(task: Task, splits: Mapping[str, row_files.Rows], limit: int | None) -> list[str]:
    """What a reader should know about the data: rows that were skipped, and numbers that are not the release's."""
    notes = []
    for split, rows in splits.items():
        if rows.broken:
            notes.append(f"{rows.source}: {rows.broken} rows that line breaks cut are left out, as on the hub")
        expected = task.rows.get(split, len(rows))
        if len(rows) != expected and not (split == task.train and limit is not None):
            notes.append(f"{rows.source}: {len(rows):,} rows, where the release has {expected:,}")
    return notes


def carry_out(plan: Plan, log: Callable[[str], None]) -> dict[str, Any]:
    """Run the cells that are not finished, and write what they come to."""
    start = time.perf_counter()
    results = {cell.path: found for cell in plan.cells if (found := cell.read()) is not None}
    waiting = [cell for cell in plan.cells if cell.path not in results]
    _announce(plan, len(results), log)
    written = start
    try:
        for cell, result in run_cells(waiting, plan.jobs):
            results[cell.path] = result
            now = time.perf_counter()
            _write_ledger(plan, now - written, cell)
            written = now
            log(_progress(cell, result, len(results), len(plan.cells)))
    except BaseException:
        _write_ledger(plan, time.perf_counter() - written, None)
        raise
    return _publish(plan, [(cell, results[cell.path]) for cell in plan.cells], time.perf_counter() - start)


def _announce(plan: Plan, finished: int, log: Callable[[str], None]) -> None:
    gpus = visible_gpus()
    device = f"{len(gpus)} GPU{'s' if len(gpus) > 1 else ''}" if gpus else "CPU"
    dtype = "bfloat16" if plan.bf16 else "float32"
    titles = dict.fromkeys(cell.job.task.title for cell in plan.cells)
    log(f"GLUE of {plan.source.name} ({plan.source.folder}), protocol {plan.protocol.description}")
    log(
        f"{', '.join(titles)}: {len(plan.cells)} fine-tunings, {finished} of them finished before; "
        f"{device}, {dtype}, {plan.jobs} at a time; results in {plan.output_dir}"
    )
    for note in plan.notes:
        log(f"note: {note}")


def _progress(cell: Cell, result: Mapping[str, Any], finished: int, total: int) -> str:
    job = cell.job
    metrics = ", ".join(f"{name} {value:.1f}" for name, value in result["metrics"].items())
    grid = f" lr {job.learning_rate:g} batch {job.batch_size}" if len(job.protocol.grid) > 1 else ""
    return f"[{finished}/{total}] {job.task.title}{grid} seed {job.seed}: {metrics} ({result['seconds']:.0f} s)"


def _write_ledger(plan: Plan, seconds: float, cell: Cell | None) -> None:
    """What a fine-tuning cost since the line before, in the run's ledger and never charged; None: it was interrupted."""
    if plan.source.run is None:
        return
    line = {
        "event": "glue",
        "seconds": seconds,
        "charged": False,
        "task": cell.job.task.name if cell else None,
        "seed": cell.job.seed if cell else None,
        "protocol": plan.protocol.name,
        "jobs": plan.jobs,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    ledger = plan.source.run / "ledger.jsonl"
    drop_torn_line(ledger)
    with ledger.open("a", encoding="utf-8") as file:
        file.write(to_line(line))


def _publish(plan: Plan, results: list[tuple[Cell, dict[str, Any]]], seconds: float) -> dict[str, Any]:
    scores = choose(results)
    notes = [SAW_PAIRS] if plan.saw_pairs else []
    table = markdown(scores, plan.protocol, notes)
    as_json = to_json(scores, plan.protocol)
    files.write(plan.output_dir / "glue.json", json.dumps(as_json, indent=1) + "\n")
    files.write(plan.output_dir / "glue.md", table)
    if plan.source.run is not None:
        update_card(plan.source.folder / "README.md", table)
        model_card.add_results(plan.source.folder / "README.md", model_card.glue_results(scores))
    mean = average(scores, plan.protocol)
    return {
        "scores": as_json,
        "average": mean["mean"] if mean else None,
        "missing": missing_tasks(scores, plan.protocol),
        "markdown": table,
        "seconds": seconds,
        "device_seconds": sum(result["seconds"] for _, result in results),
        "submission": [str(path) for path in write_submission(scores, plan.output_dir)],
        "output_dir": str(plan.output_dir),
    }
