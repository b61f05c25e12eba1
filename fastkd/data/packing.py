"""Documents to packs: every epoch's sequences, shuffled, end to end, in packs of exactly P tokens.

An epoch is the parts of a corpus, one after the other. A part is one long virtual stream of sequences [CLS] content [SEP] in
shuffled order. Pack j is what is at the virtual positions [j·(P−2), (j+1)·(P−2)): a sequence that a pack's end cuts
becomes two proper sequences, and the [SEP] and the [CLS] which that adds are what the 2 spares. So a pack is found by
arithmetic, none depends on the one before, every epoch has as many packs, and no token is lost or repeated, but for less
than a pack at a part's end. The up to 4 tokens that stay free in a pack become one sequence of [PAD].

Shapes: S sequences of a text, F sequences (fragments) of some packs, n packs.
"""

import logging
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from threading import RLock

import numpy as np

from fastkd.data.epochs import Epochs
from fastkd.data.masking import key_of
from fastkd.data.passes import Fragments, Pass
from fastkd.data.text import Text

ATTEMPTS = 16  # shuffles of a part, of which the first that keeps to the static bound is taken
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _End:
    """Where a part ends: sums over it and the parts before it."""

    packs: int = 0
    length: int = 0  # of the virtual stream
    positions: int = 0
    tokens: int = 0
    share: float = 0.0


class Packer:
    """The endless row of packs of a corpus: packs of epoch 0, then of epoch 1, and so on. Any thread may read it.

    A part is asked for when the first of its packs is. A pack depends on the parts up to its own.

    Args:
        texts: the text of a part of a number; may wait for it.
        pack_tokens: P.
        seed: of the order.

    Attributes:
        max_sequences: most sequences of a pack, a filler included; the same in every part and epoch.
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
        self._copies = -(-self._span // _virtual(first)) if single else 1  # a corpus below one pack repeats inside it
        self.extend()
        self.max_sequences = pack_tokens  # while part 0 sets it
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
        """Of an epoch; while it is not complete, of the parts that have been read."""
        return self._ends[-1].packs

    @property
    def packs_per_epoch(self) -> int:
        """The same in every epoch. Reads all parts."""
        while not self.is_complete:
            self.extend()
        return self.packs

    @property
    def mean_length(self) -> float:
        """Tokens of a sequence of part 0, [CLS] and [SEP] included."""
        text = self._text(0)
        return _virtual(text) / len(text.length)

    def extend(self) -> None:
        """Read one more part, if there is one; may wait for it."""
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
        """Epochs that a number of packs makes: one ends where the next is shuffled, short of its last tokens.

        Within an epoch by the shares that its parts have of the corpus; beyond the parts that have been read, by the
        ``tokens`` that the corpus has, about.
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
        """Different tokens of the corpus in the first packs; beyond the parts that have been read, estimated."""
        if packs >= self.packs and self.is_complete:
            return self._ends[-1].tokens
        if packs >= self.packs:
            return round(self._ends[-1].tokens * packs / max(self.packs, 1))
        before, end = self._around(packs)
        passed = (packs - before.packs) * self._span / (end.length - before.length)
        return before.tokens + round((end.tokens - before.tokens) * min(passed, 1.0))

    def packs_of(self, tokens: int) -> float:
        """How many packs a number of tokens makes, at the rate of the parts that have been read."""
        return self.packs * tokens / max(self._ends[-1].tokens, 1)

    def place(self, pack: int) -> tuple[int, int]:
        """(epoch, pack of the epoch) of a pack of the endless row."""
        epoch, _, before, at = self._locate(pack)
        return epoch, before.packs + at

    def has(self, pack: int) -> bool:
        """Whether the parts up to that of a pack have been read."""
        return self.is_complete or pack < self.packs

    def part_of(self, pack: int) -> int:
        """The part that a pack is in."""
        return self._locate(pack)[1]

    def enters_part(self, first: int, last: int) -> bool:
        """Whether packs [first, last] reach a part that packs before them do not; these have been read."""
        if first == 0:
            return False
        epoch, part, _, _ = self._locate(first - 1)
        return epoch == 0 and self._ends[part].share < 1 and self._ends[part].packs <= last

    def fragments(self, first: int, last: int) -> Fragments:
        """The sequences of packs [first, last) of the endless row."""
        found = []
        at = first
        while at < last:
            epoch, part, before, begin = self._locate(at)
            end = min(begin + last - at, self._ends[part].packs - before.packs)
            source, length, pack = self._pass((epoch, part)).fragments(begin, end)
            found.append((source + before.positions, length, pack + (at - first - begin)))
            at += end - begin
        return Fragments(*(np.concatenate(each) for each in zip(*found, strict=True)))

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """The ids at content positions of fragments, [n] int64 each."""
        borders = [end.positions for end in self._ends]
        first, last = np.searchsorted(borders, (positions.min(), positions.max()), side="right").tolist()
        if first == last:
            return self._text(first).ids(positions - (borders[first - 1] if first else 0))
        part = np.searchsorted(borders, positions, side="right")
        found = np.empty(len(positions), np.int64)
        for number in range(first, last + 1):
            here = part == number
            found[here] = self._text(number).ids(positions[here] - (borders[number - 1] if number else 0))
        return found

    def look_ahead(self, pack: int, pool: Executor) -> None:
        """Where ``pack`` is in the second half of its part, have the pool shuffle the next one, unless that is done.

        A shuffle takes about 0.2 s a million sequences: begun half a part before, no reader waits for it.
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
        """(epoch, part, end of the part before, pack of the part) of a pack of the endless row."""
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
        return divmod(packs, self.packs) if self.is_complete else (0, packs)

    def _around(self, at: int) -> tuple[_End, _End]:
        part = self._part_at(at)
        return self._ends[part - 1] if part else _End(), self._ends[part]

    def _fitting(self, part: int) -> Text:
        """The text of a part. Where its documents are so short that too many fall in a pack, they run on in a sequence.

        So nothing is lost and shapes stay the same. This needs a part that is unlike part 0, which sets the bound.
        """
        text = self._read(part)
        if part == 0 or not len(text.length) or self._ordered(text, 0, part) is not None:
            return text
        log.warning("part %d of the corpus has too short documents: several share a sequence there", part)
        return text.joined()

    def _shuffle(self, place: tuple[int, int]) -> Pass:
        """A pass over a part in an epoch: where no shuffle keeps to the bound, that of epoch 0, which does."""
        epoch, part = place
        text = self._text(part)
        found = self._ordered(text, epoch, part) or self._ordered(text, 0, part)
        assert found is not None
        return found

    def _ordered(self, text: Text, epoch: int, part: int) -> Pass | None:
        """The first shuffle that keeps to the static bound: nearly always the first of all."""
        copies = self._copies if part == 0 else 1
        for attempt in range(ATTEMPTS):
            key = key_of(self._seed, epoch, attempt, *([part] if part else []))
            found = Pass(text, copies, self._span, key=key)
            if found.max_sequences() <= self.max_sequences:
                return found
        return None

    def _bound(self, single: bool) -> int:
        """What part 0 needs in epoch 0, and room for later epochs and larger parts, up to a multiple of 16."""
        most = int((1.1 if single else 1.5) * self._pass((0, 0)).max_sequences()) + 1
        return min(-(-most // 16) * 16, self.pack_tokens // 3 + 1)


def _virtual(text: Text) -> int:
    """Length of a text's sequences end to end, [CLS] and [SEP] counted."""
    return int(text.length.sum(dtype=np.int64)) + 2 * len(text.length)
