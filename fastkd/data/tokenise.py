"""Documents to token ids in parallel: threads of the tokenizer for little text, worker processes for much.

A worker is this file run as a program that talks over its stdin and stdout. It imports only NumPy and tokenizers. It inherits
no CUDA context and no thread of torch, and does not import the caller's ``__main__``. So it starts in a third of a second and
works from a notebook, a script without a main guard, or a rank of torchrun.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_CHARACTERS = 2**21  # of text handed to a worker at once, about half a second of work
PIECE_CHARACTERS = 2**20  # a longer document is tokenised in pieces: an encoding needs 50 times the memory of its text
# Tokens that are not made from text that spells them: "[MASK]" in a text is ordinary words.
ROLES = ("cls_token", "sep_token", "mask_token", "pad_token", "unk_token")
NO_TEXT = "\ufffe\uffff"  # not characters in Unicode: no text has a word that begins with these
SMALL_CHUNKS = 8  # a corpus of no more chunks than this is not worth starting processes for
_Queue = queue.SimpleQueue[Any]
PATIENCE = 120.0  # seconds for a chunk: a worker that gives no answer until then is stopped, or stuck, and is ended


class WorkerLost(OSError):
    """A process that tokenises was ended from outside, or gave no answer; the same command goes on."""


@dataclass(frozen=True)
class Tokens:
    """Some documents as token ids, special tokens not added."""

    ids: np.ndarray  # [tokens] uint32, the documents end to end
    lengths: np.ndarray  # [documents] int64
    hashes: np.ndarray  # [documents] uint64 of the text: equal for equal documents


def tokenise(documents: Iterable[str], tokenizer_json: str, *, workers: int | None = None) -> Generator[Tokens]:
    """Tokenise documents, keeping their order.

    Args:
        documents: the texts.
        tokenizer_json: a ``tokenizers.Tokenizer``, serialised.
        workers: processes; None: one per CPU of this process for more than about 16 MB of text, else none.

    Raises:
        WorkerLost: a worker was killed, stopped or crashed; in one line. The others are ended.
    """
    chunks = _chunks(documents)
    first = list(islice(chunks, SMALL_CHUNKS + 1))
    if workers is None:
        workers = 0 if len(first) <= SMALL_CHUNKS else _cpus()
    if workers == 0:
        tokenizer = load(tokenizer_json)
        return (encode(tokenizer, chunk) for chunk in chain(first, chunks))
    return _in_processes(chain(first, chunks), tokenizer_json, workers)


def backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The Rust tokenizer behind one of transformers. Raises ``ValueError`` where there is none."""
    found = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(found, Tokenizer):
        raise ValueError(
            f"{type(tokenizer).__name__} has no Rust tokenizer behind it: take a model folder with a tokenizer.json"
        )
    return found


def serialise(tokenizer: PreTrainedTokenizerBase) -> str:
    """A tokenizer of transformers, serialised for ``load``: in a text, the tokens of ``ROLES`` are ordinary words.

    Other added tokens, such as [E1] in a text about entities, keep their own ids.

    Raises:
        ValueError: it has no Rust backend.
    """
    parts = json.loads(backend(tokenizer).to_str())
    names = {str(getattr(tokenizer, role)) for role in ROLES if getattr(tokenizer, role, None)}
    if names:
        for token in parts["added_tokens"]:
            token["special"] = token["content"] in names
    if parts["model"]["type"] == "Unigram":
        _hide(parts, names - {str(getattr(tokenizer, "unk_token", None))})
    return json.dumps(parts, sort_keys=True)


def _hide(parts: dict[str, Any], names: set[str]) -> None:
    """Rename pieces that a Unigram model would otherwise find in a text that spells them."""
    pieces = [[NO_TEXT + piece if piece in names else piece, score] for piece, score in parts["model"]["vocab"]]
    parts["model"]["vocab"] = pieces
    for token in parts["added_tokens"]:
        if token["content"] in names:
            token["content"] = NO_TEXT + token["content"]


