"""How much of a corpus its tokenizer does not know: a model cannot learn from text that is all [UNK], or all [E1]."""

from collections.abc import Collection

import numpy as np

MOST = 0.9  # of the tokens: more is refused
MUCH = 0.05  # more is worth a warning


def unknown_share(ids: np.ndarray, unknown_id: int | None) -> float:
    """The unknown token's share of a corpus's token ids [N]; ``None`` is the id where every text is known."""
    return 0.0 if unknown_id is None else float(np.count_nonzero(ids == unknown_id) / max(len(ids), 1))


def unknown_remark(share: float) -> str | None:
    """What the plan says of a share: nothing where it is small.

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
    """Refuse token ids [N] that are nearly all special, as added markers of a text can be: none of them is predicted.

    Raises:
        ValueError: with their share.
    """
    share = float(np.isin(ids, list(special), kind="table").mean()) if len(ids) else 0.0
    if share > MOST:
        raise ValueError(
            f"{share:.1%} of the corpus's tokens are special tokens, which are never predicted: name another --corpus, or "
            "take them off the tokenizer's additional special tokens"
        )
