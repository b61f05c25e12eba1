"""The parts in order, each in a process of its own under its share of the minutes; then the page.

What is worth most comes first, so that a machine that goes away early has told what matters:

    environment   what it is, and the ceilings that every later share is a share of
    smoke         whatever fails at once is known after a minute, each failure by name
    full_step     a compiler's surprise costs one minute here and five later; its code is kept for `training`
    correctness   a fast kernel that is wrong is worth nothing
    training      tokens a second, the reason for all else, and the longest part
    kernels       each loss beside its peers and its roofline
    blocks        block sizes that may be faster: for the next version, not for this one's claims
    comparison    the command as users type it, in miniature

``SECONDS`` of the parts are shares of ten minutes. Before a part starts, what is left of ``minutes`` is divided in
proportion among it and those that follow: what one leaves over all later ones get, and the whole never takes longer.
"""

from __future__ import annotations

import ast
import datetime
import hashlib
import importlib.util
import io
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import unpacking
from bench.device import alone, page, process
from bench.device.part import Context
from fastkd import files
from fastkd.device import environment
from fastkd.files import file_sha256

PLAN = ("environment", "smoke", "full_step", "correctness", "training", "kernels", "blocks", "comparison")
ROOT = Path(__file__).parents[2]  # of the checkout
UNTIMED = {"smoke", "correctness"}  # a run of only these may go on beside another one, which waits before it times
LOG_BYTES = 1 << 20  # of each log's end that goes into the archive


