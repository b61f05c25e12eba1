"""The ledger: one line for each step and for each event between steps, and what is charged for them.

Its lines are chained by sums (``chain.py``), so that an altered one is known. A finished run's ledger holds an ``end`` after
its last step, so that one which was cut at a line is known too.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING

from fastkd import chain
from fastkd.budget import PARTS
from fastkd.files import Beginning, Record, drop_torn_line, read_jsonl, whole_size

if TYPE_CHECKING:
    from fastkd.budget import Charge, StepCost, Totals

NAME = "ledger.jsonl"
# Events that cost GPU-seconds under each policy (steps that count are always charged). A crash is the time of lost steps.
CHARGED_EVENTS: dict[str, frozenset[str]] = {
    "compute": frozenset(),
    "loop": frozenset({"validation", "checkpoint", "compile", "crash", "stage"}),
    "all": frozenset({"validation", "checkpoint", "compile", "crash", "stage", "setup"}),
}
Number = int | float
FIELDS: dict[str, type | UnionType] = {  # of any line; a number that was not finite is null
    "event": str, "step": int, "stage": int, "seconds": Number | None, "charged_s": Number, "progress": Number, "phase_s": dict,
    "flops": dict, "tokens": dict, "epoch": Number, "joules": Number | None, "lr": Number, "loss": Number | None, "devices": int,
}  # fmt: skip
STEP = (
    "step",
    "charged_s",
    "progress",
    "phase_s",
    "flops",
    "tokens",
    "epoch",
    "joules",
    "lr",
    "loss",
)  # of a step's line
INNER = {"flops": PARTS, "tokens": ("real", "predicted", "unique")}
EVALUATIONS = ("glue", "probe")  # events after the end, whose lines name no step
RECENT = 3  # steps that one rank may have finished and rank 0 not written: ranks are never that many steps apart
REMEDY = "issue the run's command again, which restores it from a checkpoint"


class Ledger:
    """``ledger.jsonl`` as a run writes it. Append-only; nothing is rewritten."""

    def __init__(self, path: Path, charge: Charge, totals: Totals, devices: int = 1, *, write: bool = True) -> None:
        """``devices``: seconds are charged once for each. ``write``: only rank 0 writes.

        Raises:
            ValueError: the file was altered.
        """
        self.path, self.totals, self.charge, self.devices = path, totals, charge, devices
        self.finished = False  # the run came to its end in an earlier process: nothing more is charged
        self.recent: deque[Record] = deque(maxlen=RECENT)  # the last steps' lines
        if write:
            drop_torn_line(path)
            self._head = _verified(path).head
        self._file = open(path, "a", encoding="utf-8") if write else None  # noqa: SIM115 (closed by close())

    def step(
        self, cost: StepCost, phase_s: dict[str, float], *, progress: float, epoch: float, unique: int,
        joules: float | None, lr: float, loss: float, skipped: bool = False, stage: int | None = None,
    ) -> float:  # fmt: skip
        """Charge a finished step, ``skipped`` or not; returns its charged GPU-seconds.

        ``phase_s`` is its seconds by phase; ``stage``, if it is given, the number of its stage, from 0.
        """
        t = self.totals
        charged = sum(phase_s.values()) * self.devices
        t.step += 1
        t.progress = progress
        t.charged_s += charged
        for part in PARTS:
            t.flops[part] += cost.flops[part]
        t.tokens["real"] += cost.real
        t.tokens["predicted"] += cost.predicted
        t.tokens["unique"] = unique
        t.skipped += skipped
        t.skipped_in_a_row = t.skipped_in_a_row + 1 if skipped else 0
        if joules is not None:
            t.joules = (t.joules or 0.0) + joules
        in_stage = {} if stage is None else {"stage": stage}
        self.recent.append({
            "step": t.step, **in_stage, "progress": progress, "charged_s": t.charged_s, "phase_s": phase_s, "flops": dict(t.flops),
            "tokens": dict(t.tokens), "epoch": epoch, "joules": t.joules, "lr": lr, "loss": loss, "devices": self.devices,
            "skipped": t.skipped,
        })  # fmt: skip
        self._write(self.recent[-1])
        return charged

    def event(self, name: str, seconds: float, *, in_loop: bool = True, **details: object) -> None:
        """Record an event between steps, in wall-clock seconds, and charge it if the policy says so.

        After the last step nothing is charged: the budget is spent by then.
        """
        charged = self._charges(name) and (in_loop or name == "setup") and not self.finished
        if charged:
            self.totals.charged_s += seconds * self.devices
        self._write_event(name, seconds, charged, details)

    def crash(self, lost: Sequence[Record]) -> None:
        """Record that steps which were charged are lost and will be repeated: the totals are those of the checkpoint again.

        A policy that charges crashes keeps their seconds charged, as the crash; any other gives them back.
        """
        seconds = sum(_cost(step, self.devices) for step in lost)
        if not self._charges("crash"):
            self.totals.charged_s -= seconds
        self._write_event("crash", seconds / self.devices, self._charges("crash"), {"lost_steps": len(lost)})

    def end(self) -> None:
        """Record that the run came to its end: a ledger that was cut lacks this line."""
        self.event("end", 0.0, in_loop=False)
        self.sync()

    def complete(self, recent: Sequence[Record]) -> None:
        """Write the last lines that are missing: rank 0 died before it wrote them, and another rank saved a checkpoint."""
        for line in _missing(self.path, recent):
            self._write(line)

    def copy(self) -> Beginning:
        """The whole ledger up to this step, for a checkpoint; on a rank that does not write, with what rank 0 did not write."""
        size, more = whole_size(self.path), b""
        if self._file is None:
            with contextlib.suppress(ValueError):  # damaged on the disk: this copy will be passed over
                found = _verified(self.path)
                size, head = found.size, found.head
                for record in _missing(self.path, self.recent):
                    line, head = chain.link(head, record)
                    more += line
        return Beginning(self.path, size, more)

    def sync(self) -> None:
        """Put every line on the disk: called before a checkpoint that relies on them."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _charges(self, event: str) -> bool:
        return event in CHARGED_EVENTS[self.charge]

    def _write_event(self, name: str, seconds: float, charged: bool, details: Record) -> None:
        line = {"event": name, "seconds": seconds, "step": self.totals.step, "charged": charged}
        self._write(line | {"charged_s": self.totals.charged_s, "devices": self.devices} | details)

    def _write(self, record: Record) -> None:
        if self._file is not None:
            line, self._head = chain.link(self._head, record)
            self._file.write(line.decode())
            self._file.flush()


