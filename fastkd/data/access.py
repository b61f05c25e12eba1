"""Opening a corpus's files: what the system refuses or a .gz lacks is a line that names the file."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast


def opened(path: Path) -> BinaryIO:
    """The bytes of a file, those of a .gz decompressed."""
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else open(path, "rb")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what reading a file raises into a ``ValueError`` of one line."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"corpus file {str(path)!r} is not a complete gzip file ({error}): copy it again, `gzip -t` must accept it"
        ) from error
    except OSError as error:
        reason = " ".join(str(error.strerror or error).split())
        raise ValueError(f"cannot read corpus file {str(path)!r}: {reason}") from error
