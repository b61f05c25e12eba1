"""One GLUE evaluation of three tasks beside a plain Trainer script: the same model, rows, recipe and scores.

    python -m bench.bench_glue quickstart --data FOLDER [--rows 32] [--rounds 2]

Variants take turns, a task at a time, so that a machine that slows down slows all of them. ``plain`` is what
transformers' run_glue example does with padding by batch: float32, rows in random order, scores at the end; ``plain
bf16`` is the same with ``bf16=True``. Times start after imports and hold loading, tokenising, training and scoring. A
sample holds fewer words than a whole task, so that cutting the vocabulary gains some 4% more here than there.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from bench.results import RESULTS, device_folder
from fastkd import files
from fastkd.glue.encoded import load_examples
from fastkd.glue.evaluation import evaluate
from fastkd.glue.examples import Examples
from fastkd.glue.finetune import fast_bf16
from fastkd.glue.metrics import score
from fastkd.glue.model import find_model
from fastkd.glue.protocol import HEADLINE
from fastkd.glue.tasks import TASKS, Task

NAMES = ("sst2", "mrpc", "rte")
DEV_SHARE = 8  # training rows to a dev row, as in MRPC and RTE


def plain(model: Path, task: Task, splits: Mapping[str, Examples], *, bf16: bool) -> dict[str, float]:
    """What most people write: Trainer on tokenised rows, then the dev set's metrics."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)

    def tokenise(batch: Mapping[str, list[str]]) -> Any:
        return tokenizer(*(batch[name] for name in task.texts), truncation=True, max_length=HEADLINE.max_length)

    tables = {
        split: datasets.Dataset.from_dict(dict(zip(task.texts, rows.texts, strict=True)) | {"label": rows.labels}).map(
            tokenise, batched=True
        )
        for split, rows in splits.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=HEADLINE.batch_sizes[0], learning_rate=HEADLINE.learning_rates[0],
            num_train_epochs=HEADLINE.epochs, lr_scheduler_type="cosine", warmup_steps=HEADLINE.warmup, bf16=bf16,
            use_cpu=not torch.cuda.is_available(), save_strategy="no", report_to="none", disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        trainer = Trainer(
            AutoModelForSequenceClassification.from_pretrained(
                model, num_labels=len(task.labels), trust_remote_code=False
            ),
            arguments,
            train_dataset=tables["train"],
            eval_dataset=tables["dev"],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda found: score(
                task.metrics, np.asarray(found.label_ids), np.argmax(found.predictions, axis=-1)
            ),
        )
        trainer.train()
        return dict(trainer.evaluate())


def ours(model: Path, task: Task, data: Path) -> dict[str, Any]:
    """fastkd's evaluation, its checks and files included."""
    with tempfile.TemporaryDirectory() as folder:
        return evaluate(model, [task.name], data, seeds=1, output_dir=folder, log=lambda line: None)


def write_sample(task: Task, data: Path, rows: int, sample: Path) -> dict[str, Examples]:
    """A random part of a task in the hub's layout: ``rows`` training rows, and an eighth as many dev rows."""
    splits = load_examples(task, data, rows)
    splits["dev"] = splits["dev"].take(list(range(max(1, rows // DEV_SHARE))))
    (sample / task.name).mkdir()
    for split, part in splits.items():
        names = (*task.texts, task.label)
        records = [dict(zip(names, values, strict=True)) for values in zip(*part.texts, part.labels, strict=True)]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (sample / task.name / f"{split}.jsonl").write_text(text)
    return splits


def measure(model: Path, data: Path, rows: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds: variant → task → one a round."""
    seconds: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sample = Path(folder)
        splits = {name: write_sample(TASKS[name], data, rows, sample) for name in NAMES}
        ours(model, TASKS["sst2"], sample)  # the process's first training pays for what stays loaded
        for _ in range(rounds):
            for name in NAMES:
                task = TASKS[name]
                variants: dict[str, Callable[[], Any]] = {
                    "plain": functools.partial(plain, model, task, splits[name], bf16=False),
                    "plain bf16": functools.partial(plain, model, task, splits[name], bf16=True),
                    "fastkd": functools.partial(ours, model, task, sample),
                }
                for variant, run in variants.items():
                    if variant == "plain bf16" and not fast_bf16():
                        continue
                    start = time.perf_counter()
                    run()
                    seconds.setdefault(variant, {}).setdefault(name, []).append(time.perf_counter() - start)
    return seconds


def report(seconds: Mapping[str, Mapping[str, list[float]]], rows: int, rounds: int) -> dict[str, Any]:
    """Medians, spread and ratios of one run, with what they were measured on."""
    medians = {v: {n: statistics.median(values) for n, values in tasks.items()} for v, tasks in seconds.items()}
    totals = {variant: sum(tasks.values()) for variant, tasks in medians.items()}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": device_folder(), "threads": torch.get_num_threads(), "commit": commit,
        "date": datetime.date.today().isoformat(), "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "rows": rows, "rounds": rounds, "epochs": HEADLINE.epochs,
        "seconds": seconds, "median_seconds": medians, "total_seconds": totals,
        "speedup": {f"over {v}": total / totals["fastkd"] for v, total in totals.items() if v != "fastkd"},
    }  # fmt: skip


def main() -> None:
    """Measure, print, and write ``results/<device>/glue.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="quickstart")
    parser.add_argument("--data", type=Path, required=True, help="folder with SST-2, MRPC and RTE")
    parser.add_argument("--rows", type=int, default=32, help="training rows of each task")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    seconds = measure(find_model(options.model).folder, options.data, options.rows, options.rounds)
    result = report(seconds, options.rows, options.rounds)
    path = files.write(RESULTS / result["device"] / "glue.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("median_seconds", "total_seconds", "speedup")}, indent=1))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
