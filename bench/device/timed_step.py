"""One method's real train step, timed in a process of its own: ``python -m bench.device.timed_step``.

It reads two lines: a ``bench.variants.Spec`` as JSON, with ``profile``, a file for the longest kernels of one step, or "";
then, once it has compiled its graphs and said that it is ready, one that lets it go on. So several may import and compile
side by side, and each is timed while nothing else runs. Steps are issued as in the training loop, at most two ahead of the
device, so that the clock is the device's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.device import worker
from bench.device.part import Row
from bench.variants import LEARNING_RATE, Spec, fastkd_setup, memory_bytes
from fastkd.data.batches import Batch, StepTokens
from fastkd.device.clock import PHASES, Lap, PhaseClock
from fastkd.device.peaks import peak_flops
from fastkd.device.power import PowerMeter
from fastkd.loop import STEPS_AHEAD
from fastkd.models import flops
from fastkd.models.needs import Needs
from fastkd.setup import Setup
from fastkd.train import Trainer

ISSUED_ALONE = 5  # steps whose host time is taken with nothing before them in the device's queue
TOP = 30  # kernels of a profile
Stream = Iterator[list[Batch]]


def measure(spec: Spec, profile_path: Path | None) -> Iterator[Row]:
    """Rows of kind "method" and, with a path, "profile"."""
    torch.manual_seed(0)
    trainer = Trainer(fastkd_setup(spec))  # rehearses a micro-step, and so compiles all graphs
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()  # others compile now
    worker.say_ready()
    if not sys.stdin.readline():  # whoever asked is gone: timing would disturb others
        return
    with contextlib.closing(trainer.stream.prefetch(0)) as stream:
        first, *_ = _steps(trainer, stream, spec.warmup)[0]
        _start_counting_memory(trainer.device)
        power = PowerMeter([trainer.device])
        laps, seconds = _steps(trainer, stream, spec.steps)
        joules, clocks = power.joules_since_last(), power.clocks()
        peak = _peak_memory(trainer.device)
        issue = [_issue_seconds(trainer, stream) for _ in range(ISSUED_ALONE)]
        step_s = [sum(lap.values()) for lap in laps]
        compiling = trainer.rehearsal_seconds + sum(first.values()) - 2 * statistics.median(step_s)
        text = _text_tokens(trainer, spec)
        yield {
            "what": "method", "method": spec.method, "dtype": spec.dtype,
            "batch_tokens": trainer.setup.config.batch_tokens, "micro_tokens": trainer.micro_tokens,
            "attention": trainer.setup.attention, "compile": trainer.setup.compile,
            "compile_s": max(0.0, compiling) if trainer.setup.compile else 0.0,
            "warmup": spec.warmup, "steps": spec.steps, "mean_length": _mean_length(trainer, spec),
            "step_s": statistics.median(step_s), "step_iqr_s": _iqr(step_s), "steps_s": step_s,
            "tokens_per_s": text / seconds, "host_s": statistics.median(issue), "hosts_s": issue,
            "phases": {name: statistics.median(lap[name] for lap in laps) for name in PHASES},
            "peak_memory_bytes": peak, "joules_a_token": None if joules is None else joules / text,
            "sm_clock_mhz": clocks.sm_clock_mhz, "throttle": clocks.throttle, "device": _device_name(trainer.device),
            **_arithmetic(trainer, spec, text, seconds),
        }  # fmt: skip
        if profile_path is not None:
            yield {"what": "profile", "method": spec.method, "kernels": _profile(trainer, stream, profile_path)}


def _steps(trainer: Trainer, stream: Stream, count: int) -> tuple[list[dict[str, float]], float]:
    """Each step's seconds by phase, and the wall clock's of all."""
    _wait(trainer.device)
    trainer.clock = PhaseClock(trainer.device)
    start, laps, issued = time.perf_counter(), list[dict[str, float]](), deque[Lap]()
    for _ in range(count):
        while len(issued) >= STEPS_AHEAD:
            laps.append(issued.popleft().seconds())
        batches = next(stream)
        trainer.clock.mark("data")
        trainer.step(batches, LEARNING_RATE)
        issued.append(trainer.clock.lap())
    laps += [lap.seconds() for lap in issued]
    _wait(trainer.device)
    return laps, time.perf_counter() - start


def _issue_seconds(trainer: Trainer, stream: Stream) -> float:
    """The host's seconds to issue a step: on a GPU its queue is empty before, and nothing waits for its end."""
    batches = next(stream)
    _wait(trainer.device)
    start = time.perf_counter()
    trainer.step(batches, LEARNING_RATE)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _iqr(values: list[float]) -> float:
    first, _, third = statistics.quantiles(values, n=4) if len(values) > 1 else (values * 3)
    return third - first


