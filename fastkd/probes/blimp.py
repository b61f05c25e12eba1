"""The probe ``blimp``: minimal pairs (Warstadt et al. 2020), of which a model should find the acceptable sentence likelier.

Likelihood is the pseudo-log-likelihood, the sum of log P(token | all others) with one token at a time behind [MASK] (Wang and
Cho 2019; Salazar et al. 2020, equation 1). It is a sum, not a mean: of two sentences of unequal length the longer one has more to
add up, as the authors of both papers score them.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath
from typing import IO, TYPE_CHECKING

import numpy as np

from fastkd.data import contents
from fastkd.data.tokenise import encode, load, serialise
from fastkd.files import Record, json_sha256
from fastkd.probes.packs import Packs, log_probabilities
from fastkd.probes.scores import packed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastkd.data.assembly import SpecialIds
    from fastkd.models.encoder import Encoder

KEYS = ("sentence_good", "sentence_bad")
PAIRS = 100  # of a paradigm, by default
REMEDY = "download BLiMP again"
Opener = Callable[[], IO[bytes]]


@dataclass(frozen=True)
class Pair:
    """An acceptable sentence and one that is not, and where they were read, for messages."""

    good: str
    bad: str
    where: str


Paradigms = dict[str, list[Pair]]  # by name, in alphabetical order


def is_archive(path: Path) -> bool:
    """Whether a file is a zip archive, by its name."""
    return path.suffix.lower() == ".zip" and path.is_file()


def holds_paradigms(path: Path) -> bool:
    """Whether a path is a .jsonl file, or a folder that holds some."""
    return any(map(_is_paradigm, path.rglob("*.jsonl"))) if path.is_dir() else _is_paradigm(path)


def read(path: Path, most: int = PAIRS) -> Paradigms:
    """The first ``most`` pairs of each paradigm: a .jsonl of BLiMP's layout, of a folder or of the zip archive as published.

    Raises:
        ValueError: a damaged file or one of another layout, by file and line.
    """
    with _archive(path) as files:
        found = {name: _paradigm(where, opener, most) for name, (where, opener) in sorted(files.items())}
    if not found:
        raise ValueError(f"{path} holds no .jsonl file of minimal pairs: {REMEDY}, or name its folder")
    return found


def digest(paradigms: Paradigms) -> str:
    """SHA-256 of all pairs."""
    return json_sha256({name: [[pair.good, pair.bad] for pair in pairs] for name, pairs in paradigms.items()})


def _is_paradigm(path: PurePath) -> bool:
    """Whether a file is a paradigm; macOS adds hidden files to archives."""
    return path.suffix.lower() == ".jsonl" and not any(part.startswith((".", "__")) for part in path.parts[-2:])


@contextmanager
def _archive(path: Path) -> Iterator[Mapping[str, tuple[str, Opener]]]:
    """For each paradigm, where it is and how it is opened."""
    if not is_archive(path):
        files = [path] if path.is_file() else [found for found in path.rglob("*.jsonl") if _is_paradigm(found)]
        yield {file.stem: (str(file), lambda file=file: file.open("rb")) for file in files}  # type: ignore[misc]
        return
    with contents.readable(path):
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is no complete zip archive ({error}): {REMEDY}") from error
    with archive:
        names = [name for name in archive.namelist() if _is_paradigm(PurePath(name))]
        yield {
            PurePath(name).stem: (f"{path}/{name}", lambda name=name: archive.open(name))  # type: ignore[misc]
            for name in names
        }


def _paradigm(where: str, opener: Opener, most: int) -> list[Pair]:
    try:
        with opener() as file:
            pairs = [_pair(line, f"{where}:{number}") for number, line in islice(enumerate(file, start=1), most)]
    except (OSError, zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{where} cannot be read ({error}): {REMEDY}") from error
    if not pairs:
        raise ValueError(f"{where} is empty: {REMEDY}")
    return pairs


def _pair(line: bytes, where: str) -> Pair:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON object: {REMEDY}") from error
    good, bad = (row.get(key) if isinstance(row, dict) else None for key in KEYS)
    if not isinstance(good, str) or not isinstance(bad, str) or not good.strip() or not bad.strip():
        raise ValueError(f"{where}: lacks {' or '.join(KEYS)}: each line is one pair")
    if good == bad:
        raise ValueError(f"{where}: both sentences are {good!r}: {REMEDY}")
    return Pair(good, bad, where)


def score(
    encoder: Encoder, tokenizer: PreTrainedTokenizerBase, special: SpecialIds, paradigms: Paradigms, longest: int
) -> Record:
    """Accuracy over pairs by paradigm, and their mean: the share of pairs whose good sentence is strictly likelier.

    Returns ``accuracy`` (mean of the paradigms), ``stderr`` (of that mean, pairs within a paradigm drawn independently),
    ``paradigms`` (accuracy of each), ``right`` (bits, in the order of the paradigms).

    Raises:
        ValueError: a sentence of more tokens than the model reads, or of none.
    """
    right = {name: _right(encoder, tokenizer, special, pairs, longest) for name, pairs in paradigms.items()}
    shares = {name: float(found.mean()) for name, found in right.items()}
    variance = sum(share * (1 - share) / max(len(right[name]) - 1, 1) for name, share in shares.items())
    return {
        "accuracy": float(np.mean(list(shares.values()))),
        "stderr": float(np.sqrt(variance)) / len(shares),
        "paradigms": shares,
        "right": packed(np.concatenate(list(right.values()))),
    }


def _right(
    encoder: Encoder, tokenizer: PreTrainedTokenizerBase, special: SpecialIds, pairs: list[Pair], longest: int
) -> np.ndarray:
    tokens = encode(load(serialise(tokenizer)), [text for pair in pairs for text in (pair.good, pair.bad)])
    for number, length in enumerate(tokens.lengths.tolist()):
        if not 0 < length <= longest - 2:
            raise ValueError(
                f"{pairs[number // 2].where}: a sentence of {length} tokens, where 1 to {longest - 2} are read"
            )
    found = pseudo_log_likelihood(encoder, tokens.ids.astype(np.int64), tokens.lengths, special, longest)
    return found[::2] > found[1::2]


def pseudo_log_likelihood(
    encoder: Encoder, ids: np.ndarray, lengths: np.ndarray, special: SpecialIds, longest: int
) -> np.ndarray:
    """Σ_i log P(token i | the sentence with [MASK] in its place) of sentences: [sentences] float64.

    Args:
        encoder: with an MLM head.
        ids: [N] int64 of all sentences end to end, without special tokens.
        lengths: [sentences] int64, each at most ``longest`` − 2.
        special: the tokenizer's special ids.
        longest: tokens that the model reads at once.
    """
    size = np.repeat(lengths, lengths)  # a sentence of n tokens is read n times: [N]
    end = np.cumsum(size)
    first = np.repeat(np.cumsum(lengths) - lengths, lengths)  # of the sentence that each copy is of
    copies = ids[np.arange(end[-1]) - np.repeat(end - size, size) + np.repeat(first, size)]
    rows = end - size + np.arange(len(ids)) - first  # the token of each copy that is hidden
    copies[rows] = special.mask
    each = log_probabilities(encoder, Packs.of(copies, size, special, longest), rows, ids)
    return np.bincount(np.repeat(np.arange(len(lengths)), lengths), each, minlength=len(lengths))
