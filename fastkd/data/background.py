"""Work in threads that nothing has to wait for: Ctrl-C ends the wait for one, and the process ends without it.

A pool of ``concurrent.futures`` holds up the end of the process until its last job is done, which for a question to a hub
that does not answer is minutes. The work is plain Python: the end of the process aborts where such a thread is inside a
C++ library, such as pyarrow.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def begin(work: Callable[[], T]) -> Future[T]:
    """Do some work in a thread of its own; the future holds what it returns or raises."""
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
