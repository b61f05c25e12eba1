"""Documents to packs: every epoch's sequences, shuffled, end to end, in packs of exactly P tokens.

An epoch is one long virtual stream of sequences [CLS] content [SEP] in shuffled order. Pack j is what lies at the
virtual positions [j·(P−2), (j+1)·(P−2)): a sequence that a pack's end cuts becomes two proper sequences, and the [SEP]
and the [CLS] which that adds are what the 2 spares. So a pack is found by arithmetic, none depends on the one before,
every epoch has as many packs, and no token is lost or repeated, but for less than a pack at the epoch's end. The up to
4 tokens that stay free in a pack become one sequence of [PAD].

Shapes: S sequences of the text, F sequences (fragments) of some packs, n packs.
"""

from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from fastkd.data.epochs import Epochs
from fastkd.data.masking import key_of, mix

PACKINGS = ("documents", "full-sentences")


class Text:
    """The content of a split and how it is cut into sequences of at most ``seq_length`` with [CLS] and [SEP].

    ``documents``: a sequence holds tokens of one document. ``full-sentences`` (RoBERTa, Liu et al. 2019): the documents
    run on, a [SEP] between two, and are cut wherever a sequence is full.

    Attributes:
        tokens: corpus tokens in use.
        start, length: [S] int64 content position and [S] int32 content tokens of every sequence.
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
        if packing not in PACKINGS:
            raise ValueError(f"unknown packing {packing!r}: take one of {', '.join(PACKINGS)}")
        begin, length = _chosen(np.asarray(offsets), max_tokens)
        self.tokens = int(length.sum())
        self._ids = tokens
        self._joined: tuple[np.ndarray, np.ndarray, np.ndarray] | None
        self._separator = separator
        if packing == "documents":  # content positions are positions in the file
            self._joined = None
            self.start, self.length = _cut_documents(begin, length, seq_length - 2)
        else:  # they count the separators too: (position, begin in the file, length) of every document
            self._joined = np.cumsum(length + 1) - length - 1, begin, length
            self.start, self.length = _cut_joined(length, seq_length - 2)

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """The ids at content positions, [n] int64 each."""
        if self._joined is None:
            return self._ids[positions].astype(np.int64)
        position, begin, length = self._joined
        document = np.searchsorted(position, positions, side="right") - 1
        within = positions - position[document]
        between = within == length[document]
        ids = self._ids[begin[document] + np.where(between, 0, within)].astype(np.int64)
        return np.where(between, self._separator, ids)


def _chosen(offsets: np.ndarray, max_tokens: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(begin, length) of the documents in use: all, or in a fixed random order so many as hold ``max_tokens``."""
    begin, length = offsets[:-1], np.diff(offsets)
    if max_tokens is None or max_tokens >= length.sum():
        return begin, length
    if max_tokens < 1:
        raise ValueError(f"max_unique_tokens is {max_tokens}: take at least 1, or leave it out for the whole corpus")
    order = shuffled(len(begin), key=0)
    ends = np.cumsum(length[order])
    order = order[: np.searchsorted(ends, max_tokens) + 1]
    length = length[order]
    length[-1] -= ends[len(order) - 1] - max_tokens
    return begin[order], length


