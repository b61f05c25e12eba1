"""Predicted seconds of every fused loss and of every method's training step on GPUs: estimates, not measurements.

    python -m bench.predictions

A launch is predicted from its roofline (``bench.roofline``) and the share of the peaks that its kind may reach (KINDS,
with the reason of each); a training step is the sum of its launches (``bench.step_model``), or what the host needs to
issue them where that is more. Shares are an H100's, some of them measured (KINDS says which), and the same for the other
GPUs. One GPU; every sequence has full length; the whole step is one micro-batch, whether or not the GPU's memory holds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench import losses, roofline, step_losses, step_model
from bench.roofline import Device, Step
from bench.step_model import STREAMS, Stream, Work
from fastkd import methods

HALF = torch.bfloat16  # of a step
TOKENS = 131_072  # of a step
METHODS = sorted(methods.available(), key=lambda name: (name != "mlm", name))
GPUS = tuple(device.name for device in roofline.DEVICES)
PREDICTED = ("paper-6l", "paper-12l", "quickstart")  # of bench.throughput's sizes
OPERATION_S = 43e-6  # of the host, to issue one operation with its dispatch and autograd: measured, on 16 virtual cores
LOG_S = 0.5e-3  # losses read back, events


@dataclass(frozen=True)
class Kind:
    """The shares of a device's peak rates that one kind of launch may reach, and why."""

    flops: float
    bytes: float
    exponentials: float
    why: str
    serial: bool = False  # its three resources take turns: the sum of their times counts, not the longest

    def seconds(self, step: Step, device: Device, dtype: torch.dtype) -> float:
        """What the launch may take."""
        rate = device.single if dtype == torch.float32 else device.half
        resources = (
            step.flops / (self.flops * rate),
            step.bytes / (self.bytes * device.bytes),
            step.exponentials / (self.exponentials * device.exponentials),
        )
        return sum(resources) if self.serial else max(resources)


KINDS = {
    "stream": Kind(0.4, 0.84, 0.4, "elementwise and reductions: measured in a step, 2.8 of an H100's 3.35 TB/s"),
    "product": Kind(0.77, 0.84, 1.0, "cuBLAS, one dimension long: measured in a step, 760 of an H100's 989 TFLOP/s"),
    "logits": Kind(
        0.60, 0.84, 1.0, "measured; epilogue of exponentials and stores, hidden behind other tiles' products in part"
    ),
    "attention": Kind(0.35, 0.61, 0.4, "measured in a step: forward 2.9, backward 1.8 of an H100's 3.35 TB/s"),
    "short": Kind(
        0.50, 0.84, 0.50, "two blocks a multiprocessor; the instructions around an exponential take turns", serial=True
    ),
    "rows": Kind(0.20, 0.84, 0.25, "small products with a wait each, statistics in 4-byte loads", serial=True),
}


@dataclass(frozen=True)
class Ceilings:
    """Rates a second measured on the machine; None: the datasheet's times the share below."""

    copy: float | None = None  # bytes, read and written
    matrix: float | None = None  # FLOPs of a large square bf16 product
    exponentials: float | None = None


CEILING_SHARES = {
    "bytes": 0.90,
    "half": 0.81,
    "exponentials": 1.07,
}  # of the datasheet, that an H100 gave of the three above


@dataclass(frozen=True)
class Prediction:
    """A fused loss, value and gradient, in seconds: the roofline of the datasheet, and what to expect."""

    floor_s: float
    expected_s: float


@dataclass(frozen=True)
class StepPrediction:
    """A training step. MFU: of the datasheet's dense bf16 peak; ``full`` counts every layer as if it ran whole."""

    parts: dict[str, float]  # milliseconds, which sum to the step
    step_s: float
    tokens_per_s: float
    mfu_executed: float
    mfu_full: float
    tax: float  # seconds over the seconds of mlm
    tax_bound: float  # executed FLOPs over those of mlm
    host_s: float  # what the host needs to issue the step's launches
    floor_s: float  # the sum of the launches' rooflines


def gpu_named(cuda_name: str) -> str | None:
    """The name here of a GPU that torch.cuda.get_device_name calls so; None for one whose peaks are not known."""
    device = roofline.device_named(cuda_name)
    return None if device is None else device.name


