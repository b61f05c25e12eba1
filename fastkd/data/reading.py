"""Reads and tokenises a corpus, from any document on, and hands it out a part at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from fastkd.data.tokenise import Tokens, tokenise

if TYPE_CHECKING:
    from fastkd.data.corpus import Unit
    from fastkd.data.progress import Progress

SPARE_TOKENS = 2**20  # fewer left at a corpus's end join the part before: they might not fill a batch of long sequences
LARGEST_SHARE = 1 - 2**-20  # the largest share stored for a part that is not the last; 1 marks the last


@dataclass
class Place:
    """Where a document is in a corpus, and how much comes before it."""

    unit: int = 0
    document: int = 0  # within the unit
    unit_characters: int = 0  # of the unit's documents before it
    bytes: int = 0  # of the units before, as stored
    characters: int = 0  # of the documents of the units before


class Reading:
    """Reads a corpus once, from a place to its end.

    Args:
        units: of the corpus, in their order of reading.
        size: bytes of the corpus; 0 where not known.
        text_field: column or JSON field that holds the text.
        tokenizer_json: a ``tokenizers.Tokenizer``, serialised.
        start: the first document.
        workers: as in ``tokenise``.
        progress: is told how much was read.
    """

    def __init__(
        self,
        units: Iterable[Unit],
        size: int,
        text_field: str,
        tokenizer_json: str,
        *,
        start: Place,
        workers: int | None,
        progress: Progress,
    ) -> None:
        self._units, self._size, self._text_field, self._start = units, size, text_field, start
        self._progress = progress
        self._sizes: list[int] = []  # bytes of each unit that was begun
        # Documents that were read and are in no part yet: tokenising runs ahead of the parts.
        self._origins: deque[tuple[int, int, int]] = deque()  # (unit, document, characters) of each
        self._place = replace(start)  # of the first one
        self._rest: deque[Tokens] = deque()  # tokens of the first ones, as far as they have come
        self._chunks = tokenise(self._documents(), tokenizer_json, workers=workers)

    def close(self) -> None:
        """End the processes that tokenise."""
        self._chunks.close()

    def part(self, tokens: int) -> Generator[Tokens]:
        """Yield the documents of the next part: up to ``tokens``, or all the rest where few would be left over."""
        taken, spare = 0, max(1, min(SPARE_TOKENS, tokens // 4))
        while taken < tokens and (chunk := self._next()) is not None:
            inside, over = _cut(chunk, tokens - taken)
            if len(over.lengths):
                self._rest.appendleft(over)
            taken += len(inside.ids)
            yield self._take(inside)
        # Read on until ``spare`` tokens are known to follow; if the corpus ends before, what was read belongs to this part.
        while sum(len(chunk.ids) for chunk in self._rest) < spare:
            if (chunk := next(self._chunks, None)) is None:
                rest, self._rest = self._rest, deque()
                yield from map(self._take, rest)
                return
            self._rest.append(chunk)

    def end(self, number: int) -> tuple[float, Place | None]:
        """After part ``number``: (share of the corpus that was read, place of the next part); (1, None) at the corpus's end."""
        if not self._rest:
            return 1.0, None
        self._enter(self._origins[0][0])
        # In a corpus of unknown size each part counts for half of what is left.
        share = self._share() if self._size else 1 - 0.5 ** (number + 1)
        return min(share, LARGEST_SHARE), replace(self._place)

    def _next(self) -> Tokens | None:
        return self._rest.popleft() if self._rest else next(self._chunks, None)

    def _share(self) -> float:
        """The share of the corpus that was read, by bytes; within a unit by characters."""
        at = self._place
        ratio = at.characters / at.bytes if at.bytes and at.characters else 1.0  # characters a stored byte, so far
        return (at.bytes + min(at.unit_characters / ratio, self._sizes[at.unit])) / self._size if self._size else 0.0

    def _documents(self) -> Iterator[str]:
        start = self._start
        for number, unit in enumerate(self._units):
            self._sizes.append(unit.size)
            if number < start.unit:
                continue
            first = start.document if number == start.unit else 0
            documents = islice(unit.documents(self._text_field), first, None)
            for document, text in enumerate(documents, start=first):
                self._origins.append((number, document, len(text)))
                yield text

    def _take(self, chunk: Tokens) -> Tokens:
        """Move the place past the documents of a chunk."""
        for _ in range(len(chunk.lengths)):
            unit, document, characters = self._origins.popleft()
            self._enter(unit)
            self._place.document = document + 1
            self._place.unit_characters += characters
        self._progress.advance(int((chunk.lengths > 0).sum()), len(chunk.ids), self._share())
        return chunk

    def _enter(self, unit: int) -> None:
        """Move the place to the beginning of a unit, unless it is in that unit."""
        at = self._place
        if unit != at.unit:
            size = sum(self._sizes[at.unit : unit])
            self._place = Place(unit, 0, 0, at.bytes + size, at.characters + at.unit_characters)


def _cut(chunk: Tokens, tokens: int) -> tuple[Tokens, Tokens]:
    """(the first documents, up to the one that reaches ``tokens``; the others) of a chunk."""
    ends = chunk.lengths.cumsum()
    documents = int(ends.searchsorted(tokens)) + 1  # one more than the chunk has where it does not reach ``tokens``
    at = int(ends[min(documents, len(ends)) - 1])
    first = Tokens(chunk.ids[:at], chunk.lengths[:documents], chunk.hashes[:documents])
    return first, Tokens(chunk.ids[at:], chunk.lengths[documents:], chunk.hashes[documents:])
