"""A hub on 127.0.0.1: git-like repositories of models and datasets behind the API that huggingface_hub asks.

As a program it serves a folder and prints the address for HF_ENDPOINT:

    python tests/hub.py --serve FOLDER [--megabytes-per-second 20] [--latency-ms 50] [--copies 1000]

FOLDER holds ``models/OWNER/NAME/REVISION/…`` and ``datasets/OWNER/NAME/REVISION/…``; a slash in the revision is written
%2F (``refs%2Fconvert%2Fparquet``). ``--copies`` serves every parquet file under that many names, so that a dataset can be
larger than the disk.
"""

import argparse
import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import hub_routes

Content = bytes | Path


@cache
def _digests(content: Content) -> tuple[str, str]:
    """Git's name of a blob, and the sha256 of its bytes."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    git, sha256 = hashlib.sha1(f"blob {size}\0".encode()), hashlib.sha256()
    if isinstance(content, bytes):
        git.update(content)
        sha256.update(content)
        return git.hexdigest(), sha256.hexdigest()
    with content.open("rb") as file:
        while part := file.read(1 << 20):
            git.update(part)
            sha256.update(part)
    return git.hexdigest(), sha256.hexdigest()


@dataclass(frozen=True)
class Blob:
    """The content of a file: bytes, or a file on disk that is not held in memory."""

    content: Content

    @cached_property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @property
    def oid(self) -> str:
        """Git's name for it."""
        return _digests(self.content)[0]

    @property
    def sha256(self) -> str:
        """The name of a large file, which the hub keeps beside git."""
        return _digests(self.content)[1]

    def read(self, first: int = 0, last: int | None = None) -> Iterator[bytes]:
        """The bytes from ``first`` to ``last``, both included, in pieces."""
        left = (self.size if last is None else last + 1) - first
        if isinstance(self.content, bytes):
            yield self.content[first : first + left]
            return
        with self.content.open("rb") as file:
            file.seek(first)
            while left > 0 and (part := file.read(min(left, 1 << 16))):
                left -= len(part)
                yield part


@dataclass
class Repository:
    """Commits, each a whole tree, and the branches that name some of them."""

    kind: str  # models or datasets
    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, Content | str], revision: str = "main") -> str:
        """Add files to a branch; returns the commit."""
        contents = {path: text.encode() if isinstance(text, str) else text for path, text in files.items()}
        before = self.commits.get(self.branches.get(revision, ""), {})
        tree = before | {path: Blob(content) for path, content in contents.items()}
        named = "".join(f"{path} {blob.oid}\n" for path, blob in sorted(tree.items()))
        self.branches[revision] = hashlib.sha1(named.encode()).hexdigest()
        self.commits[self.branches[revision]] = tree
        return self.branches[revision]

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch or a commit's own name."""
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Fault:
    """What goes wrong with the requests whose ``METHOD /path`` the pattern is found in."""

    where: str
    kind: int | str  # a status code, or: cut (half of the body), html (a page with status 200), slow, drip
    times: int | None = None  # how often; None is always
    skip: int = 0  # after so many that go well
    retry_after: int | None = 0  # of 429
    seconds: float = 60.0  # of slow, and between two bytes of drip, at most: the end of the hub ends the wait


