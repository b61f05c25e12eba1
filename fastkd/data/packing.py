"""Sequences to packs: in every epoch the sequences are shuffled, put end to end and cut into packs of exactly P tokens.

An epoch is the parts of a corpus, one after the other. A part is one long virtual stream of sequences [CLS] content [SEP] in
shuffled order. Pack j holds the virtual positions [j·(P−2), (j+1)·(P−2)):

    stream   [CLS] a a a [SEP] [CLS] b b b b b b [SEP] [CLS] c c [SEP] …
    pack 0   [CLS] a a a [SEP] [CLS] b b b [SEP]                         the border cut b: this adds a [SEP] here
    pack 1   [CLS] b b b [SEP] [CLS] c c [SEP] …                         and a [CLS] here

The 2 tokens that P−2 leaves free are for these two. So a pack is found by arithmetic and depends on no other, every epoch has
the same number of packs, and no token is lost or repeated, except for less than a pack at a part's end. The up to 4 tokens
that stay free in a pack become one sequence of [PAD], its filler.

Shapes: S sequences of a text, F sequences (fragments) of some packs, n packs.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from threading import RLock

import numpy as np

from fastkd.data.epochs import Epochs
from fastkd.data.masking import key_of
from fastkd.data.sequences import Text, permutation

ATTEMPTS = 16  # shuffles of a part that are tried; the first with few enough sequences in every pack is taken
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fragments:
    """The sequences of some packs, in order, without fillers. F fragments."""

    source: np.ndarray  # [F] int64 content position of the first token
    length: np.ndarray  # [F] int64 content tokens, at least 1
    pack: np.ndarray  # [F] int64 from 0

    def of(self, first: int, last: int) -> Fragments:
        """The fragments of packs [first, last), renumbered from 0."""
        a, b = np.searchsorted(self.pack, (first, last))
        return Fragments(self.source[a:b], self.length[a:b], self.pack[a:b] - first)

    def sizes(self, packs: int, pack_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """(length with [CLS] and [SEP], whether a filler) of every sequence of the packs; a filler is the last of its pack."""
        length = self.length + 2
        filler = pack_tokens - np.bincount(self.pack, length, minlength=packs).astype(np.int64)  # [packs]; 0: none
        # The index after the last fragment of each pack that has a filler.
        ends = np.searchsorted(self.pack, np.arange(packs), side="right")[filler > 0]
        is_filler = np.insert(np.zeros(len(length), bool), ends, True)
        return np.insert(length, ends, filler[filler > 0]), is_filler


class Pass:
    """One shuffled pass over a part, as the virtual stream that packs are cut from.

    Args:
        text: of the part.
        copies: how often its sequences are in the stream, each time in another order.
        span: P − 2, virtual positions of a pack.
        key: of the shuffle.
    """

    def __init__(self, text: Text, copies: int, span: int, *, key: int) -> None:
        self._text = text
        self._span = span
        count = len(text.length)
        order = np.concatenate([permutation(count, key_of(key, copy)) for copy in range(copies)])
        self._order = order.astype(np.uint32 if count < 2**32 else np.int64)
        length = text.length[self._order] + 2
        begin = np.cumsum(length, dtype=np.int64) - length  # virtual position of each sequence's [CLS]
        total = int(length.sum(dtype=np.int64))
        borders = np.arange(total // span + 1) * span
        # Only these two are kept of ``begin``, a number a pack instead of one a sequence:
        self._first = np.searchsorted(begin, borders, side="right") - 1  # the sequence in which a pack begins
        self._begin = begin[self._first]  # the virtual position at which that sequence begins

    def max_sequences(self) -> int:
        """The most sequences that a pack can have, its filler included."""
        return int(np.diff(self._first).max(initial=0)) + 2

    def fragments(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source, length, pack) of the fragments of packs [first, last), [F] int64 each."""
        # The sequences from the one in which the first pack begins to the one in which the pack after the last begins.
        chosen = self._order[self._first[first] : self._first[last] + 1]
        source, length = self._text.start[chosen], self._text.length[chosen].astype(np.int64)
        # Virtual position of each first content token: cumsum is the end, after [SEP]; back over [SEP] (1) and the content.
        begin = self._begin[first] + np.cumsum(length + 2) - length - 1
        border = (begin // self._span + 1) * self._span  # the end of the pack that holds that token
        inside = np.minimum(length, border - begin)  # content tokens before it
        # A sequence that goes past its pack's end becomes two fragments: the second is inserted after the first.
        cut = np.flatnonzero(inside < length)
        source = np.insert(source, cut + 1, source[cut] + inside[cut])
        pack = np.insert(begin, cut + 1, border[cut]) // self._span
        length = np.insert(inside, cut + 1, (length - inside)[cut])
        keep = slice(*np.searchsorted(pack, (first, last)))  # without what falls into the packs before and after
        return source[keep], length[keep], pack[keep]


@dataclass(frozen=True)
class _End:
    """Where a part ends: sums over this part and all before it."""

    packs: int = 0
    length: int = 0  # of the virtual stream
    positions: int = 0  # of content
    tokens: int = 0
    share: float = 0.0


class Packer:
    """The endless row of packs of a corpus: the packs of epoch 0, then of epoch 1, and so on. Any thread may read it.

    A part is read when its first pack is needed. A pack depends on its own part and the parts before it.

    Args:
        texts: returns the text of a part by its number; may wait for it.
        pack_tokens: P.
        seed: of the shuffles.

    Attributes:
        max_sequences: most sequences of a pack, a filler included; a bound for all parts and epochs.
    """

    def __init__(self, texts: Callable[[int], Text], *, pack_tokens: int, seed: int) -> None:
        self.pack_tokens = pack_tokens
        self._seed = seed
        self._span = pack_tokens - 2
        self._read = texts
        self._text: Epochs[int, Text] = Epochs(self._fitting)
        self._pass: Epochs[tuple[int, int], Pass] = Epochs(self._shuffle)
        self._ends: list[_End] = []
        self._extending = RLock()
        first = self._text(0)
        single = first.share == 1
        # A corpus of less than a pack repeats to fill it.
        self._copies = -(-self._span // _virtual(first)) if single else 1
        self.extend()
        self.max_sequences = pack_tokens  # no bound while part 0 is shuffled, from which the bound follows
        self.max_sequences = self._bound(single)

    @property
    def parts(self) -> int:
        """How many parts have been read."""
        return len(self._ends)

    @property
    def is_complete(self) -> bool:
        """Whether the last part has been read."""
        return self._ends[-1].share == 1

    @property
    def packs(self) -> int:
        """Packs of an epoch; until the last part has been read, of the parts so far."""
        return self._ends[-1].packs

    @property
    def packs_per_epoch(self) -> int:
        """Packs of every epoch. Reads all parts."""
        while not self.is_complete:
            self.extend()
        return self.packs

    @property
    def mean_length(self) -> float:
        """Tokens of a sequence of part 0, [CLS] and [SEP] included."""
        text = self._text(0)
        return _virtual(text) / len(text.length)

    def extend(self) -> None:
        """Read the next part, if there is one; may wait for it."""
        with self._extending:
            if self._ends and self.is_complete:
                return  # another thread has read it
            number = len(self._ends)
            text, before = self._text(number), self._ends[-1] if self._ends else _End()
            length = _virtual(text) * (self._copies if number == 0 else 1)
            end = _End(
                before.packs + length // self._span,
                before.length + length,
                before.positions + text.positions,
                before.tokens + text.tokens,
                text.share,
            )
            self._ends.append(end)

    def epochs(self, packs: int, tokens: int) -> float:
        """Epochs in the first ``packs`` packs. An epoch is its whole packs: the few tokens after them do not count.

        Within an epoch, interpolated between the shares of the corpus at its parts' ends; beyond the parts that have been
        read, by their rate of tokens a pack and ``tokens``, about how many the corpus has.
        """
        if self._copies > 1:
            return packs * self._span / _virtual(self._text(0))
        epoch, at = self._in_epoch(packs)
        if at >= self.packs:
            end = self._ends[-1]
            return end.share + (at - end.packs) * end.tokens / max(end.packs, 1) / tokens
        before, end = self._around(at)
        return epoch + before.share + (end.share - before.share) * (at - before.packs) / (end.packs - before.packs)

    def unique(self, packs: int) -> int:
        """Different corpus tokens in the first ``packs`` packs; estimated beyond the parts that have been read."""
        if packs >= self.packs and self.is_complete:
            return self._ends[-1].tokens
        if packs >= self.packs:
            return round(self._ends[-1].tokens * packs / max(self.packs, 1))
        before, end = self._around(packs)
        passed = (packs - before.packs) * self._span / (end.length - before.length)
        return before.tokens + round((end.tokens - before.tokens) * min(passed, 1.0))

    def packs_of(self, tokens: int) -> float:
        """Packs of a number of tokens, at the rate of the parts that have been read."""
        return self.packs * tokens / max(self._ends[-1].tokens, 1)

    def place(self, pack: int) -> tuple[int, int]:
        """(epoch, number within the epoch) of a pack of the endless row."""
        epoch, _, before, at = self._locate(pack)
        return epoch, before.packs + at

    def has(self, pack: int) -> bool:
        """Whether the part of a pack has been read."""
        return self.is_complete or pack < self.packs

    def part_of(self, pack: int) -> int:
        """The part that a pack is in."""
        return self._locate(pack)[1]

    def enters_part(self, first: int, last: int) -> bool:
        """Whether packs [first, last] reach a part that no earlier pack reaches; earlier packs' parts have been read."""
        if first == 0:
            return False
        epoch, part, _, _ = self._locate(first - 1)
        return epoch == 0 and self._ends[part].share < 1 and self._ends[part].packs <= last

    def fragments(self, first: int, last: int) -> Fragments:
        """The fragments of packs [first, last) of the endless row; ``source`` counts content positions over all parts."""
        found = []
        at = first
        while at < last:  # part by part, for one pass of one part at a time
            epoch, part, before, begin = self._locate(at)
            end = min(begin + last - at, self._ends[part].packs - before.packs)
            source, length, pack = self._pass((epoch, part)).fragments(begin, end)
            found.append((source + before.positions, length, pack + (at - first - begin)))
            at += end - begin
        return Fragments(*(np.concatenate(each) for each in zip(*found, strict=True)))

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """The ids at content positions over all parts, [n] int64 each."""
        borders = [end.positions for end in self._ends]
        first, last = np.searchsorted(borders, (positions.min(), positions.max()), side="right").tolist()
        if first == last:  # nearly always: all positions are in one part
            return self._text(first).ids(positions - (borders[first - 1] if first else 0))
        part = np.searchsorted(borders, positions, side="right")
        found = np.empty(len(positions), np.int64)
        for number in range(first, last + 1):
            here = part == number
            found[here] = self._text(number).ids(positions[here] - (borders[number - 1] if number else 0))
        return found

    def look_ahead(self, pack: int, pool: Executor) -> None:
        """Where ``pack`` is in the second half of its part, let the pool shuffle the part that follows, unless that has begun.

        A shuffle takes about 0.2 s a million sequences: begun half a part ahead, no reader waits for it.
        """
        epoch, part, before, at = self._locate(pack)
        if 2 * at < self._ends[part].packs - before.packs:
            return
        following = self._ends[part].packs
        if following < self.packs:
            self._pass.ahead((epoch, self._part_at(following)), pool)
        elif self.is_complete:
            self._pass.ahead((epoch + 1, self._part_at(0)), pool)

    def _locate(self, pack: int) -> tuple[int, int, _End, int]:
        """(epoch, part, end of the part before, number within the part) of a pack of the endless row."""
        while not self.is_complete and pack >= self.packs:
            self.extend()
        epoch, at = self._in_epoch(pack)
        part = self._part_at(at)
        before = self._ends[part - 1] if part else _End()
        return epoch, part, before, at - before.packs

    def _part_at(self, pack: int) -> int:
        """The part of a pack of an epoch."""
        return bisect_right(self._ends, pack, key=lambda end: end.packs)

    def _in_epoch(self, packs: int) -> tuple[int, int]:
        """(whole epochs, packs after them); until the last part has been read, all is epoch 0."""
        return divmod(packs, self.packs) if self.is_complete else (0, packs)

    def _around(self, at: int) -> tuple[_End, _End]:
        """The ends of the part before and of the part that holds a pack of an epoch."""
        part = self._part_at(at)
        return self._ends[part - 1] if part else _End(), self._ends[part]

    def _fitting(self, part: int) -> Text:
        """The text of a part. Where its documents are so short that too many would be in a pack, they share sequences.

        So no text is lost and shapes stay the same. It happens only in a part that is unlike part 0, which sets the bound.
        """
        text = self._read(part)
        if part == 0 or not len(text.length) or self._ordered(text, 0, part) is not None:
            return text
        log.warning("part %d of the corpus has too short documents: several share a sequence there", part)
        return text.joined()

    def _shuffle(self, place: tuple[int, int]) -> Pass:
        """A pass over a part in an epoch. Where no shuffle keeps to the bound, the pass of epoch 0, which does."""
        epoch, part = place
        text = self._text(part)
        found = self._ordered(text, epoch, part) or self._ordered(text, 0, part)
        assert found is not None
        return found

    def _ordered(self, text: Text, epoch: int, part: int) -> Pass | None:
        """The first shuffle that keeps to the bound, nearly always the very first; None where none does."""
        copies = self._copies if part == 0 else 1
        for attempt in range(ATTEMPTS):
            key = key_of(self._seed, epoch, attempt, *([part] if part else []))
            found = Pass(text, copies, self._span, key=key)
            if found.max_sequences() <= self.max_sequences:
                return found
        return None

    def _bound(self, single: bool) -> int:
        """The most sequences of a pack in epoch 0 of part 0, with room for other epochs and parts; a multiple of 16."""
        most = int((1.1 if single else 1.5) * self._pass((0, 0)).max_sequences()) + 1
        # A sequence has 3 tokens at least; + 1 for the filler.
        return min(-(-most // 16) * 16, self.pack_tokens // 3 + 1)


def _virtual(text: Text) -> int:
    """Length of a text's virtual stream: all its sequences with [CLS] and [SEP]."""
    return int(text.length.sum(dtype=np.int64)) + 2 * len(text.length)
