"""Peaks of devices: what their data sheets promise, and what a matrix product reaches here."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from fastkd.device import clock, environment


class Peaks(NamedTuple):
    """Rates a second of one device, from its vendor's data sheet."""

    bf16_flops: float  # dense, of the matrix units
    bandwidth: float | None = None  # bytes of its memory; None: no bench needs it


# By the driver's whole name of the device. Part of a name is not enough: devices that differ share it (H100 PCIe, a slice of
# an H100, a laptop's RTX 4090).
PEAKS: dict[str, Peaks] = {
    "NVIDIA B200": Peaks(2250e12),
    "NVIDIA H200": Peaks(989.4e12, 4.8e12),
    "NVIDIA H200 NVL": Peaks(835e12),
    "NVIDIA GH200 480GB": Peaks(989.4e12),
    "NVIDIA H100 80GB HBM3": Peaks(989.4e12, 3.35e12),
    "NVIDIA H100 PCIe": Peaks(756e12),
    "NVIDIA H100 NVL": Peaks(835e12),
    "NVIDIA A100-SXM4-40GB": Peaks(312e12),
    "NVIDIA A100-SXM4-80GB": Peaks(312e12, 2.039e12),
    "NVIDIA A100-PCIE-40GB": Peaks(312e12),
    "NVIDIA A100 80GB PCIe": Peaks(312e12),
    "NVIDIA L40S": Peaks(362e12),
    "NVIDIA L4": Peaks(121e12),
    "NVIDIA A10G": Peaks(70e12),
    "NVIDIA GeForce RTX 4090": Peaks(165e12),
    "AMD Instinct MI300X": Peaks(1307e12),
}


def peak_flops(device: torch.device) -> float | None:
    """The data sheet's dense bf16 FLOP/s of the device, or None where it is not in the table."""
    if device.type != "cuda":
        return None
    peaks = PEAKS.get(torch.cuda.get_device_name(device))
    return None if peaks is None else peaks.bf16_flops


@functools.cache
def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it is the faster one, else float32.

    It is measured on a CPU with AVX512-BF16 or AMX: some of them multiply bfloat16 at half the speed of float32.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = environment.cpu_has_bf16() and _matmul_ratio(device) > 1
    return torch.bfloat16 if fast else torch.float32


def _matmul_ratio(device: torch.device) -> float:
    """How many times faster a matrix product is in bfloat16 than in float32."""
    rates = [measured_matmul_flops(device, dtype, seconds=0.1) for dtype in (torch.bfloat16, torch.float32)]
    return rates[0] / rates[1]


def measured_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a large square matrix product, the median of repeats: the best that this device reaches in practice."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    rates: list[float] = []
    until = clock.now() + seconds
    while len(rates) < 5 or clock.now() < until:
        timer = clock.PhaseClock(device)
        torch.mm(a, b)
        rates.append(2 * size**3 / max(timer.event("other"), 1e-9))
    return sorted(rates[1:])[len(rates[1:]) // 2]
