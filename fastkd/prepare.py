"""Tokenise a corpus in advance, on a machine without a GPU: ``python -m fastkd.prepare --preset paper-6l --tokens 1e9``.

It takes the options of a run; a run with the same corpus and tokenizer finds what was prepared, and goes on from there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from fastkd import cli, quantities, quickstart, terminal
from fastkd.config import gives_budget, parse_with
from fastkd.data import corpus
from fastkd.data.progress import Shown
from fastkd.data.shards import Shards
from fastkd.models import hf
from fastkd.run_config import RunConfig, option
from fastkd.setup import build_corpus, model_folder


@dataclass(frozen=True)
class PrepareOptions:
    """Options beside those of the run that the corpus is for."""

    tokens: float | None = option(
        None, "tokens to prepare, in whole parts; default: those of --budget-tokens, or the whole corpus"
    )


def prepare(run: RunConfig, tokens: int | None) -> Shards:
    """Tokenise the corpus of a run, as far as is asked for, in all cores.

    Raises:
        ValueError: a corpus or tokenizer that cannot be read, a cache that cannot be written.
    """
    source = run.tokenizer or run.teacher
    if source is None:
        raise ValueError("a corpus is prepared for a tokenizer: give --teacher or --tokenizer, a hub id or a folder")
    wanted = {"teacher": (source,), "text": run.corpus}
    quickstart.require(*(what for what, named in wanted.items() if quickstart.NAME in named))
    corpus.check(run.corpus, text_field=run.text_field)
    _, tokenizer = hf.shape(model_folder(source))
    with Shown(terminal.say, tokens) as progress:
        return build_corpus(run, tokenizer, tokens=tokens, progress=progress)


def describe(shards: Shards) -> str:
    """What there is of a corpus, and what to do with it."""
    sizes, count = shards.sizes, quantities.count
    rest = "the whole corpus" if shards.is_complete else f"of about {count(shards.unique_tokens)}"
    return (
        f"prepared {count(sizes['tokens']['train'])} tokens in {sizes['documents']['train']:,} documents, {rest}, "
        f"{count(sizes['tokens']['validation'])} held out: {shards.folder}\n"
        "a run with the same corpus and tokenizer finds it; copied to another machine, --corpus takes the folder"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0, 2 for a bad configuration, 75 interrupted: the parts that were written are kept."""
    return cli.answer(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(argv: list[str]) -> int:
    prog = terminal.called("prepare")
    budgeted = gives_budget(argv, prog)  # what a run needs, and this command does not
    own, resolved = parse_with(PrepareOptions, argv if budgeted else [*argv, "--budget-tokens", "1"], prog)
    if own.tokens is not None and not 1 <= own.tokens <= 1e15:
        raise ValueError(f"--tokens must be between 1 and 1e15, got {own.tokens:g}")
    tokens = own.tokens or (resolved.run.budget_tokens if budgeted else None)
    with terminal.stages():
        shards = prepare(resolved.run, None if tokens is None else int(tokens))
    terminal.say(describe(shards))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
