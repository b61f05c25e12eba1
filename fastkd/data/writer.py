"""Tokenised documents to the files of a build, in one pass over the corpus."""

import hashlib
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.data.heldout import MOST, HeldOut
from fastkd.data.tokenise import Tokens

log = logging.getLogger(__name__)
REPORT_SECONDS = 10.0


class Writer:
    """Writes the files of one build into an empty folder."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._folder = folder
        self._dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        self._unigrams = np.zeros(vocab_size, np.int64)
        self._splits = {split: _Split(folder / f"{split}.tokens.bin", self._dtype) for split in ("train", "validation")}

    def close(self) -> None:
        """Close the token files, whether or not the build was finished."""
        for split in self._splits.values():
            split.close()

    def add(self, chunks: Iterable[Tokens], validation_fraction: float) -> None:
        """Write a whole corpus. Raises ``ValueError`` where it does not hold two different documents."""
        held_out, train = HeldOut(), self._splits["train"]
        seen, tokens, start = 0, 0, time.monotonic()
        reported = start
        for chunk in chunks:
            seen += int((chunk.lengths > 0).sum())
            tokens += len(chunk.ids)
            self._split(chunk, held_out)
            if (now := time.monotonic()) - reported > REPORT_SECONDS:
                reported = now
                log.info("tokenised %s documents, %s tokens (%s/s)", f"{seen:,}", f"{tokens:,}",
                         f"{tokens / (now - start):,.0f}")  # fmt: skip
        wanted = min(round(validation_fraction * seen), MOST)
        validation, rest = held_out.settle(wanted, leave_one=not train.lengths)
        for ids in rest:
            self._train(ids, np.array([len(ids)]))
        for ids in validation:
            self._splits["validation"].write(ids, np.array([len(ids)]))
        if not validation or not train.lengths:
            raise ValueError(
                f"the corpus holds {seen} document{'' if seen == 1 else 's'} with text, at least two different ones are needed: "
                "in a .txt file blank lines separate documents"
            )

    def finish(self) -> dict[str, Any]:
        """Bring everything to disk and return what the index says of it."""
        files = {}
        for name, split in self._splits.items():
            offsets = f"{name}.offsets.bin"
            files[f"{name}.tokens.bin"] = split.finish()
            files[offsets] = write_durably(self._folder / offsets, split.offsets().tobytes())
        files["unigrams.bin"] = write_durably(self._folder / "unigrams.bin", self._unigrams.tobytes())
        return {
            "vocab_size": len(self._unigrams),
            "dtype": self._dtype.name,
            "tokens": {name: split.tokens for name, split in self._splits.items()},
            "documents": {name: len(split.offsets()) - 1 for name, split in self._splits.items()},
            "files": files,
        }

    def _split(self, chunk: Tokens, held_out: HeldOut) -> None:
        """Documents above the threshold are written in runs; only the others are looked at one by one."""
        ends = np.cumsum(chunk.lengths)
        starts = ends - chunk.lengths
        first = 0
        for d in np.flatnonzero(chunk.hashes <= np.uint64(held_out.threshold)).tolist():
            if not chunk.lengths[d]:
                continue
            self._train(chunk.ids[starts[first] : starts[d]], chunk.lengths[first:d])
            for ids in held_out.offer(int(chunk.hashes[d]), chunk.ids[starts[d] : ends[d]]):
                self._train(ids, np.array([len(ids)]))
            first = d + 1
        if first < len(starts):
            self._train(chunk.ids[starts[first] :], chunk.lengths[first:])

    def _train(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        self._unigrams += np.bincount(ids, minlength=len(self._unigrams))
        self._splits["train"].write(ids, lengths)


class _Split:
    """The token file of one split, hashed as it is written."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._file = open(path, "wb")  # noqa: SIM115  closed by close()
        self._dtype = dtype
        self._sha256 = hashlib.sha256()
        self.tokens = 0
        self.lengths: list[np.ndarray] = []

    def write(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        data = ids.astype(self._dtype).tobytes()
        self._sha256.update(data)
        self._file.write(data)
        self.tokens += len(ids)
        if lengths.any():
            self.lengths.append(lengths[lengths > 0])

    def offsets(self) -> np.ndarray:
        return np.concatenate([[0], *self.lengths]).cumsum(dtype=np.int64)

    def finish(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._sha256.hexdigest()

    def close(self) -> None:
        self._file.close()


def write_durably(path: Path, data: bytes) -> str:
    """Write and fsync a file; return its sha256."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to disk, where the system can (Windows cannot open a folder)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
