"""Checks how much of a corpus is unknown or special tokens, from which a model learns nothing."""

from collections.abc import Collection

import numpy as np

MOST = 0.9  # a larger share of the tokens is refused
MUCH = 0.05  # a larger share is remarked on


def unknown_share(ids: np.ndarray, unknown_id: int | None) -> float:
    """The unknown token's share of token ids [N]; 0 for a tokenizer without an unknown token (``None``)."""
    return 0.0 if unknown_id is None else float(np.count_nonzero(ids == unknown_id) / max(len(ids), 1))


def unknown_remark(share: float) -> str | None:
    """The plan's remark on a share of unknown tokens; None where it is small.

    Raises:
        ValueError: nearly all tokens are unknown.
    """
    if share > MOST:
        raise ValueError(
            f"{share:.1%} of the corpus's tokens are unknown to the tokenizer, which is made for another language or "
            "script: take a teacher or --tokenizer that knows the text, or name another --corpus"
        )
    if share > MUCH:
        return f"{share:.1%} of the corpus's tokens are unknown to the tokenizer and teach nothing"
    return None


def require_ordinary(ids: np.ndarray, special: Collection[int]) -> None:
    """Refuse token ids [N] that are nearly all special, such as a text of added markers: special tokens are not predicted.

    Raises:
        ValueError: with their share.
    """
    share = float(np.isin(ids, list(special), kind="table").mean()) if len(ids) else 0.0
    if share > MOST:
        raise ValueError(
            f"{share:.1%} of the corpus's tokens are special tokens, which are never predicted: name another --corpus, or "
            "take them off the tokenizer's additional special tokens"
        )
