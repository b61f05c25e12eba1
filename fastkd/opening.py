"""A run folder before its next step: its lock, what a kill or a bad disk left in it, and what the run began with.

No parameter depends on a file that is set aside here.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from fastkd import checkpoint, files, manifest
from fastkd.begun import BEGUN, CONFIG, COPIED, begun_with, config_text, sealed
from fastkd.distributed import World, on_main
from fastkd.resume import mend_ledger
from fastkd.run_folder import Run, has_student, is_object, read_opening

if TYPE_CHECKING:
    from fastkd.config import Resolved

LOCK = ".lock"
HALF_OPENED = re.compile(
    r"\.lock|(\.begun\.json|\.fastkd-.+)\.\d+\.partial"
)  # what is in a folder before a run began there
FILES = (*COPIED, "ledger.jsonl", "metrics.jsonl", "report.html")
log = logging.getLogger(__name__)


@contextlib.contextmanager
def alone_in(folder: Path, world: World | None = None) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if it is missing; rank 0 holds the lock for all.

    If nothing was written into the folder meanwhile, it is left as it was found.

    Raises:
        ValueError: another process is in it, or it cannot be locked; on every rank.
    """
    with contextlib.ExitStack() as stack:
        on_main(world or World(), lambda: stack.enter_context(_locked(folder)))
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = _names(folder)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another process trains in {folder}: wait for it, or give another --output-dir") from error
    except (OSError, NotImplementedError) as error:  # such as a network's disk without locks
        if getattr(error, "errno", None) in files.DISK_ERRORS:
            raise
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{folder} cannot be locked ({reason}): give an --output-dir on another disk") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # something is in it
            if LOCK not in before and _names(folder) == before | {LOCK}:
                (folder / LOCK).unlink()
                for path in made:
                    path.rmdir()
        lock.release()


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def take_over(folder: Path, resolved: Resolved) -> Run | None:
    """What began in a folder whose lock is held, with config, environment and plan; None if nothing did.

    What killed processes left there is removed; a damaged file on which no parameter depends is set aside.

    Raises:
        ValueError: the folder cannot be written, holds something else, another run, or no readable configuration.
    """
    files.check_writable(folder / "checkpoints", *(folder / name for name in FILES))
    if not _is_run(folder):
        if not all(map(HALF_OPENED.fullmatch, _names(folder))):
            raise ValueError(f"{folder} is not empty and holds no run: give another --output-dir")
        files.clear(folder)
        return None
    config = config_text(folder)
    if config is None:
        log.warning("%s was not there: it is written as this command means it", folder / CONFIG)
    else:
        resolved.require_same(config, folder)
    files.clear(folder)
    _write_again(folder)
    _set_damaged_aside(folder)
    _set_damaged_student_aside(folder)
    if mended := mend_ledger(folder):
        log.warning("%s", mended)
    if all((folder / name).exists() for name in COPIED):
        write_opening(folder, dict.fromkeys(COPIED, ""))
    return read_opening(folder)


def _is_run(folder: Path) -> bool:
    """Whether a run began here; one whose config.toml was removed is known by the command in environment.json."""
    return (folder / BEGUN).exists() or (folder / CONFIG).exists() or "command" in read_opening(folder).environment


def _write_again(folder: Path) -> None:
    """Write those files again that are missing, or are not what they were when the run began."""
    for name, text in begun_with(folder).items():
        path = folder / name
        if not path.exists():
            log.warning("%s is written again: it was not there", path)
        elif path.read_bytes() != text.encode():
            log.warning("%s is damaged, and written again: kept as %s", path, files.set_aside(path).name)
        else:
            continue
        files.write(path, text)


def _set_damaged_aside(folder: Path) -> None:
    """Set aside what cannot be read and cannot be written again; of metrics.jsonl, the sound lines are kept."""
    lost = {
        BEGUN: "it is made again from the files that it copies",
        "plan.json": "a new plan takes its place, and --dtype auto is measured again",
        "environment.json": "that corpus and teacher are those that the run began with is not checked",
    }
    for name, loss in lost.items():
        path = folder / name
        damaged = not begun_with(folder) if name == BEGUN else not is_object(path)
        if path.exists() and damaged:
            log.warning("%s is damaged: %s; kept as %s", path, loss, files.set_aside(path).name)
    metrics = folder / "metrics.jsonl"
    sound, damaged_lines = files.sound_lines(metrics)
    if damaged_lines:
        log.warning(
            "%s has %d damaged lines, left out: kept as %s", metrics, damaged_lines, files.set_aside(metrics).name
        )
        files.write(metrics, "".join(files.to_line(record) for record in sound))


def _set_damaged_student_aside(folder: Path) -> None:
    """Set ``final/`` aside if it is not what was exported: the checkpoint at the end exports the same again.

    Raises:
        ValueError: a file was changed, and there is no checkpoint to export it from again.
    """
    final = folder / "final"
    try:
        damaged = "it lacks a part of the student" if final.exists() and not has_student(folder) else None
        manifest.verify(final)
    except ValueError:
        if checkpoint.latest(folder / "checkpoints") is None:
            raise
        damaged = "it is not what was exported"
    if damaged:
        aside = files.set_aside(final)
        log.warning("%s is exported again, since %s: kept as %s", final, damaged, aside.name)


def write_opening(folder: Path, contents: Mapping[str, str]) -> None:
    """Write what a run begins with, by file name; a file that is there stays.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    kept = {name: (folder / name).read_text("utf-8") for name in contents if (folder / name).exists()}
    if not begun_with(folder):
        files.write(folder / BEGUN, sealed({**contents, **kept}))
        files.sync(folder)
    for name in contents.keys() - kept.keys():
        files.write(folder / name, contents[name])
