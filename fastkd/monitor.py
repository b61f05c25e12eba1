"""What a run tells while it runs: metrics.jsonl, a progress bar or plain lines, optional loggers."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastkd import quantities
from fastkd.files import Record, cut_jsonl, to_line
from fastkd.terminal import printable, say

LOGGERS = ("tensorboard", "wandb", "trackio")
PLAIN_INTERVAL_S = 5.0  # off a terminal: seconds between two lines, at least
REFRESH_INTERVAL_S = 0.25  # on a terminal


# ---- loggers ----------------------------------------------------------------------------------------------


def check_loggers(names: Iterable[str]) -> None:
    """Raises ValueError for a logger that fastkd does not know."""
    for name in names:
        if name not in LOGGERS:
            raise ValueError(f"unknown logger {name!r}: --log-to takes {', '.join(LOGGERS)}")


class _Sink:
    """One optional logger. Whatever it raises is told once, and from then on it is left alone."""

    def __init__(self, name: str, run_folder: Path, warn: Callable[[str], None]) -> None:
        self.name, self.warn, self.broken = name, warn, False
        self._log: Callable[[dict[str, float], int], object] = lambda values, step: None
        self._close: Callable[[bool], object] = lambda finished: None
        if find_spec(name) is None:
            self._fail(f"{name} is not installed (pip install {name})")
            return
        self._guard(lambda: self._open(run_folder))

    def log(self, values: dict[str, float], step: int) -> None:
        self._guard(lambda: self._log(values, step))

    def close(self, finished: bool) -> None:
        self._guard(lambda: self._close(finished))

    def _open(self, run_folder: Path) -> None:
        if self.name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(run_folder / "tensorboard"))

            def add(values: dict[str, float], step: int) -> None:
                for key, value in values.items():
                    writer.add_scalar(key, value, step)

            self._log, self._close = add, lambda finished: writer.close()
        elif self.name == "wandb":
            import wandb

            # "auto" keeps the run's id under `dir` and takes it up where the last process did not finish.
            run = wandb.init(project="fastkd", name=run_folder.name, dir=str(run_folder), resume="auto")
            self._log = lambda values, step: run.log(values, step=step)
            self._close = lambda finished: run.finish(exit_code=0 if finished else 1)
        else:
            import trackio

            run = trackio.init(project="fastkd", name=run_folder.name, resume="allow")
            self._log = lambda values, step: run.log(values, step=step)
            self._close = lambda finished: run.finish()

    def _guard(self, action: Callable[[], object]) -> None:
        if self.broken:
            return
        try:
            action()
        except Exception as error:  # whatever a logger does, the run goes on
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        self.broken = True
        self.warn(f"warning: --log-to {self.name} is off for the rest of this run: {reason}")


def _scalars(record: Mapping[str, Any], prefix: str) -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[prefix + key] = value
    return flat


# ---- the monitor ------------------------------------------------------------------------------------------


class Monitor:
    """Writes metrics.jsonl and shows the run: a progress bar on a terminal, a line now and then elsewhere.

    Args:
        run_folder: holds metrics.jsonl; made where it is missing, on entering.
        total_budget: in `unit` ("gpu-seconds", "flops" or "tokens").
        log_to: names out of `LOGGERS`.
        resume: keep the metrics that are there (then call `rewind`); else they start again.
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
        self._live: Live | None = None
        self._sinks: list[_Sink] = []
        self._record: Record = {}
        self._progress = 0.0
        self._pace: deque[tuple[float, float]] = deque(maxlen=64)  # (monotonic seconds, progress)
        self._shown_at = -math.inf
        self._shown_step: int | None = None

    def __enter__(self) -> Self:
        self.run_folder.mkdir(parents=True, exist_ok=True)
        cut_jsonl(self.path, lambda record: self.resume)  # also removes a torn last line
        self._file = self.path.open("a")
        self._sinks = [_Sink(name, self.run_folder, self.say) for name in self.log_to]
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show(force=True)
        if self._live is not None:
            with suppress(OSError):
                self._live.stop()
            self._live = None
        self._file.close()
        for sink in self._sinks:
            sink.close(finished=kind is None)

    def rewind(self, step: int) -> None:
        """Cuts the metrics of steps after `step`, atomically: a resumed run writes them again."""
        self._file.close()
        cut_jsonl(self.path, lambda record: record.get("step", 0) <= step)
        self._file = self.path.open("a")

    def due(self, step: int) -> bool:
        """Whether to read the loss off the device and call `step`: every `log_every` steps, and the first."""
        return step <= 1 or step % self.log_every == 0

    def advance(self, progress: float) -> None:
        """Moves the bar to `progress` in [0, 1]; costs nothing to speak of, call it every step."""
        self._progress = progress
        self._pace.append((time.monotonic(), progress))
        self._show()

    def step(self, record: Mapping[str, Any]) -> None:
        """Appends a step's metrics.

        Args:
            record: step, progress, charged_s, tokens, loss, parts, lr, grad_norm, tokens_per_s,
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
        self._file.write(to_line(record))
        self._file.flush()

    def _log(self, prefix: str, record: Mapping[str, Any]) -> None:
        values = _scalars({k: v for k, v in record.items() if k != "step"}, prefix)
        for sink in self._sinks:
            sink.log(values, record["step"])

    def _show(self, force: bool = False) -> None:
        now = time.monotonic()
        if self._live is not None:
            if force or now - self._shown_at >= REFRESH_INTERVAL_S:
                self._shown_at = now
                with suppress(OSError):
                    self._live.update(self._bar(), refresh=True)
            return
        step = self._record.get("step")
        interval_over = now - self._shown_at >= PLAIN_INTERVAL_S
        if step is not None and step != self._shown_step and (force or interval_over):
            self._shown_at, self._shown_step = now, step
            self.say(f"step {step:,} · {self._progress:.1%} · {self._budget_text()} · {self._state_text()}")

    def _bar(self) -> Group:
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        spent = f"{self._progress:.1%} {self._budget_text()}"
        row.add_row(ProgressBar(total=1.0, completed=self._progress), spent)
        return Group(row, Text(self._state_text()))

    def _budget_text(self) -> str:
        return quantities.spent(self._progress * self.total_budget, self.total_budget, self.unit)

    def _state_text(self) -> str:
        record = self._record
        pieces = [self._left_text()]
        if record:
            pieces += [
                f"loss {_optional(record.get('loss'))}",
                f"lr {record['lr']:.2e}",
                f"{record['tokens_per_s']:,.0f} tokens/s",
            ]
        return " · ".join(piece for piece in pieces if piece)

    def _left_text(self) -> str:
        if self._progress >= 1:
            return ""
        factor, name = quantities.budget_scale(self.total_budget, self.unit)
        left = (1 - self._progress) * self.total_budget / factor
        if not self._pace or self._pace[-1][1] <= self._pace[0][1]:
            return f"{quantities.number(left)} {name} left"
        (start, first), (end, last) = self._pace[0], self._pace[-1]
        seconds = max(0.0, (1 - last) * (end - start) / (last - first))
        return f"{quantities.number(left)} {name} left, in {quantities.duration(seconds)}"


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

    def _show(self, force: bool = False) -> None:
        pass
