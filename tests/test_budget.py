"""The ledger adds up, and the meter stops neither early nor late."""

import json
import random
from pathlib import Path

import pytest

from fastkd.budget import Budget, Charge, Ledger, Meter, StepCost, Totals, replayed_progress, surviving_steps
from fastkd.files import read_jsonl

COST = StepCost({"student": 60, "teacher": 30, "loss": 10}, real=4000, predicted=600)
PHASES = {"student": 0.3, "backward": 0.6, "optimizer": 0.1}


def charge_step(ledger: Ledger, seconds: float = 1.0) -> float:
    phase_s = {name: share * seconds for name, share in PHASES.items()}
    return ledger.step(COST, phase_s, progress=0.1, epoch=0.0, unique=4000, joules=None, lr=1e-4, loss=2.0)


def spend(budget: Budget, seconds_of_a_step: list[float], tmp_path: Path) -> tuple[Totals, list[float]]:
    totals = Totals()
    meter, progress = Meter(budget, totals, step_seconds=1.0), []
    ledger = Ledger(tmp_path / "ledger.jsonl", "loop", totals)
    for seconds in seconds_of_a_step:
        now = meter.next_progress(COST)
        if now is None:
            break
        progress.append(now)
        meter.observe(charge_step(ledger, seconds))
    ledger.close()
    return totals, progress


@pytest.mark.parametrize("seed", range(10))
def test_gpu_seconds_end_within_a_step_of_the_budget(seed: int, tmp_path: Path) -> None:
    jitter = random.Random(seed)
    budget = Budget("gpu-seconds", 40 + 37 * seed)
    totals, progress = spend(budget, [jitter.uniform(0.97, 1.03) for _ in range(1000)], tmp_path)
    assert -0.1 <= budget.amount - totals.charged_s <= 1.05
    assert progress[-1] == 1.0
    assert all(0 < p <= 1 for p in progress)
    assert progress == sorted(progress)


@pytest.mark.parametrize(("unit", "step"), [("flops", 100), ("tokens", 4000)])
def test_flops_and_tokens_are_never_exceeded_and_leave_under_a_step(unit, step, tmp_path: Path) -> None:
    budget = Budget(unit, 17.5 * step)
    totals, progress = spend(budget, [1.0] * 100, tmp_path)
    assert totals.step == 17
    assert progress[-1] == 1.0
    assert progress[0] == pytest.approx(1 / 17.5)


def test_a_budget_under_one_step_allows_none() -> None:
    assert Meter(Budget("flops", 99), Totals()).next_progress(COST) is None
    assert Meter(Budget("gpu-seconds", 0.5), Totals(), step_seconds=1.0).next_progress(COST) is None


def test_steps_on_the_device_count_before_they_are_timed() -> None:
    meter = Meter(Budget("gpu-seconds", 2.5), Totals(), step_seconds=1.0)
    assert meter.next_progress(COST, in_flight=1) is not None
    assert meter.next_progress(COST, in_flight=2) is None


def test_lines_hold_cumulative_totals(tmp_path: Path) -> None:
    totals = Totals()
    ledger = Ledger(tmp_path / "ledger.jsonl", "loop", totals, devices=2)
    for _ in range(3):
        charge_step(ledger)
    ledger.close()
    last = read_jsonl(tmp_path / "ledger.jsonl")[-1]
    assert last["step"] == 3
    assert last["charged_s"] == pytest.approx(6.0)  # two devices
    assert last["flops"] == {"student": 180, "teacher": 90, "loss": 30}
    assert last["tokens"] == {"real": 12000, "predicted": 1800, "unique": 4000}
    assert last["joules"] is None


@pytest.mark.parametrize(("charge", "expected"), [("compute", 1.0), ("loop", 4.0), ("all", 9.0)])
def test_charging_policies(charge: Charge, expected: float, tmp_path: Path) -> None:
    totals = Totals()
    ledger = Ledger(tmp_path / "ledger.jsonl", charge, totals)
    ledger.event("setup", 5.0)
    charge_step(ledger)
    ledger.event("validation", 2.0)
    ledger.event("checkpoint", 1.0)
    ledger.event("validation", 7.0, in_loop=False)  # after the last step: free under every policy
    ledger.close()
    assert totals.charged_s == pytest.approx(expected)
    events = [line for line in read_jsonl(tmp_path / "ledger.jsonl") if "event" in line]
    assert [line["event"] for line in events] == ["setup", "validation", "checkpoint", "validation"]


def test_steps_lost_in_a_crash_do_not_count_twice(tmp_path: Path) -> None:
    path, totals = tmp_path / "ledger.jsonl", Totals()
    ledger = Ledger(path, "loop", totals)
    for _ in range(4):
        charge_step(ledger)
    totals.step = 2  # back at a checkpoint
    ledger.event("crash", 2.0, lost_steps=2)
    charge_step(ledger)
    ledger.close()
    with open(path, "a") as file:
        file.write('{"step": 4, "prog')  # torn by kill -9
    assert [line["step"] for line in surviving_steps(path)] == [1, 2, 3]
    assert json.loads(path.read_text().splitlines()[-2])["charged_s"] == pytest.approx(7.0)


def test_what_is_replayed_is_the_progress_of_the_steps_that_count(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text(
        '{"event": "setup", "seconds": 1}\n{"step": 1, "progress": 0.5}\n{"step": 2, "progress": 0.9}\n'
        '{"event": "crash", "step": 1}\n{"step": 2, "progress": 0.4}\n{"step": 3, "progress": 1.0}\n'
    )
    assert replayed_progress(path) == [0.5, 0.4, 1.0]  # the step after a fast one may be behind it


def test_a_checkpoint_fills_in_what_rank_0_died_before_writing(tmp_path: Path) -> None:
    path, totals = tmp_path / "ledger.jsonl", Totals()
    ledger = Ledger(path, "loop", totals)
    for _ in range(5):
        charge_step(ledger)
    ledger.close()
    whole, recent = path.read_text(), list(ledger.recent)
    path.write_text("".join(whole.splitlines(keepends=True)[:4]))
    resumed = Ledger(path, "loop", totals)
    resumed.complete(recent)
    resumed.complete(recent)
    resumed.close()
    assert path.read_text() == whole
    assert [line["step"] for line in surviving_steps(path)] == [1, 2, 3, 4, 5]
