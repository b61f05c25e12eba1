"""Opens a local file of a corpus. What cannot be read is one line that names the file and, where there is one, the remedy."""

from __future__ import annotations

import gzip
import re
import shlex
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

HEAD = 4096  # bytes of a file's beginning that are checked
ZERO_BYTES = "holds zero bytes, as a binary file or a download that broke off does: copy it again, or leave it out"
ZEROS = bytes(16)  # no text has this many in a row; a broken-off download or a binary file has


def opened(path: Path) -> BinaryIO:
    """A file opened for its bytes; a .gz is decompressed."""
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else open(path, "rb")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an error of reading a file into a ``ValueError`` of one line."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"corpus file {str(path)!r} is not a complete gzip file ({error}): copy it again, `gzip -t` must accept it"
        ) from error
    except OSError as error:
        reason = " ".join(str(error.strerror or error).split())
        raise ValueError(f"cannot read corpus file {str(path)!r}: {reason}") from error


def _converted(encoding: str) -> Callable[[Path], str]:
    return lambda path: f"convert it with {iconv(path, encoding)}"


def _unpacked(command: str, suffix: str) -> Callable[[Path], str]:
    def remedy(path: Path) -> str:
        name, packed = shlex.quote(str(path)), shlex.quote(f"{path}{suffix}")
        return f"unpack it with `mv {name} {packed} && {command} {packed}`"

    return remedy


_KINDS: tuple[tuple[bytes, str, Callable[[Path], str]], ...] = (
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32 text", _converted("UTF-32")),
    (rb"\xff\xfe|\xfe\xff", "UTF-16 text", _converted("UTF-16")),
    (rb"\x1f\x8b\x08", "compressed by gzip", lambda path: f"name it {path.name + '.gz'!r}"),
    (rb"BZh[1-9]1AY&SY", "compressed by bzip2", _unpacked("bunzip2", ".bz2")),
    (rb"\xfd7zXZ\0", "compressed by xz", _unpacked("unxz", ".xz")),
    (rb"\x28\xb5\x2f\xfd", "compressed by zstd", _unpacked("unzstd --rm", ".zst")),
    (rb"PK\x03\x04", "a zip archive", _unpacked("unzip", ".zip")),
    (rb"%PDF-", "a PDF", lambda path: "extract its text, for instance with pdftotext"),
    (rb"PAR1", "a parquet file", lambda path: f"name it {path.stem + '.parquet'!r}"),
    (rb"version https://git-lfs\.github\.com", "a pointer of Git LFS", lambda path: "fetch it with `git lfs pull`"),
    # No byte-order mark: three bytes of four are zero.
    (rb"(?s)(?:[^\0]\0\0\0){8}", "UTF-32 text", _converted("UTF-32LE")),
    (rb"(?s)(?:\0\0\0[^\0]){8}", "UTF-32 text", _converted("UTF-32BE")),
)


def iconv(path: Path, encoding: str) -> str:
    """The command that converts a text file, also a .gz, to UTF-8 in place."""
    name, new = shlex.quote(str(path)), shlex.quote(f"{path}.utf-8")
    convert = f"iconv -f {encoding} -t UTF-8"
    if path.name.lower().endswith(".gz"):
        return f"`zcat {name} | {convert} | gzip > {new} && mv {new} {name}`"
    return f"`{convert} {name} > {new} && mv {new} {name}`"


def describe(head: bytes, path: Path) -> str | None:
    """Say what a file is, by its first bytes, if it is not UTF-8 text, with the remedy; None where it may be UTF-8 text."""
    for pattern, kind, remedy in _KINDS:
        if re.match(pattern, head):
            return f"is {kind}: {remedy(path)}"
    if path.name.lower().endswith(".parquet"):
        return None
    for encoding, high, low in (("UTF-16LE", head[1::2], head[::2]), ("UTF-16BE", head[::2], head[1::2])):
        if _controls(high) > 0.8 > 2 * _controls(low):  # no byte-order mark: the high bytes of most alphabets are small
            return f"is UTF-16 text: {_converted(encoding)(path)}"
    if _controls(head) > 0.1:
        return "is not text, its first bytes are full of control characters: copy it again, or leave it out"
    return None


def _controls(data: bytes) -> float:
    """The share of bytes that are control characters which no text has; 0 for fewer than 8 bytes."""
    return sum(byte < 32 and byte not in b"\t\n\v\f\r\b\x1b" for byte in data) / len(data) if len(data) >= 8 else 0.0