def kernel(kernel: str, case: Any, gpu: str, ceilings: Ceilings | None = None) -> Prediction:
    """Value and gradient of one case, the scaling of the gradients in the backward included.

    ``ceilings`` replaces the datasheet's rates in what is expected; the floor keeps them.

    Raises:
        ValueError: an unknown kernel or GPU.
    """
    if kernel not in losses.available():
        raise ValueError(f"no kernel {kernel!r}: choose one of {', '.join(losses.available())}")
    steps, device = step_losses.fused(kernel, case), _rates(gpu, ceilings)
    return Prediction(roofline.floor(kernel, case, _device(gpu)), _seconds(steps, device, case.dtype))


def step(
    method: str,
    size: str,
    gpu: str,
    *,
    residual: str = "float32",
    ceilings: Ceilings | None = None,
    tokens: int = TOKENS,
) -> StepPrediction:
    """One step of a method with its default options on the models of ``size``; ``residual``: dtype of the student's stream.

    Raises:
        ValueError: an unknown method, size, GPU or dtype, tokens that are no whole packs, or a method with a fused loss
            that does not describe its launches.
    """
    if residual not in STREAMS:
        raise ValueError(f"no residual stream of {residual!r}: choose one of {', '.join(STREAMS)}")
    work, device = step_model.work(size, tokens), _rates(gpu, ceilings)
    built, stream = step_model.method_of(method, work), STREAMS[residual]
    host_s, scratch = _host_seconds(built, work), step_model.method_of("mlm", work)
    parts = milliseconds(built, work, stream, device)
    seconds, executed = sum(parts.values()) / 1e3, step_model.executed_flops(built, work)
    launches = [step for steps in _launches(built, work, stream).values() for step in steps]
    peak = _device(gpu)
    return StepPrediction(
        parts=parts,
        step_s=seconds,
        tokens_per_s=work.tokens / seconds,
        mfu_executed=executed / seconds / peak.half,
        mfu_full=step_model.executed_flops(built, work, whole=True) / seconds / peak.half,
        tax=1e3 * seconds / sum(milliseconds(scratch, work, stream, device).values()),
        tax_bound=executed / step_model.executed_flops(scratch, work),
        host_s=host_s,
        floor_s=sum(step.seconds(peak, HALF) for step in launches),
    )


def undescribed(method: str, size: str) -> list[str]:
    """What keeps a method from a prediction: fused losses whose files describe no launches in a training step, and encoders
    that it trains beside the student."""
    return step_losses.undescribed(step_model.method_of(method, step_model.work(size, TOKENS)))


def milliseconds(method: methods.Method, work: Work, stream: Stream, device: Device) -> dict[str, float]:
    """A step by part; where the host needs longer to issue it, the difference is a part of its own."""
    parts = {
        part: 1e3 * _seconds(steps, device, HALF) for part, steps in _launches(method, work, stream).items() if steps
    }
    parts["masks, log"] += 1e3 * LOG_S
    wait = 1e3 * _host_seconds(method, work) - sum(parts.values())
    return parts | ({"waiting for the host": wait} if wait > 0 else {})


def _launches(method: methods.Method, work: Work, stream: Stream) -> dict[str, list[Step]]:
    return step_model.parts(method, work, stream) | step_losses.parts(method, work)


def _host_seconds(method: methods.Method, work: Work) -> float:
    return OPERATION_S * (step_model.host_operations(method, work) + step_losses.host_operations(method, work))


def _seconds(steps: Iterable[Step], device: Device, dtype: torch.dtype) -> float:
    return sum(KINDS[step.kind].seconds(step, device, dtype) for step in steps)


def _device(gpu: str) -> Device:
    devices = {device.name: device for device in roofline.DEVICES}
    if gpu not in devices:
        raise ValueError(f"no GPU {gpu!r}: choose one of {', '.join(devices)}")
    return devices[gpu]


def _rates(gpu: str, ceilings: Ceilings | None) -> Device:
    """The datasheet's rates, or those whose expected share is what was measured."""
    device, measured = _device(gpu), ceilings or Ceilings()

    def rate(name: str, measured: float | None) -> float:
        datasheet: float = getattr(device, name)
        return datasheet if measured is None else measured / CEILING_SHARES[name]

    return replace(
        device,
        bytes=rate("bytes", measured.copy),
        half=rate("half", measured.matrix),
        exponentials=rate("exponentials", measured.exponentials),
    )


