"""Labelled examples of a task's split, from the official TSV, csv, jsonl, parquet or the hub; errors name file and line."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from fastkd.data import hub_requests
from fastkd.glue.tasks import SCORE_RANGE, Task

Record = Mapping[str, Any]
Located = Iterator[tuple[int, Record]]  # (line or row from 1, its values by column)
FORMATS = (".tsv", ".csv", ".jsonl", ".parquet")
LONGEST_CELL = 2**31 - 1  # characters; csv's own limit is 131,072
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
# Skipped rows that Task.broken_rows allows: with more than both, the layout is another.
BROKEN_SHARE, BROKEN_ROWS = 0.001, 8


@dataclass(frozen=True)
class Examples:
    """The examples of a split: ``texts[column][i]``, ``labels[i]`` (class ids or scores; empty for a test split)."""

    texts: tuple[list[str], ...]
    labels: list[int] | list[float]
    source: str  # the file or hub split, for messages
    broken: int = 0  # rows that were skipped

    def __len__(self) -> int:
        return len(self.texts[0])

    @property
    def sha256(self) -> str:
        """SHA-256 of the content, the same for every file and format that holds it."""
        content = json.dumps([self.texts, self.labels], ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    def take(self, keep: list[int]) -> Examples:
        """The examples of these indices."""
        texts = tuple([column[i] for i in keep] for column in self.texts)
        return Examples(texts, [self.labels[i] for i in keep], self.source, self.broken)


def read_examples(task: Task, split: str, data: Path | None = None) -> Examples:
    """The examples of a split, from the folder ``data``, the task's own folder or the hub; a test split has no labels.

    Raises:
        ValueError: a file that is missing, empty, not UTF-8, lacks a column or holds an unknown label, by file and
            line; a hub that cannot be reached.
    """
    if task.folder is None and (data is None or not task.official):
        source, records = _hub(task, split)
        return _collect(task, split, source, records)
    paths = find_files(task, split, data)
    parts = [_collect(task, split, str(path), _records(task, split, path)) for path in paths]
    texts = tuple([text for part in parts for text in part.texts[i]] for i in range(len(task.texts)))
    labels = [label for part in parts for label in part.labels]
    return Examples(texts, labels, str(paths[0]), sum(part.broken for part in parts))


def task_folder(task: Task, data: Path) -> Path | None:
    """The folder of a GLUE task in ``data``: ``SST-2``, ``sst2``, ``sst-2``, …; None where there is none."""
    folders = sorted(path for path in data.iterdir() if path.is_dir()) if data.is_dir() else []
    names = {folder: folder.name.lower().replace("-", "").replace("_", "") for folder in folders}
    return next((folder for folder, name in names.items() if name == task.name), None)


def find_files(task: Task, split: str, data: Path | None) -> list[Path]:
    """The file of a split, or its parquet shards.

    Raises:
        ValueError: there is none, or several formats.
    """
    if task.folder is not None:
        path = task.folder / split
        if path.suffix not in FORMATS or not path.is_file():
            raise ValueError(f"{path} is not a file ending in {', '.join(FORMATS)}, as task {task.name!r} names it")
        return [path]
    assert data is not None
    own = task_folder(task, data)
    if own is None:
        raise ValueError(f"{data} has no folder {task.title} (nor {task.name})")
    places = [(own, split), (own, _hub_split(split))]
    if split == "diagnostic":  # the official release keeps it beside MNLI's folder
        places += [(data / "diagnostic", split), (data / "ax", "test")]
    for folder, stem in places:
        found = [folder / f"{stem}{suffix}" for suffix in FORMATS if (folder / f"{stem}{suffix}").is_file()]
        found = found or _shards(folder, stem)
        if found:
            return _only(found)
    raise ValueError(f"{own} has no {split}.tsv, nor {_hub_split(split)}.jsonl or .parquet")


def _shards(folder: Path, stem: str) -> list[Path]:
    """The parquet shards NAME-00000-of-00002 of a split. Raises ValueError where one is missing."""
    found = sorted(folder.glob(f"{stem}-*-of-*.parquet"))
    if found and str(len(found)) != found[0].stem.rpartition("-of-")[2].lstrip("0"):
        raise ValueError(f"{found[0]}: {len(found)} shards of this split are there; download the others too")
    return found


def _only(found: list[Path]) -> list[Path]:
    if len({path.suffix for path in found}) > 1:
        names = " and ".join(path.name for path in found)
        raise ValueError(f"{found[0].parent} holds both {names}: keep one")
    return found


def _hub_split(split: str) -> str:
    return split.replace("dev", "validation", 1)


def _records(task: Task, split: str, path: Path) -> Located:
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix == ".jsonl":
        return _jsonl(path)
    return _delimited(task, split, path)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line). Only a line feed ends a line: texts hold other Unicode line breaks."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
    if not content:
        raise ValueError(f"{path}: empty; download it again")
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            yield number, line.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error


def _delimited(task: Task, split: str, path: Path) -> Located:
    """Rows of a TSV, where quotes are text, or of a csv, where they quote."""
    lines = _fields(path)
    number, first = next(lines)
    header = first
    if task.headless and not split.startswith("test") and not _has_columns(task, split, first):
        header = list(task.headless)
        yield number, _record(path, number, header, first)
    elif not _has_columns(task, split, first):
        wanted = " or ".join(", ".join(names) for names in dict.fromkeys(_columns(task, split)))
        raise ValueError(f"{path}:{number}: no columns {wanted} (it has {', '.join(first)}); {_remedy(task)}")
    for number, fields in lines:
        if task.broken_rows and len(fields) != len(header):
            yield number, {}
        else:
            yield number, _record(path, number, header, fields)


def _fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    if path.suffix == ".tsv":
        yield from ((number, line.split("\t")) for number, line in _lines(path))
        return
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader((line + "\n" for _, line in _lines(path)), strict=True)
    start = 1
    try:
        for fields in reader:
            yield start, fields
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not a csv row ({error}); quote texts that hold quotes") from error


def _record(path: Path, number: int, header: list[str], fields: list[str]) -> Record:
    if len(fields) < len(header) or any(fields[len(header) :]):
        raise ValueError(f"{path}:{number}: {len(fields)} columns where there should be {len(header)}; mend the row")
    return dict(zip(header, fields, strict=False))


def _jsonl(path: Path) -> Located:
    for number, line in _lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: not a JSON object; write one object a line")
        yield number, record


def _parquet(path: Path) -> Located:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file; download it again") from error
    if table.num_rows == 0:
        raise ValueError(f"{path}: empty; download it again")
    yield from enumerate(table.to_pylist(), 1)


def _hub(task: Task, split: str) -> tuple[str, Located]:
    import datasets

    config, hub_split = task.config, _hub_split(split) if task.official else split
    if split == "diagnostic":
        config, hub_split = "ax", "test"
    source = f"{task.hub}:{config}:{hub_split}"
    remedy = "give --data FOLDER with the official files" if task.official else f"check {task.name}'s task file"
    table = hub_requests.ask(source, lambda: datasets.load_dataset(task.hub, config, split=hub_split), remedy=remedy)
    return source, enumerate(table.to_list(), 1)


def _columns(task: Task, split: str) -> list[tuple[str, ...]]:
    """The column names that a split may have: the hub's, or the official ones."""
    choices = [(*task.texts, task.label), *([task.official] if task.official else [])]
    return [names[:-1] if _is_test(task, split) else names for names in choices]


