"""A part of a tokenised corpus: an immutable folder, written whole, verified when it is loaded, read through memory maps.

    train.tokens.bin       uint16, or uint32 past 65,536 entries: documents end to end, no special tokens added
    train.offsets.bin      int64 [documents + 1]: where each begins
    index.json             sizes and sha256 of the files, the recipe, where the next part begins; written last

Part 0 has the same two files of what is held out for validation, and ``heldout.bin``: the hashes of its pieces, uint64.
"""

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
from fastkd.data.writer import Split, sync_folder, write_durably

SPLITS = ("train", "validation")
HASHES = "heldout.bin"


def part_folder(corpus: Path, number: int) -> Path:
    """Where a part of the corpus in a folder is."""
    return corpus / f"part-{number:05d}"


class Part:
    """A verified part. Raises ``ValueError`` where a file is missing or is not what was written.

    Args:
        corpus: the folder of the corpus.
        number: of the part, from 0.
        remedy: what the error tells to do; as a rule, to delete what can be built again.
        verify: whether the files' digests are compared.
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
        """What the corpus was made from."""
        return dict(self.index["recipe"])

    @property
    def tokens(self) -> int:
        """Of the training split, special tokens not counted."""
        return int(self.index["tokens"]["train"])

    @property
    def share(self) -> float:
        """Of the corpus that was read when the part ended, about; 1 for the last part only."""
        return float(self.index["share"])

    @property
    def next(self) -> Place | None:
        """Where the next part begins; None for the last one."""
        place = self.index["next"]
        return None if place is None else Place(**place)

    @property
    def held_out(self) -> HeldOut:
        """What part 0 holds out."""
        return HeldOut(self.index["piece"], self._map(HASHES, "uint64"))

    def documents(self, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """Memory maps of (token ids [N], offsets [documents + 1] int64) of a split; document d is ids[o[d]:o[d+1]]."""
        return self._map(f"{split}.tokens.bin", self.index["dtype"]), self._map(f"{split}.offsets.bin", "int64")

    def _map(self, name: str, dtype: str) -> np.ndarray:
        path = self.folder / name
        return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)

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
        try:
            index = json.loads((self.folder / "index.json").read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{str(self.folder)!r} holds no readable index.json ({error}): {self._remedy}") from error
        if not _describes(index, self.number):
            raise ValueError(f"{str(self.folder)!r} holds no shards that this version of fastkd wrote: {self._remedy}")
        return dict(index)


def _describes(index: Any, number: int) -> bool:
    """Whether an index.json has all that is read of it: it may come from anywhere, and no digest covers it."""
    try:
        splits = SPLITS if number == 0 else SPLITS[:1]
        names = {f"{split}.{content}.bin" for split in splits for content in ("tokens", "offsets")}
        recipe, numbers = index["recipe"], [index["vocab_size"], index["piece"], *index["tokens"].values()]
        known = recipe["format"] == FORMAT and all(isinstance(source, dict) for source in recipe["sources"])
        files = index["files"].keys() == names | ({HASHES} if number == 0 else set())
        typed = index["dtype"] in ("uint16", "uint32") and all(type(value) is int for value in numbers)
        place = index["next"] is None or isinstance(Place(**index["next"]), Place)
        counted = index["tokens"].keys() == index["documents"].keys() == set(splits)
        share = 0 < index["share"] < 1 or (index["share"] == 1 and index["next"] is None)
        return known and files and typed and place and counted and share and bool(recipe["tokenizer_hash"])
    except (KeyError, TypeError, AttributeError):
        return False


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
    """Write a part beside its place, then rename it there: whole or not at all. The caller holds the corpus's lock.

    Args:
        corpus: the folder of the corpus.
        number: of the part; part 0 keeps what is held out, a later one leaves it out.
        documents: for training, and held out of it, chunk by chunk.
        held_out: what decided that.
        recipe: what the corpus is made from.
        vocab_size: one more than the tokenizer's largest id.
        end: called after the last chunk; returns (share of the corpus that was read, place of the next part or None).
    """
    splits = SPLITS if number == 0 else SPLITS[:1]
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    with _whole(part_folder(corpus, number)) as folder, ExitStack() as stack:
        files = [Split(folder, split, dtype) for split in splits]
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
        write_durably(folder / "index.json", json.dumps(index, indent=1).encode())


@contextmanager
def _whole(final: Path) -> Iterator[Path]:
    """A folder that takes its name when all is in it and on disk. One name: what a killed build left is removed here."""
    building = final.with_name(f".{final.name}.building")
    for folder in (building, final):
        shutil.rmtree(folder, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        yield building
        sync_folder(building)
        os.replace(building, final)
        sync_folder(final.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        with suppress(OSError):  # of a corpus of which nothing could be written, nothing is left
            final.parent.rmdir()
