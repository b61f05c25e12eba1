"""``python -m fastkd.glue MODEL``: fine-tune on GLUE and score."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal, NoReturn, cast

from transformers import HfArgumentParser

from fastkd.glue.tasks import parse_limits
from fastkd.terminal import called, complain, say

DONE, BAD_CONFIGURATION, INTERRUPTED = 0, 2, 75


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": help})


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
        "headline", "headline: one configuration, 8 tasks, 5 seeds; paper: best of a grid of 8, 7 tasks"
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


class _Parser(HfArgumentParser):
    """A user's mistake is one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(argv: Sequence[str]) -> tuple[str, GlueOptions]:
    """MODEL and the options of a command line. Raises ValueError for a mistake in it."""
    parser = _Parser(cast(Any, [GlueOptions]), prog=called("glue"), allow_abbrev=False, description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="run folder, Hugging Face folder, hub id, or 'quickstart'")
    options, rest, unknown = parser.parse_args_into_dataclasses(
        list(argv), return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(f"no option {unknown[0]}: see --help")
    return rest.model, options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 2 bad configuration, 75 interrupted and saved."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        model, options = parse(sys.argv[1:] if argv is None else argv)
        return _run(model, options)
    except (ValueError, ChildProcessError) as error:
        complain(str(error))
        return BAD_CONFIGURATION if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        say("interrupted: what finished is saved, and the same command continues after it", sys.stderr)
        return INTERRUPTED


def _run(model: str, options: GlueOptions) -> int:
    from huggingface_hub.utils import logging as hub_logging

    from fastkd.glue.evaluation import evaluate  # after --help: this loads transformers' Trainer

    hub_logging.set_verbosity_error()  # its retries; what comes of them is said in one line
    result = evaluate(
        model,
        [name.strip() for name in options.tasks.split(",")] if options.tasks else None,
        options.data,
        options.protocol,
        options.seeds,
        options.output_dir,
        task_files=[path.strip() for path in options.task_file.split(",")] if options.task_file else (),
        train_rows=parse_limits(options.train_rows, "--train-rows"),
        predict_test=options.predict_test,
        jobs=options.jobs,
        log=say,
    )
    say(f"\n{result['markdown']}\nwritten to {result['output_dir']}/glue.json and glue.md")
    for path in result["submission"]:
        say(str(path))
    return DONE


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