def _is_test(task: Task, split: str) -> bool:
    return split in task.test


def _has_columns(task: Task, split: str, names: list[str]) -> bool:
    return any(set(choice) <= set(names) for choice in _columns(task, split))


def _remedy(task: Task) -> str:
    if not task.official:
        return f"name the columns as {task.name}'s task file does"
    return f"bring the file into {task.title}'s official layout or name the columns as the hub does"


def _collect(task: Task, split: str, source: str, records: Located) -> Examples:
    texts: tuple[list[str], ...] = tuple([] for _ in task.texts)
    labels: list[Any] = []
    broken = 0
    for number, record in records:
        if not record and task.broken_rows:
            if _is_test(task, split):
                raise ValueError(
                    f"{source}:{number}: not the columns of the header; mend it: predictions are numbered by row"
                )
            broken += 1
            continue
        names = next((choice for choice in _columns(task, split) if set(choice) <= record.keys()), None)
        if names is None:
            wanted = ", ".join(_columns(task, split)[0])
            raise ValueError(f"{source}:{number}: lacks one of the columns {wanted}; {_remedy(task)}")
        if _is_test(task, split) and task.official:
            _check_index(record, len(texts[0]), source, number)
        for column, name in zip(texts, names, strict=False):
            column.append(_text(record[name], name, source, number))
        if not _is_test(task, split):
            labels.append(read_label(task, record[names[-1]], f"{source}:{number}"))
    if broken > max(BROKEN_ROWS, BROKEN_SHARE * len(texts[0])):
        raise ValueError(f"{source}: {broken} rows have the wrong number of columns; download the file again")
    if not texts[0]:
        raise ValueError(f"{source}: no rows; download it again")
    return Examples(texts, labels, source, broken)


