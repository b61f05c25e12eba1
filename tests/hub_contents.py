"""What repositories of the test hub hold: parquet files and dataset cards."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet


def parquet(columns: Mapping[str, Any], rows: int = 20) -> bytes:
    """A parquet file with so many rows in a row group."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), file, row_group_size=rows)
    return file.getvalue()


def card(*configs: str, splits: Sequence[str] = ("train",)) -> str:
    """A dataset's README.md, whose configurations are folders."""
    lines = ["---", "configs:"]
    for config in configs:
        lines += [f"- config_name: {config}", "  data_files:"]
        lines += [f"  - {{split: {split}, path: {config}/{split}-*}}" for split in splits]
    return "\n".join([*lines, "---", ""])