@dataclass(frozen=True)
class Suite:
    """What to run. ``package`` holds the parts; ``parts`` names some of them, None means all."""

    out: Path
    device: str  # cuda or cpu: the latter is a rehearsal in tiny sizes
    minutes: float = 10.0
    parts: Sequence[str] | None = None
    bundle: Path | None = None
    package: str = "bench.device"

    def start(self) -> Run:
        """Check everything, unpack the bundle, start the clock.

        Raises:
            ValueError: in one line, what cannot be run. Nothing has been written to ``out`` then.
            OSError: as one, of the file system.
        """
        started = time.monotonic()
        seconds = self._chosen()
        self._check()
        scratch = _scratch(self.out)
        bundle = None if self.bundle is None else _unpacked(self.bundle, scratch)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / page.OUTCOMES).touch()  # from here on the folder is a run's
        return Run(self, scratch, bundle, seconds, started)

    def _chosen(self) -> dict[str, float]:
        """Seconds in ten minutes of the parts to run, in their order."""
        there = available(self.package)
        order = [name for name in PLAN if name in there] + sorted(there.keys() - set(PLAN))
        unknown = [name for name in self.parts or () if name not in there]
        if unknown:
            raise ValueError(f"no part {unknown[0]!r}: take of {', '.join(order)}")
        if self.parts is not None and not self.parts:
            raise ValueError(f"--parts names none: take of {', '.join(order)}, or leave it out")
        return {name: there[name] for name in order if self.parts is None or name in self.parts}

    def _check(self) -> None:
        if not 0 < self.minutes < 24 * 60:
            raise ValueError(f"--minutes is {self.minutes}: take more than 0 and less than a day, usually 10")
        nearest = next(path for path in (self.out, *self.out.absolute().parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise ValueError(f"--out {self.out} cannot be written: {nearest} is in the way, name another folder")
        if not (self.out / page.OUTCOMES).exists():  # results of an earlier run may be replaced, nothing else
            theirs = [
                *(self.out.iterdir() if self.out.is_dir() else ()),
                *(p for p in [archive(self.out)] if p.exists()),
            ]
            if theirs:
                raise ValueError(
                    f"--out {self.out} would mix with {theirs[0]}, which no run of this wrote: name a new folder"
                )
        if self.bundle is not None and not self.bundle.is_file():
            raise ValueError(f"--bundle {self.bundle} is no file: make one by python -m bench.bundle, or leave it out")


def archive(out: Path) -> Path:
    """The file beside a folder of results that holds all of it."""
    return out.absolute().with_name(f"{out.absolute().name}.tar.gz")


def available(package: str) -> dict[str, float]:
    """The parts of a package: its modules with ``SECONDS`` and ``run``, found without importing any of them."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec is not None else None) or ()
    files = [path for folder in folders for path in Path(folder).glob("*.py")]
    return {path.stem: seconds for path in files if (seconds := _seconds(path)) is not None}


def _seconds(path: Path) -> float | None:
    """``SECONDS`` of a part, None where a file is none."""
    names: dict[str, Any] = {}
    with suppress(SyntaxError):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                names[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                names |= {target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)}
    return float(names["SECONDS"]) if {"SECONDS", "run"} <= names.keys() else None


class Run:
    """One run of a suite: its clock, and what became of each part."""

    def __init__(
        self, suite: Suite, scratch: Path, bundle: Path | None, seconds: dict[str, float], started: float
    ) -> None:
        self._suite, self._out, self._scratch, self._bundle = suite, suite.out, scratch, bundle
        self._waiting, self._has_page = dict(seconds), False
        total = 60 * suite.minutes
        self._end = started + total
        self._parts_end = self._end - min(20.0, total / 10)  # the rest is for a last table, the page and the archive
        self._facts = {"commit": environment.describe().get("commit"), "date": datetime.date.today().isoformat()}

    def run(self) -> int:
        """Run the parts and write the page. 0: all ran; 4: some did not."""
        outcomes, begun = set[str](), list[Context]()
        quiet = alone.beside_others() if self._waiting.keys() <= UNTIMED else nullcontext()
        with _interruptible(), quiet:
            try:
                while self._waiting and "interrupted" not in outcomes:
                    context, limit = self._next()
                    outcomes.add(self._part(context, limit))
                    self._write_page()
                    self._complete([context])
                    begun.append(context)
                self._complete(begun)
            except KeyboardInterrupt:  # between two parts
                outcomes.add("interrupted")
                self._write_page()
        print(f"\n{(self._out / page.NAME).read_text()}\nresults in {self._out}", flush=True)
        return 0 if outcomes <= {"done"} and self._has_page else 4

    def _next(self) -> tuple[Context, float]:
        """The first of the waiting parts, with the seconds it may take."""
        name, share = next(iter(self._waiting.items()))
        limit = max(self._parts_end - time.monotonic(), 0.0) * share / sum(self._waiting.values())
        del self._waiting[name]
        margin = min(8.0, limit / 6)  # for its table and picture
        context = Context(
            name, str(self._out.absolute()), self._suite.device, limit - margin, self._suite.device == "cpu",
            None if self._bundle is None else str(self._bundle), str(self._scratch),
        )  # fmt: skip
        return context, limit

    def _part(self, context: Context, limit: float) -> str:
        """Run a part; what became of it: done, failed, cut off or interrupted."""
        for suffix in (".jsonl", ".md", ".png", ".log"):
            context.path(suffix).unlink(missing_ok=True)
        log, began = context.path(".log"), time.monotonic()
        print(f"{context.part}: up to {limit:.0f} s …", end=" ", flush=True)
        try:
            ended = process.run(self._argv(context), environment=self._environment(), log=log, seconds=limit)
            outcome = "cut off" if ended.code is None else "failed" if ended.code else "done"
        except KeyboardInterrupt:
            ended = process.Ended(None, time.monotonic() - began, "")
            outcome = "interrupted"
        self._tell(context, outcome, limit, ended)
        return outcome

    def _tell(self, context: Context, outcome: str, limit: float, ended: process.Ended) -> None:
        """Write down and print what became of a part."""
        line = "" if outcome == "done" else ended.line[:300]
        row = {"what": "part", "part": context.part, "outcome": outcome, "seconds": ended.seconds, "limit_s": limit}
        row |= {"line": line, "device": context.device, "bundle": context.bundle is not None, **self._facts}
        with (self._out / page.OUTCOMES).open("a", encoding="utf-8") as file:
            file.write(files.to_line(row))
        print(f"{outcome} after {ended.seconds:.1f} s{': ' + line if line else ''}", flush=True)

    def _complete(self, contexts: Sequence[Context]) -> None:
        """Write the tables of those parts that could not do it any more."""
        for context in contexts:
            left = min(30.0, self._end - time.monotonic() - 2)
            if context.path(".jsonl").exists() and not context.path(".md").exists() and left > 1:
                argv = [*self._argv(context), "--show"]
                process.run(argv, environment=self._environment(), log=context.path(".log"), seconds=left)
                self._write_page()

    def _argv(self, context: Context) -> list[str]:
        return [sys.executable, "-m", "bench.device.part", self._suite.package, context.dump()]

    def _environment(self) -> dict[str, str]:
        """What every part finds in its environment: no network, the checkout, caches that later parts read again."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        threads = str(max(1, (os.cpu_count() or 1) // (2 if self._suite.device == "cuda" else 1)))
        return {
            "OMP_NUM_THREADS": threads, **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
            "MPLBACKEND": "Agg", "TORCHINDUCTOR_CACHE_DIR": str(self._scratch / "inductor"),
            "TRITON_CACHE_DIR": str(self._scratch / "triton"), "XDG_CACHE_HOME": str(self._scratch / "cache"),
        }  # fmt: skip

    def _write_page(self) -> None:
        """The page of the rows so far, and all in one archive. A page that fails must not cost the rows."""
        try:
            page.write(self._out)
            self._has_page = True
        except Exception:
            self._has_page = False
            reason = traceback.format_exc()
            (self._out / page.NAME).write_text(
                f"The page could not be written:\n\n```\n{reason}```\n", encoding="utf-8"
            )
        self._pack()

    def _pack(self) -> None:
        """All results in one file, of each log the end; without room beside the folder only this file is missing."""
        whole = archive(self._out)
        partial = whole.with_name(f".{whole.name}.partial")
        try:
            with tarfile.open(partial, "w:gz") as packed:
                for file in sorted(path for path in self._out.iterdir() if path.is_file()):
                    content = file.read_bytes()
                    content = content[-LOG_BYTES:] if file.suffix == ".log" else content
                    entry = tarfile.TarInfo(f"{self._out.absolute().name}/{file.name}")
                    entry.size, entry.mtime = len(content), int(file.stat().st_mtime)
                    packed.addfile(entry, io.BytesIO(content))
            partial.replace(whole)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            print(f"{whole} is not written: {error}", flush=True)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt, once: what is written afterwards is not disturbed."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(*_: Any) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _scratch(out: Path) -> Path:
    """A private folder for what is compiled, unpacked and built; a later run with the same ``out`` finds it again."""
    key = hashlib.sha256(f"{os.getuid()} {out.resolve()}".encode()).hexdigest()[:12]
    path = Path(tempfile.gettempdir()) / f"fastkd-device-{key}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise ValueError(f"{path} belongs to somebody else: name another --out, or another folder in TMPDIR")
    return path


def _unpacked(archive: Path, scratch: Path) -> Path:
    """The folder of a bundle's verified content; what an earlier run unpacked is taken again if it is still whole."""
    folder = scratch / f"bundle-{file_sha256(archive)[:12]}"
    with suppress(ValueError):
        unpacking.opened(folder)
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    unpacking.unpack(archive, folder)
    return folder
