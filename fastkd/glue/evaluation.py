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

from fastkd import chain, disk, files, signals
from fastkd.glue import examples
from fastkd.glue.encoded import load_examples
from fastkd.glue.finetune import FOLDER, FineTuning, check_model, fast_bf16
from fastkd.glue.model import EvaluatedModel, find_model
from fastkd.glue.protocol import PROTOCOLS, Protocol
from fastkd.glue.scores import average, choose, markdown, missing_tasks, to_json, update_card
from fastkd.glue.submission import FOLDER as SUBMISSION
from fastkd.glue.submission import write_submission
from fastkd.glue.tasks import Task, choose_tasks
from fastkd.glue.workers import run_all, visible_gpus
from fastkd.reports import model_card
from fastkd.run_folder import refuse_links

EXTRA = ("accelerate", "sklearn", "scipy")
SAW_PAIRS = (
    "The quickstart teacher (all-MiniLM-L6-v2) was fine-tuned on NLI and paraphrase pairs (SNLI, MultiNLI and Quora "
    "among them): its own and its students' RTE, MRPC, QQP and MNLI scores are helped by that."
)


@dataclass(frozen=True)
class Evaluation:
    """An evaluation whose files and options have all been checked."""

    model: EvaluatedModel
    protocol: Protocol
    output_dir: Path
    jobs: int
    saw_pairs: bool  # as EvaluatedModel.saw_pairs says, read before anything is spent
    bf16: bool  # measured once for all fine-tunings
    fine_tunings: list[FineTuning] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # oddities of the data, one line each

    def add(self, task: Task, data: Path | None, seeds: int, train_rows: int | None, predict_test: bool) -> None:
        """Read a task's files and add its fine-tunings. Raises ValueError for a file that is wrong."""
        test, absent = _test_splits(task, data, predict_test)
        splits = load_examples(task, data, train_rows, test)
        for split in task.dev:
            if task.is_regression and len(splits[split]) < 2:
                raise ValueError(f"{splits[split].source}: a correlation needs two rows at least; download it again")
        self.notes.extend([*absent, *_oddities(task, splits, train_rows)])
        sizes = {split: len(found) for split, found in splits.items()}
        content = tuple((split, found.sha256) for split, found in splits.items())
        model, digest = self.model.folder, self.model.sha256
        for rate, size in self.protocol.grid:
            for seed in range(seeds):
                one = FineTuning(
                    model, task, data, train_rows, self.protocol, rate, size, seed, self.bf16, test, digest, content,
                    sizes, self.output_dir,
                )  # fmt: skip
                self.fine_tunings.append(one)


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
    tasks: names; None: the protocol's tasks found in ``data``, or only those of ``task_files`` if given.
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
    found = find_model(model)
    folder = Path(output_dir) if output_dir is not None else found.output_dir
    for written in (folder, found.run or folder):
        refuse_links(written)
        files.check_writable(written / FOLDER, written / "glue.json", written / "glue.md")
    if predict_test:
        files.check_writable(folder / SUBMISSION)
    _check_card(found)
    data = Path(data) if data is not None else None
    chosen = _choose(tasks, [Path(path) for path in task_files], PROTOCOLS[protocol], data)
    limits = _limits(train_rows, chosen)
    check_model(found.folder)
    jobs = jobs or max(1, len(visible_gpus()))
    evaluation = Evaluation(found, PROTOCOLS[protocol], folder, jobs, found.saw_pairs, fast_bf16())
    for task in chosen.values():
        evaluation.add(task, data, seeds or evaluation.protocol.seeds, limits.get(task.name), predict_test)
    with disk.written(folder):
        return carry_out(evaluation, log)


def _check_card(model: EvaluatedModel) -> None:
    """Raises ValueError where a run's model card cannot be read, before hours are spent on scores for it."""
    card = model.folder / "README.md"
    if model.run is not None and card.exists():
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
    held = {name: task for name, task in chosen.items() if examples.task_folder(task, data)}
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
            examples.find_files(task, "diagnostic", data)
        except ValueError as error:
            return tuple(split for split in task.test if split != "diagnostic"), [f"no AX.tsv: {error}"]
    return tuple(task.test), []


