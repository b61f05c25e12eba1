"""Where results are kept, by device, and what they were measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fastkd.device import environment

RESULTS = Path(__file__).parent / "results"
PEERS = ("liger-kernel", "orda-kernel", "bertdistiller")


def measured_on() -> dict[str, Any]:
    """Device, versions (the peers' too), commit and day."""
    facts = environment.describe() | {"date": datetime.date.today().isoformat()}
    for package in PEERS:
        with suppress(importlib.metadata.PackageNotFoundError):
            facts["packages"][package] = importlib.metadata.version(package)
    return facts


def in_words(facts: Mapping[str, Any]) -> str:
    """What `measured_on` found, as a clause."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    commit = facts.get("commit", "unknown")
    return f"{facts['device']}, {facts['cpu_threads']} CPU threads, {versions}; commit {commit}, {facts['date']}"


def device_folder(device: str | None = None) -> str:
    """The GPU's or CPU's name as a folder name: ``amd-epyc``. ``device`` is cuda or cpu; default: what is at hand."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else torch.cpu.get_capabilities().get("cpu_name", "")
    return "-".join((str(name) or platform.processor() or "cpu").lower().split())