def load(tokenizer_json: str) -> Tokenizer:
    """Deserialise a tokenizer. It cuts and pads nothing, and "[MASK]" in a text is ordinary words."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> Tokens:
    """Tokenise documents in this process."""
    raw = [document.encode("utf-8", "replace") for document in documents]  # JSON may hold half a surrogate pair
    pieces = [_pieces(document.decode()) for document in raw]
    encodings = iter(tokenizer.encode_batch_fast(list(chain.from_iterable(pieces)), add_special_tokens=False))
    ids = [[np.asarray(next(encodings).ids, np.uint32) for _ in document] for document in pieces]
    lengths = np.array([sum(map(len, document)) for document in ids], np.int64)
    hashes = np.frombuffer(b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in raw), np.uint64)
    return Tokens(np.concatenate([np.empty(0, np.uint32), *chain.from_iterable(ids)]), lengths, hashes)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pieces(document: str) -> list[str]:
    """Cut a very long document before white space, if it has any: no token spans such a cut."""
    pieces = []
    while len(document) > PIECE_CHARACTERS:
        cut = max(document.rfind(" ", 1, PIECE_CHARACTERS), document.rfind("\n", 1, PIECE_CHARACTERS))
        cut = cut if cut > 0 else PIECE_CHARACTERS
        pieces.append(document[:cut])
        document = document[cut:]
    return [*pieces, document]


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _Worker:
    """A worker process, called like a function."""

    def __init__(self, tokenizer_json: str) -> None:
        # -P: no module in the folder of this file may shadow one that the worker imports.
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"}, process_group=0,  # Ctrl-C does not reach it
        )  # fmt: skip
        self._tokenizer_json: str | None = tokenizer_json  # until it is sent
        self._left: float | None = None  # seconds until an answer is overdue; None: none is waited for
        self._counting = threading.Lock()
        self._silent = False

    def __call__(self, chunk: list[str]) -> Tokens:
        assert self._process.stdout is not None
        self._expect(PATIENCE * max(1.0, sum(map(len, chunk)) / CHUNK_CHARACTERS))
        try:
            if self._tokenizer_json is not None:
                self._send(self._tokenizer_json)
                self._tokenizer_json = None
            self._send(chunk)
            return Tokens(*pickle.load(self._process.stdout))
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise WorkerLost(self._death()) from error
        finally:
            self._expect(None)

    def _expect(self, seconds: float | None) -> None:
        with self._counting:
            self._left = seconds

    def pass_time(self, seconds: float) -> None:
        """Tell the worker that time passed: an overdue one is ended, which ends the wait for its answer."""
        with self._counting:
            if self._left is not None and (left := self._left - seconds) < 0:
                self._silent = True
                self.kill()
            elif self._left is not None:
                self._left = left

    def kill(self) -> None:
        """End the process, a stopped one too. A wait for its answer ends."""
        self._process.kill()

    def close(self) -> None:
        """Wait for the end of the process."""
        self.kill()
        self._process.communicate()

    def _death(self) -> str:
        code, name = self._process.wait(), f"a tokeniser process ({self._process.pid})"
        if self._silent:
            return f"{name} gave no answer, as one that is stopped or has no memory left, and was ended"
        if code >= 0:
            return f"{name} died (exit code {code}), what it printed says why"
        memory = ", as the system does when memory runs out: free some" if -code == signal.SIGKILL else ""
        return f"{name} was ended by signal {-code}{memory}"

    def _send(self, message: object) -> None:
        assert self._process.stdin is not None
        pickle.dump(message, self._process.stdin, protocol=5)
        self._process.stdin.flush()


def _in_processes(chunks: Iterator[list[str]], tokenizer_json: str, workers: int) -> Generator[Tokens]:
    """A thread for each worker takes chunk after chunk; at most two chunks a worker are in progress.

    Threads share nothing but queues that no Ctrl-C leaves locked. One that comes within an executor's ``submit`` may: its threads
    then wait for ever.
    """
    with ExitStack() as stack:
        crew: list[_Worker] = []
        tasks: _Queue = queue.SimpleQueue()  # a chunk and where its answer goes; None: the end
        for _ in range(workers):
            worker = _Worker(tokenizer_json)
            stack.callback(worker.close)
            crew.append(worker)
        over = threading.Event()
        threads = [threading.Thread(target=_work, args=(worker, tasks, over), daemon=True) for worker in crew]
        # From here on in the reverse order: the workers end, so no thread waits for one, then the threads do.
        for thread in threads:
            thread.start()
            stack.callback(thread.join)
        for worker in crew:
            stack.callback(tasks.put, None)
            stack.callback(worker.kill)
        threading.Thread(target=_watch, args=(crew, over), daemon=True).start()
        stack.callback(over.set)

        pending: deque[_Queue] = deque()
        for chunk in chunks:
            pending.append(queue.SimpleQueue())
            tasks.put((chunk, pending[-1]))
            if len(pending) > 2 * workers:
                yield _answer(pending.popleft())
        while pending:
            yield _answer(pending.popleft())


def _work(worker: _Worker, tasks: _Queue, over: threading.Event) -> None:
    """Answer chunk after chunk: with its tokens, or with the error that there was."""
    while (task := tasks.get()) is not None and not over.is_set():
        chunk, answer = task
        try:
            answer.put(worker(chunk))
        except Exception as error:  # whatever it is, the thread that waits raises it
            answer.put(error)


def _answer(found: _Queue) -> Tokens:
    answer = found.get()
    if isinstance(answer, Exception):
        raise answer
    assert isinstance(answer, Tokens)
    return answer


def _watch(crew: list[_Worker], over: threading.Event) -> None:
    """Count the seconds for which workers are waited for. Looks are counted, not the clock: while this process is itself
    stopped, so are its workers."""
    look = PATIENCE / 60
    while not over.wait(look):
        for worker in crew:
            worker.pass_time(look)


def _serve() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # a scheduler sends them to all: the parent ends its workers
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    with suppress(
        EOFError, OSError, pickle.UnpicklingError
    ):  # the parent has ended, perhaps in the middle of a message
        tokenizer = load(pickle.load(requests))
        while True:
            tokens = encode(tokenizer, pickle.load(requests))
            pickle.dump((tokens.ids, tokens.lengths, tokens.hashes), replies, protocol=5)
            replies.flush()
    os._exit(0)  # without a last flush into a pipe that nobody reads


if __name__ == "__main__":
    _serve()
