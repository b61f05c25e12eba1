"""Rows of a table to documents: the text of a row, and rows joined into running text."""

from collections.abc import Iterable, Iterator
from typing import Any

# A document of joined rows has about this many: far more than a sequence, far fewer than a part.
JOINED_CHARACTERS = 100_000
SHOWN_CHARACTERS = 120  # a value in a message is cut after these


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
    """A value for a message: on one line, cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def values(column: Any, where: str, first: int) -> list[Any]:
    """The values of an Arrow column; bytes are decoded, for some writers have no type for text.

    Raises ``ValueError`` that names ``where`` and the row, of which the column's first one is ``first``.
    """
    try:
        return [value.decode() if isinstance(value, bytes) else value for value in column.to_pylist()]
    except UnicodeDecodeError as error:
        row = first + next(number for number, value in enumerate(column) if not _is_utf8(value))
        raise ValueError(
            f"{where}, row {row} (from 0): not UTF-8 (byte 0x{error.object[error.start]:02x}): write the column again "
            "from its source as UTF-8, or leave that row out"
        ) from error


def _is_utf8(scalar: Any) -> bool:
    try:
        value = scalar.as_py()
        if isinstance(value, bytes):
            value.decode()
    except UnicodeDecodeError:
        return False
    return True


def joined(texts: Iterable[str]) -> Iterator[str]:
    """Join texts by newlines, in order; a document ends with the text that brings it to ``JOINED_CHARACTERS``."""
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
