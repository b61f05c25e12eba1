"""Digests of files, by which content is told apart whatever it is called."""

import hashlib
from pathlib import Path


def file_sha256(path: Path) -> str:
    """Hexadecimal digest of a file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
