"""The tasks of GLUE: columns, labels, metrics, hub name and file layout of each; other tasks are read from TOML files.

A local folder holds a task either in the official layout (``SST-2/train.tsv``) or as jsonl or parquet with the
hub's column names (``sst2/validation.jsonl``, ``sst2/train-00000-of-00001.parquet``).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastkd.glue.metrics import CLASS_METRICS, SCORE_METRICS

HUB = "nyu-mll/glue"
SCORE_RANGE = (0.0, 5.0)  # of STS-B


@dataclass(frozen=True)
class Task:
    """One text classification or scoring task.

    Splits are named as the official files are: ``train``, ``dev``, ``dev_matched``, …; the hub says ``validation``.
    """

    name: str  # what --tasks takes, the hub's configuration, glue.json's key
    title: str  # for tables; the official folder
    texts: tuple[str, ...]  # one or two text columns, as the hub names them
    labels: tuple[str, ...]  # class names in the order of their ids; empty: the label is a number
    metrics: tuple[str, ...]  # keys of metrics.METRICS
    label: str = "label"
    official: tuple[str, ...] = ()  # the official TSV's names of the text columns and, last, the label
    headless: tuple[str, ...] = ()  # all columns of the official train and dev TSV where they have no header
    train: str = "train"
    dev: tuple[str, ...] = ("dev",)
    test: Mapping[str, str] = field(default_factory=dict, hash=False)  # split → name of its file in a submission
    submits_names: bool = False  # a submission holds class names instead of ids
    rows: Mapping[str, int] = field(default_factory=dict, hash=False)  # official number of rows
    broken_rows: bool = False  # the release has rows that line breaks cut: they are skipped, as the hub does
    hub: str = HUB
    config: str | None = None  # the hub's configuration
    folder: Path | None = None  # splits are files below it, instead of a hub's

    @property
    def is_regression(self) -> bool:
        """Whether the label is a number."""
        return not self.labels


ENTAILMENT = ("entailment", "not_entailment")
PAIR = ("sentence1", "sentence2")


def _glue(
    title: str, texts: tuple[str, ...], labels: tuple[str, ...], metrics: tuple[str, ...],
    test: Iterable[str] = ("test",), **options: Any,
) -> Task:  # fmt: skip
    """A task of GLUE: named on the hub as its folder, in small letters without the hyphen."""
    name = title.lower().replace("-", "")
    submission = {"test_matched": f"{title}-m", "test_mismatched": f"{title}-mm", "diagnostic": "AX"}
    files = {split: submission.get(split, title) for split in test}
    return Task(name, title, texts, labels, metrics, test=files, config=name, **options)


GLUE = (
    _glue("CoLA", ("sentence",), ("unacceptable", "acceptable"), ("matthews",),
          official=("sentence", "label"), headless=("source", "label", "star", "sentence"),
          rows={"train": 8551, "dev": 1043}),
    _glue("SST-2", ("sentence",), ("negative", "positive"), ("accuracy",),
          official=("sentence", "label"), rows={"train": 67349, "dev": 872}),
    _glue("MRPC", PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1"),
          official=("#1 String", "#2 String", "Quality"), rows={"train": 3668, "dev": 408}),
    _glue("STS-B", PAIR, (), ("pearson", "spearman"),
          official=(*PAIR, "score"), rows={"train": 5749, "dev": 1500}),
    _glue("QQP", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1"),
          official=("question1", "question2", "is_duplicate"), broken_rows=True,
          rows={"train": 363846, "dev": 40430}),
    _glue("MNLI", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",),
          official=(*PAIR, "gold_label"), dev=("dev_matched", "dev_mismatched"), submits_names=True,
          test=("test_matched", "test_mismatched", "diagnostic"),
          rows={"train": 392702, "dev_matched": 9815, "dev_mismatched": 9832}),
    _glue("QNLI", ("question", "sentence"), ENTAILMENT, ("accuracy",),
          official=("question", "sentence", "label"), submits_names=True, rows={"train": 104743, "dev": 5463}),
    _glue("RTE", PAIR, ENTAILMENT, ("accuracy",),
          official=(*PAIR, "label"), submits_names=True, rows={"train": 2490, "dev": 277}),
    _glue("WNLI", PAIR, ENTAILMENT[::-1], ("accuracy",),
          official=(*PAIR, "label"), rows={"train": 635, "dev": 71}),
)  # fmt: skip
TASKS = {task.name: task for task in GLUE}

# Keys of a --task-file: those that must be there, and those that may be.
REQUIRED = ("name", "texts", "metrics", "train", "dev")
OPTIONAL = ("title", "label", "labels", "test", "hub", "config")


def load_task(path: Path) -> Task:
    """A task from a TOML file.

    ``name``, ``texts`` (one or two columns), ``labels``, ``label`` (its column), ``metrics``, and ``train``, ``dev``, ``test``:
    files beside the TOML (tsv, csv, jsonl, parquet), or split names where ``hub`` (and ``config``) name a data set.
    ``labels`` lists the class names in the order of their ids. Files may hold ids instead of names if no name is a number.
    Without ``labels`` the label is a number.

    Raises:
        ValueError: the file cannot be read, or a key is missing, unknown or of the wrong kind.
    """
    try:
        row = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable TOML file ({error})") from error
    missing = [key for key in REQUIRED if key not in row]
    unknown = [key for key in row if key not in (*REQUIRED, *OPTIONAL)]
    if missing or unknown:
        problem = f"lacks {missing[0]!r}" if missing else f"has an unknown key {unknown[0]!r}"
        raise ValueError(f"{path}: the task {problem}; it takes {', '.join((*REQUIRED, *OPTIONAL))}")
    task = _task_from_row(path, row)
    _check_metrics(path, task)
    return task


def _task_from_row(path: Path, row: dict[str, Any]) -> Task:
    lists = {key: tuple(_strings(path, key, row.get(key, []))) for key in ("texts", "labels", "metrics", "dev")}
    names = {key: _string(path, key, row[key]) for key in row if key not in lists}
    if not 1 <= len(lists["texts"]) <= 2:
        raise ValueError(f"{path}: texts names one or two columns, not {len(lists['texts'])}")
    if len(set(lists["labels"])) < len(lists["labels"]):
        raise ValueError(f"{path}: labels names a class twice: {', '.join(lists['labels'])}")
    if names["name"] in TASKS:
        raise ValueError(f"{path}: {names['name']!r} is a task of GLUE; give this one another name")
    if not re.fullmatch(r"[\w.-]+", names["name"]) or names["name"] in (".", "..", "average"):
        raise ValueError(f"{path}: name {names['name']!r} cannot name files and scores: take letters, digits and _.-")
    if names.get("test") in (names["train"], *lists["dev"]):
        raise ValueError(f"{path}: test {names['test']!r} is train or dev too: a test file has no labels, name another")
    test = {names["test"]: names["name"]} if "test" in names else {}
    return Task(
        name=names["name"], title=names.get("title", names["name"]), label=names.get("label", "label"),
        train=names["train"], test=test, submits_names=True, hub=names.get("hub", ""), config=names.get("config"),
        folder=None if "hub" in names else path.resolve().parent, texts=lists["texts"], labels=lists["labels"],
        metrics=lists["metrics"], dev=lists["dev"],
    )  # fmt: skip


def _string(path: Path, key: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{path}: {key} must be a string, not {value!r}")
    return value


def _strings(path: Path, key: str, value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [_string(path, key, item) for item in values]


def _check_metrics(path: Path, task: Task) -> None:
    allowed = SCORE_METRICS if task.is_regression else CLASS_METRICS
    wrong = [metric for metric in task.metrics if metric not in allowed]
    if wrong or not task.metrics:
        kind = "numbers" if task.is_regression else "classes"
        got = repr(wrong[0]) if wrong else "none"
        raise ValueError(f"{path}: metrics of {kind} are {', '.join(allowed)}, not {got}")
    if "f1" in task.metrics and len(task.labels) != 2:
        raise ValueError(f"{path}: f1 scores the second of two classes; use macro_f1 for {len(task.labels)}")


def choose_tasks(names: Iterable[str], task_files: Iterable[Path]) -> dict[str, Task]:
    """The tasks of ``names`` (of GLUE or of a task file), and of all task files.

    Raises:
        ValueError: an unknown name, naming those there are, or two tasks of one name.
    """
    extra = [load_task(path) for path in task_files]
    own = {task.name: task for task in extra}
    if len(own) < len(extra):
        raise ValueError("two task files give their task the same name: rename one")
    known = TASKS | own
    names = list(names)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r}: choose from {', '.join(known)}")
    return {name: known[name] for name in dict.fromkeys([*names, *own])}


def parse_limits(text: str | None, option: str) -> int | dict[str, int] | None:
    """Training rows at most, of all tasks or by task: ``20000``, ``sst2=20000,qqp=50000``, or None.

    Raises:
        ValueError: naming ``option``.
    """
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.replace(" ", "").split(",")]
    counts = [number if by_task else name for name, by_task, number in pairs]
    names = {name for name, by_task, _ in pairs if by_task}
    if not all(count.isdecimal() and int(count) > 0 for count in counts) or len(names) not in (0, len(pairs)):
        raise ValueError(f"{option} takes a number from 1, 20000, or one by task, sst2=20000,qqp=50000, not {text!r}")
    if not names and len(pairs) > 1:
        raise ValueError(f"{option} takes one number, or one by task: sst2=20000,qqp=50000, not {text!r}")
    return {name: int(number) for name, _, number in pairs} if names else int(text)
