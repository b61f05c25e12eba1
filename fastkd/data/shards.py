"""A corpus as token ids on disk, in parts: the first is there in seconds, later ones are built while the first are read.

A corpus is a folder named by a key over everything that it depends on: the sources' content, the tokenizer, the split.
Its parts (``part.py``) are a pure function of these, so that building can stop and go on at any of them.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from fastkd.data import recipe as recipes
from fastkd.data.builder import Builder, BuildingFailed, Job, build, load
from fastkd.data.corpus import check, shard_folder
from fastkd.data.part import SPLITS, Part, part_folder
from fastkd.data.progress import Progress
from fastkd.data.recipe import FIRST_TOKENS, Recipe, tokenizer_hash
from fastkd.data.tokenise import backend, serialise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
POLL_SECONDS = 0.2  # between two looks for a part that is being built
__all__ = ["BuildingFailed", "Shards", "build_shards", "cache", "tokenizer_hash"]


class Shards:
    """A tokenised corpus. Raises ``ValueError`` where a file is missing or is not what was written.

    Args:
        folder: where it is.
        remedy: what an error tells to do; as a rule, to delete what can be built again.
        job: builds the parts that are missing, in a process of its own; without one, another process does.
        whole: the parts that are there are all there will be.
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
        """The key of all that these were made from: equal for equal content, wherever it is."""
        name = recipes.key(self.first.recipe)
        return name if self._end is None or self._parts[-1].next is None else f"{name}-{self._end}"

    @property
    def vocab_size(self) -> int:
        """One more than the tokenizer's largest id, added tokens included."""
        return int(self.first.index["vocab_size"])

    @property
    def tokenizer_hash(self) -> str:
        """What ``tokenizer_hash`` gave for the tokenizer that built these."""
        return str(self.first.recipe["tokenizer_hash"])

    @property
    def is_complete(self) -> bool:
        """Whether the last part is there: if not, sizes are estimates."""
        return self._end is not None or self._there()[-1].next is None

    @property
    def unique_tokens(self) -> int:
        """Tokens of the training split, special tokens not counted; estimated from part 0 until the last part is there."""
        if self.is_complete:
            return sum(part.tokens for part in self._there())
        held_out = self.held_out_tokens  # of part 0, where they are up to a quarter: none of a later one
        return round((self.first.tokens + held_out) / self.first.share) - held_out

    @property
    def held_out_tokens(self) -> int:
        """Tokens that are held out."""
        return int(self.first.index["tokens"]["validation"])

    @property
    def sizes(self) -> dict[str, dict[str, int]]:
        """Tokens and documents of each split, in the parts that are there."""
        parts = [part.index for part in self._there()]
        return {
            name: {split: sum(index[name].get(split, 0) for index in parts) for split in SPLITS}
            for name in ("tokens", "documents")
        }

    def is_last(self, number: int) -> bool:
        """Whether no part follows one that is loaded."""
        return self._parts[number].next is None or number + 1 == self._end

    def documents(self, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """(token ids [N], offsets [documents + 1] int64) of a split; document d is ids[o[d]:o[d+1]].

        Memory maps of the only part of a small corpus, or of what is held out; of several parts, those that are there,
        arrays in memory.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: take one of {', '.join(SPLITS)}")
        if split == "validation" or len(parts := [self.part(part.number) for part in self._there()]) == 1:
            return self.first.documents(split)
        each = [part.documents() for part in parts]
        lengths = np.concatenate([np.diff(offsets) for _, offsets in each])
        return np.concatenate([ids for ids, _ in each]), np.concatenate([[0], lengths]).cumsum(dtype=np.int64)

    def tokens_before(self, number: int) -> int:
        """Training tokens of the parts before one; those are loaded."""
        return sum(part.tokens for part in self._parts[:number])

    # ---- later parts ----------------------------------------------------------------------------------------

    def part(self, number: int, stop: Callable[[], bool] = lambda: False) -> Part:
        """A part; waits until it is built.

        Args:
            number: of the part, which is one that the corpus has.
            stop: asked now and then; ends the waiting.

        Raises:
            BuildingFailed: it cannot be built, in one line.
            InterruptedError: ``stop`` said so.
        """
        while not self.is_there(number):
            if stop():
                raise InterruptedError(f"stopped waiting for part {number} of the corpus")
            self._wait_for(len(self._parts))
        return self._parts[number]

    def is_there(self, number: int) -> bool:
        """Whether a part can be read without waiting. Loads and verifies those up to it that have come."""
        with self._loading:
            while len(self._parts) <= number and (part := self._load(len(self._parts))) is not None:
                self._parts.append(part)
        return number < len(self._parts)

    def ahead(self, number: int) -> None:
        """Have a part built that will be needed, if this process is the one to do it."""
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
        """The parts that are there; the digests of those that are not loaded yet are not compared."""
        more = range(len(self._parts), len(self._parts) if self._end is not None else _parts_in(self.folder))
        return [*self._parts, *(Part(self.folder, number, remedy=self._remedy, verify=False) for number in more)]


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
    """Tokenise a corpus into ``folder``, or load what an earlier call with the same arguments left there.

    A specification that is itself a folder of shards is loaded from where it is; ``folder`` is not touched.
    Parts appear whole or not at all. Of several processes that want the same one, one builds and the others wait. A
    part that is found corrupted is made again.

    Args:
        spec: as in ``corpus.sources``, or a folder of shards.
        tokenizer: a fast tokenizer of transformers.
        folder: the cache of shards.
        text_field: column or JSON field that holds the text.
        workers: processes that tokenise; None decides by the size of the corpus.
        validation_fraction: part of the corpus's tokens that is held out, about, and at most 2^20 of them.
        first_tokens: after which part 0 ends; each later part has twice as many.
        tokens: of the training split after which building ends with its part; later parts are built when they are
            asked for. None: the whole corpus.
        progress: is told of what goes by.

    Raises:
        ValueError: an unreadable or empty corpus, a tokenizer without Rust backend, an unwritable folder; shards that
            are damaged or of another tokenizer.
    """
    if (given := shard_folder(spec)) is not None:
        return _given(given, tokenizer)
    recipe = recipes.recipe(
        spec, tokenizer, text_field=text_field, validation_fraction=validation_fraction, first_tokens=first_tokens
    )
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


def cache() -> Path:
    """Where corpora are kept. As the XDG specification says, a path that is empty or relative counts as not set."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".cache") / "fastkd"


def _has(corpus: Path, tokens: int | None) -> bool:
    """Whether ``tokens`` for training, or all of a corpus, are there and whole."""
    held = 0
    for number in count():
        if (part := load(corpus, number)) is None:
            return False
        held += part.tokens
        if part.next is None or (tokens is not None and held >= tokens):
            return True
    raise AssertionError


def _given(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Shards:
    """Shards that the user names in a corpus's place."""
    shards = Shards(folder, remedy="copy it again, or give --corpus text", whole=True)
    if shards.tokenizer_hash != tokenizer_hash(tokenizer):
        raise ValueError(
            f"the shards in {str(folder)!r} were made by another tokenizer than the student's: take a teacher with that "
            "tokenizer (or name it by --tokenizer), or give --corpus text"
        )
    return shards


def _parts_in(corpus: Path) -> int:
    """How many parts of a corpus there are, without a gap."""
    return next(number for number in count() if not part_folder(corpus, number).exists())


def _built_before(root: Path, recipe: Recipe) -> Path | None:
    """The newest build of this recipe from any commit, where the hub cannot be asked for the one of today."""
    if all(source.get("commit") != "" for source in recipe["sources"]):
        return None
    wanted = recipes.canonical(recipe, without="commit")
    for path in sorted(root.glob("*/part-00000"), key=lambda path: path.stat().st_mtime, reverse=True):
        found = Part(path.parent, 0, verify=False)
        if recipes.canonical(found.recipe, without="commit") == wanted:
            log.warning(
                "the hub cannot be asked for its commit of today: going on with what was prepared in %s", path.parent
            )
            return path.parent
    return None
