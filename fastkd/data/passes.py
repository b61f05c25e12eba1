"""One shuffled pass over a part, cut into packs. F sequences (fragments) of some packs."""

from dataclasses import dataclass

import numpy as np

from fastkd.data.masking import key_of
from fastkd.data.text import Text, shuffled


@dataclass(frozen=True)
class Fragments:
    """The sequences of some packs, fillers not included, in order."""

    source: np.ndarray  # [F] int64 content position of the first token
    length: np.ndarray  # [F] int64 content tokens, at least 1
    pack: np.ndarray  # [F] int64 from 0

    def of(self, first: int, last: int) -> "Fragments":
        """Those of packs [first, last), renumbered from 0."""
        a, b = np.searchsorted(self.pack, (first, last))
        return Fragments(self.source[a:b], self.length[a:b], self.pack[a:b] - first)

    def sizes(self, packs: int, pack_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """(length, whether a filler) of every sequence with its [CLS] and [SEP], the packs' fillers included."""
        length = self.length + 2
        filler = pack_tokens - np.bincount(self.pack, length, minlength=packs).astype(np.int64)
        ends = np.searchsorted(self.pack, np.arange(packs), side="right")[filler > 0]
        is_filler = np.insert(np.zeros(len(length), bool), ends, True)
        return np.insert(length, ends, filler[filler > 0]), is_filler


class Pass:
    """One shuffled pass over a part."""

    def __init__(self, text: Text, copies: int, span: int, *, key: int) -> None:
        self._text = text
        self._span = span
        count = len(text.length)
        order = np.concatenate([shuffled(count, key_of(key, copy)) for copy in range(copies)])
        self._order = order.astype(np.uint32 if count < 2**32 else np.int64)
        length = text.length[self._order] + 2
        begin = np.cumsum(length, dtype=np.int64) - length
        total = int(length.sum(dtype=np.int64))
        borders = np.arange(total // span + 1) * span
        self._first = np.searchsorted(begin, borders, side="right") - 1  # the sequence that a pack begins in
        self._begin = begin[self._first]  # and where in the virtual stream that one begins

    def max_sequences(self) -> int:
        """The most sequences that any pack can have, its filler counted."""
        return int(np.diff(self._first).max(initial=0)) + 2

    def fragments(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source, length, pack) of the sequences of packs [first, last), [F] int64 each."""
        chosen = self._order[self._first[first] : self._first[last] + 1]
        source, length = self._text.start[chosen], self._text.length[chosen].astype(np.int64)
        begin = self._begin[first] + np.cumsum(length + 2) - length - 1  # of the content, in the virtual stream
        border = (begin // self._span + 1) * self._span
        inside = np.minimum(length, border - begin)
        cut = np.flatnonzero(inside < length)
        source = np.insert(source, cut + 1, source[cut] + inside[cut])
        pack = np.insert(begin, cut + 1, border[cut]) // self._span
        length = np.insert(inside, cut + 1, (length - inside)[cut])
        keep = slice(*np.searchsorted(pack, (first, last)))
        return source[keep], length[keep], pack[keep]
