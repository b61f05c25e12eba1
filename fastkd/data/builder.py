"""Builds the parts of a corpus: in this process, or in one of its own that works ahead of training.

That process is this file run as a program. It reads its job from stdin and ends when stdin closes: so it ends with its
parent, even one that is killed. On its stdout it says every few seconds that it lives, and an error in one line.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import finalize

from filelock import FileLock, Timeout

import fastkd
from fastkd.data import corpus as corpora
from fastkd.data import heldout, hub
from fastkd.data.part import Part, part_folder, write_part
from fastkd.data.progress import Progress
from fastkd.data.reading import Place, Reading
from fastkd.data.recipe import Recipe, part_tokens
from fastkd.data.tokenise import Tokens, WorkerLost

NICE = 10  # of the process: on a busy machine, training goes first
BEAT, BEAT_SECONDS = ".", 5.0  # what it says while it lives
PATIENCE = 120.0  # seconds that it is waited for without a beat: then it is stopped, or stuck, and is ended
log = logging.getLogger(__name__)
_damaged: set[Path] = set()  # parts of which this process has said that they are damaged


class BuildingFailed(OSError):
    """Later parts of a corpus cannot be built."""


@dataclass(frozen=True)
class Job:
    """A corpus to be built.

    Attributes:
        folder: of the corpus.
        spec: as in ``corpus.sources``.
        tokenizer_json: a ``tokenizers.Tokenizer``, serialised.
        vocab_size: one more than its largest id.
        recipe: what the corpus is made from.
        workers: as in ``tokenise``.
    """

    folder: str
    spec: list[str]
    tokenizer_json: str
    vocab_size: int
    recipe: Recipe
    workers: int | None = None


def build(
    job: Job,
    *,
    parts: int | None = None,
    tokens: int | None = None,
    progress: Progress | None = None,
    trusted: int = 0,
) -> None:
    """Build the missing parts, in order, until there are ``parts`` parts, or ``tokens`` tokens for training, or all.

    Of several processes one builds and the others wait. A damaged part is built again; the digests of the first ``trusted``
    parts are not compared.

    Raises:
        ValueError: the corpus cannot be read; the folder cannot be written.
        WorkerLost: a process that tokenises was killed or stopped; parts that are whole are kept.
    """
    corpus = Path(job.folder)
    progress = progress or Progress()
    with _writable(corpus.parent), _alone(corpus), contextlib.ExitStack() as stack:
        reading, number, held, before = None, 0, 0, None
        while (parts is None or number < parts) and (tokens is None or number == 0 or held < tokens):
            if (part := load(corpus, number, verify=number >= trusted)) is None:
                if reading is None:
                    assert before is None or before.next is not None
                    start = before.next if before is not None and before.next is not None else Place()
                    reading = stack.enter_context(contextlib.closing(_reading(job, start, progress)))
                _build(job, number, reading)
                part = Part(corpus, number, verify=False)
            elif reading is not None:
                # This part exists, though one before it was missing: the reading is not at its end.
                reading.close()
                reading = None
            number, held, before = number + 1, held + part.tokens, part
            if part.next is None:
                return


def load(corpus: Path, number: int, *, verify: bool = True) -> Part | None:
    """A part, if it exists and is whole. Of a damaged one, this process says once that it is built again."""
    if not (folder := part_folder(corpus, number)).exists():
        return None
    try:
        part = Part(corpus, number, remedy="it is built again", verify=verify)
    except ValueError as error:
        if folder not in _damaged:
            log.warning("%s", error)
        _damaged.add(folder)
        return None
    _damaged.discard(folder)
    return part


def _reading(job: Job, start: Place, progress: Progress) -> Reading:
    size, units = corpora.size(job.spec), corpora.units(job.spec)
    return Reading(
        units, size, job.recipe["text_field"], job.tokenizer_json, start=start, workers=job.workers, progress=progress
    )


def _build(job: Job, number: int, reading: Reading) -> None:
    corpus, began = Path(job.folder), time.monotonic()
    chunks: Iterable[Tokens] = reading.part(part_tokens(job.recipe, number))
    if number == 0:
        chunks = list(chunks)
        share, _ = reading.end(0)
        held_out = heldout.choose(chunks, job.recipe["validation_fraction"], share)
    else:
        held_out = Part(corpus, 0, verify=False).held_out
    write_part(
        corpus, number, map(held_out.split, chunks), held_out, recipe=job.recipe, vocab_size=job.vocab_size,
        end=lambda: reading.end(number),
    )  # fmt: skip
    log.info("built part %d of %s in %.1f s", number, corpus, time.monotonic() - began)


@contextlib.contextmanager
def _writable(root: Path) -> Iterator[None]:
    try:
        root.mkdir(parents=True, exist_ok=True)
        yield
    except WorkerLost:  # not the folder's fault
        raise
    except OSError as error:
        raise ValueError(
            f"cannot write shards to {str(root)!r} ({error.strerror or error}): free its disk or make it writable, "
            "or set XDG_CACHE_HOME to another folder"
        ) from error


@contextlib.contextmanager
def _alone(corpus: Path) -> Iterator[None]:
    """Hold the corpus's lock. Where another process has it, say so before waiting: that may take hours."""
    lock = FileLock(corpus.with_name(f"{corpus.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another process that tokenises this corpus into %s", corpus)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class Builder:
    """Builds later parts in another process, one process a part. It ends with this process, or when this is closed."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._building, self._closed = 0, False
        self._said, self._silent = "", 0.0  # by the process that is at work; seconds since it said something
        self._finalizer: finalize[..., Any] | None = None

    def ahead(self, number: int) -> None:
        """Begin to build a part, unless a process is at work or has failed to build it; ``require`` raises that failure.

        Does nothing once closed: a thread that reads ahead may ask after the training has ended.
        """
        with self._lock:
            if self._closed:
                return
            if self._process is not None and self._process.poll() is not None:
                self._ended()
            if self._process is None and self._building != number:
                self._start(number)

    def require(self, number: int, seconds: float) -> None:
        """Wait for a part that is needed now, at most ``seconds``; one that could not be built is tried once more.

        A process that says nothing for ``PATIENCE`` is ended. Only the seconds of these waits count: while this
        process is itself stopped, so is the other.

        Raises:
            BuildingFailed: it could not be built; in one line.
        """
        with self._lock:
            if self._process is None:
                self._start(number)
            process = self._process
            assert process is not None
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                self._listen(seconds)
                if self._silent < PATIENCE:
                    return
                process.kill()
            silent, said = self._silent >= PATIENCE, self._ended()
            if process.returncode and self._building == number:
                how = f"said nothing for {PATIENCE:g} s" if silent else f"ended by {_end_of(process)}"
                raise BuildingFailed(said or f"the process that tokenises the corpus ({process.pid}) {how}")

    def _listen(self, seconds: float) -> None:
        """Take what the process has said meanwhile; ``seconds`` have passed."""
        assert self._process is not None and self._process.stdout is not None
        with contextlib.suppress(BlockingIOError):
            if new := os.read(self._process.stdout.fileno(), 1 << 16):
                self._said, self._silent = self._said + new.decode(), 0.0
                return
        self._silent += seconds

    def close(self) -> None:
        """End the process, if one is at work."""
        with self._lock:
            self._closed = True
            if self._finalizer is not None:
                self._finalizer()
            self._process = None

    def _ended(self) -> str:
        """Forget a process that has ended; returns what it printed."""
        assert self._process is not None and self._finalizer is not None
        said, _ = self._process.communicate()
        self._finalizer.detach()
        self._process = None
        return (self._said + said).lstrip(BEAT).strip()

    def _start(self, number: int) -> None:
        package = str(Path(fastkd.__file__).parents[1])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        # -P: the folder that a user is in must not shadow any module of the process's. Its group is its own: a signal to
        # this one's, such as Ctrl-C, does not reach it before it ignores that.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=os.environ | {"PYTHONPATH": path}, process_group=0,
        )  # fmt: skip
        self._finalizer = finalize(self, _end, process)
        self._process, self._building, self._said, self._silent = process, number, "", 0.0
        assert process.stdin is not None and process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        with contextlib.suppress(BrokenPipeError):  # it has ended: ``require`` says so when the part is needed
            process.stdin.write(json.dumps({"number": number, "beat": BEAT_SECONDS, "job": asdict(self._job)}) + "\n")
            process.stdin.flush()


def _end_of(process: subprocess.Popen[str]) -> str:
    return f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def main() -> int:
    """The building process: builds the parts up to the one that stdin names."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # a scheduler sends them to all: the parent ends this one
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(NICE)
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    threading.Thread(target=_beat, args=(order["beat"],), daemon=True).start()
    job = Job(**order["job"])
    try:
        with hub.pinned(job.recipe["sources"]):
            _check_sources(job)
            build(job, parts=order["number"] + 1, trusted=order["number"])
    except Exception as error:  # of any kind: the parent shows this line
        kind = "" if isinstance(error, (ValueError, WorkerLost)) else f"{type(error).__name__}: "
        print(f"{kind}{' '.join(str(error).split())}", flush=True)
        return 1
    return 0


def _check_sources(job: Job) -> None:
    """Refuse to go on where a file has changed since the corpus was begun: its parts would not fit together."""
    begun, now = job.recipe["sources"], corpora.sources(job.spec)
    known = [(before, source) for before, source in zip(begun, now, strict=False) if before.get("commit") != ""]
    changed = any(source.identity() != before for before, source in known)  # the hub could not be asked for the others
    if changed or len(now) != len(begun):
        raise ValueError(
            f"a file of the corpus {' '.join(job.spec)!r} changed, came or went since it was first read: put all back as "
            "they were, or begin a new run in another --output-dir"
        )


def _end_with_parent() -> None:
    """End when stdin closes. This process's own workers then end too: their stdin closes with it."""
    os.read(sys.stdin.fileno(), 1)  # not through the buffer, which a thread must not hold when the process ends
    os._exit(1)


def _beat(seconds: float) -> None:
    """Say now and then that this process lives. Once stopped, it does not."""
    while True:
        os.write(sys.stdout.fileno(), BEAT.encode())
        time.sleep(seconds)


if __name__ == "__main__":
    raise SystemExit(main())
