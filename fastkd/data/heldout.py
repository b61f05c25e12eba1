"""Which documents are held out for validation, decided while they stream past."""

import heapq

import numpy as np

MOST = 2_000  # different documents: enough for a loss to three digits, few enough to evaluate often


class HeldOut:
    """Keeps the documents of the smallest content hashes; everything else is handed back for training.

    The choice depends on the documents alone, not on their order; equal documents land on the same side, so that no
    copy of a held-out document is trained on.
    """

    def __init__(self) -> None:
        self._kept: dict[int, list[np.ndarray]] = {}
        self._largest: list[int] = []  # heap of negated hashes

    @property
    def threshold(self) -> int:
        """Documents with a larger hash are for training, now and later: the threshold only falls."""
        return -self._largest[0] if len(self._kept) == MOST else 2**64 - 1

    def offer(self, digest: int, ids: np.ndarray) -> list[np.ndarray]:
        """Take a document; return those that leave for the training split, perhaps this one."""
        if digest in self._kept:
            self._kept[digest].append(ids.copy())
            return []
        self._kept[digest] = [ids.copy()]  # a copy: a slice would keep its whole chunk in memory
        heapq.heappush(self._largest, -digest)
        return self._kept.pop(-heapq.heappop(self._largest)) if len(self._kept) > MOST else []

    def settle(self, wanted: int, *, leave_one: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """At the end of the corpus: (held-out documents, those that go back to the training split).

        Args:
            wanted: different documents to hold out.
            leave_one: nothing is in the training split yet, so that one must go back.
        """
        order = sorted(self._kept)
        count = min(max(wanted, 1), len(order) - leave_one)
        return self._documents(order[:count]), self._documents(order[count:])

    def _documents(self, hashes: list[int]) -> list[np.ndarray]:
        return [ids for digest in hashes for ids in self._kept[digest]]