# ---- what lines say -----------------------------------------------------------------------------------------


def read(path: Path) -> list[Record]:
    """The lines of a ledger; those of an older version have no sums. ``[]`` if there is no file; a torn last line is left out.

    Raises:
        ValueError: a line that was altered, or that is no line of a ledger.
    """
    _verified(path)
    return read_verified(path)


def read_verified(path: Path) -> list[Record]:
    """``read``, of a file whose sums were followed already.

    Raises:
        ValueError: a line that is no line of a ledger.
    """
    lines = read_jsonl(path)
    for line in lines:
        if (name := wrong_field(line)) is not None:
            raise ValueError(f"{path} has a line without its {name}: restore the file or start a new run folder")
    return lines


def wrong_field(line: Record) -> str | None:
    """The field that a line lacks or that holds something else: in a ledger without sums, any may have been altered."""
    needed = STEP if "event" not in line else () if line["event"] in EVALUATIONS else ("step", "seconds")
    for name, kind in FIELDS.items():
        value = line.get(name)
        sound = isinstance(value, kind)
        if sound and isinstance(value, dict):
            sound = value.keys() >= {*INNER.get(name, ())} and all(isinstance(each, Number) for each in value.values())
        if not sound if name in line else name in needed:
            return name
    return None


def surviving_steps(path: Path) -> list[Record]:
    """The step lines of a ledger that count: those after a crash's rewind point were lost and are left out.

    Raises:
        ValueError: a damaged file.
    """
    return surviving(read(path), path)


