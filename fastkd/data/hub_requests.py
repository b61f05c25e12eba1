"""Requests to the Hugging Face hub: a failure that may pass is tried again, a lasting one is an error of one line.

Everything that fastkd reads from the hub or sends to it goes through ``ask``.
"""

from __future__ import annotations

import atexit
import json
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

log = logging.getLogger(__name__)

WAITS = (2.0, 8.0, 30.0)  # seconds before each new try, unless the hub says how long
LONGEST_WAIT = 300.0  # seconds: the hub counts requests in windows of five minutes
NO_ANSWER = 45.0  # seconds, for requests to which huggingface_hub sets no limit
LEAST = 1000  # bytes of an answer in so many seconds: a byte now and then is no answer
WORD_AFTER = 10.0  # seconds of a request after which it is said what is waited for
LONGEST_SILENCE = 120.0  # seconds after which a hub that has not answered in time is not asked again
TRANSIENT = (408, 429, 500, 502, 503, 504)
MODEL_FILES = ("*.json", "*.txt", "*.model")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # pickled weights only if there are no safetensors

T = TypeVar("T")


class HubUnreachable(ValueError):
    """The hub did not answer, or is not to be asked (HF_HUB_OFFLINE)."""


class NotOnHub(ValueError):
    """The hub has no such repository, or not for this user."""


def ask(what: str, call: Callable[[], T], *, remedy: str, verb: str = "read") -> T:
    """Call a function that makes a request. Try again after a failure that may pass: no answer, one that was cut off, too
    many requests, an error of the hub's own. Each wait is logged. A hub that stays silent is given up after some minutes.

    Args:
        what: what is asked for, such as ``corpus 'a/b'``.
        call: makes the request.
        remedy: the next command or option that works without it.
        verb: ``read`` or ``push``.

    Raises:
        NotOnHub: no such repository, or not for this user.
        HubUnreachable: anything else; in one line with the remedy.
    """
    from huggingface_hub import close_session, get_session

    began = time.monotonic()
    for wait in (*WAITS, None):
        session = get_session()
        if _limit not in session.event_hooks["request"]:
            atexit.unregister(close_session)  # threads that still wait for an answer would log a closed connection
            hooks = session.event_hooks
            session.event_hooks = {
                "request": [*hooks["request"], _limit],
                "response": [*hooks["response"], _require_progress],
            }
        try:
            with _said(what):
                return call()
        except Exception as error:  # the hub's HTTP library, and so its exceptions, changes from version to version
            given_up = _is_silence(error) and time.monotonic() - began > LONGEST_SILENCE
            if wait is None or given_up or not _is_transient(error):
                raise _explained(what, error, remedy, verb) from error
            seconds = min(_asked_to_wait(error) or wait, LONGEST_WAIT)
            log.warning("%s: %s; trying again in %g s", what, _reason(error), seconds)
        time.sleep(seconds)
    raise AssertionError("the last try returns or raises")


_words: dict[str, float] = {}  # when it was said last what is waited for: threads that wait for the same say it once


