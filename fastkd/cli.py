"""How a command ends: its exit codes, and one line for what went wrong."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from contextlib import suppress

from packaging.version import Version

from fastkd import terminal
from fastkd.budget import BudgetTooSmall
from fastkd.loop import Interrupted

EXIT_OK, EXIT_CONFIGURATION, EXIT_BUDGET, EXIT_ROWS, EXIT_INTERRUPTED = 0, 2, 3, 4, 75
OLDEST = {"torch": "2.11", "transformers": "5", "datasets": "4"}  # as pyproject.toml asks for


def answer(work: Callable[[], int]) -> int:
    """Do a command's work and return its exit code; what it raises becomes one line."""
    try:
        check_versions()
        return work()
    except (ValueError, BudgetTooSmall) as error:
        terminal.complain(str(error))
        return EXIT_BUDGET if isinstance(error, BudgetTooSmall) else EXIT_CONFIGURATION
    except OSError as error:
        terminal.complain(f"{error}: mend it and issue the same command again, what was saved is kept")
    except (Interrupted, KeyboardInterrupt) as error:
        if os.environ.get("RANK", "0") == "0":
            terminal.say(str(error) or "stopped outside the training loop; issue the same command again")
    return EXIT_INTERRUPTED


def check_versions() -> None:
    """Refuse packages that are too old.

    Raises:
        ValueError: naming the package, its version and the remedy.
    """
    for package, oldest in OLDEST.items():
        with suppress(importlib.metadata.PackageNotFoundError):
            installed = importlib.metadata.version(package)
            if Version(installed).release < Version(oldest).release:
                raise ValueError(
                    f"fastkd needs {package} {oldest} or newer, this is {installed}: pip install -U '{package}>={oldest}'"
                )
