"""Tokenised documents to files, hashed as they are written and brought to disk."""

import hashlib
import os
from pathlib import Path

import numpy as np


class Split:
    """The documents of one split of a part: ``<name>.tokens.bin`` and ``<name>.offsets.bin``."""

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
        """Bring both files to disk and return their digests."""
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
