"""Finds the local files that a path, a pattern or a folder names."""

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path

SUFFIXES = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz")
ADDED = ("__MACOSX", "@eaDir")  # folders that macOS archives and Synology disks add; left out like hidden ones


@dataclass(frozen=True)
class Found:
    """What a walk found; each file once, however many links lead to it."""

    files: list[Path] = field(default_factory=list)  # of the kinds that are read, sorted by path
    hidden: list[Path] = field(default_factory=list)  # files of these kinds, and folders, left out for their names
    others: list[Path] = field(default_factory=list)  # files of other kinds, hidden ones not counted


def kind_of(path: Path | str) -> str | None:
    """A file's suffix, which says how it is read; None for a kind that is not read."""
    return next((suffix for suffix in SUFFIXES if str(path).lower().endswith(suffix)), None)


def find(spec: str) -> Found | None:
    """Find the files of a corpus specification; None where nothing here has that name and it is no pattern.

    A path that exists is that path, also if it holds characters of patterns. Links in folders are followed. Hidden files
    and folders (.ipynb_checkpoints, ._part.txt) and those of ``ADDED`` are left out.

    Raises:
        ValueError: a folder that cannot be read, something that is not a file, or a named file of a kind that is not
            read.
    """
    path = Path(os.path.expanduser(spec))
    if os.path.isdir(path):
        found = walk(path)
    elif os.path.lexists(path):
        found = _named([path])
    elif glob.has_magic(spec):
        found = _matching(path)
    else:
        return None
    for file in found.files:
        _require_file(file)
    return found


def walk(folder: Path) -> Found:
    """Walk a folder, following links. No folder or file is visited twice, so links in a circle do no harm.

    Raises:
        ValueError: a folder that cannot be read.
    """
    found, met = Found(), set[str]()
    for where, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        if (real := os.path.realpath(where)) in met:
            folders.clear()
            continue
        met.add(real)
        found.hidden.extend(Path(where, name) for name in folders if _is_hidden(name))
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        for path in (Path(where, name) for name in sorted(names)):
            if kind_of(path) is not None:
                (found.hidden if _is_hidden(path.name) else found.files).append(path)
            elif not _is_hidden(path.name):  # such as .DS_Store, which nobody means by a pattern
                found.others.append(path)
    return Found(_once(found.files), found.hidden, found.others)


def _refuse(error: OSError) -> None:
    raise ValueError(f"cannot read corpus folder {str(error.filename)!r}: {error.strerror}") from error


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in ADDED


def _once(paths: Iterable[Path]) -> list[Path]:
    """Sorted; of several paths to the same file the first."""
    return sorted({os.path.realpath(path): path for path in sorted(paths, reverse=True)}.values())


def _named(paths: Sequence[Path]) -> Found:
    for path in paths:
        if kind_of(path) is None:
            raise ValueError(f"corpus file {str(path)!r} is of an unknown kind: fastkd reads {' '.join(SUFFIXES)}")
    return Found(list(paths))


def _require_file(path: Path) -> None:
    if not os.path.exists(path):
        raise ValueError(f"corpus file {str(path)!r} is a link to {os.readlink(path)!r}, which is not there: mend it")
    if not os.path.isfile(path):
        raise ValueError(f"corpus file {str(path)!r} is a pipe or a device: write its text to a file, and name that")


def _matching(path: Path) -> Found:
    """The files that match a pattern, and the files of the folders that match."""
    base, pattern = _literal(path)
    fixed = pattern.index("**") if "**" in pattern else len(pattern)
    matches = glob.glob(os.path.join(*pattern[:fixed]), root_dir=base) if fixed else ["."]
    starts = [base / match for match in matches if not _met_added(Path(match).parts, pattern)]
    named = _named([start for start in starts if not start.is_dir()] if fixed == len(pattern) else [])
    walks = [_below(start, pattern[fixed:]) for start in starts if start.is_dir()]
    found = (named, *walks)
    return Found(_once(chain(*(part.files for part in found))), [], [])


def _met_added(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a match goes through a folder of ``ADDED`` that the pattern does not name."""
    return any(name in ADDED and name != part for name, part in zip(names, pattern, strict=False))


def _literal(path: Path) -> tuple[Path, tuple[str, ...]]:
    """(longest first part of a pattern that exists as a path, the parts after it)."""
    known = next(parent for parent in path.parents if os.path.lexists(parent))
    return known, path.relative_to(known).parts


def _below(folder: Path, pattern: tuple[str, ...]) -> Found:
    """The files in a folder that match a pattern with ``**``, or are in a folder there that matches; all without a pattern."""
    found = walk(folder)
    if not pattern:
        return found
    _named([path for path in found.others if _fits(path.relative_to(folder).parts, pattern)])
    ways = {path: path.relative_to(folder).parts for path in found.files}
    files = [path for path, way in ways.items() if any(_fits(way[:end], pattern) for end in range(1, len(way) + 1))]
    return Found(files, found.hidden, [])


def _fits(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether the names of a path match a pattern, part by part; ``**`` stands for any number of folders, also none."""
    if not pattern or not names:
        return all(part == "**" for part in pattern) and not names
    if pattern[0] == "**":
        return _fits(names, pattern[1:]) or _fits(names[1:], pattern)
    return fnmatchcase(names[0], pattern[0]) and _fits(names[1:], pattern[1:])
