"""The probe ``pos``: the part of speech of a word, read at its first sub-word."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastkd.data.tokenise import load, serialise
from fastkd.probes import conllu
from fastkd.probes.conllu import UPOS, Sentence
from fastkd.probes.items import Items, require_enough

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TESTED = 3  # of one file, every third sentence is scored
Split = tuple[list[Sentence], list[Sentence]]


def sentences(files: Sequence[Path]) -> Split:
    """(to fit, to score): a treebank's development file and its test file, or one file, of which every third sentence is scored.

    Files that are named as neither, such as the training file, are left out: what is fitted is small, and the same for all.

    Raises:
        ValueError: a damaged file, by file and line; several files of which not one is named dev and one test.
    """
    if len(files) == 1:
        found = conllu.read(files[0])
        test = found[TESTED - 1 :: TESTED]
        return [sentence for number, sentence in enumerate(found) if number % TESTED != TESTED - 1], test
    dev, test_files = ([path for path in files if _is_named(path, word)] for word in ("dev", "test"))
    if len(dev) != 1 or len(test_files) != 1:
        names = ", ".join(path.name for path in files[:4]) + (", …" if files[4:] else "")
        raise ValueError(
            f"--probe-data names {len(files)} CoNLL-U files ({names}), not one called …-dev.conllu, which is fitted, and one "
            "called …-test.conllu, which is scored: name one treebank, or one file"
        )
    return conllu.read(dev[0]), conllu.read(test_files[0])


def _is_named(path: Path, word: str) -> bool:
    return re.search(rf"(^|[-_.]){word}[-_.]", path.name.lower()) is not None


def tagged_text(split: Split, tokenizer: PreTrainedTokenizerBase) -> tuple[Items, Items]:
    """(to fit, to score). A label is a part of speech's place in ``UPOS``, a group a sentence.

    Raises:
        ValueError: too few sentences.
    """
    if not split[1]:
        raise ValueError("--probe-data holds no sentence to score: name a larger treebank")
    fit, test = (_items(part, tokenizer) for part in split)
    require_enough(fit, "--probe-data", "name a larger treebank")
    if not len(test):
        raise ValueError("--probe-data holds no word to score that the tokenizer knows: name another treebank")
    return fit, test


def _items(found: list[Sentence], tokenizer: PreTrainedTokenizerBase) -> Items:
    """A sentence is its words with spaces between them. A word that the tokenizer leaves nothing of is no item."""
    backend = load(serialise(tokenizer))
    encodings = backend.encode_batch([" ".join(sentence.words) for sentence in found], add_special_tokens=False)
    firsts = [_first(sentence, encoding.offsets) for sentence, encoding in zip(found, encodings, strict=True)]
    lengths = np.array([len(encoding.ids) for encoding in encodings], np.int64)
    begin = np.cumsum(lengths) - lengths
    kept = [first >= 0 for first in firsts]
    labels = [np.array([UPOS.index(tag) for tag in sentence.tags], np.int64) for sentence in found]
    return Items(
        np.concatenate([np.array(encoding.ids, np.int64) for encoding in encodings]),
        lengths,
        np.concatenate([at + first[keep] for at, first, keep in zip(begin, firsts, kept, strict=True)]),
        np.concatenate([label[keep] for label, keep in zip(labels, kept, strict=True)]),
        np.repeat(np.arange(len(found)), [int(keep.sum()) for keep in kept]),
    )


def _first(sentence: Sentence, offsets: list[tuple[int, int]]) -> np.ndarray:
    """The first token that spells a character of each word, by its place in the sentence: [words] int64; −1 where none does."""
    size = np.array([len(word) for word in sentence.words])
    begin = np.cumsum(size + 1) - size - 1
    if not offsets:
        return np.full(len(size), -1)
    start, end = np.array(offsets).T  # [tokens]
    # The first that ends beyond the word's beginning; a token of no character has (0, 0).
    first = np.searchsorted(np.maximum.accumulate(end), begin, side="right")
    inside = start[first.clip(max=len(start) - 1)] < begin + size
    return np.where((first < len(start)) & inside, first, -1)
