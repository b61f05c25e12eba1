"""One run under one budget: ``python -m fastkd.run --budget-gpu-hours 24``. Plan, train, export, probe, report.

Issuing the same command again resumes an interrupted run, and says where a finished one is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fastkd import cli, disk, files, terminal
from fastkd.cli import EXIT_BUDGET, EXIT_CONFIGURATION, EXIT_INTERRUPTED, EXIT_OK
from fastkd.config import parse, require_inputs
from fastkd.terminal import Console

__all__ = ["EXIT_BUDGET", "EXIT_CONFIGURATION", "EXIT_INTERRUPTED", "EXIT_OK", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 1 numbers stopped being finite, 2 bad configuration, 3 budget under one step,
    75 interrupted, or a disk that is full or fails: can be resumed."""
    return cli.answer(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    resolved = parse(argv, prog=terminal.called("run"))
    files.check_writable(resolved.output_dir)
    finished = (resolved.output_dir / "final").is_dir()
    if not finished:  # a finished run reads nothing again
        require_inputs(resolved.run)
    from fastkd import pipeline  # only now: PyTorch takes seconds to load, and neither --help nor a mistake needs it
    from fastkd.distributed import joined, on_main
    from fastkd.probes import at_end

    with joined() as world, terminal.stages(quiet=not world.is_main), disk.written(resolved.output_dir):
        if not finished:
            on_main(world, lambda: at_end.check(resolved.run))
        console = Console(quiet=not world.is_main)
        pipeline.run(resolved, world, console, lambda: at_end.probe_student(resolved.output_dir, resolved.run, console))
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main())
