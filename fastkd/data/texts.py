"""The texts of a corpus's parts, as packs are made of them."""

from dataclasses import dataclass

import numpy as np

from fastkd.data.assembly import SpecialIds
from fastkd.data.shards import Shards
from fastkd.data.sizes import pack_size
from fastkd.data.text import Text


@dataclass(frozen=True)
class Texts:
    """The text of each part of a split, by its number.

    Attributes:
        max_tokens: of the corpus in use: parts in order, of the last one documents in a fixed random order.
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
        over = left - part.tokens  # of the limit, for the next part
        if over < pack_size(self.seq_length):  # it would fill no pack there
            return self._text(part.documents(), left, 1.0)
        return self._text(part.documents(), None, max(share, (before + part.tokens) / self.max_tokens))

    def _text(self, documents: tuple[np.ndarray, np.ndarray], most: int | None, share: float) -> Text:
        return Text(
            *documents, seq_length=self.seq_length, packing=self.packing, separator=self.special.sep, max_tokens=most,
            share=share,
        )  # fmt: skip
