"""The text of a row, and the rows' joining into running text."""

from collections.abc import Iterable, Iterator
from typing import Any

JOINED_CHARACTERS = 100_000  # of a document of joined rows: long beside a sequence, short beside a part of the corpus
SHOWN_CHARACTERS = 120  # of a value in a message


def text_of(row: Any, text_field: str, where: object) -> str:
    """A row's stripped text; null counts as blank. Raises ``ValueError`` that names ``where`` the row is."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: holds a JSON {type(row).__name__}, not an object with a field {text_field!r}")
    if text_field not in row:
        raise ValueError(f"{where}: no field {text_field!r}; it has {shown(sorted(row))}: name one with --text-field")
    text = row[text_field]
    if text is not None and not isinstance(text, str):
        raise ValueError(
            f"{where}: field {text_field!r} holds {shown(text)}, not a string: name another with --text-field"
        )
    return (text or "").strip()


def shown(value: object) -> str:
    """A value as a message shows it: on one line, cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def joined(texts: Iterable[str]) -> Iterator[str]:
    """Join texts by newlines, in order, into documents that end with the text that fills ``JOINED_CHARACTERS``."""
    document: list[str] = []
    size = 0
    for text in texts:
        document.append(text)
        size += len(text) + 1
        if size >= JOINED_CHARACTERS:
            yield "\n".join(document)
            document, size = [], 0
    if document:
        yield "\n".join(document)
