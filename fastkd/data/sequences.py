"""Documents to sequences: which documents of a part are used, and where they are cut. S sequences of a part."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastkd.data.masking import mix
from fastkd.data.sizes import pack_size

if TYPE_CHECKING:
    from fastkd.data.assembly import SpecialIds
    from fastkd.data.shards import Shards

PACKINGS = ("documents", "full-sentences")


class Text:
    """The content of a part, cut into sequences of at most ``seq_length`` tokens with [CLS] and [SEP].

    ``documents``: a sequence holds tokens of one document. ``full-sentences`` (RoBERTa, Liu et al. 2019): the documents
    follow each other with a [SEP] between two, and are cut wherever a sequence is full.

    A content position is a place in the part's content, from 0. With ``documents`` the content is the part's token file;
    with ``full-sentences`` it is the documents in use with a separator after each.

    Attributes:
        tokens: corpus tokens in use.
        share: about the share of the corpus up to the end of this part; 1 only for the last part.
        positions: how many content positions there are.
        start, length: [S] int64 content position of the first token and [S] int32 content tokens of every sequence.
    """

    def __init__(
        self,
        tokens: np.ndarray,  # [N] ids
        offsets: np.ndarray,  # [documents + 1] int64
        *,
        seq_length: int,
        packing: str,
        separator: int,
        max_tokens: int | None = None,
        share: float = 1.0,
    ) -> None:
        if packing not in PACKINGS:
            raise ValueError(f"unknown packing {packing!r}: take one of {', '.join(PACKINGS)}")
        begin, length = _chosen(np.asarray(offsets), max_tokens)
        self.tokens, self.share = int(length.sum()), share
        self._documents, self._seq_length = (begin, length), seq_length
        self._ids = tokens
        self._separator = separator
        self._joined: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        if packing == "documents":
            self.positions = len(tokens)
            self.start, self.length = _cut_documents(begin, length, seq_length - 2)
        else:
            self._join()

    def joined(self) -> Text:
        """The same documents as ``full-sentences``."""
        other = copy.copy(self)
        other._join()
        return other

    def _join(self) -> None:
        begin, length = self._documents
        # (content position, position in the file, length) of each document; + 1 is the separator after it
        self._joined = np.cumsum(length + 1) - length - 1, begin, length
        self.positions = self.tokens + len(length)
        self.start, self.length = _cut_joined(length, self._seq_length - 2)

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """The ids at content positions, [n] int64 each."""
        if self._joined is None:
            return self._ids[positions].astype(np.int64)
        position, begin, length = self._joined
        document = np.searchsorted(position, positions, side="right") - 1
        within = positions - position[document]
        between = within == length[document]  # one past the document's last token: the separator
        ids = self._ids[begin[document] + np.where(between, 0, within)].astype(np.int64)
        return np.where(between, self._separator, ids)


@dataclass(frozen=True)
class Texts:
    """The text of each part of a split, by its number.

    Attributes:
        max_tokens: tokens of the corpus to use at most: parts in order, of the last one documents in a fixed random order.
    """

    shards: Shards
    special: SpecialIds
    split: str
    seq_length: int
    packing: str
    max_tokens: int | None

    def __call__(self, number: int) -> Text:
        if self.split != "train":
            return self._text(self.shards.documents(self.split), None, 1.0)
        part, before = self.shards.part(number), self.shards.tokens_before(number)
        share = 1.0 if self.shards.is_last(number) else part.share
        if self.max_tokens is None:
            return self._text(part.documents(), None, share)
        left = self.max_tokens - before
        over = left - part.tokens  # what the limit leaves for the next part
        if over < pack_size(self.seq_length):  # less than a pack: this part is the last
            return self._text(part.documents(), left, 1.0)
        return self._text(part.documents(), None, max(share, (before + part.tokens) / self.max_tokens))

    def _text(self, documents: tuple[np.ndarray, np.ndarray], most: int | None, share: float) -> Text:
        return Text(
            *documents, seq_length=self.seq_length, packing=self.packing, separator=self.special.sep, max_tokens=most,
            share=share,
        )  # fmt: skip


def _chosen(offsets: np.ndarray, max_tokens: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(begin, length) of the documents in use: all, or random ones that hold ``max_tokens``, the last one cut."""
    begin, length = offsets[:-1], np.diff(offsets)
    if max_tokens is None or max_tokens >= length.sum():
        return begin, length
    if max_tokens < 1:
        raise ValueError(f"max_unique_tokens is {max_tokens}: take at least 1, or leave it out for the whole corpus")
    order = permutation(len(begin), key=0)
    ends = np.cumsum(length[order])
    order = order[: np.searchsorted(ends, max_tokens) + 1]
    length = length[order]
    length[-1] -= ends[len(order) - 1] - max_tokens
    return begin[order], length


def _cut_documents(begin: np.ndarray, length: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """(start, length) of the sequences of documents, each cut by itself into pieces of ``room`` tokens."""
    count = -(-length // room)  # sequences of each document
    # For each sequence: its number among those of its document (a running number minus that of the document's first) · room.
    within = (np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)) * room
    return np.repeat(begin, count) + within, np.minimum(np.repeat(length, count) - within, room).astype(np.int32)


def _cut_joined(length: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """(start, length) of the sequences of documents that follow each other, cut every ``room`` tokens."""
    total = max(int(length.sum()) + len(length) - 1, 0)  # no separator after the last document
    start = np.arange(0, total, room)
    return start, np.minimum(total - start, room).astype(np.int32)


def permutation(count: int, key: int) -> np.ndarray:
    """A random permutation of range(count), [count] int64. It depends only on the key, not on NumPy's version.

    Each index gets a hash whose low bits are replaced by the index; sorted, the low bits are the permutation.
    """
    index = np.arange(count, dtype=np.uint64)
    low = np.uint64((1 << max(count - 1, 0).bit_length()) - 1)
    order = mix(index + np.uint64(key)) & ~low | index  # no two are equal: the index is part of each
    order.sort()
    return (order & low).view(np.int64)
