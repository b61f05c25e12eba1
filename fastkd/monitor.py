"""What a run shows and records while it trains: metrics.jsonl, a progress bar or plain lines, optional loggers."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from fastkd import quantities
from fastkd.files import Record, cut_jsonl, finite, to_line, with_sum
from fastkd.loggers import Guarded, check_loggers, scalars
from fastkd.terminal import printable, say

PLAIN_INTERVAL_S = 5.0  # off a terminal: seconds between two lines, at least
PACE_S = 600.0  # how far back steps tell the speed: rich's own 30 seconds may hold less than two


class Monitor:
    """Writes metrics.jsonl and shows the run: a progress bar on a terminal, a line now and then elsewhere.

    Args:
        run_folder: holds metrics.jsonl; made on entering if it is missing.
        total_budget: in `unit` ("gpu-seconds", "flops" or "tokens").
        log_to: names of `LOGGERS`.
        resume: keep the metrics of the folder (then call `rewind`); else they start again.
        log_every: steps from one for which `due` is true to the next.
        stream: where the run is shown, standard output unless given.

    Raises:
        ValueError: unknown unit or logger, before anything is written.
    """

    def __init__(
        self,
        run_folder: Path,
        total_budget: float,
        unit: str,
        *,
        log_to: tuple[str, ...] = (),
        resume: bool = False,
        log_every: int = 10,
        stream: TextIO | None = None,
    ) -> None:
        check_loggers(log_to)
        quantities.budget_scale(total_budget, unit)
        self.run_folder, self.total_budget, self.unit = Path(run_folder), total_budget, unit
        self.log_to, self.resume, self.log_every = log_to, resume, log_every
        self.path = self.run_folder / "metrics.jsonl"
        self._stream = stream or sys.stdout
        self._console = Console(file=self._stream, highlight=False, soft_wrap=True)
        self._bar = Progress(
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            speed_estimate_period=PACE_S,
            expand=True,
        )
        self._bar.add_task("", total=1.0)
        (self._task,) = self._bar.tasks
        self._live: _Display | None = None
        self._loggers: list[Guarded] = []
        self._record: Record = {}
        self._shown_at = -math.inf
        self._shown_step: int | None = None

    def __enter__(self) -> Self:
        self.run_folder.mkdir(parents=True, exist_ok=True)
        cut_jsonl(self.path, lambda record: self.resume)  # also removes a torn last line
        self._file = self.path.open("a")
        self._loggers = [Guarded(name, self.run_folder, self.say) for name in self.log_to]
        if self._console.is_terminal:
            self._live = _Display(console=self._console, get_renderable=self._display)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show_line(at_once=True)
        if self._live is not None:
            with suppress(OSError):
                self._live.stop()  # draws it once more
            self._live = None
        self._file.close()
        for logger in self._loggers:
            logger.close(finished=kind is None)

    def rewind(self, step: int) -> None:
        """Cuts the metrics of steps after `step` and the validation of the end, atomically: a resumed run writes them again."""

        def stays(record: Record) -> bool:
            at_the_end = record.get("event") == "validation" and record.get("progress") == 1.0
            return record.get("step", 0) <= step and not at_the_end

        self._file.close()
        cut_jsonl(self.path, stays)
        self._file = self.path.open("a")

    def due(self, step: int) -> bool:
        """Whether to read the loss off the device and call `step`: every `log_every` steps, and the first."""
        return step <= 1 or step % self.log_every == 0

    def advance(self, progress: float) -> None:
        """Moves the bar to `progress` in [0, 1]. It takes next to no time: call it every step."""
        self._bar.update(self._task.id, completed=progress, description=f"{progress:.1%} {self._spent(progress)}")
        self._show_line()

    def step(self, record: Mapping[str, Any]) -> None:
        """Appends a step's metrics.

        Args:
            record: step, progress, charged_s, tokens, loss, parts, lr, skipped, grad_norm, tokens_per_s,
                peak_memory_bytes.
        """
        self._append(record)
        self._record = dict(record)
        self._log("train/", record)
        self.advance(record["progress"])

    def validation(self, record: Mapping[str, Any]) -> None:
        """Appends a validation.

        Args:
            record: step, progress, charged_s, tokens, loss, accuracy (None where no head is trained).
        """
        self._append({"event": "validation", **record})
        self._log("validation/", record)
        accuracy = record.get("accuracy")
        shown = "" if accuracy is None else f" · accuracy {accuracy:.2%}"
        self.say(f"step {record['step']:,} · validation loss {_optional(record['loss'])}{shown}")

    def say(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self._live is None:
            say(text, self._stream)
            return
        with suppress(OSError):  # a closed terminal must not end a run that is paid for
            self._console.print(Text(printable(text, self._stream)))

    def _append(self, record: Mapping[str, Any]) -> None:
        self._file.write(to_line(with_sum(finite(record))))
        self._file.flush()

    def _log(self, prefix: str, record: Mapping[str, Any]) -> None:
        values = scalars({k: v for k, v in record.items() if k != "step"}, prefix)
        for logger in self._loggers:
            logger.log(values, record["step"])

    def _show_line(self, at_once: bool = False) -> None:
        """Off a terminal, print the last step that was logged, if it is new and the last line is some seconds old."""
        step, now = self._record.get("step"), time.monotonic()
        is_due = at_once or now - self._shown_at >= PLAIN_INTERVAL_S
        if self._live is None and step is not None and step != self._shown_step and is_due:
            self._shown_at, self._shown_step = now, step
            progress = self._task.completed
            self.say(f"step {step:,} · {progress:.1%} · {self._spent(progress)} · {self._state()}")

    def _display(self) -> Group:
        """The bar with what is spent, and the state below it."""
        return Group(self._bar.make_tasks_table([self._task]), Text(self._state()))

    def _spent(self, progress: float) -> str:
        return quantities.spent(progress * self.total_budget, self.total_budget, self.unit)

    def _state(self) -> str:
        record = self._record
        pieces = [self._left()]
        if record:
            pieces += [
                f"loss {_optional(record.get('loss'))}",
                f"lr {record['lr']:.2e}",
                f"{record['tokens_per_s']:,.0f} tokens/s",
                f"{record['skipped']:,} steps skipped" if record.get("skipped") else "",
            ]
        return " · ".join(piece for piece in pieces if piece)

    def _left(self) -> str:
        """What is left of the budget, and for how long it will last if a speed is known."""
        progress, seconds = self._task.completed, self._task.time_remaining
        if progress >= 1:
            return ""
        factor, name = quantities.budget_scale(self.total_budget, self.unit)
        left = f"{quantities.number((1 - progress) * self.total_budget / factor)} {name} left"
        return left if seconds is None else f"{left}, in {quantities.duration(seconds)}"


class _Display(Live):
    """Redrawn by a thread, four times a second. A closed terminal ends neither the thread nor the run."""

    def refresh(self) -> None:
        with suppress(OSError):
            super().refresh()


def _optional(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4f}"


class SilentMonitor(Monitor):
    """The monitor of every rank but 0: nothing is written or shown."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def rewind(self, step: int) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def _append(self, record: Mapping[str, Any]) -> None:
        pass

    def _show_line(self, at_once: bool = False) -> None:
        pass
