"""What a busy program beside a run costs on a CPU, for several ways in which OpenMP's threads wait for one another.

    python -m bench.neighbour [--rounds 8] [--settings default,own,passive] [--neighbours 0,1,2] [options of a run]

``own`` is what fastkd does (``fastkd/device/waiting.py``); ``default``, ``passive`` and numbers of spins are settings of libgomp.
A process for each setting trains. They take turns, a few steps each, by themselves and beside busy loops, which run in
sessions of their own as a program in another window does. Whatever else the machine does affects all of them; "alone" needs
a machine with nothing else to do, and the result says what the load was before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.results import RESULTS, device_folder, measured_on
from fastkd import files
from fastkd.config import parse
from fastkd.distributed import World
from fastkd.setup import prepare
from fastkd.train import Trainer

RUN = ["--preset", "quickstart", "--budget-tokens", "1e9"]
WARMUP_STEPS = 3
SPINS = "GOMP_SPINCOUNT"
VARIABLES = ("OMP_WAIT_POLICY", SPINS)
COLUMNS = ("busy programs", "waiting", "median", "quartiles", "least", "median over the first's")


def environment_of(setting: str) -> dict[str, str]:
    """Variables of a setting; ``own`` and ``default`` set none."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    if setting in ("own", "default"):
        return kept
    return kept | ({"OMP_WAIT_POLICY": "passive"} if setting == "passive" else {SPINS: str(int(setting))})


class Worker:
    """A process that trains with one setting, some steps at a time."""

    def __init__(self, setting: str, options: Sequence[str]) -> None:
        argv = [sys.executable, "-m", "bench.neighbour", "--worker", setting, *options]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(argv, env=environment_of(setting), **pipes)

    def steps(self, count: int) -> list[float]:
        """Wall-clock seconds of ``count`` steps."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        return list(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        with self.process:
            self.process.terminate()


def work(setting: str, options: Sequence[str]) -> None:
    """A worker: builds the trainer, then does as many steps as each line of its input says."""
    trainer, done = Trainer(prepare(parse([*RUN, *options]), World())), 0
    if setting != "own":
        trainer.waiting = None
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            batches = trainer.stream.step(done)
            start = time.perf_counter()
            float(trainer.step(batches, lr=trainer.setup.lr)[0])
            seconds.append(time.perf_counter() - start)
            done += 1
        print(json.dumps(seconds), flush=True)


@contextlib.contextmanager
def busy(neighbours: int) -> Iterator[None]:
    """Other programs that compute all the time."""
    argv = [sys.executable, "-c", "while True: pass"]
    with contextlib.ExitStack() as running:
        for _ in range(neighbours):
            process = running.enter_context(subprocess.Popen(argv, start_new_session=True))
            running.callback(process.kill)
        yield


def measure(
    settings: list[str], neighbours: list[int], rounds: int, steps: int, options: Sequence[str]
) -> dict[str, Any]:
    """Seconds of every step, by number of neighbours and setting."""
    seconds: dict[int, dict[str, list[float]]] = {n: {name: [] for name in settings} for n in neighbours}
    with contextlib.ExitStack() as running:
        workers = {name: running.enter_context(contextlib.closing(Worker(name, options))) for name in settings}
        for worker in workers.values():
            worker.steps(WARMUP_STEPS)
        for number in range(rounds):
            order = settings[number % len(settings) :] + settings[: number % len(settings)]
            for count in neighbours:
                with busy(count):
                    for name in order:
                        seconds[count][name] += workers[name].steps(steps)
    return {str(count): {name: summary(found) for name, found in rows.items()} for count, rows in seconds.items()}


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, quartiles and the least of some seconds."""
    low, median, high = statistics.quantiles(seconds, n=4)
    return {"median_s": median, "low_s": low, "high_s": high, "least_s": min(seconds), "steps": len(seconds)}


def table(measured: dict[str, Any]) -> str:
    """What was measured, in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| ---: | --- | ---: | ---: | ---: | ---: |"]
    for count, rows in measured.items():
        first = next(iter(rows.values()))["median_s"]
        for name, row in rows.items():
            median, low, high, least = (row[key] for key in ("median_s", "low_s", "high_s", "least_s"))
            cells = (
                count,
                name,
                f"{median:.3f} s",
                f"{low:.3f} to {high:.3f} s",
                f"{least:.3f} s",
                f"{median / first:.3f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and file the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.neighbour", description=__doc__)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="steps of a setting in its turn")
    parser.add_argument("--settings", default="default,own,passive", help="default, own, passive or numbers of spins")
    parser.add_argument("--neighbours", default="0,1,2", help="numbers of busy programs")
    parser.add_argument("--results", type=Path, default=RESULTS / device_folder("cpu"), help="folder of neighbour.json")
    own, options = parser.parse_known_args()
    if own.worker:
        work(own.worker, options)
        return
    load, counts = os.getloadavg()[0], [int(count) for count in own.neighbours.split(",")]
    measured = measure(own.settings.split(","), counts, own.rounds, own.steps, options)
    facts = measured_on() | {"run": [*RUN, *options], "load_before": load, "seconds": measured}
    files.write(own.results / "neighbour.json", json.dumps(facts, indent=1) + "\n")
    print(table(measured))


if __name__ == "__main__":
    main()
