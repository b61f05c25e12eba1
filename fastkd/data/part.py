"""A part of a tokenised corpus: a folder that is written whole, verified when it is loaded and read into memory.

Each rank holds up to two in memory, the one it reads and the next: of fastkd's own, with 2^27 tokens at most, 256 to 512 MB
each. A memory map would save that, but a file that is cut while it is mapped, or a disk that fails, ends the process by
SIGBUS, which nothing can catch.

    train.tokens.bin       uint16, or uint32 past 65,536 entries: documents end to end, no special tokens added
    train.offsets.bin      int64 [documents + 1]: where each document begins, and the end of the last one
    index.json             sizes and SHA-256 of the files, the recipe, where the next part begins, and the SHA-256 of all that;
                           written last

Part 0 also has validation.tokens.bin, validation.offsets.bin and ``heldout.bin``: the hashes of the held-out pieces, uint64.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.data.heldout import Documents, HeldOut
from fastkd.data.reading import Place
from fastkd.data.recipe import FORMAT, Recipe

SPLITS = ("train", "validation")
KEYS = {
    "recipe",
    "part",
    "vocab_size",
    "dtype",
    "tokens",
    "documents",
    "piece",
    "share",
    "next",
    "files",
}  # of index.json
DIGEST = "sha256"  # its key in index.json; indices of an older version have none
HASHES = "heldout.bin"


def part_folder(corpus: Path, number: int) -> Path:
    """Where a part of the corpus in a folder is."""
    return corpus / f"part-{number:05d}"


class PartLost(OSError):
    """A file of a part was cut or taken away while it was in use; the same command again finds it and says what to do."""


class Part:
    """A verified part. Raises ``ValueError`` where a file is missing or is not what was written.

    Args:
        corpus: the folder of the corpus.
        number: of the part, from 0.
        remedy: what the error says to do; default: delete the part, which can be built again.
        verify: whether the SHA-256 of its files is compared.
    """

    def __init__(self, corpus: Path, number: int, *, remedy: str | None = None, verify: bool = True) -> None:
        self.folder, self.number = part_folder(corpus, number), number
        self._remedy = remedy or f"delete {str(self.folder)!r}, the next run builds it again from the corpus"
        self.index = self._read_index()
        if verify:
            with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
                list(pool.map(self._verify, self.index["files"]))

    @property
    def recipe(self) -> Recipe:
        """What the corpus is made from."""
        return dict(self.index["recipe"])

    @property
    def tokens(self) -> int:
        """Tokens of the training split; no special tokens are stored."""
        return int(self.index["tokens"]["train"])

    @property
    def share(self) -> float:
        """About the share of the corpus that was read when the part ended; 1 only for the last part."""
        return float(self.index["share"])

    @property
    def next(self) -> Place | None:
        """Where the next part begins; None for the last one."""
        place = self.index["next"]
        return None if place is None else Place(**place)

    @property
    def held_out(self) -> HeldOut:
        """What part 0 holds out; later parts depend on it, so it is verified each time."""
        self._verify(HASHES)
        return HeldOut(self.index["piece"], self._read(HASHES, "uint64"))

    def documents(self, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """(token ids [N], offsets o [documents + 1] int64) of a split; document d is ids[o[d] : o[d + 1]].

        Raises:
            PartLost: a file is not as long as it was, or cannot be read.
        """
        tokens, documents = self.index["tokens"][split], self.index["documents"][split]
        ids = self._read(f"{split}.tokens.bin", self.index["dtype"], tokens)
        return ids, self._read(f"{split}.offsets.bin", "int64", documents + 1)

    def _read(self, name: str, dtype: str, count: int | None = None) -> np.ndarray:
        path = self.folder / name
        try:
            found = np.fromfile(path, dtype)
        except OSError as error:
            raise PartLost(f"shard {str(path)!r} cannot be read any more ({error.strerror})") from error
        if count is not None and len(found) != count:
            raise PartLost(f"shard {str(path)!r} was cut or changed while it was in use")
        return found

    def _verify(self, name: str) -> None:
        path, expected = self.folder / name, self.index["files"][name]
        try:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ValueError(f"shard {str(path)!r} cannot be read ({error.strerror}): {self._remedy}") from error
        if found != expected:
            raise ValueError(f"shard {str(path)!r} is corrupted (its sha256 changed): {self._remedy}")

    def _read_index(self) -> dict[str, Any]:
        path = self.folder / "index.json"
        try:
            index = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{str(self.folder)!r} holds no readable index.json ({error}): {self._remedy}") from error
        if not _describes(index, self.number):
            raise ValueError(f"{str(self.folder)!r} holds no shards that this version of fastkd wrote: {self._remedy}")
        if index.get(DIGEST, expected := _index_sha256(index)) != expected:
            raise ValueError(f"{str(path)!r} is corrupted (its sha256 changed): {self._remedy}")
        for split in index["tokens"]:
            self._check_sizes(index, split)
        return dict(index)

    def _check_sizes(self, index: dict[str, Any], split: str) -> None:
        """Refuse an index whose numbers are not those of the files: a file that is cut, or an index that no digest protects."""
        sizes = {"tokens": index["tokens"][split] * np.dtype(index["dtype"]).itemsize}
        sizes["offsets"] = (index["documents"][split] + 1) * np.dtype(np.int64).itemsize
        for content, expected in sizes.items():
            path = self.folder / f"{split}.{content}.bin"
            try:
                found = path.stat().st_size
            except OSError as error:
                raise ValueError(f"shard {str(path)!r} cannot be read ({error.strerror}): {self._remedy}") from error
            if found != expected:
                raise ValueError(
                    f"shard {str(path)!r} is corrupted (it has {found} bytes, its index.json says {expected}): {self._remedy}"
                )


def _index_sha256(index: dict[str, Any]) -> str:
    """Of an index without its own digest, however it is written."""
    content = {key: value for key, value in index.items() if key != DIGEST}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _describes(index: Any, number: int) -> bool:
    """Whether an index.json has every field that is read, and no other. It may come from anywhere."""
    try:
        splits = SPLITS if number == 0 else SPLITS[:1]
        names = {f"{split}.{content}.bin" for split in splits for content in ("tokens", "offsets")}
        recipe, place = index["recipe"], index["next"]
        numbers = [index["vocab_size"], index["piece"], *index["tokens"].values(), *index["documents"].values()]
        known = index.keys() - {DIGEST} == KEYS and index["part"] == number
        known &= recipe["format"] == FORMAT and all(isinstance(source, dict) for source in recipe["sources"])
        files = index["files"].keys() == names | ({HASHES} if number == 0 else set())
        typed = index["dtype"] == _dtype(index["vocab_size"]).name
        typed &= all(type(value) is int and value >= 0 for value in numbers)
        placed = place is None or all(type(value) is int and value >= 0 for value in vars(Place(**place)).values())
        counted = index["tokens"].keys() == index["documents"].keys() == set(splits)
        share = 0 < index["share"] < 1 or (index["share"] == 1 and place is None)
        return known and files and typed and placed and counted and share and bool(recipe["tokenizer_hash"])
    except (KeyError, TypeError, AttributeError):
        return False


def _dtype(vocab_size: int) -> np.dtype:
    """Of token ids."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def write_part(
    corpus: Path,
    number: int,
    documents: Iterable[tuple[Documents, Documents]],
    held_out: HeldOut,
    *,
    recipe: Recipe,
    vocab_size: int,
    end: Callable[[], tuple[float, Place | None]],
) -> None:
    """Write a part under another name, then rename it: it appears whole or not at all. The caller holds the corpus's lock.

    Args:
        corpus: the folder of the corpus.
        number: of the part; part 0 keeps what is held out, a later one leaves it out.
        documents: (for training, held out), chunk by chunk.
        held_out: the choice of what is held out.
        recipe: what the corpus is made from.
        vocab_size: one more than the tokenizer's largest id.
        end: called after the last chunk; returns (share of the corpus that was read, place of the next part or None).
    """
    splits = SPLITS if number == 0 else SPLITS[:1]
    dtype = _dtype(vocab_size)
    with _whole(part_folder(corpus, number)) as folder, ExitStack() as stack:
        files = [SplitWriter(folder, split, dtype) for split in splits]
        for file in files:
            stack.callback(file.close)
        for splits_of_chunk in documents:
            for file, content in zip(files, splits_of_chunk, strict=False):
                file.write(*content)
        share, place = end()
        digests = {name: digest for file in files for name, digest in file.finish().items()}
        if number == 0:
            digests[HASHES] = write_durably(folder / HASHES, held_out.hashes.tobytes())
        index = {
            "recipe": recipe,
            "part": number,
            "vocab_size": vocab_size,
            "dtype": dtype.name,
            "tokens": {file.name: file.tokens for file in files},
            "documents": {file.name: file.documents for file in files},
            "piece": held_out.piece,
            "share": share,
            "next": None if place is None else place.__dict__,
            "files": digests,
        }
        index[DIGEST] = _index_sha256(index)
        write_durably(folder / "index.json", json.dumps(index, indent=1).encode())


