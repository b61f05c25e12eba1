"""The text of a part: its documents in use, and how they are cut into sequences. S sequences of the text."""

import copy

import numpy as np

from fastkd.data.masking import mix

PACKINGS = ("documents", "full-sentences")


class Text:
    """The content of a part and how it is cut into sequences of at most ``seq_length`` with [CLS] and [SEP].

    ``documents``: a sequence holds tokens of one document. ``full-sentences`` (RoBERTa, Liu et al. 2019): the documents
    run on, a [SEP] between two, and are cut wherever a sequence is full.

    Attributes:
        tokens: corpus tokens in use.
        share: of the corpus that this part and those before it are, about; 1 for the last part only.
        positions: of content: tokens, and the separators between documents that run on.
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
        if packing == "documents":  # content positions are positions in the file
            self.positions = len(tokens)
            self.start, self.length = _cut_documents(begin, length, seq_length - 2)
        else:
            self._join()

    def joined(self) -> "Text":
        """The same documents as ``full-sentences``."""
        other = copy.copy(self)
        other._join()
        return other

    def _join(self) -> None:
        begin, length = self._documents  # positions count the separators too
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
        between = within == length[document]
        ids = self._ids[begin[document] + np.where(between, 0, within)].astype(np.int64)
        return np.where(between, self._separator, ids)


def _chosen(offsets: np.ndarray, max_tokens: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(begin, length) of the documents in use: all, or in a fixed random order as many as hold ``max_tokens``, the last one cut."""
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
    total = max(int(length.sum()) + len(length) - 1, 0)
    start = np.arange(0, total, room)
    return start, np.minimum(total - start, room).astype(np.int32)


def shuffled(count: int, key: int) -> np.ndarray:
    """A permutation of range(count), [count] int64, that depends only on the key, not on NumPy's version."""
    index = np.arange(count, dtype=np.uint64)
    low = np.uint64((1 << max(count - 1, 0).bit_length()) - 1)
    order = mix(index + np.uint64(key)) & ~low | index  # the index makes ties impossible
    order.sort()
    return (order & low).view(np.int64)
