"""What a tokenised corpus is made from, and the name of its folder, a hash of that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastkd.data.tokenise import serialise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastkd.data.corpus import Source

FORMAT = 2
Recipe = dict[str, Any]
FIRST_TOKENS, MOST_TOKENS = 2**22, 2**27  # of part 0, which takes seconds; of the largest parts


def recipe(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_field: str,
    validation_fraction: float,
    first_tokens: int,
) -> Recipe:
    """The recipe of a corpus: everything that the bytes of its parts depend on.

    Raises:
        ValueError: a source that cannot be read, a tokenizer without Rust backend, a number out of range.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}: take one between 0 and 1, such as 0.02")
    return {
        "format": FORMAT,
        "sources": [source.identity() for source in sources],
        "text_field": text_field,
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "validation_fraction": validation_fraction,
        "first_tokens": first_tokens,
    }


def key(recipe: Recipe) -> str:
    """The name of a corpus's folder: equal for equal content, wherever it is."""
    return hashlib.sha256(canonical(recipe)).hexdigest()[:16]


def canonical(recipe: Recipe, *, without: str = "") -> bytes:
    """A recipe as bytes, equal for equal recipes; the field ``without`` of its sources is left out."""
    parts = [{name: value for name, value in source.items() if name != without} for source in recipe["sources"]]
    return json.dumps(recipe | {"sources": parts}, sort_keys=True).encode()


def part_tokens(recipe: Recipe, number: int) -> int:
    """Tokens of a part: twice as many as of the part before, up to ``MOST_TOKENS``."""
    return int(min(recipe["first_tokens"] << number, max(MOST_TOKENS, recipe["first_tokens"])))


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what the ids of a text depend on: vocabulary, normaliser, pre-tokeniser, added tokens."""
    parts = json.loads(serialise(tokenizer))
    deciding = {name: parts[name] for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
