"""Fused losses and their peers, value and gradient together: ``python -m bench.device.timed_kernels JSON``, for ``kernels``.

In each case fastkd and its definition take turns; once all cases have had them, the others take turns among themselves. On
a GPU the device's own time of a call is taken (``timer``): as a CUDA graph, or by events where a peer cannot be captured. On a
CPU, in tiny sizes, by the wall clock.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import losses, roofline
from bench.contenders import Contender, Inputs, Loss, contenders, first_rows, gradient_error, step
from bench.device import environment, part, worker
from bench.device.part import Row
from bench.device.timer import Timer, broken, give_memory_back
from bench.losses.packed import PackedCase
from bench.memory import gpu_peak

# By worth; the cases that are left out here only differ in size. A kernel that is not named gives all its cases.
CE, KL, KL_CE = ("linear_kd", "ce 768"), ("linear_kd", "kl 384/768"), ("linear_kd", "kl+ce 768/768")
A48, SCORE = ("relation_kl", "256×128, 768, A=48"), ("score_mse", "256×128, 768/768, A=12")
WANTED = (
    CE,
    A48,
    ("relation_kl", "text, 760×43, 768, A=48"),
    KL,
    SCORE,
    ("relation_kl", "256×128, 768, A=12"),
    ("relation_kl", "256×128, 768, A=12 cross"),
    KL_CE,
    ("hidden_mse", "131072×768"),
    ("relation_kl", "8×1024, 768, A=48"),
)
COMPILED, PEERED = {CE, A48, SCORE}, {A48, KL, KL_CE}
OURS, OTHERS = "fastkd", "others"  # whose turn it is
ROUNDS, ROUND_MS = 3, 10  # of each contender
FIRST_S, COMPILE_S = 8.0, 12.0  # of a case, until one was timed, and of torch.compile


def chosen(tiny: bool) -> list[tuple[str, Any]]:
    """(kernel, case) to measure, the worthiest first."""
    named = {kernel for kernel, _ in WANTED}
    there = {(kernel, case.name): case for kernel, case in losses.cases()}
    known = [(kernel, there[kernel, name]) for kernel, name in WANTED if (kernel, name) in there]
    found = known + [(kernel, case) for (kernel, _), case in there.items() if kernel not in named]
    return [(kernel, _tiny(case)) for kernel, case in found] if tiny else found


def _tiny(case: Any) -> Any:
    """The same case with a few rows."""
    if isinstance(case, PackedCase):
        return dataclasses.replace(case, lengths=tuple(min(n, 32) for n in case.lengths[:2]))
    smaller = {"rows": 32, "vocabulary": 1000}
    known = {field.name for field in dataclasses.fields(case)}
    return dataclasses.replace(case, **{name: value for name, value in smaller.items() if name in known})


class Ready(NamedTuple):
    """A contender with its loss, and a call of it."""

    contender: Contender
    loss: Loss
    run: Callable[[], Any]


@dataclass
class Bench:
    """What every case needs to know. ``skip``: rounds of cases that are done."""

    out: str
    device: str
    tiny: bool
    seconds: float
    skip: int

    def __post_init__(self) -> None:
        self.timer, self.compiling = Timer(self.device), 0.0  # seconds, of the present case

    def rows(self) -> Iterator[Row]:
        """The rows that the time allows, of fastkd and its definition in all cases, then of the others; before the rows
        of a case one of kind "case"."""
        started, longest = time.monotonic(), {OURS: FIRST_S, OTHERS: FIRST_S}
        cases = chosen(self.tiny)
        rounds = [(whose, *case) for whose in (OURS, OTHERS) for case in cases if list(self.contenders(whose, *case))]
        for whose, kernel, case in rounds[self.skip :]:
            name = f"{case.name} in miniature" if self.tiny else case.name
            names = {"kernel": kernel, "case": name, "dtype": str(case.dtype)[6:]}
            left = self.seconds - (time.monotonic() - started)
            needed = 0.0 if self.tiny else longest[whose]
            if left < needed:
                why = f"takes about {needed:.0f} s, {left:.0f} s were left"
                yield {"what": "kernel", **names, "contender": whose, "skipped": why}
                continue
            began, self.compiling = time.monotonic(), 0.0
            yield {"what": "case", **names, "contender": whose}
            for row in self.case(whose, kernel, case, left):
                yield {"what": "kernel", **names, **row}
            longest[whose] = time.monotonic() - began - self.compiling  # most cases compile nothing

    def case(self, whose: str, kernel: str, case: Any, left: float) -> Iterator[Row]:
        """One case: what could not be run, then every contender's measurement, then the launches of fastkd's call."""
        inputs, ready = case.inputs(self.device), list[Ready]()
        for contender in self.contenders(whose, kernel, case):
            if reason := self.refusal(contender, case, left):
                yield {"contender": contender.name, "skipped": reason}
                continue
            try:
                ready.append(self.made(contender, inputs))
            except Exception as error:
                yield {"contender": contender.name, "error": _survivable(error)}
        times = _interleaved([one.run for one in ready], self.timer)
        few = first_rows(case).inputs(self.device)
        for one, timed in zip(ready, times, strict=True):
            beside = self.beside(kernel, case, one, few) | self.of_roofline(kernel, case, timed)
            yield {"contender": one.contender.name, **timed, **beside}
        if self.device == "cuda" and ready and ready[0].contender.name == "fastkd":
            try:
                yield from self.launches(kernel, case, ready[0].run)
            except Exception as error:
                print(f"no launches of {case.name}: {_survivable(error)}", file=sys.stderr)

    def refusal(self, contender: Contender, case: Any, left: float) -> str:
        """Why a contender is left out, or ""."""
        if "compiled" in contender.name and left < FIRST_S + COMPILE_S:
            return f"compiling takes about {COMPILE_S:.0f} s, {left:.0f} s were left for the case"
        return contender.refusal(case, self.device)

    def made(self, contender: Contender, inputs: Inputs) -> Ready:
        """A contender that has run once."""
        began, loss = time.monotonic(), contender.make()
        run = step(loss, contender.taken(inputs))
        try:
            run()
        finally:
            self.compiling += time.monotonic() - began if "compiled" in contender.name else 0.0
        return Ready(contender, loss, run)

    def beside(self, kernel: str, case: Any, one: Ready, few: Inputs) -> Row:
        """Memory, and the gradients' error on the inputs of a few rows: what is compiled has its definition's."""
        found: Row = {}
        try:
            found["peak_bytes"] = gpu_peak(one.run) if self.device == "cuda" else None
            if one.contender.name != "reference compiled":
                found["gradient_error"] = gradient_error(one.contender, kernel, case, self.device, one.loss, few)
        except Exception as error:
            found["error"] = _survivable(error)
        return found

    def contenders(self, whose: str, kernel: str, case: Any) -> Iterator[Contender]:
        """fastkd and its definition in every case, the others in some."""
        mine = (kernel, case.name)
        for contender in contenders(kernel):
            compiled = contender.name == "reference compiled"
            if whose == OURS or contender.name in (OURS, "reference"):
                wanted = whose == OURS and contender.name in (OURS, "reference")
            elif compiled:
                wanted = mine in COMPILED and not self.tiny
            else:  # chunks that torch.compile makes ready for a minute: pytest bench has them
                wanted = mine in PEERED and contender.name != "liger chunked jsd"
            if wanted:
                yield contender

    def of_roofline(self, kernel: str, case: Any, timed: Row) -> Row:
        """The least seconds that the peaks allow, and their share of the measured ones."""
        device, which = self.ceilings()
        if device is None or "device_s" not in timed:
            return {}
        floor = roofline.floor(kernel, case, device)
        return {"floor_s": floor, "of_roofline": floor / timed["device_s"], "roofline": which}

    def ceilings(self) -> tuple[roofline.Device | None, str]:
        """Those that this run measured, else the datasheet's, if the device is known."""
        measured = environment.measured(self.out)
        if measured is not None or self.device == "cpu":
            return measured, "measured"
        return roofline.device_named(torch.cuda.get_device_name()), "datasheet"

    def launches(self, kernel: str, case: Any, run: Callable[[], Any]) -> Iterator[Row]:
        """Seconds of each kernel of a call, the longest first, those of Triton against their own floor."""
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            run()
            torch.cuda.synchronize()
        device, which = self.ceilings()
        events = [event for event in recorded.key_averages() if event.device_type == DeviceType.CUDA]
        for event in sorted(events, key=lambda event: -event.self_device_time_total)[:8]:
            row = {"what": "launch", "launch": event.key[:150], "calls": event.count}
            row["device_s"] = event.self_device_time_total / 1e6
            steps = [each for each in roofline.steps(kernel, case) if each.kernel and each.kernel in event.key]
            if device is not None and steps and event.key.startswith("_") and row["device_s"]:  # Triton keeps a name
                floor = sum(each.seconds(device, case.dtype) for each in steps)
                row |= {"floor_s": floor, "of_roofline": floor / row["device_s"], "roofline": which}
            yield row


def _interleaved(runs: list[Callable[[], Any]], timer: Timer) -> list[Row]:
    """Every call's median seconds over rounds in which all take turns, and (max − min)/median; or its error."""
    found: list[Row] = [{} for _ in runs]
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for number, run in enumerate(runs):
            if "error" in found[number]:
                continue
            try:
                value, found[number]["timing"] = timer.seconds(run, ROUND_MS, found[number].get("timing"))
                seconds[number].append(value)
            except Exception as error:
                found[number] = {"error": _survivable(error)}
    for row, values in zip(found, seconds, strict=True):
        if "error" not in row:
            median = statistics.median(values)
            row |= {"device_s": median, "spread": (max(values) - min(values)) / median, "rounds_s": values}
    return found


def _survivable(error: Exception) -> str:
    """The error in one line; raised again where it comes from the device, since then nothing else would run either."""
    if broken(error):
        raise error
    give_memory_back()
    return part.in_one_line(error)


def main() -> None:
    """Print the rows."""
    for row in Bench(**json.loads(sys.argv[1])).rows():
        worker.hand_over(row)


if __name__ == "__main__":
    main()
