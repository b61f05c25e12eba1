"""Sentences of CoNLL-U files (universaldependencies.org/format.html): words and their universal parts of speech."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastkd.data import contents

UPOS = (
    "ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM",
    "VERB", "X",
)  # fmt: skip
SUFFIXES = (".conllu", ".conllu.gz")
COLUMNS = 10
NO_WORD = re.compile(r"\d+[-.]\d+")  # a range of words that are written as one, or a node of no word
REMEDY = "copy the file again"


@dataclass(frozen=True)
class Sentence:
    """The words of a sentence, and the part of speech of each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


def is_conllu(path: Path) -> bool:
    """Whether a file is named as CoNLL-U."""
    return path.name.lower().endswith(SUFFIXES)


def read(path: Path) -> list[Sentence]:
    """The sentences of a file, also of a .gz. Comments, multi-word ranges and empty nodes are skipped.

    Raises:
        ValueError: what is wrong, with file and line.
    """
    found: list[Sentence] = []
    words: list[tuple[str, str]] = []
    for number, line in _lines(path):
        if not line:
            _end(words, found)
        elif not line.startswith("#"):
            columns = line.split("\t")
            if len(columns) != COLUMNS:
                raise ValueError(f"{path}:{number}: {len(columns)} columns, where CoNLL-U has {COLUMNS}: {REMEDY}")
            if not NO_WORD.fullmatch(columns[0]):
                words.append(_word(columns, len(words) + 1, f"{path}:{number}"))
    _end(words, found)
    if not found:
        raise ValueError(f"{path} holds no sentence in CoNLL-U: {REMEDY}, or name another one")
    return found


def _end(words: list[tuple[str, str]], found: list[Sentence]) -> None:
    """The words so far are a sentence."""
    if words:
        found.append(Sentence(*zip(*words, strict=True)))
        words.clear()


def _word(columns: list[str], expected: int, where: str) -> tuple[str, str]:
    number, form, tag = columns[0], columns[1], columns[3]
    if number != str(expected):
        raise ValueError(f"{where}: word {number!r}, where word {expected} of the sentence comes next: {REMEDY}")
    if not form.strip():
        raise ValueError(f"{where}: word {number} has no form: {REMEDY}")
    if tag not in UPOS:
        raise ValueError(f"{where}: {form!r} has the part of speech {tag!r}, which is none of {', '.join(UPOS)}")
    return form, tag


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file by their numbers, without their ends."""
    with contents.readable(path), contents.opened(path) as file:
        head = file.read(contents.HEAD)
        if (what := contents.describe(head, path)) is not None:
            raise ValueError(f"{path} {what}")
        file.seek(0)
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not UTF-8 (byte {error.start + 1} of the line): {REMEDY}"
                ) from error
