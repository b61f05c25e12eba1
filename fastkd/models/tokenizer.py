"""Tokenizers of Hugging Face folders and hub ids, refused if they cannot encode a text for a model."""

from __future__ import annotations

import hashlib
import json

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastkd.data.recipe import tokenizer_hash

REMEDY = "put the model's tokenizer.json beside its config.json"


def load(where: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id; a vocab.txt or merges.txt is converted as transformers does.

    Raises:
        ValueError: it cannot be read, is not a fast (Rust) one, or lacks a token that batches are made with.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # a damaged file raises whatever its reader does
        raise ValueError(f"cannot load the tokenizer of {where!r} ({reason(error)}); {REMEDY}") from error
    check(tokenizer, where)
    return tokenizer


def check(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Refuse a tokenizer that no batch can be made with.

    Raises:
        ValueError: naming what it lacks.
    """
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise ValueError(f"the tokenizer of {source!r} is a {kind}, which has no tokenizer.json; take another model")
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        # Where it finds no file, transformers makes a tokenizer with the special tokens only.
        raise ValueError(f"{source!r} holds no tokenizer; {REMEDY}")
    missing = [name for name in ("cls", "sep", "mask", "pad") if getattr(tokenizer, f"{name}_token_id") is None]
    if missing:
        raise ValueError(
            f"the tokenizer of {source!r} has no {', '.join(missing)} token; "
            "name it in tokenizer_config.json, as that of a BERT or RoBERTa does"
        )


def entries(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding of its ids needs: one more than the largest id, since ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over all that batches depend on: ``tokenizer_hash``, and the ids of special tokens by what they are for."""
    special = [getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "mask", "pad", "unk")]
    content = [tokenizer_hash(tokenizer), special, sorted(tokenizer.all_special_ids)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def reason(error: Exception) -> str:
    """An error's type and the first sentence of its message: torch's second one advises to run code from a file."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0].partition(". ")[0]
