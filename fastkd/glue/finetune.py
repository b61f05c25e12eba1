"""One fine-tuning: a new head, transformers' Trainer, scores of the dev sets, predictions of the test sets."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers import logging as hf_logging
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from fastkd import files
from fastkd.device import waiting
from fastkd.device.peaks import fastest_dtype
from fastkd.glue.encoded import (
    EncodedSplit,
    EncodedTask,
    LengthGroupedBatches,
    collate,
    cut_embeddings,
    encode,
    load_examples,
    load_tokenizer,
    require_encoder,
)
from fastkd.glue.metrics import score
from fastkd.glue.protocol import Protocol
from fastkd.glue.tasks import TASKS, Task
from fastkd.models import weights
from fastkd.models.shape import LARGEST, MOST_LAYERS, NAMES, SIZES, require_size
from fastkd.models.tokenizer import reason

FOLDER = "glue"  # of the results, in the folder of scores
EVAL_BATCH = 64
QUIET_S = 60.0  # between two lines of progress


@dataclass(frozen=True)
class FineTuning:
    """One fine-tuning of a model on a task: what its scores depend on, and the file of its result.

    Finished ones are on disk, a JSON file each, so that an interrupted evaluation repeats nothing.
    """

    model: Path
    task: Task
    data: Path | None
    train_rows: int | None
    protocol: Protocol
    learning_rate: float
    batch_size: int
    seed: int
    bf16: bool = False  # trains under autocast
    test: tuple[str, ...] = ()  # splits to predict
    model_sha256: str = ""
    content: tuple[tuple[str, str], ...] = ()  # (split, SHA-256 of its examples): files that change are noticed
    rows: Mapping[str, int] = field(default_factory=dict, hash=False)  # of each split, after --train-rows
    output_dir: Path = Path()

    @property
    def identity(self) -> dict[str, Any]:
        """What the scores depend on. Device and versions do not count: they are written beside the scores."""
        task, protocol = self.task, self.protocol
        return {
            "model": self.model_sha256,
            "task": task.name,
            "labels": task.labels,
            "metrics": task.metrics,
            "splits": [task.train, *task.dev],
            "content": {split: sha256 for split, sha256 in self.content if split not in self.test},
            "epochs": protocol.epochs,
            "schedule": protocol.schedule,
            "warmup": protocol.warmup,
            "weight_decay": protocol.weight_decay,
            "max_length": protocol.max_length,
            "learning_rate": self.learning_rate,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    @property
    def path(self) -> Path:
        """The file of its result."""
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        name = f"{self.task.name}-lr{self.learning_rate:g}-b{self.batch_size}-seed{self.seed}-{key}.json"
        return self.output_dir / FOLDER / name

    def read(self) -> dict[str, Any] | None:
        """Its result; None where it is not finished, or lacks predictions that are wanted now."""
        try:
            result: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        kinds = {"metrics": dict, "predictions": dict, "seconds": float, "test_content": dict}
        if not isinstance(result, dict) or not all(isinstance(result.get(k), kind) for k, kind in kinds.items()):
            return None
        if not result["metrics"]:
            return None
        return result if self._test_content.items() <= result["test_content"].items() else None

    @property
    def _test_content(self) -> dict[str, str]:
        return {split: sha256 for split, sha256 in self.content if split in self.test}

    def run(self) -> dict[str, Any]:
        """Fine-tune, and write the result to disk before anything else happens."""
        result = {
            **self.identity,
            "rows": dict(self.rows),
            **finetune(self),
            "test_content": self._test_content,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        files.write(self.path, json.dumps(result) + "\n")
        return result


def finetune(tuning: FineTuning) -> dict[str, Any]:
    """Fine-tune and score.

    Returns ``metrics`` (times 100), ``predictions`` (test split → class ids or scores in the file's order),
    ``seconds``, ``loss`` (mean over the training), ``device`` and ``dtype``.

    Raises:
        ValueError: weights are missing from the model, a file has changed, or the loss is not finite.
    """
    start = time.perf_counter()
    encoded = _encoded(replace(tuning, learning_rate=0.0, batch_size=0, seed=0, bf16=False))
    set_seed(tuning.seed)
    model = load_classifier(tuning.model, tuning.task)
    cut_embeddings(model, encoded)
    loss, device = _train(model, tuning, encoded)
    if not math.isfinite(loss):
        raise ValueError(
            f"{tuning.task.title}, seed {tuning.seed}: the loss is {loss}; are the model's weights finite?"
        )
    metrics: dict[str, float] = {}
    for split in tuning.task.dev:
        labels = np.asarray(encoded.splits[split].labels)
        values = score(tuning.task.metrics, labels, predict(model, encoded, split, tuning.task))
        metrics |= {name + _suffix(tuning.task, split): value for name, value in values.items()}
    return {
        "metrics": metrics,
        "predictions": {split: predict(model, encoded, split, tuning.task).tolist() for split in tuning.test},
        "seconds": time.perf_counter() - start,
        "loss": loss,
        "device": device,
        "dtype": "bfloat16" if tuning.bf16 else "float32",
    }


def _suffix(task: Task, split: str) -> str:
    """The end of a metric's name where there are several dev sets: " matched", " mismatched" or the name in a task file."""
    if len(task.dev) == 1:
        return ""
    return split.removeprefix("dev").replace("_", " ") if task.official else f" {split}"


@lru_cache(maxsize=1)
def _encoded(tuning: FineTuning) -> EncodedTask:
    """The tokenised examples of a task. One task is kept: all its seeds and configurations use it."""
    splits = load_examples(tuning.task, tuning.data, tuning.train_rows, tuning.test)
    for split, sha256 in tuning.content:
        if splits[split].sha256 != sha256:
            raise ValueError(f"{splits[split].source} has changed since the evaluation began: issue the command again")
    return encode(tuning.model, splits, tuning.protocol.max_length)


def check_model(folder: Path) -> None:
    """Raises ValueError where model or tokenizer cannot be loaded, do not fit together, or are not an encoder's."""
    model = load_classifier(folder, TASKS["sst2"])
    tokenizer = load_tokenizer(folder)
    require_encoder(folder)
    rows = next(model.get_input_embeddings().parameters()).shape[0]
    if len(tokenizer) > rows:
        raise ValueError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {rows}; export both together")


def load_classifier(folder: Path, task: Task) -> PreTrainedModel:
    """The model in float32 with a new random head for ``task``, from torch's global generator.

    A classifier of an earlier fine-tuning is replaced too, so that seeds differ. BERT's pooler belongs to the body.

    Raises:
        ValueError: transformers cannot load it, or weights below the head are missing.
    """
    weights.files(folder)
    labels = 1 if task.is_regression else len(task.labels)
    problem = "regression" if task.is_regression else "single_label_classification"
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(
                folder, num_labels=labels, problem_type=problem, trust_remote_code=False
            )
            for name in {*NAMES.values(), *SIZES}:
                most = MOST_LAYERS if name == "num_hidden_layers" else LARGEST
                require_size(name, vars(config).get(name, 0), least=0, most=most)
            config._attn_implementation = None  # transformers' default: what config.json names may not be installed
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True,
                trust_remote_code=False,
            )  # fmt: skip
    except Exception as error:  # of any kind, from the reader of damaged weights
        raise ValueError(f"{folder} cannot be loaded ({reason(error)})") from error
    body = f"{model.base_model_prefix}."
    changed = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    missing = sorted(key for key in changed if key.startswith(body) and ".pooler." not in key)
    if missing:
        raise ValueError(f"{folder} lacks {missing[0]} and {len(missing) - 1} more weights; export the model again")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.startswith(body):
            torch.nn.init.normal_(module.weight, std=model.config.initializer_range)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' report of new weights: the head's are meant to be new, and the others are checked."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def fast_bf16() -> bool:
    """Whether bfloat16 is faster than float32 here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return fastest_dtype(device) == torch.bfloat16


class _Trainer(Trainer):
    """Trainer with batches of similar lengths (its own option for that has another name in other versions)."""

    def __init__(self, encoded: EncodedTask, train: EncodedSplit, **options: Any) -> None:
        self.batches = LengthGroupedBatches(train.lengths, options["args"].train_batch_size, options["args"].seed)
        super().__init__(
            train_dataset=train, data_collator=partial(collate, pad_token_id=encoded.pad_token_id), **options
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of examples on the host; Trainer moves them to its device."""
        pin = self.args.device.type == "cuda"
        assert isinstance(self.train_dataset, EncodedSplit)
        return DataLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=self.data_collator, pin_memory=pin)


