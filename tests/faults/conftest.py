"""Fixtures of the fault campaign, and the table at its end."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import campaign
import pytest
import run_case
import shim
from campaign import Tally


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the campaign's table is written."""
    group = parser.getgroup("faults")
    group.addoption("--faults-page", type=Path, help="a Markdown page whose table of faults is written anew")
    group.addoption("--faults-json", type=Path, help="a file for the table as JSON, failures included")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker is left alone with it."""
    items.sort(key=lambda item: not ("campaign" in item.keywords and item.path.stem in ("test_soak", "test_workers")))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print what was tried and what survived, and write it where that was asked for."""
    reports = [report for name in ("passed", "failed") for report in terminalreporter.getreports(name)]
    texts = [
        text for report in reports if report.when == "call" for name, text in report.user_properties if name == "fault"
    ]
    found = campaign.merged(sorted((Tally(**json.loads(text)) for text in texts), key=lambda each: each.fault))
    if not found:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line(campaign.table(found))
    if path := config.getoption("faults_json", None):
        path.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n", "utf-8")
    if page := config.getoption("faults_page", None):
        caption = f"{date.today().isoformat()}, {platform.machine()}, Linux {platform.release().split('-')[0]}: `make test-faults`."
        campaign.write_into(page, found, caption)


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Callable[[str, str], AbstractContextManager[Tally]]:
    """Counts the tries of a fault: ``with fault(NAME, PROMISE) as tally``."""
    return lambda name, promise: campaign.tallied(request.node.user_properties, name, promise)


@pytest.fixture(scope="session")
def shimmed() -> None:
    """Skips where faults cannot be placed in a process."""
    if shim.library() is None:
        pytest.skip("needs Linux and a C compiler (cc) for the shim that places faults")


@pytest.fixture(scope="session")
def scratch(from_scratch: list[str], shimmed: None, tmp_path_factory: pytest.TempPathFactory) -> run_case.Case:
    """Five steps of mlm, saved after each, with a cache of its own."""
    options = [*from_scratch, "--student", "1L-24H-12A", "--batch-tokens", "512", "--method", "mlm"]
    options += ["--budget-tokens", "2800", "--checkpoint-minutes", "0", "--log-every", "2"]
    return run_case.undisturbed(options, tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="session")
def recipe(light: list[str], shimmed: None, tmp_path_factory: pytest.TempPathFactory) -> run_case.Case:
    """Some steps by relations, then some by words, saved after each."""
    options = [*light, "--student", "1L-24H-12A", "--batch-tokens", "512", "--method", "minilmv2:0.5>mlm"]
    options += ["--budget-tokens", "3400", "--checkpoint-minutes", "0", "--log-every", "2"]
    return run_case.undisturbed(options, tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="session")
def taught(small: list[str], shimmed: None, tmp_path_factory: pytest.TempPathFactory) -> run_case.Case:
    """Three steps of minilmv2 with the quickstart teacher, saved after each."""
    options = [*small, "--method", "minilmv2", "--budget-tokens", "3500", "--checkpoint-minutes", "0"]
    return run_case.undisturbed(options, tmp_path_factory.mktemp("taught"))
