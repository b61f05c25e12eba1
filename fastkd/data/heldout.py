"""Chooses the text that is held out for validation: about a wanted number of tokens, no copy of which is trained on.

Pieces are held out: a document, or a few thousand tokens of a long one, so that a book is not held out whole.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from fastkd.data.tokenise import Tokens

MOST_TOKENS = 2**20  # enough for a loss to three digits, few enough to evaluate often
MOST_SHARE = 0.25  # of part 0, from which pieces are chosen
PIECES = 4  # or more make up the wanted tokens, so that what is held out comes near their number
SMALLEST, LARGEST = 32, 4096  # tokens of a piece

Documents = tuple[np.ndarray, np.ndarray]  # ids [tokens] end to end, lengths [documents] int64


@dataclass(frozen=True)
class HeldOut:
    """The held-out pieces, by their hashes: equal pieces are on the same side, wherever they are.

    Attributes:
        piece: tokens of a piece; a document shorter than two pieces is one piece.
        hashes: [n] uint64, ascending.
    """

    piece: int
    hashes: np.ndarray

    def split(self, chunk: Tokens) -> tuple[Documents, Documents]:
        """(for training, held out). Text between two held-out pieces of a document becomes a document of its own."""
        lengths, hashes, document = _pieces(chunk, self.piece)
        held = np.isin(hashes, self.hashes)  # [pieces]
        here = np.repeat(held, lengths)  # [tokens]
        # A piece for training begins a new document where its document begins, or where the piece before is held out.
        begins = ~held & (np.diff(document, prepend=-1).astype(bool) | np.append(True, held[:-1]))
        run = np.cumsum(begins) - 1  # the number of the new document that a piece for training belongs to
        joined = np.bincount(run[~held], lengths[~held], minlength=int(begins.sum())).astype(np.int64)
        return (chunk.ids[~here], joined), (chunk.ids[here], lengths[held])


def choose(chunks: list[Tokens], fraction: float, share: float) -> HeldOut:
    """Hold out the pieces with the smallest hashes, as many as come nearest to ``fraction`` of the corpus's tokens.

    The choice depends on the documents, not on their order. A piece whose copies would be more than half of the wanted
    tokens is passed over.

    Args:
        chunks: the first part of a corpus.
        fraction: of the whole corpus's tokens; at most ``MOST_TOKENS`` and ``MOST_SHARE`` of the part are taken.
        share: about the share of the corpus that the part is.

    Raises:
        ValueError: the part does not hold two different pieces.
    """
    total = sum(len(chunk.ids) for chunk in chunks)
    wanted = min(fraction * total / share, MOST_TOKENS, MOST_SHARE * total)
    piece = min(max(int(wanted / PIECES), SMALLEST), LARGEST)
    each = [_pieces(chunk, piece) for chunk in chunks]
    lengths = np.concatenate([np.empty(0, np.int64), *(lengths for lengths, _, _ in each)])
    hashes, which = np.unique(
        np.concatenate([np.empty(0, np.uint64), *(hashes for _, hashes, _ in each)]), return_inverse=True
    )
    if len(hashes) < 2:
        seen = sum(len(chunk.lengths) for chunk in chunks)
        raise ValueError(
            f"the corpus holds {seen} document{'' if seen == 1 else 's'} with text and no two different pieces of "
            f"{SMALLEST} tokens, one to train on and one to hold out: give it more text"
        )
    tokens = np.bincount(which, lengths)
    fitting = np.flatnonzero(tokens <= wanted / 2)
    if not len(fitting):
        return HeldOut(piece, hashes[[np.argmin(tokens)]])
    reached = np.cumsum(tokens[fitting])
    count = int(np.argmin(np.abs(reached - wanted))) + 1
    return HeldOut(piece, hashes[fitting[:count]])


def _pieces(chunk: Tokens, piece: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(length, hash, document) of every piece, in order; documents without a token have none."""
    document = np.flatnonzero(chunk.lengths)
    lengths, hashes = chunk.lengths[document], chunk.hashes[document]
    count = np.where(lengths < 2 * piece, 1, lengths // piece)
    if (count == 1).all():
        return lengths, hashes, document
    last = np.cumsum(count) - 1  # index of each document's last piece
    # Pieces have ``piece`` tokens; a document's last one has the rest, a document of one piece all.
    cut = np.repeat(np.where(count == 1, lengths, piece), count)
    cut[last] = lengths - (count - 1) * piece
    # A whole document keeps its text's hash; pieces of a document get their ids' hash.
    hashes = np.repeat(hashes, count)
    end = np.cumsum(cut)
    for at in np.flatnonzero(np.repeat(count > 1, count)).tolist():
        content = chunk.ids[end[at] - cut[at] : end[at]].astype("<u4").tobytes()
        hashes[at] = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
    return cut, hashes, np.repeat(document, count)
