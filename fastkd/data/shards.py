"""A corpus as token ids on disk, in parts: the first takes seconds, later ones are built while earlier ones are read.

A corpus is a folder whose name is a hash over everything it depends on: the sources' content, the tokenizer, the split.
Its parts (``part.py``) are a pure function of these, so that building can stop and go on at any part.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from fastkd.data import recipe as recipes
from fastkd.data.builder import Builder, BuildingFailed, Job, build, load
from fastkd.data.corpus import check, shard_folder, sources
from fastkd.data.part import SPLITS, Part, part_folder, write_part
from fastkd.data.progress import Progress
from fastkd.data.recipe import FIRST_TOKENS, Recipe, tokenizer_hash
from fastkd.data.tokenise import backend, serialise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
POLL_SECONDS = 0.2  # between two looks whether a part has been built
__all__ = ["BuildingFailed", "Shards", "build_shards", "cache", "tokenizer_hash", "write_sample"]


class Shards:
    """A tokenised corpus. Raises ``ValueError`` where a file is missing or is not what was written.

    Args:
        folder: of the corpus.
        remedy: what an error says to do; default: delete the part, which can be built again.
        job: how missing parts are built, in another process; None: some other program builds them.
        whole: no more parts will come than there are now.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        remedy: str | None = None,
        job: Job | None = None,
        whole: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self._remedy = remedy
        self._builder = None if job is None else Builder(job)
        self._parts = [Part(self.folder, 0, remedy=remedy)]
        self._loading, self._waiting = Lock(), Lock()
        self._end: int | None = None
        if whole:
            for number in range(1, _parts_in(self.folder)):
                self._parts.append(Part(self.folder, number, remedy=remedy))
            self._end = len(self._parts)

    @property
    def first(self) -> Part:
        """Part 0."""
        return self._parts[0]

    @property
    def version(self) -> str:
        """The hash of what these were made from: equal for equal content, wherever it is."""
        name = recipes.key(self.first.recipe)
        return name if self._end is None or self._parts[-1].next is None else f"{name}-{self._end}"

    @property
    def vocab_size(self) -> int:
        """One more than the tokenizer's largest id, added tokens included."""
        return int(self.first.index["vocab_size"])

    @property
    def tokenizer_hash(self) -> str:
        """``tokenizer_hash`` of the tokenizer that built these."""
        return str(self.first.recipe["tokenizer_hash"])

    @property
    def is_complete(self) -> bool:
        """Whether the last part exists; if not, sizes are estimates."""
        return self._end is not None or self._there()[-1].next is None

    @property
    def unique_tokens(self) -> int:
        """Tokens of the training split, without special tokens; estimated from part 0 until the last part exists."""
        if self.is_complete:
            return sum(part.tokens for part in self._there())
        held_out = self.held_out_tokens  # all of them are from part 0 (up to a quarter of it), none from later parts
        return round((self.first.tokens + held_out) / self.first.share) - held_out

    @property
    def held_out_tokens(self) -> int:
        """Tokens that are held out for validation."""
        return int(self.first.index["tokens"]["validation"])

    @property
    def sizes(self) -> dict[str, dict[str, int]]:
        """Tokens and documents of each split, in the parts that exist."""
        parts = [part.index for part in self._there()]
        return {
            name: {split: sum(index[name].get(split, 0) for index in parts) for split in SPLITS}
            for name in ("tokens", "documents")
        }

    def is_last(self, number: int) -> bool:
        """Whether part ``number``, which is loaded, is the last."""
        return self._parts[number].next is None or number + 1 == self._end

    def documents(self, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """(token ids [N], offsets o [documents + 1] int64) of a split; document d is ids[o[d] : o[d + 1]].

        Of the training split, the parts that exist.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: take one of {', '.join(SPLITS)}")
        if split == "validation" or len(parts := [self.part(part.number) for part in self._there()]) == 1:
            return self.first.documents(split)
        each = [part.documents() for part in parts]
        lengths = np.concatenate([np.diff(offsets) for _, offsets in each])
        return np.concatenate([ids for ids, _ in each]), np.concatenate([[0], lengths]).cumsum(dtype=np.int64)

    def tokens_before(self, number: int) -> int:
        """Training tokens of the parts before ``number``, which are loaded."""
        return sum(part.tokens for part in self._parts[:number])

    # ---- later parts ----------------------------------------------------------------------------------------

    def part(self, number: int, stop: Callable[[], bool] = lambda: False) -> Part:
        """A part; waits until it is built.

        Args:
            number: of a part that the corpus has.
            stop: asked now and then; True ends the waiting.

        Raises:
            BuildingFailed: it cannot be built; in one line.
            InterruptedError: ``stop`` returned True.
        """
        while not self.is_there(number):
            if stop():
                raise InterruptedError(f"stopped waiting for part {number} of the corpus")
            self._wait_for(len(self._parts))
        return self._parts[number]

    def is_there(self, number: int) -> bool:
        """Whether a part can be read without waiting. Loads and verifies the new parts up to it."""
        with self._loading:
            while len(self._parts) <= number and (part := self._load(len(self._parts))) is not None:
                self._parts.append(part)
        return number < len(self._parts)

    def ahead(self, number: int) -> None:
        """Begin to build a part that will be needed, if that is this process's task."""
        if self._builder is not None and not part_folder(self.folder, number).exists():
            self._builder.ahead(number)

    def close(self) -> None:
        """End the process that builds, if one is at work."""
        if self._builder is not None:
            self._builder.close()

    def _wait_for(self, number: int) -> None:
        assert self._parts[-1].next is not None, f"the corpus has {len(self._parts)} parts"
        with self._waiting:
            if self._builder is not None:
                self._builder.require(number, POLL_SECONDS)
            else:
                time.sleep(POLL_SECONDS)

    def _load(self, number: int) -> Part | None:
        return None if self._end is not None else load(self.folder, number)

    def _there(self) -> list[Part]:
        """The parts that exist; those that are not loaded yet are not verified."""
        there = list(self._parts)
        while self._end is None and (part := load(self.folder, len(there), verify=False)) is not None:
            there.append(part)
        return there


def build_shards(
    spec: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike[str],
    *,
    text_field: str = "text",
    workers: int | None = None,
    validation_fraction: float = 0.02,
    first_tokens: int = FIRST_TOKENS,
    tokens: int | None = None,
    progress: Progress | None = None,
) -> Shards:
    """Tokenise a corpus into ``folder``, or load it from there if an earlier call with the same arguments has built it.

    A specification that is itself a folder of shards is loaded from that folder; ``folder`` is not touched.
    Parts appear whole or not at all. Of several processes that want the same part, one builds and the others wait. A
    corrupted part is built again.

    Args:
        spec: as in ``corpus.sources``, or a folder of shards.
        tokenizer: a fast tokenizer of transformers.
        folder: the cache of shards.
        text_field: column or JSON field that holds the text.
        workers: processes that tokenise; None: decided by the size of the corpus.
        validation_fraction: about this part of the corpus's tokens is held out, at most 2^20 of them.
        first_tokens: of part 0; each later part has twice as many.
        tokens: building ends with the part that brings the training split to this many; later parts are built when they
            are needed. None: the whole corpus.
        progress: is told how much was read.

    Raises:
        ValueError: an unreadable or empty corpus, a tokenizer without Rust backend, an unwritable folder; a folder of
            shards that is damaged or of another tokenizer.
    """
    if (given := shard_folder(spec)) is not None:
        return _given(given, tokenizer)
    recipe = recipes.recipe(
        sources(spec), tokenizer, text_field=text_field, validation_fraction=validation_fraction,
        first_tokens=first_tokens,
    )  # fmt: skip
    root = Path(folder).expanduser()
    corpus = _built_before(root, recipe) or root / recipes.key(recipe)
    vocab_size = max(backend(tokenizer).get_vocab().values()) + 1
    specs = [spec] if isinstance(spec, str) else list(spec)
    job = Job(str(corpus), specs, serialise(tokenizer), vocab_size, recipe, workers)
    if not _has(corpus, tokens):  # a finished cache may be shared read-only: no lock is taken
        if load(corpus, 0) is None:
            check(spec, text_field=text_field)
        build(job, tokens=tokens, progress=progress)
    return Shards(corpus, job=job)


def write_sample(shards: Shards, folder: str | os.PathLike[str], *, tokens: int, seed: int) -> Shards:
    """Write a random sample of a corpus's training documents as a corpus of one part, with all that is held out.

    Documents are drawn in a random order until the next one would bring them over ``tokens``; at least one is taken. They
    are written in the corpus's order. A smaller sample is part of every larger one of the same seed. A sample of all
    documents is the same corpus, of the same version.

    Args:
        shards: the corpus; the parts of it that exist are drawn from.
        folder: of the sample; an existing one is replaced.
        tokens: of the training split, at most.
        seed: of the random order.
    """
    target = Path(folder)
    shutil.rmtree(target, ignore_errors=True)
    ids, offsets = shards.documents("train")
    kept = _drawn(np.diff(offsets), tokens, seed)
    recipe, first = shards.first.recipe, shards.first
    if not kept.all():
        recipe |= {"sample": {"of": shards.version, "tokens": int(np.diff(offsets)[kept].sum()), "seed": seed}}
    held_ids, held_offsets = shards.documents("validation")
    drawn = (ids[np.repeat(kept, np.diff(offsets))], np.diff(offsets)[kept]), (held_ids, np.diff(held_offsets))
    write_part(target, 0, [drawn], first.held_out, recipe=recipe, vocab_size=shards.vocab_size, end=lambda: (1.0, None))
    return Shards(target, whole=True)


def cache() -> Path:
    """The folder of tokenised corpora. As the XDG specification says, an empty or relative path counts as not set."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".cache") / "fastkd"


def _has(corpus: Path, tokens: int | None) -> bool:
    """Whether whole parts hold ``tokens`` for training, or all of the corpus."""
    held = 0
    for number in count():
        if (part := load(corpus, number)) is None:
            return False
        held += part.tokens
        if part.next is None or (tokens is not None and held >= tokens):
            return True
    raise AssertionError


def _given(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Shards:
    """Shards that the user names as the corpus."""
    shards = Shards(folder, remedy="copy it again, or give --corpus text", whole=True)
    if shards.tokenizer_hash != tokenizer_hash(tokenizer):
        raise ValueError(
            f"the shards in {str(folder)!r} were made by another tokenizer than the student's: take a teacher with that "
            "tokenizer (or name it by --tokenizer), or give --corpus text"
        )
    return shards


def _parts_in(corpus: Path) -> int:
    """How many parts of a corpus exist, up to the first that is missing."""
    return next(number for number in count() if not part_folder(corpus, number).exists())


def _built_before(root: Path, recipe: Recipe) -> Path | None:
    """Where the hub cannot be asked for today's commit: the newest build of this recipe from any commit."""
    if all(source.get("commit") != "" for source in recipe["sources"]):
        return None
    wanted = recipes.canonical(recipe, without="commit")
    for path in sorted(root.glob("*/part-00000"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            found = Part(path.parent, 0, verify=False)
        except ValueError:  # a damaged one, perhaps of another corpus
            continue
        if recipes.canonical(found.recipe, without="commit") == wanted:
            log.warning(
                "the hub cannot be asked for its commit of today: going on with what was prepared in %s", path.parent
            )
            return path.parent
    return None


def _drawn(lengths: np.ndarray, tokens: int, seed: int) -> np.ndarray:
    """Which documents are in the sample, [documents] bool."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    count = max(int(np.searchsorted(lengths[order].cumsum(), tokens, side="right")), 1)
    kept = np.zeros(len(lengths), bool)
    kept[order[:count]] = True
    return kept
