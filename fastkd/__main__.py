"""``fastkd COMMAND …``, also ``python -m fastkd COMMAND …``: only the module of that command is loaded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from fastkd import __version__, signals, terminal

COMMANDS = {
    "run": ("fastkd.run", "train a student under one budget: plan, train, export, report"),
    "plan": ("fastkd.plan", "time a few steps and print what the budget would buy"),
    "compare": ("fastkd.compare", "every method under one matched budget, one table"),
    "glue": ("fastkd.glue.__main__", "fine-tune and score a student on GLUE"),
    "probe": ("fastkd.probe", "read out of a frozen model what it knows, with or without a head"),
    "prepare": ("fastkd.prepare", "tokenise a corpus, on a machine without a GPU"),
}
HELP = f"""usage: fastkd COMMAND …

{{commands}}

`fastkd COMMAND --help` lists a command's options; `fastkd --version` prints {__version__}.
A first run, in minutes and without a GPU: fastkd run --preset quickstart --budget-gpu-hours 0.02"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 bad configuration, and what the named command returns."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in ("--help", "-h", "help"):
        print(HELP.format(commands="\n".join(f"  {known:<9}{does}" for known, (_, does) in COMMANDS.items())))
    elif name in ("--version", "-V"):
        print(f"fastkd {__version__}")
    elif name not in COMMANDS:
        terminal.complain(f"unknown command {name!r}: fastkd takes {', '.join(COMMANDS)}")
        return 2
    else:
        with signals.watched():  # from before the imports
            return int(import_module(COMMANDS[name][0]).main(rest))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
