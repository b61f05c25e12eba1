"""A plugin of pytest that writes each test's outcome as soon as it is known: a run that is cut off leaves those it had.

pytest -p bench.device.outcomes --outcomes FILE tests        a line of JSON a test; with xdist, of all workers
    … --share 2/3                                            the second of three shares of the tests
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastkd import files


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="file for the outcomes")
    parser.addoption("--share", default="1/1", help="run only this share of the tests, as 2/3")


@pytest.hookimpl(trylast=True)  # of what -k and -m leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Every n-th test: neighbours often differ in their data only, so each share has of every kind."""
    number, of = map(int, config.getoption("--share").split("/"))
    items[:] = items[number - 1 :: of]


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput") and config.getoption("--outcomes"):  # xdist's controller hears of all tests
        config.pluginmanager.register(_Writer(config.getoption("--outcomes")))


class _Writer:
    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_text("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test that passed counts once it was called, one that failed or was skipped in whichever phase it did."""
        if report.when == "call" or report.outcome != "passed":
            kind = "error" if report.failed and report.when != "call" else report.outcome
            self._add(report.nodeid, kind, report.duration, _message(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that could not be collected."""
        if report.failed:
            self._add(report.nodeid, "error", 0.0, _message(report))

    def _add(self, test: str, outcome: str, seconds: float, message: str) -> None:
        row = {"test": test, "outcome": outcome, "seconds": seconds, "message": message}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(files.to_line(row))


def _message(report: Any) -> str:
    """Where a test failed and the line that says why."""
    if not report.failed:
        return ""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return f"{Path(crash.path).name}:{crash.lineno}: {crash.message.strip().splitlines()[0]}"[:400]
    lines = [line for line in str(report.longrepr).splitlines() if line.strip()]
    return lines[-1][:400] if lines else ""
