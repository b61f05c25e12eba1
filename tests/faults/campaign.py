"""How often a fault is tried: a few places in the short form, all of them in the campaign; and what came of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

BEGIN, END = "<!-- make test-faults -->", "<!-- end of what it writes -->"
SHOWN = 12  # failures that an assertion lists


@dataclass(frozen=True)
class Places:
    """Some of the places 1 … total: ``count`` of them, evenly spread, or every ``step``-th from ``first`` on."""

    count: int = 0
    first: int = 1
    step: int = 1

    def of(self, total: int) -> list[int]:
        """The places, each at most once."""
        if self.count:
            return sorted({1 + (2 * i + 1) * total // (2 * self.count) for i in range(min(self.count, total))})
        return list(range(self.first, total + 1, self.step))

    def __str__(self) -> str:
        return f"{self.count}-places" if self.count else f"every-{self.step}-from-{self.first}"


def places(short: int, shares: int, every: int = 1) -> pytest.MarkDecorator:
    """A test of ``short`` places, and in the campaign of every ``every``-th, as ``shares`` tests that may run side by side."""
    marks = [pytest.mark.campaign, pytest.mark.timeout(1700)]
    long = [pytest.param(Places(first=1 + every * share, step=every * shares), marks=marks) for share in range(shares)]
    return pytest.mark.parametrize("places", [Places(count=short), *long], ids=str)


def tries(short: int, long: int, shares: int = 1) -> pytest.MarkDecorator:
    """A test of the numbers 0 … short − 1 (none for 0), and in the campaign of those up to ``long``, as ``shares`` tests."""
    marks = [pytest.mark.campaign, pytest.mark.timeout(1700)]
    parts = [range(long * share // shares, long * (share + 1) // shares) for share in range(shares)]
    given = [*([range(short)] if short else []), *(pytest.param(part, marks=marks) for part in parts)]
    return pytest.mark.parametrize("numbers", given, ids=lambda numbers: f"{numbers.start}-to-{numbers.stop}")


def some(names: Iterable[str], short: Sequence[str]) -> list[object]:
    """Parameters of a test: the short form has those of ``short``, the campaign all."""
    return [name if name in short else pytest.param(name, marks=pytest.mark.campaign) for name in names]


@dataclass
class Tally:
    """What came of the tries of one fault."""

    fault: str
    promise: str
    tries: int = 0
    survived: int = 0
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def attempt(self, label: str) -> Iterator[None]:
        """One try: it survives if nothing in it raises."""
        self.tries += 1
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split())
            self.failures.append(
                f"{label}: {text[:400]}" if isinstance(error, AssertionError) else f"{label}: {error!r}"
            )
        else:
            self.survived += 1


@contextmanager
def tallied(properties: list[tuple[str, object]], fault: str, promise: str) -> Iterator[Tally]:
    """Count tries, all of which are made; at the end they are reported, and a failure is one of the test."""
    tally = Tally(fault, promise)
    try:
        yield tally
    finally:
        properties.append(("fault", json.dumps(asdict(tally))))
    more = f"\n… and {len(tally.failures) - SHOWN} more" if len(tally.failures) > SHOWN else ""
    assert not tally.failures, f"{tally.survived} of {tally.tries}:\n" + "\n".join(tally.failures[:SHOWN]) + more


def merged(found: Sequence[Tally]) -> list[Tally]:
    """One tally a fault, in order of first appearance."""
    faults: dict[str, Tally] = {}
    for each in found:
        total = faults.setdefault(each.fault, Tally(each.fault, each.promise))
        total.tries += each.tries
        total.survived += each.survived
        total.failures += each.failures
    return list(faults.values())


def table(found: Sequence[Tally]) -> str:
    """The faults as a table of Markdown."""
    head = "| fault | tries | survived | what is promised |\n| --- | ---: | ---: | --- |\n"
    rows = [f"| {each.fault} | {each.tries:,} | {each.survived:,} | {each.promise} |\n" for each in found]
    total = f"| **together** | **{sum(t.tries for t in found):,}** | **{sum(t.survived for t in found):,}** | |\n"
    return head + "".join(rows) + total


def write_into(page: Path, found: Sequence[Tally], caption: str) -> None:
    """Put the table between the two marks of a page.

    Raises:
        ValueError: the page has not both marks.
    """
    text = page.read_text("utf-8")
    block = f"{BEGIN}\n\n{table(found)}\n{caption}\n\n{END}"
    new, times = re.subn(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: block, text, flags=re.DOTALL)
    if times != 1:
        raise ValueError(f"{page} lacks a line {BEGIN} and a later line {END}")
    page.write_text(new, "utf-8")
