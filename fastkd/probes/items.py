"""Items of a probe: positions in texts and what is to be read there. N tokens of all texts, n items."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

DEV = 5  # every fifth group of what is fitted chooses the penalty and the layer
LEAST_GROUPS = DEV  # fewer give no group to choose by


@dataclass(frozen=True)
class Items:
    """Texts end to end without special tokens, the positions in them that are read, and the label of each.

    A group is a text whose items are not independent of each other: a sentence, or a sequence with all its masks.
    """

    ids: np.ndarray  # [N] int64, as the model reads them
    lengths: np.ndarray  # [texts] int64
    rows: np.ndarray  # [n] int64, ascending positions in ids
    labels: np.ndarray  # [n] int64
    groups: np.ndarray  # [n] int64, ascending

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sha256(self) -> str:
        """SHA-256 of texts, positions and labels: equal for items that models can be compared on."""
        digest = hashlib.sha256()
        for part in (self.ids, self.lengths, self.rows, self.labels):
            digest.update(len(part).to_bytes(8, "little") + part.astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def sizes(self) -> list[int]:
        """Items of each group that has any, in order."""
        return [int(size) for size in np.unique(self.groups, return_counts=True)[1]]

    @property
    def is_dev(self) -> np.ndarray:
        """[n] bool: the items that choose the penalty and the layer; the others of what is fitted are fitted first."""
        return self.groups % DEV == DEV - 1


def require_enough(items: Items, what: str, remedy: str) -> None:
    """Refuse items that a read-out cannot be fitted to and chosen by.

    Raises:
        ValueError: naming what is too little, and the remedy.
    """
    dev = int(items.is_dev.sum())
    if not 0 < dev < len(items):
        raise ValueError(f"{what} gives {len(items)} items in {len(items.sizes)} texts, too few to fit: {remedy}")
