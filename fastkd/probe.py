"""What a frozen encoder knows, with or without an MLM head: ``python -m fastkd.probe MODEL``.

Hidden states are read out by ridge regression, of masked tokens and of parts of speech; minimal pairs are scored where there is a
head. docs/probes.md says what each score means.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fastkd import cli, terminal
from fastkd.probes.names import chosen
from fastkd.probes.options import ProbeOptions


def parse(argv: Sequence[str]) -> tuple[str, ProbeOptions]:
    """MODEL and the options of a command line.

    Raises:
        ValueError: an unknown option, a value of the wrong kind, or no MODEL.
    """
    parser = cli.Parser([ProbeOptions], terminal.called("probe"), description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="run folder, Hugging Face folder, hub id, or 'quickstart'")
    given, unknown = parser.given(argv)
    if unknown:
        raise cli.unknown_option(unknown[0])
    return given.pop("model"), ProbeOptions(**given)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 2 bad configuration, 75 interrupted: nothing was written."""
    return cli.answer(lambda: _main(*parse(sys.argv[1:] if argv is None else argv)))


def _main(model: str, options: ProbeOptions) -> int:
    options.check()
    from fastkd.probes.evaluation import probe  # only now: PyTorch takes seconds to load
    from fastkd.probes.scores import lines

    with terminal.stages():
        record = probe(
            model,
            chosen(options.probes),
            probe_data=options.probe_data,
            corpus=options.corpus,
            text_field=options.text_field,
            pairs=options.pairs,
            references=options.references,
            output_dir=options.output_dir,
        )
    for line in lines(record):
        terminal.say(line)
    return cli.EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main())
