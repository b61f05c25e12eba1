"""Command lines: a parser of a dataclass's fields, exit codes, and one line for what went wrong."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from packaging.version import Version

from fastkd import disk, signals, terminal
from fastkd.budget import BudgetTooSmall
from fastkd.health import Diverged
from fastkd.signals import EXIT_INTERRUPTED, INTERRUPTED

EXIT_OK, EXIT_FAILED, EXIT_CONFIGURATION, EXIT_BUDGET, EXIT_ROWS = 0, 1, 2, 3, 4
CODES: tuple[tuple[type[Exception], int], ...] = (
    (BudgetTooSmall, EXIT_BUDGET),
    (ValueError, EXIT_CONFIGURATION),
    (ChildProcessError, EXIT_FAILED),
    (Diverged, EXIT_FAILED),
)
OLDEST = {"torch": "2.11", "transformers": "5", "datasets": "4"}  # as pyproject.toml asks for
WORDS = {"yes": True, "true": True, "t": True, "y": True, "1": True} | dict.fromkeys(
    ("no", "false", "f", "n", "0"), False
)


def answer(work: Callable[[], int]) -> int:
    """Do a command's work and return its exit code. An error or a signal becomes one line on standard error."""
    with signals.watched():
        try:
            check_versions()
            return work()
        except KeyboardInterrupt as error:
            return _interrupted(str(error))  # the loop's own says where it stopped
        except Exception as error:
            if (found := disk.failure(error)) is not None:
                terminal.complain(disk.line(error, found))
                return EXIT_INTERRUPTED
            return _interrupted() if signals.asked() else _failed(error)
        finally:
            terminal.let_go()


def _interrupted(text: str = "") -> int:
    if os.environ.get("RANK", "0") == "0":
        terminal.say(text or INTERRUPTED, sys.stderr)
    return EXIT_INTERRUPTED


def _failed(error: Exception) -> int:
    """The exit code of an error that is said in one line; one of another kind is a mistake of ours and is raised again."""
    for kinds, code in CODES:
        if isinstance(error, kinds):
            terminal.complain(str(error))
            return code
    if isinstance(error, OSError):
        terminal.complain(f"{error}: fix this and run the same command again; saved work is kept")
        return EXIT_INTERRUPTED
    raise error


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


class Parser(argparse.ArgumentParser):
    """A parser with an option for each field of some dataclasses; the help is in the field's metadata.

    Only options that are given are in the result, since presets and files override the defaults of fields.
    A mistake raises a ValueError of one line, where argparse would print the usage and exit.
    """

    def __init__(self, classes: Sequence[Any], prog: str, **settings: Any) -> None:
        super().__init__(prog=prog, allow_abbrev=False, argument_default=argparse.SUPPRESS, **settings)
        for cls in classes:
            kinds = get_type_hints(cls)
            for field in dataclasses.fields(cls):
                flags = dict.fromkeys((f"--{field.name}", f"--{field.name.replace('_', '-')}"))
                self.add_argument(*flags, help=field.metadata["help"], **_taken(kinds[field.name]))

    def given(self, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """The options of a command line by name, and the words that it does not know.

        Raises:
            ValueError: a value of the wrong kind, or none where one is needed.
        """
        known, unknown = self.parse_known_args(list(argv))
        return vars(known), unknown

    def error(self, message: str) -> NoReturn:
        """Raise the message, where argparse would exit."""
        raise ValueError(message)


def unknown_option(word: str) -> ValueError:
    """The error for a word that a command does not know."""
    return ValueError(f"unknown option {word!r}: --help lists them")


def _taken(kind: Any) -> dict[str, Any]:
    """The arguments of ``add_argument`` for a field of this type."""
    if get_origin(kind) in (Union, UnionType):  # X | None
        (kind,) = (each for each in get_args(kind) if each is not NoneType)
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is list:
        return {"type": get_args(kind)[0], "nargs": "+"}
    return {"type": _truth, "nargs": "?", "const": True} if kind is bool else {"type": kind}


def _truth(word: str) -> bool:
    """The value of a switch such as ``--compile true``."""
    if word.lower() not in WORDS:
        raise argparse.ArgumentTypeError(f"takes true or false (yes, no, t, f, y, n, 1 and 0 too), got {word!r}")
    return WORDS[word.lower()]
