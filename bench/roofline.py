"""The least time a GPU needs for a fused loss, from bytes, FLOPs and exponentials.

    python -m bench.roofline

A loss runs in steps, one launch after the other. Inside a step, memory, tensor cores and the exponential unit can
overlap completely, so a step takes at least the longest of the three, and the loss the sum of its steps. Bytes count a
step's inputs and outputs, each once. The backward, which scales the gradients, is not counted: it can be fused away.
A step says what kind of launch it is; ``bench.predictions`` knows how much of the peaks each kind may reach.
Shapes: M rows, V vocabulary, D width (D_s, D_t), n length of a sequence, A relation heads.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastkd.device.peaks import PEAKS
from fastkd.kernels import hidden_mse, linear_kd, packed, score_mse, tiling


@dataclass(frozen=True)
class Device:
    """Peak rates a second, without sparsity."""

    name: str
    cuda_name: str  # as torch.cuda.get_device_name gives it: a PCIe or NVL board of the same name is slower
    half: float  # FLOPs of bf16 and float16 matrix products
    single: float  # FLOPs of float32 on the CUDA cores
    bytes: float
    exponentials: float


def _device(name: str, cuda_name: str, single: float, exponentials: float) -> Device:
    """A device whose bf16 peak and bandwidth are in the table of ``fastkd.device.peaks``."""
    half, bandwidth = PEAKS[cuda_name]
    assert bandwidth is not None
    return Device(name, cuda_name, half, single, bandwidth, exponentials)


# FLOPs and bandwidth: the datasheets of the SXM boards, "A100 80GB" (nvidia.com/en-us/data-center/a100), "H100 SXM"
# (…/h100) and "H200 SXM" (…/h200), dense. Exponentials: 16 a clock and multiprocessor (CUDA C++ Programming Guide,
# "Arithmetic Instructions", table of native throughput, capabilities 8.0 and 9.0), at the clock of the dense bf16
# peak: 312e12 / (108 · 2048) = 1.41 GHz, 989.4e12 / (132 · 4096) = 1.83 GHz.
DEVICES = (
    _device("A100", "NVIDIA A100-SXM4-80GB", 19.5e12, 16 * 108 * 1.41e9),
    _device("H100", "NVIDIA H100 80GB HBM3", 66.9e12, 16 * 132 * 1.83e9),
    _device("H200", "NVIDIA H200", 66.9e12, 16 * 132 * 1.83e9),
)


@dataclass(frozen=True)
class Step:
    """One launch."""

    flops: float
    bytes: float
    exponentials: float = 0
    kind: str = "stream"  # a key of ``predictions.KINDS``

    def seconds(self, device: Device, dtype: torch.dtype) -> float:
        """The longest of its three resources."""
        rate = device.single if dtype == torch.float32 else device.half
        return max(self.flops / rate, self.bytes / device.bytes, self.exponentials / device.exponentials)


def linear_kd_steps(case: linear_kd.Case) -> list[Step]:
    """Logits of each model, dz, dx, dW: 2MV(D_t + 3D_s) FLOPs, and M·V written once and read twice a model.

    Exponentials: one a logit for its tile's sum and one for its probability, again for a second temperature. The
    gradient of the bias can ride on dz or dW. One chunk of rows is assumed: each further one reads W again and adds
    to dW.
    """
    m, v, d, size = case.rows, case.vocabulary, case.student_width, case.dtype.itemsize
    tempered = case.teacher_width is not None and case.ce_weight != 0 and case.temperature != 1
    softmaxes = 1 + tempered
    models = 1 + (case.teacher_width is not None)

    def logits(width: int, softmaxes: int) -> Step:
        return Step(2 * m * v * width, size * (m * width + v * width + m * v), softmaxes * m * v, "logits")

    steps = [logits(d, softmaxes)]
    if case.teacher_width is not None:
        steps.append(logits(case.teacher_width, 1))
    dz = Step(0, size * m * v * (models + 1), (softmaxes + models - 1) * m * v)
    dx = Step(2 * m * v * d, size * (m * v + v * d) + 4 * m * d, kind="product")
    dw = Step(2 * m * v * d, size * (m * v + m * d) + 4 * v * d, kind="product")
    return [*steps, dz, dx, dw]


def relation_kl_steps(case: packed.Case) -> list[Step]:
    """Up to length 128 one launch, 2n²(D_t + 2D_s) FLOPs, else one for the rows' statistics and one for the gradient.

    Two exponentials a score and launch. A cross relation has a second gradient and, past length 128, a second
    pass, over the columns.
    """
    pairs, tokens = _pairs_and_tokens(case)
    ds, dt, cross = case.student_width, case.teacher_width, case.cross
    inputs = case.dtype.itemsize * tokens * (1 + cross) * (ds + dt)
    outputs = case.dtype.itemsize * tokens * (1 + cross) * ds
    exponentials = 2 * case.num_heads * pairs
    scores, gradient = 2 * pairs * (ds + dt), 2 * pairs * ds
    if max(case.lengths) <= 128:
        return [Step(scores + (1 + cross) * gradient, inputs + outputs, exponentials, "short")]
    second = Step((1 + cross) * (scores + gradient), inputs + outputs, (1 + cross) * exponentials, "rows")
    return [Step(scores, inputs, exponentials, "rows"), second]


def score_mse_steps(case: score_mse.Case) -> list[Step]:
    """One launch: 2n²(D_t + 3D_s) FLOPs up to length 128, else the residual twice, for dq and for dk."""
    pairs, tokens = _pairs_and_tokens(case)
    ds, dt = case.student_width, case.teacher_width
    passes = 1 if max(case.lengths) <= 128 else 2
    flops = 2 * pairs * (passes * (ds + dt) + 2 * ds)
    kind = "short" if passes == 1 else "rows"
    return [Step(flops, case.dtype.itemsize * tokens * 2 * (2 * ds + dt), kind=kind)]


def hidden_mse_steps(case: hidden_mse.Case) -> list[Step]:
    """One launch that reads both matrices and writes the student's gradient."""
    size = case.rows * case.width
    return [Step(3 * size, size * (2 * case.dtype.itemsize + case.teacher_dtype.itemsize))]


