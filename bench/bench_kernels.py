"""Each fused loss, value and gradient together, beside its definition, the definition compiled, and its peers.

    pytest bench                     all of it; results/<device>/<kernel>.json and .md hold what came out
    pytest bench -k linear_kd

On a GPU every case of every kernel; on a CPU those that take seconds there. A bench measures the time of a call, its peak
memory beyond its inputs, and the error of its gradients against float64; for ``fastkd`` on a GPU also the device's own
time, replayed as a CUDA graph, against the least that the roofline allows.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from bench import roofline
from bench.contenders import Contender, entries, gradient_error, step
from bench.kernel_results import KernelResults
from bench.memory import peak_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGEST_ON_A_CPU = 5e11  # FLOPs


def clock() -> float:
    """Seconds, when the device has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# A round on a GPU is many calls, so that the host runs ahead of the device as it does in training.
@pytest.mark.benchmark(timer=clock, min_rounds=3, max_time=2.0, min_time=0.02 if DEVICE == "cuda" else 1e-3)
@pytest.mark.filterwarnings("default")  # other packages' warnings are not ours to fix
@pytest.mark.parametrize(
    ("kernel", "case", "contender"),
    [pytest.param(*entry, id=f"{entry[0]}: {entry[1].name}: {entry[2].name}") for entry in entries()],
)
def test_value_and_gradient(
    benchmark: Any, results: KernelResults, kernel: str, case: Any, contender: Contender
) -> None:
    flops = sum(part.flops for part in roofline.steps(kernel, case))
    if DEVICE == "cpu" and flops > LARGEST_ON_A_CPU:
        pytest.skip(f"{flops / 1e9:.0f} GFLOP take too long on a CPU")
    if reason := contender.refusal(case, DEVICE):
        results.skip(kernel, case, contender.name, reason)
        pytest.skip(reason)
    run = step(contender.make(), contender.inputs(case, DEVICE))
    start = clock()
    run()
    benchmark.group = f"{kernel} {case.name}"
    if DEVICE == "cpu" and clock() - start > 1:
        benchmark.pedantic(run, rounds=3)  # needs no calibration
    else:
        benchmark(run)
    results.add(
        kernel, case, contender.name, benchmark.stats,
        peak_bytes=peak_bytes(kernel, case, contender, DEVICE),
        gradient_error=gradient_error(contender, kernel, case, DEVICE),
        **(_roofline(kernel, case, run) if (contender.name, DEVICE) == ("fastkd", "cuda") else {}),
    )  # fmt: skip


def _roofline(kernel: str, case: Any, run: Any) -> dict[str, float]:
    """The device's seconds a call without the host's, and the least there can be where the device's peaks are known."""
    import triton.testing

    seconds = {"device_s": triton.testing.do_bench_cudagraph(run, return_mode="median") / 1e3}
    device = roofline.device_named(torch.cuda.get_device_name())
    return seconds if device is None else seconds | {"floor_s": roofline.floor(kernel, case, device)}