class _Progress(TrainerCallback):
    """A line on stderr a minute: a large task takes hours on a CPU."""

    def __init__(self, tuning: FineTuning) -> None:
        self.name, self.said = f"{tuning.task.title} seed {tuning.seed}", time.perf_counter()
        self.waiting = None if torch.cuda.is_available() else waiting.of_this_process()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.waiting is not None:
            self.waiting.look()
        if time.perf_counter() - self.said >= QUIET_S:
            self.said = time.perf_counter()
            print(f"{self.name}: step {state.global_step:,} of {state.max_steps:,}", file=sys.stderr, flush=True)


def training_arguments(tuning: FineTuning, rows: int, folder: str) -> TrainingArguments:
    """Trainer's arguments for ``rows`` training rows. Nothing is logged or saved, and the host never waits for the device."""
    steps = tuning.protocol.epochs * math.ceil(rows / tuning.batch_size)
    return TrainingArguments(
        folder, seed=tuning.seed, per_device_train_batch_size=tuning.batch_size, num_train_epochs=tuning.protocol.epochs,
        learning_rate=tuning.learning_rate, lr_scheduler_type=tuning.protocol.schedule,
        warmup_steps=math.ceil(tuning.protocol.warmup * steps), weight_decay=tuning.protocol.weight_decay,
        optim="adamw_torch_fused",
        bf16=tuning.bf16, use_cpu=not torch.cuda.is_available(), save_strategy="no", logging_strategy="no",
        logging_nan_inf_filter=False, report_to="none", disable_tqdm=True,
    )  # fmt: skip


