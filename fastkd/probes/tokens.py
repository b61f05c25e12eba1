"""The probe ``tokens``: which token is behind a [MASK], read from text of a corpus. It needs no labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from fastkd.data.masking import Masker, key_of
from fastkd.data.sequences import Text, permutation
from fastkd.probes.items import Items, require_enough

if TYPE_CHECKING:
    from fastkd.data.assembly import SpecialIds
    from fastkd.data.shards import Shards

FIT_TOKENS = 2**17  # of the training split
TEST_TOKENS = 2**16  # of the held-out split; a smaller one is read again with other masks,
MOST_TIMES = 4  # at most this often
MASK_RATE = 0.15
SEQUENCE = 128  # tokens of a sequence at most, [CLS] and [SEP] included
KEYS = {"train": 1, "validation": 2}  # of order and masks


def masked_text(shards: Shards, special: SpecialIds) -> tuple[Items, Items]:
    """(to fit, to score): masked sequences of the training split's first part, and of the held-out split.

    Of the tokens, 15% are picked as in training; the items are those that became [MASK], since the others, replaced or left as
    they are, still say or seem to say what they were. Both depend on the corpus and the tokenizer only.

    Raises:
        ValueError: the corpus holds too little text.
    """
    both = tuple(
        _items(shards, special, split, most) for split, most in (("train", FIT_TOKENS), ("validation", TEST_TOKENS))
    )
    for items in both:
        require_enough(items, "the corpus", "name a larger --corpus")
    fit, test = both
    return fit, test


def _items(shards: Shards, special: SpecialIds, split: str, most: int) -> Items:
    tokens, offsets = shards.first.documents(split)
    text = Text(tokens, offsets, seq_length=SEQUENCE, packing="documents", separator=special.sep)
    order = permutation(len(text.length), KEYS[split])
    chosen = np.sort(order[: max(1, int(np.searchsorted(np.cumsum(text.length[order]), most, side="right")))])
    times = 1
    if split == "validation":  # what is fitted needs other text, not other masks
        times = int(np.clip(most // max(text.length[chosen].sum(), 1), 1, MOST_TIMES))
    number = np.repeat(np.arange(len(chosen)), times)  # of the sequence that each text is
    length = text.length[chosen][number].astype(np.int64)
    within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    plain = text.ids(np.repeat(text.start[chosen][number], length) + within)
    ids, rows, labels = _mask(plain, shards.vocab_size, special, key_of(KEYS[split]))
    return Items(ids, length, rows, labels, np.repeat(number, length)[rows])


def _mask(ids: np.ndarray, vocab_size: int, special: SpecialIds, key: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids [N] with 15% of them hidden; the rows that are [MASK] now, and what they were."""
    never = special.all_special | special.absent
    masker = Masker(vocab_size, never, special.mask, round(MASK_RATE * len(ids)), torch.device("cpu"))
    keys = torch.from_numpy(np.array([key], np.uint64).view(np.int64))
    masked, rows, labels = (found.numpy() for found in masker(torch.from_numpy(ids)[None], keys))
    hidden = (masked[rows] == special.mask) & (labels >= 0)
    return masked, rows[hidden], labels[hidden]
