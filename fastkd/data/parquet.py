"""Documents from the row groups of a local parquet file."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastkd.data.contents import readable
from fastkd.data.rows import text_of, values

ROWS = 1024  # that are decoded at once


@dataclass(frozen=True)
class RowGroup:
    """Rows of a parquet file that are stored together."""

    path: Path
    number: int
    first: int  # row of the file, from 0
    size: int  # bytes as stored, its share of the footer included
    footer: Any = field(repr=False, compare=False)  # pyarrow's, read once a file

    @property
    def name(self) -> str:
        """The file's name and the row group's number, from 0."""
        return f"{self.path.name} row group {self.number}"

    def documents(self, text_field: str) -> Iterator[str]:
        """Yield the rows' text in order, blank ones left out. Raises ``ValueError`` that names file, column and row."""
        import pyarrow.parquet

        row = self.first
        with (
            _parquet(self.path, f" (row group {self.number})"),
            pyarrow.parquet.ParquetFile(self.path, metadata=self.footer) as file,
        ):
            columns = file.schema_arrow.names
            if text_field not in columns:
                raise ValueError(f"{self.path}: no column {text_field!r}; it has {columns}: name one with --text-field")
            for batch in file.iter_batches(ROWS, row_groups=[self.number], columns=[text_field], use_threads=False):
                for value in values(batch.column(0), f"{self.path}: column {text_field!r}", row):
                    if text := text_of({text_field: value}, text_field, self.path):
                        yield text
                row += len(batch)


def row_groups(path: Path, size: int) -> list[RowGroup]:
    """The row groups of a file of ``size`` bytes; their sizes add up to it. Raises ``ValueError`` for what is no parquet."""
    import pyarrow.parquet

    with _parquet(path):
        footer = pyarrow.parquet.read_metadata(path)
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    stored = [sum(group.column(i).total_compressed_size for i in range(group.num_columns)) for group in groups]
    units, first, read = [], 0, 0
    # A row group counts for its columns' share of the file. Differences of rounded sums add up to the size exactly.
    for number, group in enumerate(groups):
        start, read = read, read + stored[number]
        share = size * read // max(sum(stored), 1) - size * start // max(sum(stored), 1)
        units.append(RowGroup(path, number, first, share, footer))
        first += group.num_rows
    return units


@contextmanager
def _parquet(path: Path, where: str = "") -> Iterator[None]:
    import pyarrow

    with readable(path):
        try:
            yield
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the system's, for ``readable``; pyarrow's own have no number
            reason = " ".join(str(error).split())
            raise ValueError(
                f"corpus file {str(path)!r} is not a readable parquet file{where}: {reason}: copy it again"
            ) from error
