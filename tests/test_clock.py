"""Phases are contiguous and sum to the wall clock."""

import json
import time
from pathlib import Path

import pytest
import torch

from fastkd.config import parse
from fastkd.device.clock import PHASES, PhaseClock, now, trace
from fastkd.distributed import World
from fastkd.loop import Loop
from fastkd.monitor import Monitor
from fastkd.run_folder import read_run
from fastkd.setup import prepare
from fastkd.train import Trainer

CPU = torch.device("cpu")


def test_phases_sum_to_the_wall_clock() -> None:
    start = now()
    clock = PhaseClock(CPU)
    laps = []
    for _ in range(50):
        torch.randn(200, 200) @ torch.randn(200, 200)
        clock.mark("student")
        clock.mark("loss")
        laps.append(clock.lap().seconds())
    wall = now() - start
    assert sum(sum(lap.values()) for lap in laps) == pytest.approx(wall, rel=0.01)
    assert set(laps[0]) == set(PHASES)


def test_an_event_takes_all_that_was_marked_within() -> None:
    clock = PhaseClock(CPU)
    clock.mark("student")
    torch.randn(300, 300) @ torch.randn(300, 300)
    clock.mark("loss")
    seconds = clock.event("validation")
    assert seconds > 0
    assert sum(clock.lap().seconds().values()) == 0


def test_a_changed_wall_clock_changes_nothing(monkeypatch) -> None:
    clock = PhaseClock(CPU)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    clock.mark("data")
    assert 0 <= clock.lap().seconds()["data"] < 5


def test_steps_and_events_of_a_loop_sum_to_its_wall_clock(small: list[str], tmp_path: Path) -> None:
    options = [*small, "--method", "minilmv2", "--checkpoint-minutes", "0.002", "--budget-tokens", "8000"]
    trainer = Trainer(prepare(parse(options), World()))
    with Monitor(tmp_path, 8000, "tokens") as monitor:
        loop = Loop(trainer, tmp_path, monitor, step_seconds=[0.1])
        loop.record_validation(0.0, in_loop=False)
        start = now()
        loop.run()
        wall = now() - start
        loop.ledger.close()
    run = read_run(tmp_path)
    saves = [event for event in run.events if event["event"] == "checkpoint"]
    assert any(save["charged"] for save in saves)
    at_the_end = sum(save["seconds"] for save in saves if not save["charged"])
    assert run.accounted_s == pytest.approx(wall - at_the_end, rel=0.01)


def test_trace_writes_what_ran(tmp_path: Path) -> None:
    with trace(tmp_path / "trace.json", 2) as step:
        for _ in range(5):
            torch.randn(8, 8) @ torch.randn(8, 8)
            step()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any("mm" in event.get("name", "") for event in events)