def surviving(lines: Iterable[Record], path: Path) -> list[Record]:
    """The step lines that count among the lines of a ledger, which ``path`` names in errors.

    Raises:
        ValueError: a line without its step.
    """
    steps: list[Record] = []
    for line in lines:
        if line.get("event", "crash") != "crash":
            continue
        if not isinstance(line.get("step"), int):
            raise ValueError(f"{path} has a line without its step: restore the file or start a new run folder")
        if "event" in line:
            _rewind(steps, line["step"])
        else:
            steps.append(line)
    return steps


def charged_s(lines: Iterable[Record], devices: int) -> float:
    """What the lines of a ledger charge, in GPU-seconds: the steps that count and the charged events, each once.

    Steps that a crash lost are in it as that crash, where the policy charges crashes, and else not at all. Added in the
    order in which they were charged, so that the sum is the same to the last bit.

    Args:
        devices: of lines that do not say how many were charged for.
    """
    steps: list[Record] = []
    charged = 0.0
    for line in lines:
        if "event" not in line:
            steps.append(line)
            charged += _cost(line, devices)
        elif line["event"] == "crash":
            lost = _rewind(steps, line["step"])
            if not line.get("charged"):
                charged -= sum(_cost(step, devices) for step in lost)
        elif line.get("charged"):
            charged += line["seconds"] * line.get("devices", devices)
    return charged


def has_ended(lines: Sequence[Record]) -> bool:
    """Whether lines are those of a finished run, to its end; of an older version's, which wrote no sums, nothing is known."""
    if not any("sum" in line for line in lines):
        return True
    return holds_its_end(lines)


def holds_its_end(lines: Sequence[Record]) -> bool:
    """Whether lines have an ``end``, and after it no step and no crash, which gives steps up."""
    marks = [line.get("event", "step") for line in lines]
    return "end" in marks and not {"step", "crash"} & {*marks[len(marks) - marks[::-1].index("end") :]}


def replayed_progress(path: Path) -> list[float]:
    """The progress of each step of a finished run's ledger, for a run that replays it instead of reading the clock.

    It need not rise at every step: after a step that was faster than predicted, the next one may be lower.

    Raises:
        ValueError: the file is no ledger of a run from its first step to its end.
    """
    remedy = "give the ledger.jsonl of a finished run"
    if not path.is_file():
        raise ValueError(f"--replay {path} is no file: {remedy}")
    try:
        lines = read_jsonl(path)
        _verified(path)
        steps = surviving(lines, path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--replay {path} cannot be read as a ledger, or was altered: {remedy}") from error
    if not steps:
        raise ValueError(f"--replay {path} holds no steps: {remedy}")
    for number, line in enumerate(steps, start=1):
        progress = line.get("progress")
        if line.get("step") != number or not isinstance(progress, int | float) or not 0 < progress <= 1:
            raise ValueError(f"--replay {path} lacks step {number} with a progress above 0 and at most 1: {remedy}")
    if not has_ended(lines):
        raise ValueError(f"--replay {path} was cut after step {len(steps)}, or its run has not ended: {remedy}")
    return [float(line["progress"]) for line in steps]


def _cost(step: Record, devices: int) -> float:
    return float(sum(step["phase_s"].values()) * step.get("devices", devices))


def _rewind(steps: list[Record], step: int) -> list[Record]:
    """Take the steps after ``step`` off the end; returns them."""
    kept = len(steps)
    while kept and steps[kept - 1]["step"] > step:
        kept -= 1
    lost, steps[kept:] = steps[kept:], []
    return lost


def _missing(path: Path, recent: Sequence[Record]) -> list[Record]:
    written = {line["step"] for line in surviving_steps(path)} if recent else set()
    return [line for line in recent if line["step"] not in written]


def _verified(path: Path) -> chain.Chain:
    found = chain.follow(chain.whole_lines(path))
    if not found.whole:
        raise ValueError(f"{path}:{found.sound + 1} was altered, or lines before it are missing: {REMEDY}")
    return found
