"""Where results lie, and the device that they are filed under."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def device_folder(device: str | None = None) -> str:
    """The GPU's or CPU's name as a folder name: ``amd-epyc``. ``device`` is cuda or cpu; default: what is at hand."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else torch.cpu.get_capabilities().get("cpu_name", "")
    return "-".join((str(name) or platform.processor() or "cpu").lower().split())
