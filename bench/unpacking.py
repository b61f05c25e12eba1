"""An archive of ``bench.bundle`` becomes a folder again: whole and verified, and of a size that is known beforehand.

An archive may come from anywhere. What is unpacked are plain files under the folders of a bundle, of at most
``most_bytes`` together, whatever the archive says about itself.
"""

from __future__ import annotations

import json
import lzma
import shutil
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from fastkd.files import file_sha256

FORMAT = 1
INDEX = "bundle.json"
PARTS = ("teacher", "shards", "glue")
NEEDED = ("teacher/config.json", "shards/part-00000/index.json")  # glue/ may be missing
# Weights in bfloat16 and token ids grow about 1.5 and 2 times, text 3 to 5 times.
LARGEST_FACTOR, LEAST_BYTES = 20, 100_000_000  # an archive may unpack to 20 times its size, and to 100 MB in any case


@dataclass(frozen=True)
class Bundle:
    """The parts of an unpacked archive."""

    teacher: Path  # what --teacher and --tokenizer take
    shards: Path  # what --corpus takes
    glue: Path | None  # what --data of fastkd.glue takes


def most_bytes(archive_bytes: int) -> int:
    """What an archive of this size may be unpacked to, the tar's own headers included."""
    return max(LARGEST_FACTOR * archive_bytes, LEAST_BYTES)


def unpack(archive: str | Path, folder: Path) -> Bundle:
    """Unpack an archive into a folder, whole and verified or not at all.

    Args:
        archive: what ``bench.bundle`` wrote.
        folder: it must not be there yet, or be empty.

    Raises:
        ValueError: a file that is no such archive, is damaged, grows beyond ``most_bytes``, or holds anything but plain
            files under its own folders; a folder that is in use.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is in use: unpack into a folder that is not there yet")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _extract(Path(archive), partial)
        opened(partial)
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _parts(folder)


def opened(folder: Path) -> Bundle:
    """The parts of an unpacked archive, every file verified.

    Raises:
        ValueError: a file that is missing or is not what was packed.
    """
    remedy = "unpack the archive again"
    try:
        index = json.loads((folder / INDEX).read_bytes())
        files = {str(name): str(entry["sha256"]) for name, entry in index["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder} holds no readable {INDEX}: {remedy}") from error
    if index.get("format") != FORMAT:
        raise ValueError(f"{folder} was packed by another version of fastkd: pack it again with bench.bundle")
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        found = pool.map(lambda name: _sha256(folder / name), files)
        broken = [name for name, sha256 in zip(files, found, strict=True) if sha256 != files[name]]
    broken += [name for name in NEEDED if name not in files]
    if broken:
        raise ValueError(f"{folder / broken[0]} is missing or is not what was packed: {remedy}")
    return _parts(folder)


def _parts(folder: Path) -> Bundle:
    glue = folder / "glue"
    return Bundle(folder / "teacher", folder / "shards", glue if glue.is_dir() else None)


def _sha256(path: Path) -> str | None:
    try:
        return file_sha256(path)
    except OSError:
        return None


class _Limited:
    """A stream that may be read so far and no further."""

    def __init__(self, stream: IO[bytes] | lzma.LZMAFile, archive: Path) -> None:
        self._stream, self._archive = stream, archive
        self._left = most_bytes(archive.stat().st_size)

    def read(self, size: int) -> bytes:
        """The next bytes, as of a file."""
        content = self._stream.read(size)
        self._left -= len(content)
        if self._left < 0:
            raise ValueError(f"{self._archive} is larger unpacked than an archive of its size may be: do not use it")
        return content


def _extract(archive: Path, folder: Path) -> None:
    try:
        with lzma.open(archive) as stream, tarfile.open(fileobj=_Limited(stream, archive), mode="r|") as tar:  # type: ignore[call-overload]
            for member in tar:
                _check(member, archive)
                _write(tar.extractfile(member), folder / member.name)
    except (EOFError, lzma.LZMAError, tarfile.TarError) as error:
        raise ValueError(f"{archive} is not a whole archive of bench.bundle ({error}): copy it again") from error
    except OSError as error:
        raise ValueError(f"{archive} could not be unpacked ({error}): look at the disk, or copy it again") from error


def _write(content: IO[bytes] | None, path: Path) -> None:
    """A plain file, whatever else its member says: no mode, owner or link is taken from an archive."""
    assert content is not None  # it was checked
    path.parent.mkdir(parents=True, exist_ok=True)
    with content, path.open("wb") as file:
        shutil.copyfileobj(content, file)


def _check(member: tarfile.TarInfo, archive: Path) -> None:
    """Refuse what ``bench.bundle`` never writes, whatever it would do: a sparse file, for one, is as large as it says."""
    path = PurePosixPath(member.name)
    own = member.name == INDEX or (len(path.parts) > 1 and path.parts[0] in PARTS)
    plain = member.isreg() and not member.issparse()
    if not plain or not own or ".." in path.parts or "\\" in member.name:
        raise ValueError(f"{archive} holds {member.name!r}, which is no file of a bundle: do not use it")
