"""``python -m fastkd.glue MODEL``: fine-tune on GLUE and score."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastkd import cli
from fastkd.glue.tasks import choose_tasks, parse_limits
from fastkd.run_config import option
from fastkd.terminal import called, say


@dataclass(frozen=True)
class GlueOptions:
    """What to evaluate on, and how."""

    tasks: str | None = option(
        None, "comma-separated: cola,sst2,mrpc,stsb,qqp,mnli,qnli,rte,wnli; default: the protocol's that --data holds"
    )
    data: str | None = option(None, "folder with the official GLUE files; default: nyu-mll/glue on the hub")
    output_dir: str | None = option(
        None, "for scores and finished fine-tunings; default: the run folder, or runs/glue-…"
    )
    protocol: Literal["headline", "paper"] = option(
        "headline",
        "headline: one configuration, 8 tasks, 5 seeds; paper: best of a grid of 8, 7 tasks; default: headline",
    )
    seeds: int | None = option(None, "number of seeds, from 0; default: 5 (headline), 1 (paper)")
    task_file: str | None = option(
        None, "comma-separated TOML files, each with another task (columns, labels, metrics, files)"
    )
    train_rows: str | None = option(
        None, "training rows at most, a fixed random subset: 20000, or by task: sst2=20000,qqp=50000"
    )
    predict_test: bool = option(False, "also predict the test sets, in the submission format")
    jobs: int | None = option(None, "fine-tunings side by side; default: one a GPU")

    def check(self) -> None:
        """Refuse values that are out of range, and tasks that nothing defines.

        Raises:
            ValueError: naming the option.
        """
        for name, value in (("seeds", self.seeds), ("jobs", self.jobs)):
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, not {value}")
        parse_limits(self.train_rows, "--train-rows")
        choose_tasks(_listed(self.tasks), map(Path, _listed(self.task_file)))


def parse(argv: Sequence[str]) -> tuple[str, GlueOptions]:
    """MODEL and the options of a command line.

    Raises:
        ValueError: an unknown option, a value of the wrong kind, or no MODEL.
    """
    parser = cli.Parser([GlueOptions], called("glue"), description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="run folder, Hugging Face folder, hub id, or 'quickstart'")
    given, unknown = parser.given(argv)
    if unknown:
        raise cli.unknown_option(unknown[0])
    return given.pop("model"), GlueOptions(**given)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 1 a process of it died, 2 bad configuration, 75 interrupted and saved."""
    return cli.answer(lambda: _run(*parse(sys.argv[1:] if argv is None else argv)))


def _run(model: str, options: GlueOptions) -> int:
    options.check()
    from huggingface_hub.utils import logging as hub_logging

    from fastkd.glue.evaluation import evaluate  # only now: this loads transformers' Trainer, which takes seconds

    hub_logging.set_verbosity_error()  # its retries; what comes of them is said in one line
    result = evaluate(
        model,
        _listed(options.tasks) or None,
        options.data,
        options.protocol,
        options.seeds,
        options.output_dir,
        task_files=_listed(options.task_file),
        train_rows=parse_limits(options.train_rows, "--train-rows"),
        predict_test=options.predict_test,
        jobs=options.jobs,
        log=say,
    )
    say(f"\n{result['markdown']}\nwritten to {result['output_dir']}/glue.json and glue.md")
    for path in result["submission"]:
        say(str(path))
    return cli.EXIT_OK


def _listed(text: str | None) -> list[str]:
    """The parts of a text between its commas."""
    return [part.strip() for part in text.split(",")] if text else []


if __name__ == "__main__":
    sys.exit(main())
