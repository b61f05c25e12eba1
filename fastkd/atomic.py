"""Files that are written whole or not at all, and folders that can be written and are safely on the disk."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write(path: Path, content: str | bytes) -> Path:
    """Write a file whole or not at all, whatever stops the process; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path


def check_writable(folder: Path, *files: Path) -> None:
    """Refuse a run folder that cannot be made or written, before anything is: a file is tried where it will lie.

    Args:
        folder: it, or the nearest folder above that is there, must take a new file.
        files: where files are to be written; none of them may be a folder.

    Raises:
        ValueError: naming what is in the way and --output-dir.
    """
    nearest = folder
    try:
        for file in files:
            if file.is_dir():
                raise ValueError(f"{file} is a folder, where a file is to be written; give --output-dir another one")
        nearest = next(path for path in (folder, *folder.absolute().parents) if _is_there(path))
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(f"{nearest} is not a folder that can be written; give --output-dir another one") from error


def _is_there(path: Path) -> bool:
    """Whether a name is taken, be it by a link to nowhere. Raises OSError where it cannot be, such as a name too long."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def sync(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