def _cut_documents(begin: np.ndarray, length: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    count = -(-length // room)
    within = (np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)) * room
    return np.repeat(begin, count) + within, np.minimum(np.repeat(length, count) - within, room).astype(np.int32)


def _cut_joined(length: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    total = int(length.sum()) + len(length) - 1
    start = np.arange(0, total, room)
    return start, np.minimum(total - start, room).astype(np.int32)


def shuffled(count: int, key: int) -> np.ndarray:
    """A permutation of range(count), [count] int64, that depends on the key alone, not on NumPy's version."""
    index = np.arange(count, dtype=np.uint64)
    low = np.uint64((1 << (count - 1).bit_length()) - 1)
    order = mix(index + np.uint64(key)) & ~low | index  # the index makes ties impossible
    order.sort()
    return (order & low).view(np.int64)


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


class Packer:
    """The endless row of packs of a text: packs of epoch 0, then of epoch 1, and so on. Any thread may read it.

    Attributes:
        packs_per_epoch: the same in every epoch.
        max_sequences: most sequences of a pack, a filler included; the same in every epoch.
    """

    def __init__(self, text: Text, *, pack_tokens: int, seed: int) -> None:
        self.text = text
        self.pack_tokens = pack_tokens
        self._seed = seed
        self._span = pack_tokens - 2
        self._total = int(text.length.sum(dtype=np.int64)) + 2 * len(text.length)
        self._copies = -(-self._span // self._total)  # a corpus below one pack repeats inside it
        self.packs_per_epoch = self._total * self._copies // self._span
        self._epoch = Epochs(self._shuffle)
        self.max_sequences = self._bound()

    def passes(self, packs: int) -> float:
        """How often a number of packs goes through the text, by its tokens."""
        return packs * self._span / self._total

    def epochs(self, packs: int) -> float:
        """Epochs that a number of packs makes: one ends where the next is shuffled, short of its last tokens."""
        return packs / self.packs_per_epoch if self._copies == 1 else self.passes(packs)

    def place(self, pack: int) -> tuple[int, int]:
        """(epoch, pack of the epoch) of a pack of the endless row."""
        return divmod(pack, self.packs_per_epoch)

    def fragments(self, first: int, last: int) -> Fragments:
        """The sequences of packs [first, last) of the endless row."""
        parts = []
        at = first
        while at < last:
            epoch, begin = self.place(at)
            end = min(begin + last - at, self.packs_per_epoch)
            parts.append((*self._epoch(epoch).fragments(begin, end), at - first - begin))
            at += end - begin
        return Fragments(
            np.concatenate([source for source, _, _, _ in parts]),
            np.concatenate([length for _, length, _, _ in parts]),
            np.concatenate([pack + shift for _, _, pack, shift in parts]),
        )

    def look_ahead(self, pack: int, pool: Executor) -> None:
        """Where ``pack`` lies in the second half of its epoch, have the pool shuffle the next one, unless that is done.

        A shuffle takes about 0.2 s a million sequences: begun half an epoch before, no reader waits for it.
        """
        epoch, at = self.place(pack)
        if 2 * at >= self.packs_per_epoch:
            self._epoch.ahead(epoch + 1, pool)

    def _shuffle(self, number: int) -> "_Epoch":
        """The first shuffle of this epoch that keeps to the static bound: nearly always the first of all."""
        attempt = 0
        while True:
            epoch = _Epoch(self.text, self._copies, self._span, key=key_of(self._seed, number, attempt))
            if number == 0 or epoch.max_sequences() <= self.max_sequences:
                return epoch
            attempt += 1

    def _bound(self) -> int:
        """What epoch 0 needs, and a tenth more for later epochs, up to a multiple of 16."""
        most = int(1.1 * self._epoch(0).max_sequences()) + 1
        return min(-(-most // 16) * 16, self.pack_tokens // 3 + 1)


class _Epoch:
    """One shuffled pass over a text."""

    def __init__(self, text: Text, copies: int, span: int, *, key: int) -> None:
        self._text = text
        self._span = span
        count = len(text.length)
        order = np.concatenate([shuffled(count, key_of(key, copy)) for copy in range(copies)])
        self._order = order.astype(np.uint32 if count < 2**32 else np.int64)
        begin = np.cumsum(text.length[self._order] + 2, dtype=np.int64)
        total = int(begin[-1])
        begin -= text.length[self._order] + 2
        borders = np.arange(total // span + 1) * span
        self._first = np.searchsorted(begin, borders, side="right") - 1  # the sequence that a pack begins in
        self._begin = begin[self._first]  # and where in the virtual stream that one begins

    def max_sequences(self) -> int:
        """The most sequences that any pack can have, its filler counted."""
        return int(np.diff(self._first).max()) + 2

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
