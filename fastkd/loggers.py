"""Optional loggers: TensorBoard, Weights & Biases, Trackio. A logger that fails never stops a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol


class Logger(Protocol):
    """Takes the numbers of a run. Its package is imported when it is made."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Take the numbers of a step."""

    def close(self, finished: bool) -> None:
        """The run has come to its end, or was stopped before."""


class TensorBoard:
    """Writes event files into ``tensorboard/`` of the run folder."""

    def __init__(self, run_folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_folder / "tensorboard"))

    def log(self, values: dict[str, float], step: int) -> None:
        """A scalar each."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, finished: bool) -> None:
        """Close the files."""
        self._writer.close()


class WandB:
    """Sends to Weights & Biases, as the run folder's name in the project fastkd."""

    def __init__(self, run_folder: Path) -> None:
        import wandb

        # "auto" keeps the run's id under `dir` and takes it up where the last process did not finish.
        self._run = wandb.init(project="fastkd", name=run_folder.name, dir=str(run_folder), resume="auto")

    def log(self, values: dict[str, float], step: int) -> None:
        """All at once."""
        self._run.log(values, step=step)

    def close(self, finished: bool) -> None:
        """Mark the run as finished or failed."""
        self._run.finish(exit_code=0 if finished else 1)


class Trackio:
    """Sends to Trackio, as the run folder's name in the project fastkd."""

    def __init__(self, run_folder: Path) -> None:
        import trackio

        self._run = trackio.init(project="fastkd", name=run_folder.name, resume="allow")

    def log(self, values: dict[str, float], step: int) -> None:
        """All at once."""
        self._run.log(values, step=step)

    def close(self, finished: bool) -> None:
        """End the run."""
        self._run.finish()


LOGGERS: dict[str, Callable[[Path], Logger]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def check_loggers(names: Iterable[str]) -> None:
    """Raises ValueError for a logger that fastkd does not know."""
    for name in names:
        if name not in LOGGERS:
            raise ValueError(f"unknown logger {name!r}: --log-to takes {', '.join(LOGGERS)}")


class Guarded:
    """A logger by name. What it raises is told once; after that it is off."""

    def __init__(self, name: str, run_folder: Path, warn: Callable[[str], None]) -> None:
        self._name, self._warn = name, warn
        self._logger: Logger | None = None
        if find_spec(name) is None:
            self._fail(f"{name} is not installed (pip install {name})")
            return
        try:
            self._logger = LOGGERS[name](run_folder)
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")

    def log(self, values: dict[str, float], step: int) -> None:
        """Log the numbers of a step."""
        self._guard(lambda logger: logger.log(values, step))

    def close(self, finished: bool) -> None:
        """Close it."""
        self._guard(lambda logger: logger.close(finished))

    def _guard(self, action: Callable[[Logger], None]) -> None:
        if self._logger is None:
            return
        try:
            action(self._logger)
        except Exception as error:  # whatever a logger does, the run goes on
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        self._logger = None
        self._warn(f"warning: --log-to {self._name} is off for the rest of this run: {reason}")


def scalars(record: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The numbers of a record, those of its inner records too, named ``prefix`` + ``outer/inner``."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[prefix + key] = value
    return flat
