"""A corpus as tokenised documents, from a place on, handed out a part at a time."""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from fastkd.data.corpus import sources, units
from fastkd.data.progress import Progress
from fastkd.data.tokenise import Tokens, tokenise

SPARE_TOKENS = 2**20  # at a corpus's end: fewer are no part of their own, which a batch of long sequences may not fill
LARGEST_SHARE = 1 - 2**-20  # of a part that is not the last


@dataclass
class Place:
    """A document of a corpus, and what is before it."""

    unit: int = 0
    document: int = 0  # of the unit
    unit_characters: int = 0  # of the unit's documents before it
    bytes: int = 0  # of the units before, as stored
    characters: int = 0  # of their documents


class Reading:
    """Reads a corpus once, from a place to its end.

    Args:
        spec: as in ``corpus.sources``.
        text_field: column or JSON field that holds the text.
        tokenizer_json: a ``tokenizers.Tokenizer``, serialised.
        start: the first document.
        workers: as in ``tokenise``.
        progress: is told of what goes by.
    """

    def __init__(
        self,
        spec: str | Sequence[str],
        text_field: str,
        tokenizer_json: str,
        *,
        start: Place,
        workers: int | None,
        progress: Progress,
    ) -> None:
        sizes = [source.size for source in sources(spec)]
        self._total = sum(sizes) if all(sizes) else 0  # bytes of the corpus; 0 where not known
        self._spec, self._text_field, self._start = spec, text_field, start
        self._progress = progress
        self._sizes: list[int] = []  # of the units, bytes
        self._origins: deque[tuple[int, int, int]] = deque()  # (unit, document, characters) of what is in no part yet
        self._place = replace(start)  # of the first of these
        self._rest: deque[Tokens] = deque()  # the beginning of these, tokenised
        self._chunks = tokenise(self._documents(), tokenizer_json, workers=workers)

    def close(self) -> None:
        """End the processes that tokenise."""
        self._chunks.close()

    def part(self, tokens: int) -> Generator[Tokens]:
        """Yield the documents of the next part: those up to ``tokens``, or all that are left if few would be over."""
        taken, spare = 0, max(1, min(SPARE_TOKENS, tokens // 4))
        while taken < tokens and (chunk := self._next()) is not None:
            inside, over = _cut(chunk, tokens - taken)
            if len(over.lengths):
                self._rest.appendleft(over)
            taken += len(inside.ids)
            yield self._take(inside)
        while sum(len(chunk.ids) for chunk in self._rest) < spare:
            if (chunk := next(self._chunks, None)) is None:
                rest, self._rest = self._rest, deque()
                yield from map(self._take, rest)
                return
            self._rest.append(chunk)

    def end(self, number: int) -> tuple[float, Place | None]:
        """After a part: (share of the corpus that was read, place of the next part); 1 and None at the corpus's end."""
        if not self._rest:
            return 1.0, None
        self._enter(self._origins[0][0])
        # Of unknown size: as if the next part were the last.
        share = self._share() if self._total else 1 - 0.5 ** (number + 1)
        return min(share, LARGEST_SHARE), replace(self._place)

    def _next(self) -> Tokens | None:
        return self._rest.popleft() if self._rest else next(self._chunks, None)

    def _share(self) -> float:
        """Of the corpus that was read, by bytes; within a unit by characters."""
        at = self._place
        ratio = at.characters / at.bytes if at.bytes and at.characters else 1.0
        return (at.bytes + min(at.unit_characters / ratio, self._sizes[at.unit])) / self._total if self._total else 0.0

    def _documents(self) -> Iterator[str]:
        start = self._start
        for number, unit in enumerate(units(self._spec)):
            self._sizes.append(unit.size)
            if number < start.unit:
                continue
            first = start.document if number == start.unit else 0
            documents = islice(unit.documents(self._text_field), first, None)
            for document, text in enumerate(documents, start=first):
                self._origins.append((number, document, len(text)))
                yield text

    def _take(self, chunk: Tokens) -> Tokens:
        """Move the place behind the documents of a chunk."""
        for _ in range(len(chunk.lengths)):
            unit, document, characters = self._origins.popleft()
            self._enter(unit)
            self._place.document = document + 1
            self._place.unit_characters += characters
        self._progress.advance(int((chunk.lengths > 0).sum()), len(chunk.ids), self._share())
        return chunk

    def _enter(self, unit: int) -> None:
        """Move the place to the beginning of a unit, unless it is in it."""
        at = self._place
        if unit != at.unit:
            size = sum(self._sizes[at.unit : unit])
            self._place = Place(unit, 0, 0, at.bytes + size, at.characters + at.unit_characters)


def _cut(chunk: Tokens, tokens: int) -> tuple[Tokens, Tokens]:
    """The first documents of a chunk, as many as it takes for ``tokens``, and the others."""
    ends = chunk.lengths.cumsum()
    documents = int(ends.searchsorted(tokens)) + 1
    at = int(ends[min(documents, len(ends)) - 1])
    first = Tokens(chunk.ids[:at], chunk.lengths[:documents], chunk.hashes[:documents])
    return first, Tokens(chunk.ids[at:], chunk.lengths[documents:], chunk.hashes[documents:])