def _train(model: PreTrainedModel, tuning: FineTuning, encoded: EncodedTask) -> tuple[float, str]:
    train = encoded.splits[tuning.task.train]
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(tuning, len(train), folder)
        trainer = _Trainer(encoded, train, model=model, args=arguments)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Progress(tuning))
        with _quiet():
            loss = trainer.train().training_loss
        # Scores are computed in float32: bfloat16 would round STS-B's predictions to steps of 1/64.
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    return loss, arguments.device.type


@torch.inference_mode()
def predict(model: PreTrainedModel, encoded: EncodedTask, split: str, task: Task) -> np.ndarray:
    """Class ids [N] int64, or scores [N] float32, in the split's order."""
    rows = encoded.splits[split]
    model.eval()
    order = np.argsort(rows.lengths, kind="stable")
    logits = []
    for chosen in np.array_split(order, math.ceil(len(rows) / EVAL_BATCH)):
        batch = collate([rows[int(i)] for i in chosen], encoded.pad_token_id)
        batch.pop("labels", None)
        logits.append(model(**{name: values.to(model.device) for name, values in batch.items()}).logits.cpu())
    answers = torch.cat(logits)
    answers = answers[:, 0] if task.is_regression else answers.argmax(dim=-1)
    found = np.empty(len(rows), dtype=answers.numpy().dtype)
    found[order] = answers.numpy()
    return found
