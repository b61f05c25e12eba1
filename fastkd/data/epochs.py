"""The epochs in use: each is made once, whichever thread asks first, and ahead of its need where a pool is given.

An epoch of a corpus in parts is held a part at a time.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Executor, Future
from threading import Lock
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)  # int, or (epoch, part)
T = TypeVar("T")

HELD = 2  # the epoch that is read and the next one: a step may lie in both


class Epochs(Generic[K, T]):
    """Epochs by number; the two that were asked for last are held.

    Threads that want an epoch which is being made wait only for that one: the lock guards the table and is never held
    while an epoch is made, which takes seconds for a large corpus.

    Args:
        make: makes an epoch of its number.
    """

    def __init__(self, make: Callable[[K], T]) -> None:
        self._make = make
        self._lock = Lock()
        self._held: OrderedDict[K, Future[T]] = OrderedDict()

    def __call__(self, number: K) -> T:
        """An epoch: made here unless it is held or being made. Raises what making it raised; the next call tries again."""
        while True:
            epoch, missing = self._slot(number)
            if missing:
                self._fill(number, epoch)
            try:
                return epoch.result()
            except CancelledError:  # its pool was closed before it began
                continue

    def ahead(self, number: K, pool: Executor) -> None:
        """Have the pool make an epoch unless it is held or being made; whoever wants it from now on waits for the pool.

        A pool that is closed before it begins leaves the epoch to the next who wants it.
        """
        epoch, missing = self._slot(number)
        if missing:
            job = pool.submit(self._fill, number, epoch)
            job.add_done_callback(lambda job: self._forget(number, epoch) if job.cancelled() else None)

    def _slot(self, number: K) -> tuple[Future[T], bool]:
        """The place of an epoch, and whether nobody has begun to make it; it is the caller who must then."""
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
        except BaseException as error:  # those who wait must not wait for ever
            with self._lock:
                self._held.pop(number, None)
            epoch.set_exception(error)
