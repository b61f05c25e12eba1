"""Print the plan of a run: ``python -m fastkd.plan --budget-gpu-hours 24``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from fastkd import cli, terminal
from fastkd.config import parse_with, require_inputs
from fastkd.files import finite
from fastkd.run_config import option
from fastkd.terminal import Console


@dataclass(frozen=True)
class PlanOptions:
    """Options besides those of the run that is planned."""

    json: bool = option(False, "print the plan as one JSON object, and nothing else on standard output")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0, 2 for a bad configuration, 3 for a budget under one step."""
    return cli.answer(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    own, resolved = parse_with(PlanOptions, argv, terminal.called("plan"))
    require_inputs(resolved.run)
    from fastkd import (  # only now: PyTorch takes seconds to load, and neither --help nor a mistake needs it
        plan_lines,
        planning,
    )
    from fastkd.distributed import joined, phase
    from fastkd.setup import prepare
    from fastkd.train import Trainer

    with terminal.kept_for_answer(own.json) as out, joined() as world, terminal.stages(quiet=not world.is_main):
        console = Console(quiet=not world.is_main)
        plan_lines.announce(resolved, console)
        with phase("set-up"):
            trainer = Trainer(prepare(resolved, world))
            plan = planning.make(resolved, trainer, planning.measure(trainer))
        if own.json and world.is_main:
            print(json.dumps(finite(plan), allow_nan=False), file=out, flush=True)
        else:
            plan_lines.render(plan, console)
    return cli.EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main())
