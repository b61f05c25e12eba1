"""Random draws for the order in which a corpus is read: any first part of it is a sample of the whole."""

import hashlib

SEED = 0  # the same in every run: runs of all seeds, and all rows of a comparison, share one tokenised copy


def draw(*key: object) -> float:
    """A number in [0, 1): the same for equal keys, uniform over keys."""
    digest = hashlib.blake2b(repr((SEED, *key)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53  # the upper 53 bits of 64: all that a float holds exactly


def shuffled(count: int, *key: object) -> list[int]:
    """0 to ``count - 1`` in a random order that depends only on the key."""
    return sorted(range(count), key=lambda number: draw(*key, number))