@contextmanager
def _said(what: str) -> Iterator[None]:
    """Say what is waited for, if that takes long."""

    def say() -> None:
        now = time.monotonic()
        if now - _words.get(what, -WORD_AFTER) >= WORD_AFTER:
            _words[what] = now
            log.info("waiting for the hub: %s, %g s so far", what, WORD_AFTER)

    timer = threading.Timer(WORD_AFTER, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def resumed(items: Callable[[], Iterator[T]], ask: Callable[[Callable[[], Any]], Any]) -> Iterator[T]:
    """Yield the items of an iterator that makes requests, each through ``ask``. After a failure that may pass, the iterator
    is made again and goes on after the items that were yielded."""
    done, running, end = 0, None, object()

    def following() -> Any:
        nonlocal running
        try:
            running = islice(items(), done, None) if running is None else running
            return next(running, end)
        except Exception:
            running = None
            raise

    while (item := ask(following)) is not end:
        done += 1
        yield item


def begin(work: Callable[[], T]) -> Future[T]:
    """Do some work in a daemon thread; the future holds what it returns or raises.

    Ctrl-C ends the wait for the future, and the process can end before the work does. A pool of ``concurrent.futures``
    would hold up the end of the process until its last job is done: minutes, where a hub does not answer. The work must be
    plain Python: the process aborts if it ends while such a thread is inside a C++ library, such as pyarrow.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, daemon=True, name="background").start()
    return future


def model_folder(name: str, *, remedy: str, weights: bool = True) -> Path:
    """A hub model's files in the hub's own cache, all of one commit. Pickled weights are taken only where there are no others.

    Where the hub cannot be reached, what the cache holds is taken: a commit that was downloaded completely.

    Raises:
        ValueError: there is no such model, or neither hub nor cache have it; in one line.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

    if constants.HF_HUB_OFFLINE and (cached := _cached(name)) is not None:
        return cached

    def download() -> Path:
        info = HfApi().model_info(name, timeout=NO_ANSWER)
        wanted = _wanted([sibling.rfilename for sibling in info.siblings or ()], weights)
        for file in wanted:  # one by one: the library's threads would hold up a Ctrl-C until the hub answers
            hf_hub_download(name, file, revision=info.sha)
        folder = Path(snapshot_download(name, revision=info.sha, allow_patterns=wanted))
        # Points the cache's name at this commit, now that it is complete.
        snapshot_download(name, allow_patterns=wanted)
        return folder

    try:
        return ask(f"model {name!r}", download, remedy=remedy)
    except HubUnreachable as error:
        cached = _cached(name)
        if cached is None:
            raise
        log.warning("%s; going on with what the cache holds", error)
        return cached


def _wanted(files: Sequence[str], weights: bool) -> list[str]:
    """The files of a repository that belong to a model."""
    kind = next((kind for kind in WEIGHTS if any(fnmatch(file, kind) for file in files)), WEIGHTS[0])
    patterns = (*MODEL_FILES, kind) if weights else MODEL_FILES
    return [file for file in files if "/" not in file and any(fnmatch(file, pattern) for pattern in patterns)]


def _cached(name: str) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return None


def _limit(request: Any) -> None:
    """Set a limit for a request that has none."""
    waits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {kind: NO_ANSWER if wait is None else wait for kind, wait in waits.items()}


def _require_progress(response: Any) -> None:
    """Let an answer that comes drop by drop end as one that does not come: no wait for the next drop is too long."""
    library = sys.modules[type(response).__module__.partition(".")[0]]  # httpx or httpx2
    plain = response.stream

    class Watched(library.SyncByteStream):  # type: ignore[name-defined]
        def __iter__(self) -> Iterator[bytes]:
            parts, waited, got = iter(plain), 0.0, 0
            while True:
                before = time.monotonic()
                if (part := next(parts, None)) is None:
                    return
                waited, got = waited + time.monotonic() - before, got + len(part)
                if waited >= NO_ANSWER:
                    if got < LEAST:
                        raise library.ReadTimeout(f"{got} bytes in {waited:.0f} s", request=response.request)
                    waited, got = 0.0, 0
                yield part

        def close(self) -> None:
            plain.close()

    response.stream = Watched()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_a(error: BaseException, *names: str) -> bool:
    """Whether an error is of one of these classes, by name: the classes of httpx and httpx2 are not related."""
    return any(kind.__name__ in names for kind in type(error).__mro__)


def _response(error: BaseException) -> Any:
    """The HTTP response that an error came from; None where there was none."""
    answers = (getattr(cause, "response", None) for cause in _chain(error))
    return next((answer for answer in answers if answer is not None), None)


def _is_transient(error: BaseException) -> bool:
    answer = _response(error)
    if answer is not None:
        return answer.status_code in TRANSIENT
    causes = list(_chain(error))
    if any(_is_a(cause, "ConnectError") for cause in causes):
        return False  # no network: waiting some seconds does not help
    cut = any("Consistency check failed" in str(cause) for cause in causes)
    return cut or any(_is_a(cause, "TransportError", "TimeoutError") for cause in causes)


def _is_silence(error: BaseException) -> bool:
    """Whether the hub did not answer in time."""
    return _response(error) is None and any(_is_a(one, "TimeoutException", "TimeoutError") for one in _chain(error))


def _asked_to_wait(error: BaseException) -> float | None:
    """The seconds that the hub asks to wait, plus one, since it rounds down."""
    headers = getattr(_response(error), "headers", {})
    found = re.fullmatch(r"\d+", headers.get("Retry-After", "")) or re.search(
        r"(?<=;t=)\d+", headers.get("RateLimit", "")
    )
    return float(found[0]) + 1 if found else None


def _explained(what: str, error: Exception, remedy: str, verb: str) -> ValueError:
    """An error as one line."""
    from huggingface_hub import constants

    causes = list(_chain(error))
    answer = _response(error)
    if any(_is_a(cause, "GatedRepoError") for cause in causes):
        return NotOnHub(f"{what} is gated: accept its terms on its page, log in with `hf auth login`, or {remedy}")
    if any(_is_a(cause, "RevisionNotFoundError") for cause in causes):
        return NotOnHub(f"{what}: the hub has no such revision: correct what follows the @, or {remedy}")
    missing = any(_is_a(cause, "RepositoryNotFoundError", "DatasetNotFoundError") for cause in causes)
    if missing and (answer is None or answer.status_code in (401, 404)):
        return NotOnHub(
            f"{what} is neither here nor on the hub for you to read: correct the name, log in with `hf auth login`, or {remedy}"
        )
    if answer is None and type(error) is ValueError and not constants.HF_HUB_OFFLINE:
        return ValueError(f"{what}: {' '.join(str(error).split())}")  # about a value: it names those that work
    return HubUnreachable(
        f"cannot {verb} {what} {'to' if verb == 'push' else 'from'} the hub ({_reason(error)}): {_next(error, remedy)}"
    )


def _reason(error: BaseException) -> str:
    """What went wrong, in a few words."""
    from huggingface_hub import constants

    causes = list(_chain(error))
    answer = _response(error)
    if any(isinstance(cause, json.JSONDecodeError) or _is_a(cause, "FileMetadataError") for cause in causes):
        return "what answered is not the hub: a web page or a proxy"
    if answer is not None:
        said = {401: "it refuses the token", 403: "it forbids it", 404: "not found", 429: "too many requests"}
        return f"status {answer.status_code}, {said.get(answer.status_code, 'an error of its own')}"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set and the cache has not all of it"
    if _is_silence(error):
        return "no answer in time"
    if any(_is_a(cause, "ConnectError") for cause in causes):
        return "no connection"
    if any(_is_a(cause, "TransportError") or "Consistency check failed" in str(cause) for cause in causes):
        return "the answer was cut off"
    first, last = str(error), str(causes[-1])
    text = " ".join((first if last in first else f"{first} {last}").split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " …"


def _next(error: BaseException, remedy: str) -> str:
    """What to do about it."""
    answer = _response(error)
    if answer is not None and answer.status_code == 401:
        return f"log in again with `hf auth login`, unset HF_TOKEN, or {remedy}"
    if _is_transient(error):
        return f"issue the same command again later, or {remedy}"
    return remedy
