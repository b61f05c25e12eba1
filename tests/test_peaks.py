"""Peaks of data sheets, what a matrix product reaches, and the dtype that follows from it."""

import pytest
import torch

from fastkd.device import peaks
from fastkd.device.memory import peak_memory_bytes
from fastkd.device.peaks import PEAKS

CPU = torch.device("cpu")


def test_a_cpu_has_no_data_sheet() -> None:
    assert peaks.peak_flops(CPU) is None


def test_a_peak_is_that_of_the_whole_name() -> None:
    assert PEAKS["NVIDIA H100 PCIe"].bf16_flops < PEAKS["NVIDIA H100 80GB HBM3"].bf16_flops
    for name in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GB200"):
        assert name not in PEAKS


def test_matmul_rate_and_memory_are_measured() -> None:
    assert peaks.measured_matmul_flops(CPU, torch.float32, seconds=0.05) > 1e8
    assert peak_memory_bytes(CPU) > 2**20


def test_the_dtype_of_a_cpu_is_the_one_that_it_multiplies_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = peaks.fastest_dtype.__wrapped__
    monkeypatch.setattr(peaks.environment, "cpu_has_bf16", lambda: True)
    for fast, slow in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        rates = {fast: 2e11, slow: 1e11}
        monkeypatch.setattr(peaks, "measured_matmul_flops", lambda _, dtype, seconds, rates=rates: rates[dtype])
        assert measure(CPU) == fast
    monkeypatch.setattr(peaks.environment, "cpu_has_bf16", lambda: False)
    assert measure(CPU) == torch.float32
