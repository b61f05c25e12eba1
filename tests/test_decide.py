"""Decisions before a step: progress and stop, when to validate and when to save."""

import json
import time
from pathlib import Path

import pytest

from fastkd import recipe
from fastkd.budget import StepCost, Totals
from fastkd.config import resolve
from fastkd.decide import Checkpoints, Decider, Validations

OPTIONS = {"preset": "quickstart", "method": "mlm", "budget_tokens": 1000}


def decider(totals: Totals, **options: object) -> Decider:
    config = resolve({**OPTIONS, **options}).run
    cost = StepCost({"student": 1, "teacher": 0, "loss": 0}, real=100, predicted=15)
    stages = recipe.stages(config.method, recipe.options_class(config.method)())
    return Decider(
        config, totals, stages, lambda number, stage: cost, [0.0] * len(stages), Validations(config.validations, 1)
    )


def spent(tokens: int) -> Totals:
    return Totals(tokens={"real": tokens, "predicted": 0, "unique": 0})


def test_progress_is_one_for_the_last_step_that_fits_and_then_it_stops() -> None:
    assert decider(spent(300)).decide(3, [], interrupted=False).progress == pytest.approx(0.4)
    assert decider(spent(900)).decide(9, [], interrupted=False).progress == 1.0
    assert decider(spent(950)).decide(10, [], interrupted=False).stop
    assert decider(spent(300)).decide(3, [], interrupted=True).interrupted


def test_a_budget_is_spent_where_a_step_like_the_last_does_not_fit() -> None:
    assert not decider(spent(900)).is_spent(9, [])
    assert decider(spent(950)).is_spent(10, [])


def test_a_replayed_ledger_gives_the_progress_and_the_end(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text("".join(json.dumps({"step": n, "progress": n / 2}) + "\n" for n in (1, 2)))
    replayed = decider(spent(0), replay=str(ledger))
    assert [replayed.decide(number, [], interrupted=False).progress for number in (0, 1)] == [0.5, 1.0]
    assert replayed.decide(2, [], interrupted=False).stop and replayed.is_spent(2, []) and not replayed.is_spent(1, [])


def test_validations_come_once_for_each_share_of_the_budget() -> None:
    validations = Validations(4, 1)
    due = [validations.due(progress / 20, 100.0) for progress in range(1, 21)]
    # At the end another one follows.
    assert [number for number, is_due in enumerate(due, start=1) if is_due] == [5, 10, 15]


def test_validations_keep_within_their_share_of_what_is_charged() -> None:
    validations = Validations(4, 2)
    validations.seconds = 0.5  # a second on two devices, 2% of 50
    assert not validations.due(0.25, 49.0)
    assert validations.due(0.5, 50.0)
    validations.count = 1
    assert not validations.due(0.75, 99.0)


def test_validations_go_on_after_a_ledger() -> None:
    validations = Validations(4, 1)
    start = {"event": "validation", "step": 0, "seconds": 9.0}
    lines = [start, {"step": 5, "progress": 0.6}, {"event": "validation", "step": 5, "seconds": 0.25}]
    validations.take_over(lines, 5)
    assert (validations.count, validations.seconds) == (1, 0.25)
    assert not validations.due(0.7, 1e9) and validations.due(0.75, 1e9)


def test_a_checkpoint_is_due_after_its_minutes_if_a_step_was_issued(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    checkpoints = Checkpoints(2.0)
    clock[0] = 121.0
    assert not checkpoints.due()
    checkpoints.unsaved = True
    assert checkpoints.due()
    checkpoints.saved()
    assert not checkpoints.due() and not checkpoints.unsaved
