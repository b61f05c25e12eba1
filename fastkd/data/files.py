"""Documents from local files: .txt (blank lines between documents), .jsonl and .parquet, the first two also .gz."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

SUFFIXES = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz")


def is_supported(path: Path | str) -> bool:
    """Whether the file's name says that fastkd can read it."""
    return any(_is(path, suffix) for suffix in SUFFIXES)


def _is(path: Path | str, suffix: str) -> bool:
    return str(path).lower().endswith(suffix)


def text_of(row: Any, text_field: str, where: str) -> str:
    """A row's stripped text; null counts as blank. Raises ``ValueError`` that names where the row is."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: holds a JSON {type(row).__name__}, not an object with a field {text_field!r}")
    if text_field not in row:
        raise ValueError(f"{where}: no field {text_field!r}; it has {sorted(row)}: name one with --text-field")
    text = row[text_field]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: field {text_field!r} holds {text!r}, not a string: name another with --text-field")
    return (text or "").strip()


@dataclass(frozen=True)
class LocalFile:
    """One file of a corpus. Raises ``ValueError`` for what is wrong in it, naming the file and the line."""

    path: Path

    @property
    def name(self) -> str:
        """Of the file, without its folder."""
        return self.path.name

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size

    def units(self) -> Iterator["LocalFile"]:
        """The file as a whole."""
        yield self

    def identity(self) -> dict[str, str]:
        """The sha256 of its content and how that is read, wherever the file lies."""
        with self._readable(), open(self.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"kind": next(suffix for suffix in SUFFIXES if _is(self.path, suffix)), "sha256": digest}

    def documents(self, text_field: str) -> Iterator[str]:
        """Yield the documents in file order; blank ones are left out."""
        with self._readable():
            if _is(self.path, ".parquet"):
                yield from _from_parquet(self.path, text_field)
            elif _is(self.path, ".jsonl") or _is(self.path, ".jsonl.gz"):
                yield from _from_jsonl(self.path, text_field)
            else:
                yield from _from_text(self.path)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(
                f"corpus file {str(self.path)!r} is not a complete gzip file ({error}): "
                "copy it again, `gzip -t` must accept it"
            ) from error
        except OSError as error:
            raise ValueError(f"cannot read corpus file {str(self.path)!r}: {error.strerror or error}") from error


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, stripped line)."""
    with _open(path) as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not UTF-8 (byte 0x{raw[error.start]:02x} at column {error.start + 1}): "
                    "convert the file, for instance with `iconv -f latin1 -t utf-8`"
                ) from error
            yield number, line.strip()


def _from_text(path: Path) -> Iterator[str]:
    document: list[str] = []
    for _, line in _lines(path):
        if line:
            document.append(line)
        elif document:
            yield "\n".join(document)
            document = []
    if document:
        yield "\n".join(document)


def _from_jsonl(path: Path, text_field: str) -> Iterator[str]:
    for number, line in _lines(path):
        if not line:
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not a JSON object ({error}): one object per line is read") from error
        text = text_of(row, text_field, f"{path}:{number}")
        if text:
            yield text


def _from_parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                raise ValueError(f"{path}: no column {text_field!r}; it has {columns}: name one with --text-field")
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                yield from filter(None, (text_of(row, text_field, str(path)) for row in batch.to_pylist()))
    except pyarrow.ArrowException as error:
        raise ValueError(f"corpus file {str(path)!r} is not a readable parquet file: {error}") from error
