"""Tokenise a corpus in advance, on a machine without a GPU: ``python -m fastkd.prepare --preset paper-6l --tokens 1e9``.

It takes the options of a run; a run with the same corpus and tokenizer finds what was prepared, and goes on from there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from fastkd import quantities
from fastkd.config import RunConfig, option, resolve, split_options
from fastkd.data import corpus
from fastkd.data.progress import Shown
from fastkd.data.shards import Shards
from fastkd.models import hf
from fastkd.parts import build_corpus, model_folder

PROG = "python -m fastkd.prepare"


@dataclass(frozen=True)
class Prepare:
    """What to prepare."""

    tokens: float | None = option(
        None, "tokens to prepare, in whole parts; default: those of --budget-tokens, or the whole corpus"
    )


def prepare(own: Prepare, run: RunConfig, console: Console) -> Shards:
    """Tokenise the corpus of a run, as far as is asked for, in all cores.

    Raises:
        ValueError: a corpus or tokenizer that cannot be read, a cache that cannot be written.
    """
    source = run.tokenizer or run.teacher
    if source is None:
        raise ValueError("a corpus is prepared for a tokenizer: give --teacher or --tokenizer, a hub id or a folder")
    corpus.check(run.corpus, text_field=run.text_field)
    tokenizer = hf.load_tokenizer(model_folder(source))
    wanted = None if own.tokens is None else int(own.tokens)
    with Shown(console, wanted) as progress:
        return build_corpus(run, tokenizer, tokens=wanted, progress=progress)


def describe(shards: Shards) -> str:
    """What there is of a corpus, and what to do with it."""
    sizes, count = shards.sizes, quantities.count
    there = f"{count(sizes['tokens']['train'])} tokens in {count(sizes['documents']['train'])} documents"
    rest = "the whole corpus" if shards.is_complete else f"of about {count(shards.unique_tokens)}"
    held = f"{count(sizes['tokens']['validation'])} held out"
    return (
        f"prepared {there}, {rest}, {held}: {shards.folder}\n"
        "A run with the same corpus and tokenizer finds it; copied to another machine, --corpus takes the folder."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0, 2 for a bad configuration, 75 interrupted: the parts that are done are kept."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        own, explicit = _options(sys.argv[1:] if argv is None else argv)
        shards = prepare(own, resolve(explicit).run, console)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on after the last part that was written")
        return 75
    console.print(describe(shards), markup=False)
    return 0


def _options(argv: Sequence[str]) -> tuple[Prepare, dict[str, Any]]:
    """Raises ``ValueError`` for an option that is unknown or out of range."""
    own, explicit = split_options(argv, Prepare, PROG)
    assert isinstance(own, Prepare)
    if own.tokens is not None and not 1 <= own.tokens <= 1e15:
        raise ValueError(f"--tokens must be between 1 and 1e15, got {own.tokens:g}")
    if not {"budget_gpu_hours", "budget_flops", "budget_tokens"} & explicit.keys():
        explicit["budget_tokens"] = own.tokens or 1.0  # what a run needs and this command does not
    elif own.tokens is None and explicit.get("budget_tokens"):
        own = Prepare(tokens=explicit["budget_tokens"])
    return own, explicit


if __name__ == "__main__":
    raise SystemExit(main())
