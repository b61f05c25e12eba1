"""Hub datasets as sources of text, streamed: only shards are stored.

``datasets`` finds a dataset's files by its card and layout, and reads those that are not parquet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from fastkd.data import hub_requests
from fastkd.data.hub_parquet import HubRowGroup, row_groups
from fastkd.data.order import shuffled
from fastkd.data.rows import text_of

REMEDY = "take --preset quickstart, which needs no hub, or a local path (.txt .jsonl .parquet, .gz too)"
NAMED_AT_ONCE = 500  # files in one request for sizes
ROWS = 1024  # that are decoded at once

_SPEC = re.compile(
    r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?(:(?P<config>[\w.-]*)(:(?P<split>[\w.\[\]%:-]+))?)?"
)


_pinned: dict[tuple[str, str | None], str] = {}  # (name, revision): commit


@contextmanager
def pinned(sources: object) -> Iterator[None]:
    """Read datasets at the commits of these identities: a corpus goes on as it began, even if the hub has newer data.

    Args:
        sources: as a run's environment.json holds them; what is no identity pins nothing.
    """
    before = dict(_pinned)
    for one in sources if isinstance(sources, list) else ():
        match one:
            case {"hub": str(name), "revision": str(revision), "commit": str(commit)} if commit:
                _pinned[name, revision or None] = commit
    try:
        yield
    finally:
        _pinned.clear()
        _pinned.update(before)


@dataclass(frozen=True)
class HubDataset:
    """``name[@revision][:config[:split]]``; the split is ``train`` by default."""

    name: str
    revision: str | None
    config: str | None
    split: str

    @classmethod
    def parse(cls, spec: str) -> HubDataset | None:
        """Read a specification; None where it does not have that form."""
        match = _SPEC.fullmatch(spec)
        if match is None:
            return None
        return cls(match["name"], match["revision"], match["config"] or None, match["split"] or "train")

    @cached_property
    def commit(self) -> str:
        """The commit of the revision, today's or the pinned one. Raises ``ValueError`` where the hub cannot be reached."""
        from huggingface_hub import HfApi

        if (begun := _pinned.get((self.name, self.revision))) is not None:
            return begun
        info = self._ask(
            lambda: HfApi().dataset_info(self.name, revision=self.revision, timeout=hub_requests.NO_ANSWER)
        )
        return str(info.sha)

    def identity(self) -> dict[str, str]:
        """Name, revision, configuration, split and commit; the commit is empty where the hub cannot be asked."""
        try:
            commit = self.commit
        except hub_requests.HubUnreachable:
            commit = ""
        asked = {"revision": self.revision or "", "config": self.config or "", "split": self.split}
        return {"hub": self.name, **asked, "commit": commit}

    @property
    def size(self) -> int:
        """Bytes of the split's files."""
        return sum(self._files.values())

    def units(self) -> Iterator[HubRowGroup | HubFile]:
        """Row groups of parquet files, else files, in an order drawn from the fixed seed: a function of the commit.

        Raises:
            ValueError: no such name, configuration or split; a hub that cannot be reached.
        """
        files = list(self._files.items())
        order = shuffled(len(files), self.name)
        if all(path.endswith(".parquet") for path in self._files):
            return row_groups([files[number] for number in order], self.name, self._ask)
        count = self._stream.num_shards
        if count != len(files):  # files that belong together, such as text beside its metadata
            return (
                HubFile(self, f"shard {number} of {count}", self.size // count, number)
                for number in shuffled(count, self.name)
            )
        return (HubFile(self, *files[number], number) for number in order)

    @cached_property
    def _builder(self) -> Any:
        import datasets

        commit = self.commit
        return self._ask(lambda: datasets.load_dataset_builder(self.name, self.config, revision=commit))

    @cached_property
    def _files(self) -> dict[str, int]:
        """Bytes of each of the split's files, by address; files outside the repository count as empty."""
        splits = self._builder.config.data_files
        if self.split not in (*splits, "all"):
            raise ValueError(
                f"corpus {self.name!r} has no split {self.split!r}: take {', '.join(splits)}, or all of them as 'all'"
            )
        wanted = list(splits) if self.split == "all" else [self.split]
        addresses = [address for split in wanted for address in splits[split]]
        root = f"hf://datasets/{self.name}@{self.commit}/"
        sizes = self._sizes([address.removeprefix(root) for address in addresses if address.startswith(root)])
        return {address: sizes.get(address.removeprefix(root), 0) for address in addresses}

    def _sizes(self, paths: list[str]) -> dict[str, int]:
        """Bytes of files of the repository."""
        sizes: dict[str, int] = {}
        for first in range(0, len(paths), NAMED_AT_ONCE):
            sizes |= self._ask(partial(self._sizes_of, paths[first : first + NAMED_AT_ONCE]))
        return sizes

    def _sizes_of(self, paths: list[str]) -> dict[str, int]:
        from huggingface_hub import HfApi

        infos = HfApi().get_paths_info(self.name, paths, revision=self.commit, repo_type="dataset")
        return {info.path: getattr(info, "size", 0) for info in infos}

    @cached_property
    def _stream(self) -> Any:
        """The files as ``datasets`` streams them, a shard each."""
        return self._ask(lambda: self._builder.as_streaming_dataset(self.split))

    def _ask(self, call: Callable[[], Any]) -> Any:
        try:
            return hub_requests.ask(f"corpus {self.name!r}", call, remedy=REMEDY)
        except hub_requests.HubUnreachable as error:
            if "scripts are no longer supported" not in str(error):
                raise
            copy = f"{self.name}@refs/convert/parquet is the hub's own copy without the script, where it made one"
            raise ValueError(f"corpus {self.name!r} is a script, which `datasets` does not run: {copy}") from error


@dataclass(frozen=True)
class HubFile:
    """A file on the hub that is not parquet, read from its beginning to its end."""

    dataset: HubDataset
    path: str  # hf://…
    size: int  # bytes
    number: int  # among the split's files

    @property
    def name(self) -> str:
        """Its path in the repository."""
        return self.path.partition("@")[2].partition("/")[2] or self.path

    def documents(self, text_field: str) -> Iterator[str]:
        """Yield the rows' text in order, blank ones left out. Raises ``ValueError`` for rows without that text."""
        for texts in hub_requests.resumed(lambda: self._texts(text_field), self.dataset._ask):
            yield from filter(None, texts)

    def _texts(self, text_field: str) -> Iterator[list[str]]:
        stream = self.dataset._stream
        for table in stream.shard(stream.num_shards, self.number).with_format("arrow").iter(batch_size=ROWS):
            columns = [text_field] if text_field in table.column_names else table.column_names
            yield [text_of(row, text_field, self.name) for row in table.select(columns).to_pylist()]