@contextmanager
def _whole(final: Path) -> Iterator[Path]:
    """A folder that gets its name when everything in it is on disk. What killed builds left of this or other parts goes first."""
    building = final.with_name(f".{final.name}.building")
    for folder in (*final.parent.glob(".part-*.building"), final):
        shutil.rmtree(folder, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        yield building
        sync_folder(building)
        os.replace(building, final)
        sync_folder(final.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        with suppress(OSError):  # if no part could be written, the corpus's empty folder goes too
            final.parent.rmdir()


class SplitWriter:
    """Writes the documents of one split of a part: ``<name>.tokens.bin`` and ``<name>.offsets.bin``."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype) -> None:
        self.name = name
        self._folder, self._dtype = folder, dtype
        self._file = open(folder / f"{name}.tokens.bin", "wb")  # noqa: SIM115  closed by close()
        self._sha256 = hashlib.sha256()
        self._lengths: list[np.ndarray] = [np.zeros(1, np.int64)]
        self.tokens = self.documents = 0

    def write(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: ids [tokens] end to end, lengths [documents], none of them 0."""
        data = ids.astype(self._dtype).tobytes()
        self._sha256.update(data)
        self._file.write(data)
        self._lengths.append(lengths)
        self.tokens += len(ids)
        self.documents += len(lengths)

    def finish(self) -> dict[str, str]:
        """Bring both files to disk and return their SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        offsets = np.concatenate(self._lengths).cumsum(dtype=np.int64)
        name = f"{self.name}.offsets.bin"
        return {
            f"{self.name}.tokens.bin": self._sha256.hexdigest(),
            name: write_durably(self._folder / name, offsets.tobytes()),
        }

    def close(self) -> None:
        """Close the token file, whether or not it was finished."""
        self._file.close()


def write_durably(path: Path, data: bytes) -> str:
    """Write and fsync a file; return its SHA-256."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def sync_folder(folder: Path) -> None:
    """Fsync a folder, so that its names are on disk too. Windows cannot open a folder: nothing is done there."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