def _oddities(task: Task, splits: Mapping[str, examples.Examples], limit: int | None) -> list[str]:
    """Notes on the data: rows that were skipped, and numbers of rows that differ from the release's."""
    notes = []
    for split, found in splits.items():
        if found.broken:
            notes.append(f"{found.source}: {found.broken} rows that line breaks cut are left out, as on the hub")
        expected = task.rows.get(split, len(found))
        if len(found) != expected and not (split == task.train and limit is not None):
            notes.append(f"{found.source}: {len(found):,} rows, where the release has {expected:,}")
    return notes


def carry_out(evaluation: Evaluation, log: Callable[[str], None]) -> dict[str, Any]:
    """Run the fine-tunings that are not finished, and write scores, table, card and ledger lines."""
    start = time.perf_counter()
    wanted = evaluation.fine_tunings
    results = {one.path: found for one in wanted if (found := one.read()) is not None}
    waiting = [one for one in wanted if one.path not in results]
    _announce(evaluation, len(results), log)
    written = start
    try:
        with signals.raised():
            for one, result in run_all(waiting, evaluation.jobs):
                results[one.path] = result
                now = time.perf_counter()
                _write_ledger(evaluation, now - written, one)
                written = now
                log(_progress(one, result, len(results), len(wanted)))
    except BaseException:
        _write_ledger(evaluation, time.perf_counter() - written, None)
        raise
    return _publish(evaluation, [(one, results[one.path]) for one in wanted], time.perf_counter() - start)


def _announce(evaluation: Evaluation, finished: int, log: Callable[[str], None]) -> None:
    gpus = visible_gpus()
    device = f"{len(gpus)} GPU{'s' if len(gpus) > 1 else ''}" if gpus else "CPU"
    dtype = "bfloat16" if evaluation.bf16 else "float32"
    titles = dict.fromkeys(one.task.title for one in evaluation.fine_tunings)
    log(f"GLUE of {evaluation.model.name} ({evaluation.model.folder}), protocol {evaluation.protocol.description}")
    log(
        f"{', '.join(titles)}: {len(evaluation.fine_tunings)} fine-tunings, {finished} of them finished before; "
        f"{device}, {dtype}, {evaluation.jobs} at a time; results in {evaluation.output_dir}"
    )
    for note in evaluation.notes:
        log(f"note: {note}")


def _progress(one: FineTuning, result: Mapping[str, Any], finished: int, total: int) -> str:
    metrics = ", ".join(f"{name} {value:.1f}" for name, value in result["metrics"].items())
    grid = f" lr {one.learning_rate:g} batch {one.batch_size}" if len(one.protocol.grid) > 1 else ""
    return f"[{finished}/{total}] {one.task.title}{grid} seed {one.seed}: {metrics} ({result['seconds']:.0f} s)"


def _write_ledger(evaluation: Evaluation, seconds: float, one: FineTuning | None) -> None:
    """Append a line to the run's ledger: seconds since the line before, never charged; None: interrupted."""
    if evaluation.model.run is None:
        return
    line = {
        "event": "glue",
        "seconds": seconds,
        "charged": False,
        "task": one.task.name if one else None,
        "seed": one.seed if one else None,
        "protocol": evaluation.protocol.name,
        "jobs": evaluation.jobs,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    chain.append(evaluation.model.run / "ledger.jsonl", line)


def _publish(
    evaluation: Evaluation, results: list[tuple[FineTuning, dict[str, Any]]], seconds: float
) -> dict[str, Any]:
    scores = choose(results)
    notes = [SAW_PAIRS] if evaluation.saw_pairs else []
    table = markdown(scores, evaluation.protocol, notes)
    as_json = to_json(scores, evaluation.protocol)
    files.write(evaluation.output_dir / "glue.json", json.dumps(as_json, indent=1) + "\n")
    files.write(evaluation.output_dir / "glue.md", table)
    if evaluation.model.run is not None:
        update_card(evaluation.model.folder / "README.md", table)
        model_card.add_results(evaluation.model.folder / "README.md", model_card.glue_results(scores))
    mean = average(scores, evaluation.protocol)
    return {
        "scores": as_json,
        "average": mean["mean"] if mean else None,
        "missing": missing_tasks(scores, evaluation.protocol),
        "markdown": table,
        "seconds": seconds,
        "device_seconds": sum(result["seconds"] for _, result in results),
        "submission": [str(path) for path in write_submission(scores, evaluation.output_dir)],
        "output_dir": str(evaluation.output_dir),
    }
