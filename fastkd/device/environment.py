"""Environment: what a result was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("fastkd", "torch", "triton", "transformers", "datasets", "tokenizers", "numpy", "flash-attn")


def describe() -> dict[str, Any]:
    """Device, driver, versions and commit. What cannot be found out is left out, never guessed."""
    facts: dict[str, Any] = {
        "device": device_name(),
        "devices": torch.cuda.device_count() if torch.cuda.is_available() else 1,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "commit": _commit(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"cuda": torch.version.cuda, "driver": _driver(), "device_memory_bytes": properties.total_memory}
    return {name: value for name, value in facts.items() if value is not None}


def device_name() -> str:
    """The GPU's name, or the CPU's model and its number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model or 'CPU'}, {os.cpu_count()} cores"


def cpu_has_bf16() -> bool:
    """Whether the CPU has instructions that multiply bfloat16 (AVX512-BF16 or AMX)."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _commit() -> str | None:
    """The checkout's commit, marked ``+`` where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    with suppress(OSError, subprocess.CalledProcessError):
        run = {"capture_output": True, "text": True, "check": True}
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()  # type: ignore[call-overload]
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], **run).stdout.strip()  # type: ignore[call-overload]
        return commit + ("+" if changed else "")
    return None


def _driver() -> str | None:
    with suppress(Exception):  # NVML is an extra: its absence is no error
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    return None
