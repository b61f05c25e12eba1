"""A hundred steps of each method on the quickstart's teacher and text give the losses that they gave before."""

import json
from pathlib import Path

import golden
import pytest

from fastkd import methods

KNOWN = json.loads(golden.FILE.read_text())
EXPLAIN = f"where the numerics were meant to change, explain it in LOG.md and issue: {golden.RENEW}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


@pytest.fixture(scope="module")
def found(quickstart_teacher: Path, folder: Path) -> dict[str, list[float]]:
    return golden.all_losses(folder)


def first_beyond(found: list[float], known: list[float]) -> int | None:
    """The first step, from 1, whose loss differs by more than processors do."""
    differences = enumerate(golden.differences(found, known), start=1)
    return next((step for step, difference in differences if not difference <= KNOWN["tolerance"]), None)


@pytest.mark.parametrize("method", methods.available())
def test_a_hundred_losses_are_what_they_were(method: str, found: dict[str, list[float]]) -> None:
    assert method in KNOWN["losses"], f"{method} has no golden losses yet; {EXPLAIN}"
    step = first_beyond(found[method], KNOWN["losses"][method])
    worst = max(golden.differences(found[method], KNOWN["losses"][method]))
    assert step is None, f"{method}: losses differ from step {step} on, by up to {worst:.1e} of their size; {EXPLAIN}"


def test_a_small_change_of_the_optimiser_does_not_pass(found: dict[str, list[float]], folder: Path) -> None:
    """AdamW's second beta, by a ten-thousandth."""
    assert first_beyond(golden.losses("mlm", folder, adam_beta2=0.9801), KNOWN["losses"]["mlm"])
