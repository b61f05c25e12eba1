"""The paper's experiment in one command: every method under one matched budget, then one table.

``python -m fastkd.compare --budget-gpu-hours 1 --methods mlm,logit_kd,tinybert,minilmv2 --match gpu-seconds``

A row is a run as ``fastkd.run`` makes it, in its own folder: planned, charged, resumed and reported like any other.
Rows differ only in their method; whatever else differs is listed beside them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fastkd import cli, disk, terminal
from fastkd.cli import EXIT_OK, EXIT_ROWS
from fastkd.comparison.options import CompareConfig, check
from fastkd.config import split_options

__all__ = ["EXIT_OK", "EXIT_ROWS", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 2 bad configuration, 3 budget under one step, 4 a row failed and the others are
    done, 75 interrupted and saved."""
    return cli.answer(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(argv: list[str]) -> int:
    own, shared = split_options(argv, CompareConfig, terminal.called("compare"), check)
    from fastkd.comparison.experiment import Comparison, to_json  # only now: PyTorch takes seconds to load, and
    from fastkd.distributed import joined  # neither --help nor a mistake needs it
    from fastkd.probes.evaluation import Prober

    with terminal.kept_for_answer(own.json) as out, joined() as world, terminal.stages(quiet=not world.is_main):
        comparison = Comparison(own, shared, argv, world, Prober(own.probes, own.probe_data))
        with disk.written(comparison.folder):
            failed = comparison.run()
        if own.json and world.is_main:
            print(to_json(comparison, failed), file=out, flush=True)
        if not own.plan_only:
            comparison.console.print(f"table {comparison.folder}/RESULTS.md · report {comparison.folder}/report.html")
        if failed:
            comparison.console.print(f"rows that failed: {failed}; issue the same command again to try them once more")
    return EXIT_ROWS if failed else EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main())
