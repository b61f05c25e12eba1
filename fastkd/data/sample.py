"""Part of a tokenised corpus as one of its own, for where a whole one does not fit."""

import os
import shutil
from pathlib import Path

import numpy as np

from fastkd.data.part import write_part
from fastkd.data.shards import Shards


def write_sample(shards: Shards, folder: str | os.PathLike[str], *, tokens: int, seed: int) -> Shards:
    """Write a random part of a corpus's training documents, whole and in their order, with all that it holds out.

    Documents are taken in an order that the seed decides, up to the first that would bring their tokens over
    ``tokens``; at least one is. So a smaller sample of a seed is part of every larger one. All of them is the same
    corpus again, of the same version, in one part.

    Args:
        shards: the corpus to draw from; of a large one, the parts that are there.
        folder: of the new one; what is there is replaced.
        tokens: of the training split, at most.
        seed: of the order.
    """
    target = Path(folder)
    shutil.rmtree(target, ignore_errors=True)
    ids, offsets = shards.documents("train")
    kept = _drawn(np.diff(offsets), tokens, seed)
    recipe, first = shards.first.recipe, shards.first
    if not kept.all():
        recipe |= {"sample": {"of": shards.version, "tokens": int(np.diff(offsets)[kept].sum()), "seed": seed}}
    held_ids, held_offsets = shards.documents("validation")
    drawn = (ids[np.repeat(kept, np.diff(offsets))], np.diff(offsets)[kept]), (held_ids, np.diff(held_offsets))
    write_part(target, 0, [drawn], first.held_out, recipe=recipe, vocab_size=shards.vocab_size, end=lambda: (1.0, None))
    return Shards(target, whole=True)


def _drawn(lengths: np.ndarray, tokens: int, seed: int) -> np.ndarray:
    """Which documents are taken, [documents] bool."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    count = max(int(np.searchsorted(lengths[order].cumsum(), tokens, side="right")), 1)
    kept = np.zeros(len(lengths), bool)
    kept[order[:count]] = True
    return kept
