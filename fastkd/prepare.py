"""Tokenise a corpus in advance, on a machine without a GPU: ``python -m fastkd.prepare --preset paper-6l --tokens 1e9``.

It takes the options of a run; a run with the same corpus and tokenizer finds what was prepared, and goes on from there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastkd import cli, quantities, quickstart, terminal
from fastkd.config import parse_with
from fastkd.run_config import RunConfig, option

if TYPE_CHECKING:
    from fastkd.data.shards import Shards


@dataclass(frozen=True)
class PrepareOptions:
    """Options besides those of the run that the corpus is for."""

    tokens: float | None = option(
        None, "tokens to prepare, in whole parts; default: those of --budget-tokens, or the whole corpus"
    )

    def __post_init__(self) -> None:
        """Refuse a number of tokens out of range."""
        if self.tokens is not None and not 1 <= self.tokens <= 1e15:
            raise ValueError(f"--tokens must be between 1 and 1e15, got {self.tokens:g}")


def prepare(run: RunConfig, source: str, tokens: int | None) -> Shards:
    """Tokenise the corpus of a run with the tokenizer of ``source``, on all cores: all of it, or about ``tokens``.

    Raises:
        ValueError: a corpus or tokenizer that cannot be read, a cache that cannot be written.
    """
    from fastkd.data import corpus  # only now: PyTorch takes seconds to load, and neither --help nor a mistake needs it
    from fastkd.data.progress import Shown
    from fastkd.models import hf
    from fastkd.setup import build_corpus, model_folder

    corpus.check(run.corpus, text_field=run.text_field)
    _, tokenizer = hf.shape(model_folder(source))
    with Shown(terminal.say, tokens) as progress:
        return build_corpus(run, tokenizer, tokens=tokens, progress=progress)


def describe(shards: Shards) -> str:
    """What was prepared of a corpus, and what to do with it."""
    sizes, count = shards.sizes, quantities.count
    rest = "the whole corpus" if shards.is_complete else f"of about {count(shards.unique_tokens)}"
    return (
        f"prepared {count(sizes['tokens']['train'])} tokens in {sizes['documents']['train']:,} documents, {rest}, "
        f"{count(sizes['tokens']['validation'])} held out: {shards.folder}\n"
        "a run with the same corpus and tokenizer finds it; copied to another machine, --corpus takes the folder"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0, 2 for a bad configuration, 75 interrupted: the parts that were written are kept."""
    return cli.answer(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    own, resolved = parse_with(PrepareOptions, argv, terminal.called("prepare"), needs_budget=False)
    run, tokens = resolved.run, own.tokens or resolved.run.budget_tokens
    source = run.tokenizer or run.teacher
    if source is None:
        raise ValueError("a corpus is prepared for a tokenizer: give --teacher or --tokenizer, a hub id or a folder")
    quickstart.require_named((source,), run.corpus)
    with terminal.stages():
        shards = prepare(run, source, None if tokens is None else int(tokens))
    terminal.say(describe(shards))
    return cli.EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main())
