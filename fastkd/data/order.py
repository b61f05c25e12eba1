"""Draws that decide the order in which a corpus is read, so that any first part of it is a sample of the whole."""

import hashlib

SEED = 0  # of corpora, not of runs: runs of several seeds, and all rows of a comparison, share one tokenised copy


def draw(*key: object) -> float:
    """A number in [0, 1): always the same for a key, uniform over keys."""
    digest = hashlib.blake2b(repr((SEED, *key)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def shuffled(count: int, *key: object) -> list[int]:
    """0 to ``count - 1`` in an order drawn for a key."""
    return sorted(range(count), key=lambda number: draw(*key, number))
