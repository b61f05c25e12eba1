"""Documents to packs: every epoch's sequences, shuffled, end to end, in packs of exactly P tokens.

An epoch is one long virtual stream of sequences [CLS] content [SEP] in shuffled order. Pack j is what lies at the
virtual positions [j·(P−2), (j+1)·(P−2)): a sequence that a pack's end cuts becomes two proper sequences, and the [SEP]
and the [CLS] which that adds are what the 2 spares. So a pack is found by arithmetic, none depends on the one before,
every epoch has as many packs, and no token is lost or repeated, but for less than a pack at the epoch's end. The up to
4 tokens that stay free in a pack become one sequence of [PAD].
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fastkd.data.masking import mix

PACKINGS = ("documents", "full-sentences")


class Text:
    """The content of a split and how it is cut into sequences of at most ``seq_length`` with [CLS] and [SEP].

    ``documents``: a sequence holds tokens of one document. ``full-sentences``: the documents run on, a [SEP] between
    two, and are cut wherever a sequence is full.
    """

    def __init__(
        self,
        tokens: np.ndarray,  # [N] ids, a memory map
        offsets: np.ndarray,  # [documents + 1] int64
        *,
        seq_length: int,
        packing: str,
        separator: int,
        max_tokens: int | None,
    ) -> None:
        self._tokens = tokens
        self._joined = packing == "full-sentences"
        self._separator = separator
        begin, length = _chosen(np.asarray(offsets), max_tokens)
        self.tokens = int(length.sum())
        cut = _cut_joined if self._joined else _cut_documents
        self.start, self.length = cut(begin, length, seq_length - 2)  # [S] int64: where each sequence's content lies
        if self._joined:
            self._begin, self._joint = begin, np.cumsum(length + 1) - length - 1

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """The ids at content positions, [n] int64 each."""
        if not self._joined:
            return self._tokens[positions].astype(np.int64)
        document = np.searchsorted(self._joint, positions, side="right") - 1
        within = positions - self._joint[document]
        index = self._begin[document] + within
        next_joint = np.append(self._joint[1:], np.iinfo(np.int64).max)
        is_separator = positions == next_joint[document] - 1
        return np.where(is_separator, self._separator, self._tokens[np.where(is_separator, 0, index)]).astype(np.int64)


def _chosen(offsets: np.ndarray, max_tokens: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(begin, length) of the documents in use: all, or whole documents in a fixed random order up to ``max_tokens``."""
    begin, length = offsets[:-1], np.diff(offsets)
    if max_tokens is None or max_tokens >= length.sum():
        return begin, length
    if max_tokens < 1:
        raise ValueError(f"max_unique_tokens is {max_tokens}: take at least 1, or None for the whole corpus")
    order = shuffled(len(begin), key=0)
    ends = np.cumsum(length[order])
    count = int(np.searchsorted(ends, max_tokens)) + 1
    length = length[order[:count]].copy()
    length[-1] -= ends[count - 1] - max_tokens
    return begin[order[:count]], length


