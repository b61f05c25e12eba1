"""Files of a run: written whole or not at all; SHA-256 of a file's content; JSON lines that can be read after a kill.

What is being written has a name of its own: ``NAME.PID.partial`` for a file, ``.final-…`` or ``.building-…`` for a folder. A kill
leaves it there; `clear` removes it.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
PARTIAL = re.compile(
    r"(?:\.fastkd-.+|.+\.(?:jsonl?|toml|html|md|svg|tsv))\.(\d+)\.partial"
)  # the process that writes it
# No space, no more of a quota, a file larger than the system lets it be: errors that pass when there is room.
FULL = [getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name)]
DISK_ERRORS = [*FULL, errno.EIO]  # the last: a disk that fails
SUM = "sum"  # the last field of a line that has one
BUILDING = re.compile(r"\.(final|building|dropped|rescue)-.+")
BLOCK = 1 << 20  # bytes that are read at once
WRITTEN_IN = ("checkpoints", "final", "plots", "glue", "references/*")  # of a run's or a comparison's folder


def write(path: Path, content: str | bytes) -> Path:
    """Write a file whole or not at all, even if the process is killed; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # a full disk
    return path


@dataclass(frozen=True)
class Beginning:
    """The first bytes of a file that only grows, and what goes on from them; a copy of it is never held in memory."""

    path: Path
    size: int
    more: bytes = b""

    def copy_to(self, target: Path) -> None:
        """Write it as a file of its own."""
        with target.open("wb") as copy:
            if self.size:
                with self.path.open("rb") as file:
                    for start in range(0, self.size, BLOCK):
                        copy.write(file.read(min(BLOCK, self.size - start)))
            copy.write(self.more)


def set_aside(path: Path, called: str = "damaged") -> Path:
    """Keep a damaged file that is not needed under another name beside it; returns that name: NAME.damaged, NAME.damaged-2, …

    Args:
        called: another word, for a file that is not damaged.
    """
    taken = {entry.name for entry in path.parent.iterdir()}
    names = (f"{path.name}.{called}{'' if i == 1 else f'-{i}'}" for i in itertools.count(1))
    return path.rename(path.with_name(next(name for name in names if name not in taken)))


def _is_debris(path: Path) -> bool:
    """Whether a name is that of something half-written. A file of a process that lives is none."""
    if (partial := PARTIAL.fullmatch(path.name)) is not None:
        return path.is_file() and not _lives(int(partial[1]))
    return BUILDING.fullmatch(path.name) is not None and path.is_dir() and not path.is_symlink()


def clear(folder: Path) -> None:
    """Remove what killed processes left half-written in a run's or a comparison's folder, whose lock is held; through a link
    that leads out of it, nothing."""
    below = (place for pattern in WRITTEN_IN for place in folder.glob(pattern) if place.is_dir())
    places = [folder, *(place for place in below if place.resolve().is_relative_to(folder.resolve()))]
    for left in [path for place in places for path in place.iterdir() if _is_debris(path)]:
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    """Whether another process with this number runs on this machine."""
    if os.name != "posix":  # where signal 0 is Ctrl-C
        return False
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    except OverflowError:
        return False
    return process != os.getpid()


def give_usual_modes(folder: Path) -> None:
    """Give the files of a folder, which this process has just written, the mode that the umask means: safetensors' is 0600."""
    fresh = folder / f"mode.{os.getpid()}.partial"
    fresh.touch()
    mode = fresh.stat().st_mode & 0o777
    fresh.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def check_writable(folder: Path, *files: Path) -> None:
    """Refuse a run folder that cannot be made or written, before anything is written: a file is tried in it.

    Args:
        folder: this one, or the nearest folder above that exists, must take a new file.
        files: files that will be written; none of them may be a folder.

    Raises:
        ValueError: naming what is in the way and --output-dir.
        OSError: the disk is full or fails.
    """
    nearest = folder
    try:
        for file in files:
            if file.is_dir():
                raise ValueError(f"{file} is a folder, where a file is to be written; give --output-dir another one")
        nearest = next(path for path in (folder, *folder.absolute().parents) if _is_there(path))
        with tempfile.TemporaryFile(dir=nearest, prefix=".fastkd-", suffix=f".{os.getpid()}.partial"):
            pass
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise
        raise ValueError(f"{nearest} is not a folder that can be written; give --output-dir another one") from error


def _is_there(path: Path) -> bool:
    """Whether a path exists, even as a link to nowhere. Raises OSError if it cannot, such as a name that is too long."""
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


def file_sha256(path: Path) -> str:
    """Hexadecimal digest of a file.

    Raises:
        OSError: it cannot be read, or is a device or a pipe, which may never end.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(content: Any) -> str:
    """Hexadecimal digest of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_jsonl(path: Path) -> list[Record]:
    """The objects of a JSON-lines file, `[]` if there is no file.

    A process that is killed while it writes leaves a torn last line; that line is left out.

    Raises:
        ValueError: a line before the last is no JSON object.
    """
    if not path.exists():
        return []
    records: list[Record] = []
    torn = None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if torn is not None:
                raise ValueError(f"{path}:{torn} is no JSON object: restore the file or start a new run folder")
            record = _parse(line)
            if record is None:
                torn = number
            else:
                records.append(record)
    return records


def sound_lines(path: Path) -> tuple[list[Record], int]:
    """The sound objects of a JSON-lines file, and how many lines are damaged: no JSON object, not what their sum says, doubled.

    A line without a sum is of an older version. A torn last line, as a kill leaves it, counts as neither. An event may stand
    twice: older versions wrote the last validation again when they went on.
    """
    if not path.exists():
        return [], 0
    *lines, last = path.read_bytes().split(b"\n")
    sound: dict[bytes, Record] = {}
    damaged = 0
    for line in filter(bytes.strip, lines):
        record = _parse(line)
        if record is not None and sum_holds(record) and (line not in sound or "event" in record):
            sound[line] = record
        else:
            damaged += 1
    end = _parse(last)
    return [*sound.values(), *([end] if end is not None and sum_holds(end) else [])], damaged


def with_sum(record: Mapping[str, Any]) -> Record:
    """A record with a last field ``sum``: 16 hexadecimal digits of the SHA-256 of its line without it."""
    plain = {key: value for key, value in record.items() if key != SUM}
    return {**plain, SUM: hashlib.sha256(to_line(plain).encode()).hexdigest()[:16]}


def sum_holds(record: Mapping[str, Any]) -> bool:
    """Whether a record is what its sum says; one without a sum is of an older version."""
    return SUM not in record or record == with_sum(record)


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def whole_size(path: Path) -> int:
    """Bytes of a file up to the end of its last whole line; 0 if there is no file."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - BLOCK)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def drop_torn_line(path: Path) -> None:
    """Cuts off a last line without an end, as a kill leaves it, so that the next line starts on its own."""
    if path.exists():
        os.truncate(path, whole_size(path))


def cut_jsonl(path: Path, keep: Callable[[Record], bool]) -> None:
    """Rewrites a JSON-lines file with the records that `keep` accepts, atomically: all or nothing happens."""
    kept = [record for record in read_jsonl(path) if keep(record)]
    write(path, "".join(to_line(record) for record in kept))
    sync(path.parent)


def to_line(record: Mapping[str, Any]) -> str:
    """One line of strict JSON; numbers that are not finite become null: strict JSON has no word for them."""
    return json.dumps(finite(record), allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """A JSON value with null for each number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
