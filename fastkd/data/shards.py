"""A corpus as token ids on disk: built once, verified at every load, read through memory maps.

A build is a folder named by a key over everything that it depends on (the sources' content, the tokenizer, the split):

    <split>.tokens.bin     uint16, or uint32 past 65,536 entries: documents end to end, no special tokens added
    <split>.offsets.bin    int64 [documents + 1]: where each begins
    unigrams.bin           int64 [V]: how often each id stands in the training split
    index.json             sizes and sha256 of these, the tokenizer's hash, the sources; written last
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Collection, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from tokenizers import Tokenizer

from fastkd.data.corpus import check, documents, shard_folder, sources
from fastkd.data.tokenise import Tokens, tokenise
from fastkd.data.writer import Writer, sync_folder, write_durably

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
SPLITS = ("train", "validation")
FILES = (*(f"{split}.{content}.bin" for split in SPLITS for content in ("tokens", "offsets")), "unigrams.bin")
log = logging.getLogger(__name__)


class Shards:
    """A verified build. Raises ``ValueError`` where a file is missing or is not what was written.

    Args:
        folder: where the build lies.
        remedy: what the error tells to do; as a rule, to delete what can be built again.
    """

    def __init__(self, folder: str | os.PathLike[str], *, remedy: str | None = None) -> None:
        self.folder = Path(folder)
        self._remedy = remedy or _rebuild(self.folder)
        self.index = _read_index(self.folder, self._remedy)
        with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
            list(pool.map(self._verify, self.index["files"]))

    @property
    def unique_tokens(self) -> int:
        """Tokens of the training split, special tokens not counted."""
        return int(self.index["tokens"]["train"])

    @property
    def version(self) -> str:
        """The key of all that these were made from: equal for equal content, wherever it lies."""
        return _key(self.index["recipe"])

    @property
    def vocab_size(self) -> int:
        """One more than the tokenizer's largest id, added tokens included."""
        return int(self.index["vocab_size"])

    @property
    def tokenizer_hash(self) -> str:
        """What ``tokenizer_hash`` gave for the tokenizer that built these."""
        return str(self.index["tokenizer_hash"])

    def documents(self, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """Memory maps of (token ids [N], offsets [documents + 1] int64) of a split; document d is ids[o[d]:o[d+1]]."""
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: take one of {', '.join(SPLITS)}")
        return self._map(f"{split}.tokens.bin", self.index["dtype"]), self._map(f"{split}.offsets.bin", "int64")

    def unigram_counts(self) -> np.ndarray:
        """How often each id stands in the training split, [V] int64."""
        return self._map("unigrams.bin", "int64")

    def unigram_cross_entropy(self, special: Collection[int] = ()) -> float:
        """Loss, in nats a token, of predicting the held-out split from the training split's frequencies alone.

        −Σ_v q(v) log p(v), q the held-out frequencies, p the training frequencies with one added to each count; ids
        in ``special`` are left out. It is what a masked language model reaches before it reads any context.
        """
        keep = np.ones(self.vocab_size, bool)
        keep[list(special)] = False
        held_out = np.bincount(self.documents("validation")[0], minlength=self.vocab_size)[keep]
        train = self.unigram_counts()[keep] + 1.0
        return float(-(held_out * np.log(train / train.sum())).sum() / held_out.sum())

    def _map(self, name: str, dtype: str) -> np.ndarray:
        return np.memmap(self.folder / name, dtype=dtype, mode="r")

    def _verify(self, name: str) -> None:
        path, expected = self.folder / name, self.index["files"][name]
        try:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ValueError(f"shard {str(path)!r} cannot be read ({error.strerror}): {self._remedy}") from error
        if found != expected:
            raise ValueError(f"shard {str(path)!r} is corrupted (its sha256 changed): {self._remedy}")


def build_shards(
    spec: str | Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    folder: str | os.PathLike[str],
    *,
    text_field: str = "text",
    workers: int | None = None,
    validation_fraction: float = 0.02,
) -> Shards:
    """Tokenise a corpus into ``folder``, or load what an earlier call with the same arguments left there.

    A specification that is itself a folder of shards is loaded from where it lies; ``folder`` is not touched.
    Builds appear whole or not at all. Of several processes that want the same one, one builds and the others wait. A
    build that is found corrupted is made again.

    Args:
        spec: as in ``corpus.sources``, or a folder of shards.
        tokenizer: a fast tokenizer of transformers.
        folder: the cache of shards.
        text_field: column or JSON field that holds the text.
        workers: processes that tokenise; None decides by the size of the corpus.
        validation_fraction: part of the documents held out, at least one and at most 2,000 different ones.

    Raises:
        ValueError: an unreadable or empty corpus, a tokenizer without Rust backend, an unwritable folder; shards that
            are damaged or of another tokenizer.
    """
    if (given := shard_folder(spec)) is not None:
        return _given(given, tokenizer)
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}: take one between 0 and 1, such as 0.02")
    recipe = {
        "format": FORMAT,
        "sources": [source.identity() for source in sources(spec)],
        "text_field": text_field,
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "validation_fraction": validation_fraction,
    }
    root = Path(folder).expanduser()
    final = _built_before(root, recipe) or root / _key(recipe)
    if (shards := _load(final)) is not None:  # without a lock: a finished cache may be shared read-only
        return shards
    check(spec, text_field=text_field)
    with _writable(root), FileLock(root / f"{final.name}.lock"):
        if (shards := _load(final)) is not None:
            return shards
        shutil.rmtree(final, ignore_errors=True)
        backend = _backend(tokenizer)
        texts = documents(spec, text_field=text_field)
        _build(tokenise(texts, backend.to_str(), workers=workers), _entries(backend), recipe, final)
    return Shards(final)


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Sha256 of all that decides which ids a text becomes: vocabulary, normaliser, pre-tokeniser, added tokens."""
    parts = json.loads(_backend(tokenizer).to_str())
    deciding = {name: parts[name] for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def _given(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> Shards:
    """Shards that the user names in a corpus's place."""
    shards = Shards(folder, remedy="copy it again, or give --corpus text")
    if shards.tokenizer_hash != tokenizer_hash(tokenizer):
        raise ValueError(
            f"the shards in {str(folder)!r} were made by another tokenizer than the student's: take a teacher with that "
            "tokenizer (or name it by --tokenizer), or give --corpus text"
        )
    return shards