class Hub:
    """The repositories, what goes wrong with them, how fast the line is, and what was asked."""

    def __init__(self) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Routes", (hub_routes.Routes,), {"hub": self}))
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.store = f"http://localhost:{self.server.server_port}"  # large files: another host, as of the real hub
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.past: set[str] = set()  # names of repositories of earlier tests
        self.reset()

    def reset(self) -> None:
        """An empty hub with a fast line."""
        self.past |= {name for _, name in self.repositories}
        self.repositories = {}
        self.blobs: dict[str, Blob] = {}  # large files that were pointed to, by sha256
        self.listings: dict[tuple[str, str, bool], dict[str, dict[str, object]]] = {}
        self.uploads: dict[str, bytes] = {}
        self.tokens = {"hf_writer": ("someone", "write"), "hf_reader": ("someone", "read")}
        self.faults: list[Fault] = []
        self.requests: list[str] = []  # METHOD /path, and the range where one was asked for
        self.sent = 0  # bytes of files
        self.bytes_per_s = 0.0  # of all connections together; 0 is no limit
        self.latency_s = 0.0  # before each answer
        self.page_size = 1000  # entries of a tree in one answer
        self.large = 1 << 12  # files from so many bytes on are stored beside git, and answered by a redirect
        self.stalls: Callable[[], object] = lambda: None  # called when a slow answer begins
        self.stopped = threading.Event()
        self._line, self._free_at = threading.Lock(), 0.0

    def add(
        self, kind: str, name: str, files: Mapping[str, Content | str], revision: str = "main", **options: bool
    ) -> str:
        """Commit files to a repository, which is made if it is not there; returns the commit."""
        repository = self.repositories.setdefault((kind, name), Repository(kind, name, **options))
        return repository.commit(files, revision)

    def add_folder(self, folder: Path, copies: int = 1) -> None:
        """Add all repositories of a folder: ``models/OWNER/NAME/REVISION/…`` and ``datasets/…``."""
        for root in sorted(folder.glob("*/*/*/*/")):
            kind, owner, name, revision = root.relative_to(folder).parts
            paths = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
            files: dict[str, Content] = {}
            for path, file in paths.items():
                times = copies if file.suffix == ".parquet" else 1
                for copy in range(times):
                    files[path if copy == 0 else f"{path.removesuffix('.parquet')}-{copy:05}.parquet"] = file
            self.add(kind, f"{owner}/{name}", files, unquote(revision))

    def entries(self, tree: dict[str, Blob], commit: str, folder: str, recursive: bool) -> dict[str, dict[str, object]]:
        """What is in a folder of a commit, by path, in the order of the paths."""
        key = (commit, folder, recursive)
        if key not in self.listings:
            self.listings[key] = self._entries(tree, f"{folder}/" if folder else "", recursive)
        return self.listings[key]

    def _entries(self, tree: dict[str, Blob], prefix: str, recursive: bool) -> dict[str, dict[str, object]]:
        found: dict[str, dict[str, object]] = {}
        for path, blob in tree.items():
            if not path.startswith(prefix):
                continue
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                name = prefix + "/".join(parts[:depth])
                found.setdefault(name, {"type": "directory", "path": name, "size": 0, "oid": "0" * 40})
            if recursive or len(parts) == 1:
                found[path] = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
                if blob.size >= self.large:
                    found[path]["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
        return {name: found[name] for name in sorted(found)}

    def fault(self, request: str) -> Fault | None:
        """The fault of a request, if it has one. What threads of an earlier test still ask does not use one up."""
        if self.is_of_the_past(request):
            return None
        for fault in self.faults:
            if fault.times == 0 or not re.search(fault.where, request):
                continue
            if fault.skip > 0:
                fault.skip -= 1
                continue
            if fault.times is not None:
                fault.times -= 1
            return fault
        return None

    def is_of_the_past(self, request: str) -> bool:
        """Whether a request is for what only an earlier test had."""
        if (blob := re.match(r"GET /blobs/(\w+)", request)) is not None:
            return blob[1] not in self.blobs
        past = self.past - {name for _, name in self.repositories}
        return any(re.search(rf"/{re.escape(name)}(?![\w.-])", request) for name in past)

    def wait(self, size: int) -> None:
        """Take the time that ``size`` bytes need on the line, which all connections share."""
        self.sent += size
        if not self.bytes_per_s:
            return
        with self._line:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + size / self.bytes_per_s
            seconds = self._free_at - now
        self.stopped.wait(seconds)

    def start(self) -> "Hub":
        """Answer from now on, in threads that end with the process."""
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def stop(self) -> None:
        """End all answers, and the server."""
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def serve(name: str, folder: Path) -> Iterator[str]:
    """Serve the files of a folder as the dataset ``name``; yields the address for HF_ENDPOINT."""
    hub = Hub().start()
    hub.add(
        "datasets", name, {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    )
    try:
        yield hub.address
    finally:
        hub.stop()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", type=Path, required=True, metavar="FOLDER", help="the repositories")
    parser.add_argument("--megabytes-per-second", type=float, default=0.0, help="of the whole line; 0: no limit")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="before each answer")
    parser.add_argument("--copies", type=int, default=1, help="names for each parquet file")
    options = parser.parse_args()
    hub = Hub()
    hub.add_folder(options.serve, options.copies)
    hub.bytes_per_s, hub.latency_s = options.megabytes_per_second * 1e6, options.latency_ms / 1e3
    print(f"export HF_ENDPOINT={hub.address}", flush=True)
    hub.server.serve_forever()


if __name__ == "__main__":
    main()