def _check_index(record: Record, place: int, source: str, number: int) -> None:
    """A test row's own number, if it has one, must be its place: predictions are submitted by that number."""
    index = next((record[name] for name in ("index", "id", "idx") if name in record), place)
    if str(index) != str(place):
        raise ValueError(f"{source}:{number}: index {index} where {place} is due; bring the rows into their order")


def _text(value: object, name: str, source: str, number: int) -> str:
    if not isinstance(value, str) or not _is_unicode(value):
        raise ValueError(f"{source}:{number}: {name} is {value!r}, not a text; mend the row")
    return value


def _is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogate: JSON can hold one, and no tokenizer takes it."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def read_label(task: Task, value: object, place: str) -> int | float:
    """A class id from a class name, a number or an index, or a finite score.

    Raises:
        ValueError: it means none of the task's, naming ``place``, its file and line.
    """
    found = _score(task, value) if task.is_regression else _class(task.labels, value)
    if found is not None:
        return found
    if task.is_regression:
        low, high = SCORE_RANGE
        kind = f"a number from {low:g} to {high:g}" if task.official else "a number"
        raise ValueError(f"{place}: label {value!r} is not {kind}; mend the row")
    index = "" if _numbers(task.labels) else " nor its index"
    kind = f"is {'neither ' if index else 'not '}one of {', '.join(task.labels)}{index}"
    raise ValueError(f"{place}: label {value!r} {kind}; mend the row")


def _score(task: Task, value: object) -> float | None:
    number = _number(value)
    score = math.nan if number is None else float(number)
    low, high = SCORE_RANGE if task.official else (-math.inf, math.inf)
    return score if math.isfinite(score) and low <= score <= high else None


def _class(names: tuple[str, ...], value: object) -> int | None:
    """The id of a class; None where ``value`` means no class, or more than one.

    A name means itself. Another number is compared with the names that are numbers: files of one task write 1, 1.0 and
    "01". It can be an index only where no name is a number. A boolean is the name "true" or "false", in any case of letters.
    """
    if isinstance(value, str) and value in names:
        return names.index(value)
    if isinstance(value, bool):
        alike = [i for i, name in enumerate(names) if name.lower() == str(value).lower()]
        return alike[0] if len(alike) == 1 else None
    wanted, numbers = _number(value), _numbers(names)
    if wanted is None:
        return None
    if not numbers:
        return int(wanted) if wanted in range(len(names)) else None
    alike = [i for i, found in numbers.items() if found == wanted]
    return alike[0] if len(alike) == 1 else None


@functools.lru_cache(maxsize=16)
def _numbers(names: tuple[str, ...]) -> dict[int, Decimal]:
    """The names that are numbers, by class id."""
    found = {i: _number(name) for i, name in enumerate(names)}
    return {i: number for i, number in found.items() if number is not None}


def _number(value: object) -> Decimal | None:
    """A finite number exactly as written; None for anything else, such as true, null or "1_000"."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        return None
    if isinstance(value, str) and not NUMBER.fullmatch(value.strip()):
        return None
    number = Decimal(str(value).strip())
    return number if number.is_finite() else None