def _backend(tokenizer: "PreTrainedTokenizerBase") -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError(
            f"{type(tokenizer).__name__} has no Rust tokenizer behind it: take a model folder with a tokenizer.json"
        )
    return backend


def _entries(backend: Tokenizer) -> int:
    """The vocabulary's size with its gaps: one more than the largest id."""
    return max(backend.get_vocab().values()) + 1


def _load(folder: Path) -> Shards | None:
    """A build that is there and whole."""
    if not folder.exists():
        return None
    try:
        return Shards(folder)
    except ValueError as error:
        log.warning("%s; building it again", error)
        return None


def _key(recipe: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(recipe)).hexdigest()[:16]


def _canonical(recipe: dict[str, Any], *, without: str = "") -> bytes:
    """A recipe as bytes, one field of its sources left out."""
    parts = [{name: value for name, value in source.items() if name != without} for source in recipe["sources"]]
    return json.dumps(recipe | {"sources": parts}, sort_keys=True).encode()


def _built_before(root: Path, recipe: dict[str, Any]) -> Path | None:
    """The newest build of this recipe from any commit, where the hub cannot be asked for the one of today."""
    if all(source.get("commit") != "" for source in recipe["sources"]):
        return None
    wanted = _canonical(recipe, without="commit")
    indices = sorted(root.glob("*/index.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in indices:
        if _canonical(_read_index(path.parent, _rebuild(path.parent))["recipe"], without="commit") == wanted:
            return path.parent
    return None


def _read_index(folder: Path, remedy: str) -> dict[str, Any]:
    try:
        index = json.loads((folder / "index.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(folder)!r} holds no readable index.json ({error}): {remedy}") from error
    if not _describes(index):
        raise ValueError(f"{str(folder)!r} holds no shards that this version of fastkd wrote: {remedy}")
    return dict(index)


def _describes(index: Any) -> bool:
    """Whether an index.json has all that is read of it: it may come from anywhere, and no digest covers it."""
    try:
        recipe, numbers = index["recipe"], (index["tokens"]["train"], index["vocab_size"])
        known = recipe["format"] == FORMAT and all(isinstance(source, dict) for source in recipe["sources"])
        files = index["files"].keys() == set(FILES) and index["dtype"] in ("uint16", "uint32")
        return known and files and all(type(number) is int for number in numbers) and bool(index["tokenizer_hash"])
    except (KeyError, TypeError, AttributeError):
        return False


def _rebuild(folder: Path) -> str:
    return f"delete {str(folder)!r}, the next run builds it again from the corpus"


@contextmanager
def _writable(root: Path) -> Iterator[None]:
    try:
        root.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ValueError(
            f"cannot write shards to {str(root)!r} ({error.strerror or error}): free its disk or make it writable, "
            "or set XDG_CACHE_HOME to another folder"
        ) from error


def _build(chunks: Generator[Tokens], vocab_size: int, recipe: dict[str, Any], final: Path) -> None:
    """Write a build beside its place, then rename it there. The caller holds the lock."""
    building = final.with_name(f".{final.name}.building")  # one name: what a killed build left is removed here
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        start = time.monotonic()
        with closing(chunks), closing(Writer(building, vocab_size)) as writer:
            writer.add(chunks, recipe["validation_fraction"])
            index = writer.finish() | {"tokenizer_hash": recipe["tokenizer_hash"], "recipe": recipe}
        write_durably(building / "index.json", json.dumps(index, indent=1).encode())
        sync_folder(building)
        building.rename(final)
        sync_folder(final.parent)
        tokens = sum(index["tokens"].values())
        log.info("built %s: %s tokens in %.1f s", final, f"{tokens:,}", time.monotonic() - start)
    finally:
        shutil.rmtree(building, ignore_errors=True)
