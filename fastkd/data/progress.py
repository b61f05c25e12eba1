"""Progress of tokenising a corpus: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Self

from rich import get_console
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

PLAIN_SECONDS = 10.0


class Progress:
    """Counts documents and tokens, and shows nothing."""

    documents = tokens = 0

    def advance(self, documents: int, tokens: int, share: float) -> None:
        """Count more documents and tokens; ``share`` of the corpus has been read in all, as far as is known."""
        self.documents += documents
        self.tokens += tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Shown(Progress):
    """Shows documents, tokens a second, the share that is done, and the time left.

    Args:
        say: prints a line; used where ``console`` is no terminal.
        wanted: tokens after which building ends, if the corpus does not end before; None: the whole corpus is read.
        console: where the bar is drawn; default: standard output.
    """

    def __init__(self, say: Callable[[str], object], wanted: int | None, console: Console | None = None) -> None:
        self._say, self._wanted = say, wanted
        self._began = self._told = time.monotonic()
        self._first_share: float | None = None  # of the corpus when this began: building may go on within it
        self._done = 0.0
        console = console or get_console()
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def advance(self, documents: int, tokens: int, share: float) -> None:
        """Count, and show the progress."""
        super().advance(documents, tokens, share)
        if self._first_share is None:
            self._first_share = share if self.tokens != tokens else 0.0
        read = (share - self._first_share) / (1 - self._first_share) if self._first_share < 1 else 1.0
        self._done = min(1.0, max(read, self.tokens / self._wanted if self._wanted else 0.0))
        now = time.monotonic()
        if self._live is not None:
            self._live.update(self._bar(now), refresh=True)
        elif now - self._told >= PLAIN_SECONDS:
            self._told = now
            self._say(self._text(now))

    def _text(self, now: float) -> str:
        seconds = max(now - self._began, 1e-9)
        left = f"{seconds * (1 - self._done) / self._done:.0f} s left" if self._done else "time left not known"
        return (
            f"tokenising: {self.documents:,} documents, {self.tokens / 1e6:.1f} M tokens, "
            f"{self.tokens / seconds / 1e6:.2f} M tokens/s, {self._done:.0%}, {left}"
        )

    def _bar(self, now: float) -> Table:
        grid = Table.grid(padding=(0, 1))
        grid.add_row(ProgressBar(total=1.0, completed=self._done, width=24), self._text(now))
        return grid