def _start_counting_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak_memory(device: torch.device) -> int:
    """Bytes allocated at most since counting began; of a CPU, the process's most since it started."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else memory_bytes()[1]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"


# ---- arithmetic -----------------------------------------------------------------------------------------------


def _timed_steps(spec: Spec) -> range:
    return range(spec.warmup, spec.warmup + spec.steps)


def _text_tokens(trainer: Trainer, spec: Spec) -> int:
    """Tokens of the timed steps, fillers not counted."""
    return sum(trainer.stream.tokens_of(number).real for number in _timed_steps(spec))


def _mean_length(trainer: Trainer, spec: Spec) -> float:
    """Tokens of a sequence, in the first step that is timed."""
    sequences = sum(len(batch.lengths) for batch in trainer.stream.step(spec.warmup))
    return trainer.stream.tokens_of(spec.warmup).real / sequences


def _arithmetic(trainer: Trainer, spec: Spec, text: int, seconds: float) -> Row:
    """FLOPs a token as run, and with layers that ran in part counted whole; MFU by either, of the datasheet's peak."""
    peak = peak_flops(trainer.device)
    run = sum(sum(trainer.step_cost(number).flops.values()) for number in _timed_steps(spec))
    whole = sum(whole_flops(trainer.setup, trainer.stream.tokens_of(number)) for number in _timed_steps(spec))
    return {
        "flops_a_token": run / text,
        "flops_a_token_whole": whole / text,
        "mfu": None if peak is None else run / seconds / peak,
        "mfu_whole": None if peak is None else whole / seconds / peak,
    }


def whole_flops(setup: Setup, count: StepTokens) -> int:
    """FLOPs of a step if the deepest layer of student and teacher, of which a part runs, ran at every row."""
    shape = {"tokens": setup.config.batch_tokens, "pairs": count.pairs, "predicted": count.predicted}
    student, total = setup.student.config, setup.method.loss_flops(**shape)
    forward = flops.forward_flops(student, _whole(setup.method.student_needs, student.num_layers), **shape)
    total += forward + flops.backward_flops(forward)
    if setup.teacher is not None:
        teacher = setup.teacher.config
        total += flops.forward_flops(teacher, _whole(setup.teacher.needs, teacher.num_layers), **shape)
    return total


def _whole(needs: Needs, layers: int) -> Needs:
    return dataclasses.replace(needs, hidden=(*needs.hidden, needs.depth(layers)))


# ---- kernels of a step ----------------------------------------------------------------------------------------


def _profile(trainer: Trainer, stream: Stream, path: Path) -> list[dict[str, Any]]:
    """The longest kernels (on a CPU: operators) of one step, also as text in ``path``."""
    gpu, batches = trainer.device.type == "cuda", next(stream)
    activity = ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU  # both together take seconds more
    with profile(activities=[activity]) as recorded:
        trainer.step(batches, LEARNING_RATE)
        _wait(trainer.device)
    kernels = [
        {"name": event.key, "calls": event.count, "device_s": time_us / 1e6}
        for event in recorded.key_averages()
        if (time_us := _microseconds(event, gpu)) > 0
    ]
    kernels.sort(key=lambda kernel: -kernel["device_s"])
    total = sum(kernel["device_s"] for kernel in kernels)
    lines = [f"{'ms':>9} {'share':>6} {'calls':>6}  name; all {len(kernels)} take {total * 1e3:.2f} ms"]
    for kernel in kernels[:TOP]:
        name, calls, seconds = kernel.values()
        lines.append(f"{seconds * 1e3:9.3f} {seconds / total:6.1%} {calls:6}  {name[:150]}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [kernel | {"name": kernel["name"][:150]} for kernel in kernels[:TOP]]


def _microseconds(event: Any, gpu: bool) -> float:
    if not gpu:
        return float(event.self_cpu_time_total)
    kernel = event.device_type == DeviceType.CUDA and not event.is_user_annotation
    return float(event.self_device_time_total) if kernel else 0.0


def main() -> None:
    """Print the rows."""
    fields = json.loads(sys.stdin.readline())
    path = fields.pop("profile")
    for row in measure(Spec(**fields), Path(path) if path else None):
        worker.hand_over(row)


if __name__ == "__main__":
    main()
