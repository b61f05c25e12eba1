"""Checkpoints: safetensors and JSON, written atomically, verified at load, two kept.

A checkpoint is a folder ``step-N`` with ``model.safetensors``, ``optimizer.safetensors``, ``state.json`` and, written
last, ``manifest.json`` with the sha256 of each. It is built in a hidden folder beside, synced to the disk, and then renamed.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastkd import files
from fastkd.files import file_sha256

KEEP = 2
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that verified."""

    folder: Path
    state: dict[str, Any]

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load parameters and optimiser state, in place."""
        model.load_state_dict(load_file(self.folder / "model.safetensors"))
        _load_optimizer(optimizer, load_file(self.folder / "optimizer.safetensors"))


def save(root: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
    """Write ``root/step-N`` (N is ``state["step"]``) and drop all but the newest two."""
    final = root / f"step-{state['step']}"
    building = root / f".building-{final.name}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    save_file(_host(model.state_dict()), building / "model.safetensors")
    save_file(_host(_optimizer_tensors(optimizer)), building / "optimizer.safetensors")
    (building / "state.json").write_text(json.dumps(state, indent=1))
    manifest = {path.name: file_sha256(path) for path in sorted(building.iterdir())}
    (building / MANIFEST).write_text(json.dumps(manifest, indent=1))
    files.give_usual_modes(building)
    for path in (*building.iterdir(), building):
        files.sync(path)
    if final.exists():
        shutil.rmtree(final)
    building.rename(final)
    files.sync(root)
    _rotate(root)
    return final


def newest(root: Path) -> Checkpoint | None:
    """The newest checkpoint whose files match its manifest, or None. A damaged one is skipped for an older one."""
    for folder in sorted(_folders(root), key=_step, reverse=True):
        if _verifies(folder):
            return Checkpoint(folder, json.loads((folder / "state.json").read_text()))
    return None


def _folders(root: Path) -> list[Path]:
    return [path for path in root.glob("step-*") if path.name[5:].isdigit()]


def _step(folder: Path) -> int:
    return int(folder.name[5:])


def _rotate(root: Path) -> None:
    for old in sorted(_folders(root), key=_step)[:-KEEP]:
        shutil.rmtree(old)


def _verifies(folder: Path) -> bool:
    try:
        manifest: dict[str, str] = json.loads((folder / MANIFEST).read_text())
        return all(file_sha256(folder / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def _host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
