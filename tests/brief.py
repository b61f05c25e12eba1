"""A command of fastkd without what takes its seconds and touches no file: `brief.py fastkd.run OPTIONS`.

Fewer steps are timed before the plan, and the report's plots are not drawn. Every file operation stays. With BRIEF_CHUNK in
the environment, that many characters are enough for a worker process that tokenises.
"""

import os
import sys
from importlib import import_module
from typing import Any


def shorten() -> None:
    """In this process, from now on."""
    from matplotlib.figure import Figure

    from fastkd import planning
    from fastkd.data import tokenise

    tokenise.CHUNK_CHARACTERS = int(os.environ.get("BRIEF_CHUNK", tokenise.CHUNK_CHARACTERS))

    planning.MEASURED_STEPS = 3
    planning.measured_matmul_flops = lambda device, dtype: 1e11  # type: ignore[assignment]
    Figure.savefig = lambda self, file, **given: file.write("<svg></svg>")  # type: ignore[assignment,method-assign]


def main() -> int:
    """The command that is named first."""
    shorten()
    name, *options = sys.argv[1:]
    command: Any = import_module(name)
    return int(command.main(options))


if __name__ == "__main__":
    raise SystemExit(main())
