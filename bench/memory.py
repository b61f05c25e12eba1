"""Peak memory of one value-and-gradient call beyond its inputs.

On a GPU the allocator counts it. On a CPU a process of its own does (Linux): after one call, which compiles and loads
libraries, the kernel's mark of the highest resident size is reset and read again after the next.

    python -m bench.memory linear_kd 'kl 384/768' fastkd
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.contenders import Contender, contenders, step
from bench.losses import cases

ROOT = Path(__file__).parents[1]
# Freed blocks from this size on go back to the system at once, so that none is hidden in the first call's leftovers.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(64 << 10)}


def peak_bytes(kernel: str, case: Any, contender: Contender, device: str) -> int | None:
    """Bytes, the gradients included; None where it cannot be measured."""
    if device == "cuda":
        return gpu_peak(step(contender.make(), contender.inputs(case, device)))
    if sys.platform != "linux":
        return None
    command = [sys.executable, "-m", "bench.memory", kernel, case.name, contender.name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | ENVIRONMENT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} failed: {done.stderr}")
    return int(done.stdout.splitlines()[-1])


def gpu_peak(run: Callable[[], object]) -> int:
    """Bytes of a call, by the allocator; the first call, which may compile, is not counted."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak(run: Any) -> int:
    run()
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts again from the present one
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def main(kernel: str, case_name: str, contender_name: str) -> None:
    """Print the bytes of one contender's call on this process's CPU."""
    case = next(case for name, case in cases() if (name, case.name) == (kernel, case_name))
    contender = next(candidate for candidate in contenders(kernel) if candidate.name == contender_name)
    print(_cpu_peak(step(contender.make(), contender.inputs(case, "cpu"))))


if __name__ == "__main__":
    main(*sys.argv[1:])