def _pairs_and_tokens(case: packed.Case) -> tuple[int, int]:
    """Σ n² and Σ n."""
    return sum(n * n for n in case.lengths), sum(case.lengths)


STEPS: dict[str, Callable[[Any], list[Step]]] = {
    "linear_kd": linear_kd_steps,
    "relation_kl": relation_kl_steps,
    "score_mse": score_mse_steps,
    "hidden_mse": hidden_mse_steps,
}


def floor(kernel: str, case: Any, device: Device) -> float:
    """Seconds that value and gradient of ``case`` need at least."""
    return sum(step.seconds(device, case.dtype) for step in STEPS[kernel](case))


def device_named(cuda_name: str) -> Device | None:
    """The device of that name, if its peaks are known."""
    return next((device for device in DEVICES if device.cuda_name == cuda_name), None)


def cases() -> list[tuple[str, Any]]:
    """(kernel, case) of every bench case of every kernel file."""
    stems = sorted(path.stem for path in Path(tiling.__file__).parent.glob("*.py"))
    modules = [importlib.import_module(f"fastkd.kernels.{stem}") for stem in stems]
    return [(module.__name__.split(".")[-1], case) for module in modules for case in getattr(module, "BENCHES", ())]


def table() -> str:
    """Totals of each case and its floor on each device, as Markdown."""
    names = " | ".join(f"{device.name}, µs" for device in DEVICES)
    lines = [f"| kernel | case | GFLOP | MB | G exp | {names} |", "| --- | --- |" + " ---: |" * (3 + len(DEVICES))]
    for kernel, case in cases():
        steps = STEPS[kernel](case)
        totals = (sum(s.flops for s in steps), sum(s.bytes for s in steps) * 1e3, sum(s.exponentials for s in steps))
        floors = [f"{floor(kernel, case, device) * 1e6:.0f}" for device in DEVICES]
        cells = (kernel, case.name, *(f"{total / 1e9:.2f}" for total in totals), *floors)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
