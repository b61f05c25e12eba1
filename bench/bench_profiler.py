"""What timing the phases of a step costs: the same steps with the profiler and without, taking turns.

    python -m bench.bench_profiler [--steps 100] [options of a run]
    python -m bench.bench_profiler --teacher BUNDLE/teacher --corpus BUNDLE/shards          without packages and network

``with`` is what a run does: a mark after each phase, a lap, its seconds, the joules. ``without`` has a clock whose marks
do nothing. Steps of both kinds alternate on the same trainer, so that a machine that slows down slows both. ``calls`` is
the time of a step's profiler calls only, which a difference of two noisy medians cannot resolve.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from bench.results import RESULTS, device_folder
from fastkd import files
from fastkd.config import parse
from fastkd.device import environment
from fastkd.device.clock import PHASES, PhaseClock
from fastkd.device.power import PowerMeter
from fastkd.distributed import World
from fastkd.setup import prepare
from fastkd.train import Trainer

RUN = ["--preset", "quickstart", "--student", "2L-192H-12A", "--budget-tokens", "1e9"]


class NoClock:
    """A clock that keeps no time."""

    def mark(self, phase: str) -> None:
        """Nothing."""


def timed_step(trainer: Trainer, number: int, clock: Any, settle: Callable[[], object]) -> float:
    """Wall-clock seconds of one step with this clock, the reading of its lap included."""
    batches = trainer.stream.step(number)
    trainer.clock = cast(PhaseClock, clock)
    start = time.perf_counter()
    clock.mark("data")
    loss, _, _ = trainer.step(batches, lr=trainer.setup.lr)
    float(loss)
    clock.mark("other")
    settle()
    return time.perf_counter() - start


def calls_of_a_step(device: torch.device, power: PowerMeter) -> float:
    """Seconds of a step's profiler calls on their own, one micro-batch a step."""
    clock = PhaseClock(device)
    start = time.perf_counter()
    repeats = 1000
    for _ in range(repeats):
        for phase in PHASES:
            clock.mark(phase)
        clock.lap().seconds()
        power.joules_since_last()
    return (time.perf_counter() - start) / repeats


def measure(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Seconds of ``steps`` steps of either kind."""
    power = PowerMeter([trainer.device])
    clock = PhaseClock(trainer.device)
    kinds: dict[str, tuple[Any, Callable[[], object]]] = {
        "with": (clock, lambda: (clock.lap().seconds(), power.joules_since_last())),
        "without": (NoClock(), lambda: None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(-5, steps):  # the first few warm up
        order = list(kinds) if number % 2 else list(reversed(kinds))
        for name in order:
            taken = timed_step(trainer, abs(number), *kinds[name])
            if number >= 0:
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    calls = calls_of_a_step(trainer.device, power)
    return {
        "median_seconds": medians,
        "quartiles": {name: statistics.quantiles(values, n=4) for name, values in seconds.items()},
        "overhead": medians["with"] / medians["without"] - 1,
        "calls_seconds": calls,
        "calls_share_of_a_step": calls / medians["without"],
    }


def main() -> None:
    """Measure, print and file the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.bench_profiler", description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="steps of either kind")
    parser.add_argument("--results", type=Path, default=RESULTS / device_folder(), help="folder of profiler.json")
    own, options = parser.parse_known_args()
    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    measured = measure(Trainer(prepare(parse([*RUN, *options]), world)), own.steps)
    facts = {"date": datetime.date.today().isoformat(), "run": [*RUN, *options], "steps": own.steps}
    path = files.write(
        own.results / "profiler.json", json.dumps(environment.describe() | facts | measured, indent=1) + "\n"
    )
    print(json.dumps(measured, indent=1))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
