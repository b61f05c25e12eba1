"""A cache of the epochs in use. Each is made once, by the first thread that needs it or ahead of time in a pool.

An epoch of a corpus in parts is held a part at a time: the key is then (epoch, part).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Executor, Future
from threading import Lock
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)  # int, or (epoch, part)
T = TypeVar("T")

HELD = 2  # the epoch that is read and the next one: a step may have packs of both


class Epochs(Generic[K, T]):
    """Epochs by number; the two that were asked for last are kept.

    A thread waits only for the epoch that it wants: the lock guards the table and is never held while an epoch is made,
    which takes seconds for a large corpus.

    Args:
        make: makes the epoch of a number.
    """

    def __init__(self, make: Callable[[K], T]) -> None:
        self._make = make
        self._lock = Lock()
        self._held: OrderedDict[K, Future[T]] = OrderedDict()

    def __call__(self, number: K) -> T:
        """An epoch: made in this thread unless it is kept or being made. Raises what ``make`` raised; the next call tries again."""
        while True:
            epoch, missing = self._slot(number)
            if missing:
                self._fill(number, epoch)
            try:
                return epoch.result()
            except CancelledError:  # its pool was closed before it began: make it here
                continue

    def ahead(self, number: K, pool: Executor) -> None:
        """Let the pool make an epoch, unless it is kept or being made. Threads that want it from now on wait for the pool.

        If the pool is closed before it begins, the next thread that wants the epoch makes it.
        """
        epoch, missing = self._slot(number)
        if missing:
            job = pool.submit(self._fill, number, epoch)
            job.add_done_callback(lambda job: self._forget(number, epoch) if job.cancelled() else None)

    def _slot(self, number: K) -> tuple[Future[T], bool]:
        """(future of an epoch, True if the caller must make it)."""
        with self._lock:
            missing = number not in self._held
            epoch = self._held.setdefault(number, Future())
            self._held.move_to_end(number)
            while len(self._held) > HELD:
                self._held.popitem(last=False)
        return epoch, missing

    def _forget(self, number: K, epoch: Future[T]) -> None:
        with self._lock:
            if self._held.get(number) is epoch:
                del self._held[number]
        epoch.cancel()

    def _fill(self, number: K, epoch: Future[T]) -> None:
        try:
            epoch.set_result(self._make(number))
        except BaseException as error:  # of any kind: threads that wait must learn of it
            with self._lock:
                self._held.pop(number, None)
            epoch.set_exception(error)