# ---- tables ---------------------------------------------------------------------------------------------------


def markdown(head: str, rows: Iterable[Iterable[str]], words: int = 1) -> str:
    """A table; the first ``words`` columns hold words, the others numbers."""
    columns = head.count("|") + 1
    rule = ["---"] * words + ["---:"] * (columns - words)
    return "\n".join(f"| {line} |" for line in (head, " | ".join(rule), *(" | ".join(row) for row in rows)))


def kinds_table() -> str:
    """The shares of the peaks, with their reasons."""
    rows = (
        (
            name,
            f"{kind.flops:.0%}",
            f"{kind.bytes:.0%}",
            f"{kind.exponentials:.0%}",
            "sum" if kind.serial else "longest",
            kind.why,
        )
        for name, kind in KINDS.items()
    )
    return markdown("launch | FLOPs | bytes | exponentials | of the three | why", rows, words=6)


def kernels_table() -> str:
    """Floor and expected microseconds of every bench case."""
    rows = []
    for name, case in losses.cases():
        predicted = [kernel(name, case, gpu) for gpu in GPUS]
        rows.append((name, case.name, *(f"{1e6 * p.floor_s:.0f} / {1e6 * p.expected_s:.0f}" for p in predicted)))
    return markdown(f"kernel | case | {' | '.join(f'{gpu}, µs' for gpu in GPUS)}", rows, words=2)


def steps_table(size: str, gpu: str, residual: str = "float32") -> str:
    """Every method's step; docs/gpu.md holds one of these tables."""
    rows = []
    for method in METHODS:
        if missing := undescribed(method, size):
            rows.append((f"`{method}`", f"not described: {', '.join(missing)}", "", "", ""))
            continue
        p = step(method, size, gpu, residual=residual)
        seconds, mfu = f"{1e3 * p.step_s:.0f} ({1e3 * p.floor_s:.0f})", f"{p.mfu_executed:.0%} ({p.mfu_full:.0%})"
        tax = "–" if method == "mlm" else f"{p.tax:.2f} ({p.tax_bound:.2f})"
        rows.append((f"`{method}`", f"{p.tokens_per_s / 1e6:.2f} M", seconds, mfu, tax))
    return markdown("method | tokens/s | ms a step (floor) | MFU (layers counted whole) | tax (bound)", rows)


def parts_table(size: str, gpu: str, stream: Stream = STREAMS["float32"]) -> str:
    """Milliseconds of every method's parts; a method that is not described has no column."""
    work, device = step_model.work(size, TOKENS), _device(gpu)
    described = [method for method in METHODS if not undescribed(method, size)]
    steps = [milliseconds(step_model.method_of(method, work), work, stream, device) for method in described]
    names = dict.fromkeys(part for parts in steps for part in parts)
    rows = [(name, *(f"{parts[name]:.1f}" if name in parts else "" for parts in steps)) for name in names]
    rows.append(("sum", *(f"{sum(parts.values()):.1f}" for parts in steps)))
    return markdown(f"ms | {' | '.join(described)}", rows)


def page() -> Iterator[str]:
    """Everything, as Markdown."""
    yield "# Predicted, not measured"
    yield f"## Shares of the peaks\n\n{kinds_table()}"
    yield f"## Fused losses: floor / expected\n\n{kernels_table()}"
    for size in PREDICTED:
        for gpu in GPUS:
            yield f"## {size} on one {gpu}, {TOKENS:,} tokens a step\n\n{steps_table(size, gpu)}"
        yield f"## {size} on one H100, parts\n\n{parts_table(size, 'H100')}"
    yield f"## paper-6l on one H100, residual stream in bfloat16\n\n{steps_table('paper-6l', 'H100', 'bfloat16')}"
    apart = parts_table("paper-6l", "H100", step_model.LAYERS_APART)
    yield f"## paper-6l on one H100, every layer a graph of its own, embeddings eager: parts\n\n{apart}"


if __name__ == "__main__":
    print("\n\n".join(page()))