def _cut_documents(begin: np.ndarray, length: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    count = -(-length // room)
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return np.repeat(begin, count) + within * room, np.minimum(np.repeat(length, count) - within * room, room)


def _cut_joined(begin: np.ndarray, length: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    total = int(length.sum()) + len(length) - 1
    start = np.arange(0, total, room)
    return start, np.minimum(total - start, room)


def shuffled(count: int, key: int) -> np.ndarray:
    """A permutation of range(count), [count] int64, that depends on the key alone, not on NumPy's version."""
    index = np.arange(count, dtype=np.uint64)
    low = np.uint64((1 << max(count - 1, 1).bit_length()) - 1)
    return (np.sort(mix(index + np.uint64(key)) & ~low | index) & low).astype(np.int64)


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

    def sizes(self, packs: int, pack_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(begin, length) of every sequence, fillers included, and which are fillers: [F'] each, begin in [0, T)."""
        length = self.length + 2
        filler = pack_tokens - np.bincount(self.pack, length, minlength=packs).astype(np.int64)
        ends = np.searchsorted(self.pack, np.arange(packs), side="right")[filler > 0]
        length = np.insert(length, ends, filler[filler > 0])
        is_filler = np.insert(np.zeros(len(self.length), bool), ends, True)
        return np.cumsum(length) - length, length, is_filler


def concatenate(parts: list[tuple[Fragments, int]]) -> Fragments:
    """Join fragments of consecutive ranges, each with the number of its packs."""
    before = np.cumsum([0, *(packs for _, packs in parts)])
    return Fragments(
        np.concatenate([part.source for part, _ in parts]),
        np.concatenate([part.length for part, _ in parts]),
        np.concatenate([part.pack + first for (part, _), first in zip(parts, before, strict=False)]),
    )


class Packer:
    """The endless sequence of packs of a text: packs of epoch 0, then of epoch 1, and so on."""

    def __init__(self, text: Text, *, pack_tokens: int, seed: int) -> None:
        self.text = text
        self.pack_tokens = pack_tokens
        self._seed = seed
        self._span = pack_tokens - 2
        self._total = int(text.length.sum()) + 2 * len(text.length)
        self._copies = -(-self._span // self._total)  # a corpus below one pack repeats inside it
        self.packs_per_epoch = self._total * self._copies // self._span
        self.epoch = lru_cache(maxsize=2)(self._shuffle)
        self.max_sequences = self._bound()

    def epochs(self, packs: int) -> float:
        """Epochs that a number of packs makes."""
        return packs / (self.packs_per_epoch if self._copies == 1 else self._total / self._span)

    def fragments(self, first: int, last: int) -> Fragments:
        """The sequences of the packs [first, last) of the endless sequence."""
        parts = []
        while first < last:
            number, begin = divmod(first, self.packs_per_epoch)
            end = min(begin + last - first, self.packs_per_epoch)
            parts.append((self.epoch(number).fragments(begin, end), end - begin))
            first += end - begin
        return concatenate(parts)

    def _shuffle(self, number: int) -> "Epoch":
        """The first shuffle of this epoch that keeps to the static bound: in practice the first."""
        attempt = 0
        while True:
            epoch = Epoch(self.text, self._copies, self._span, key=key_of(self._seed, number, attempt))
            if number == 0 or epoch.max_sequences() <= self.max_sequences:
                return epoch
            attempt += 1

    def _bound(self) -> int:
        """Most sequences a pack may have: what epoch 0 needs, a tenth more for later epochs, a multiple of 16."""
        most = int(1.1 * self.epoch(0).max_sequences()) + 1
        return min(-(-most // 16) * 16, self.pack_tokens // 3 + 1)


class Epoch:
    """One shuffled pass over a text."""

    def __init__(self, text: Text, copies: int, span: int, *, key: int) -> None:
        self._text = text
        self._span = span
        count = len(text.length)
        order = shuffled(count * copies, key) % count
        self._order = order.astype(np.uint32 if count < 2**32 else np.int64)
        length = text.length[self._order] + 2
        begin = np.cumsum(length) - length
        borders = np.arange((begin[-1] + length[-1]) // span + 1) * span
        self._first = np.searchsorted(begin, borders, side="right") - 1  # the sequence that a pack begins in
        self._begin = begin[self._first]  # and where in the virtual stream that one begins

    def max_sequences(self) -> int:
        """The most sequences of any pack, its filler counted."""
        _, _, pack = self._pieces(0, len(self._first) - 1)
        return int(np.bincount(pack).max()) + 1

    def fragments(self, first: int, last: int) -> Fragments:
        """The sequences of packs [first, last)."""
        source, length, pack = self._pieces(first, last)
        return Fragments(source, length, pack - first)

    def _pieces(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        chosen = self._order[self._first[first] : self._first[last] + 1]
        source, length = self._text.start[chosen], self._text.length[chosen]
        begin = self._begin[first] + np.cumsum(length + 2) - length - 1  # of the content, in the virtual stream
        border = (begin // self._span + 1) * self._span
        inside = np.minimum(length, border - begin)
        cut = np.flatnonzero(inside < length)
        source = np.insert(source, cut + 1, source[cut] + inside[cut])
        rest = (length - inside)[cut]
        length = np.insert(inside, cut + 1, rest)
        pack = np.insert(begin, cut + 1, border[cut]) // self._span
        keep = slice(*np.searchsorted(pack, (first, last)))
        return source[keep], length[keep], pack[keep]


def key_of(*numbers: int) -> int:
    """Hash integers, in order, to one in [0, 2^64)."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = mix(key + np.uint64(number % 2**64))
    return int(key[0])
