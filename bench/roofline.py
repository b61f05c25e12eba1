"""The least time a GPU needs for a fused loss, from bytes, FLOPs and exponentials.

    python -m bench.roofline

A loss runs in steps, one launch after the other. Inside a step, memory, tensor cores and the exponential unit can
overlap completely, so a step takes at least the longest of the three, and the loss the sum of its steps. Bytes count a
step's inputs and outputs, each once. The backward, which scales the gradients, is not counted: it can be fused away.
Each loss's steps are in its file of ``bench/losses/``. A step says what kind of launch it is; ``bench.predictions`` knows how much
of the peaks each kind may reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bench import losses
from fastkd.device.peaks import PEAKS


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
    kernel: str = ""  # a word in the name of the Triton kernel that it launches

    def seconds(self, device: Device, dtype: torch.dtype) -> float:
        """The longest of its three resources."""
        rate = device.single if dtype == torch.float32 else device.half
        return max(self.flops / rate, self.bytes / device.bytes, self.exponentials / device.exponentials)


def product(rows: int, inner: int, outer: int) -> Step:
    """[rows, inner] × [inner, outer], operands and result of two bytes."""
    return Step(2 * rows * inner * outer, 2 * (rows * inner + inner * outer + rows * outer), kind="product")


def steps(kernel: str, case: Any) -> list[Step]:
    """The launches of value and gradient of ``case``."""
    launches: list[Step] = losses.load(kernel).steps(case)
    return launches


def floor(kernel: str, case: Any, device: Device) -> float:
    """Seconds that value and gradient of ``case`` need at least."""
    return sum(step.seconds(device, case.dtype) for step in steps(kernel, case))


def device_named(cuda_name: str) -> Device | None:
    """The device of that name, if its peaks are known."""
    return next((device for device in DEVICES if device.cuda_name == cuda_name), None)


def table() -> str:
    """Totals of each case and its floor on each device, as Markdown."""
    names = " | ".join(f"{device.name}, µs" for device in DEVICES)
    lines = [f"| kernel | case | GFLOP | MB | G exp | {names} |", "| --- | --- |" + " ---: |" * (3 + len(DEVICES))]
    for kernel, case in losses.cases():
        launches = steps(kernel, case)
        totals = (
            sum(s.flops for s in launches), sum(s.bytes for s in launches) * 1e3, sum(s.exponentials for s in launches),
        )  # fmt: skip
        floors = [f"{floor(kernel, case, device) * 1e6:.0f}" for device in DEVICES]
        cells = (kernel, case.name, *(f"{total / 1e9:.2f}" for total in totals), *floors)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
