"""Checkpoints: safetensors and JSON, written atomically, verified at load, the newest two that are sound kept.

A checkpoint is a folder ``step-N`` with ``model.safetensors``, ``optimizer.safetensors``, ``state.json``, copies of files that
its state goes with, and, written last, ``manifest.json`` with the sha256 of each. It is built in a hidden folder beside, synced
to the disk, and then renamed. A step that is saved again becomes ``step-N.1``, ``step-N.2``: what is there stays until the new
one is. A damaged one that is met is kept as ``step-N.damaged``, one of a past that was given up as ``step-N.given-up``, and said.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastkd import files, optim
from fastkd.budget import Totals
from fastkd.files import file_sha256
from fastkd.health import Diverged
from fastkd.ledger import wrong_field

log = logging.getLogger(__name__)

KEEP = 2
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
NAME = re.compile(r"step-(\d+)(?:\.(\d+))?")
DEBRIS = (".building-*", ".dropped-*")  # what a kill leaves of a save and of a rotation


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that verified."""

    folder: Path
    state: dict[str, Any]

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load parameters and optimiser state, in place.

        Raises:
            ValueError: they are those of another model.
        """
        try:
            model.load_state_dict(load_file(self.folder / MODEL))
            _load_optimizer(optimizer, load_file(self.folder / OPTIMIZER))
        except torch.OutOfMemoryError:
            raise
        except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"{self.folder} is no checkpoint of this model: remove it, or give another --output-dir"
            ) from error


def save(
    root: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    copies: Mapping[str, files.Beginning] | None = None,
    goes_on: bool = True,
    say: Callable[[str], None] = log.warning,
) -> Path:
    """Write ``root/step-N`` (N is ``state["step"]``) whole or not at all, and drop all but it and the newest other sound one.

    Args:
        copies: more files of the checkpoint, by name.
        goes_on: whether the run goes on from here, so that one of a later step belongs to a past that was given up: it was
            put back by hand, or written late by a rank of a job that ended. False where ranks save because others are gone:
            another one may have come further, and what it saved stays the newest.
        say: is told of each checkpoint that is set aside.

    Raises:
        Diverged: a weight or a moment is not finite; nothing is written.
        OSError: it cannot be written; older checkpoints are as they were.
    """
    require_finite(model, optimizer)
    final = root / _free_name(root, state["step"])
    building = (
        root / f".building-{final.name}-{os.getpid()}"
    )  # a rank that takes another for dead may write the same step
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        _write_tensors(building / MODEL, model.state_dict())
        _write_tensors(building / OPTIMIZER, _optimizer_tensors(optimizer))
        (building / STATE).write_text(json.dumps(state, indent=1))
        for name, content in (copies or {}).items():
            content.copy_to(building / name)
        manifest = {path.name: file_sha256(path) for path in sorted(building.iterdir())}
        (building / MANIFEST).write_text(json.dumps(manifest, indent=1))
        files.give_usual_modes(building)
        for path in (*building.iterdir(), building):
            files.sync(path)
        building.rename(final)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    files.sync(root)
    _rotate(root, final, goes_on, say)
    return final


def require_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse to keep weights or moments that hold NaN or infinity.

    Raises:
        Diverged: naming the first of them.
    """
    bad = optim.not_finite(model.state_dict()) or optim.not_finite(_optimizer_tensors(optimizer))
    if bad:
        more = f" and {len(bad) - 1} more tensors are" if bad[1:] else " is"
        raise Diverged(f"{bad[0]}{more} not finite")


def newest(root: Path, say: Callable[[str], None] = log.warning) -> Checkpoint | None:
    """The newest checkpoint whose files match its manifest; None where none was ever saved.

    Damaged ones that are newer are set aside, and ``say`` is told so: they were passed over. What a killed save left is removed.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    _clear(root)
    damaged: dict[Path, str] = {}
    for folder in _folders(root):
        reason = _damage(folder)
        if reason is None:
            for passed, why in damaged.items():
                _set_aside(passed, f"{why}; {folder.name} is taken instead", say)
            if len(_folders(root)) > KEEP:  # the last save was killed before it dropped the oldest
                _rotate(root, folder, False, say)
            return Checkpoint(folder, json.loads((folder / STATE).read_bytes()))
        damaged[folder] = reason
    if damaged:
        each = "; ".join(f"{folder.name}: {reason}" for folder, reason in damaged.items())
        raise ValueError(
            f"every checkpoint in {root} is damaged ({each}): put a copy back, or remove {root} to start at step 0"
        )
    return None


def sound_files(root: Path, name: str) -> list[Path]:
    """The files of a name in checkpoints that are what their manifests say, whatever the rest of the checkpoint is like."""
    return [folder / name for folder in _folders(root) if _damage(folder, only=name) is None]


def latest(root: Path) -> Path | None:
    """The checkpoint with the highest number, whether or not it is sound."""
    return next(iter(_folders(root)), None)


def step_of(folder: Path) -> int:
    """The number of the step after which a checkpoint was saved."""
    return _order(folder)[0]


def _order(folder: Path) -> tuple[int, int]:
    """The number of a checkpoint's step, and which save of that step it is."""
    found = NAME.fullmatch(folder.name)
    assert found is not None
    return int(found[1]), int(found[2] or 0)


def _folders(root: Path) -> list[Path]:
    """All checkpoints, the newest first."""
    found = [path for path in root.glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=_order, reverse=True)


def _free_name(root: Path, step: int) -> str:
    saved = [_order(folder)[1] for folder in _folders(root) if step_of(folder) == step]
    return f"step-{step}.{max(saved) + 1}" if saved else f"step-{step}"


def _rotate(root: Path, saved: Path, goes_on: bool, say: Callable[[str], None]) -> None:
    """Keep what was just saved and the newest other sound ones."""
    kept = 1
    for folder in _folders(root):
        if goes_on and _order(folder) > _order(saved):
            _set_aside(folder, f"it is of a later step than {saved.name}, where the run went on", say, "given-up")
        elif folder != saved and kept == KEEP:
            _drop(folder)
        elif folder != saved and (reason := _damage(folder)) is not None:
            _set_aside(folder, reason, say)
        elif folder != saved:
            kept += 1


def _drop(folder: Path) -> None:
    """Remove a checkpoint: a kill leaves the whole of it, or debris that looks like none."""
    dropped = folder.rename(folder.with_name(f".dropped-{folder.name}"))
    shutil.rmtree(dropped)


def _clear(root: Path) -> None:
    for pattern in DEBRIS:
        for path in root.glob(pattern):
            shutil.rmtree(path)


def _set_aside(folder: Path, reason: str, say: Callable[[str], None], called: str = "damaged") -> None:
    aside = files.set_aside(folder, called)
    say(f"checkpoint {folder} is passed over ({reason}) and kept as {aside.name}")


def _damage(folder: Path, only: str | None = None) -> str | None:
    """What is wrong with a checkpoint, or with ``only`` one of its files; None if it holds what was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if not isinstance(manifest, dict) or not manifest.keys() >= ({only} if only else {MODEL, OPTIMIZER, STATE}):
            return f"{MANIFEST} does not list its files"
        for name, digest in manifest.items():
            if name != Path(name).name or name == "..":
                return f"{MANIFEST} names {name!r}, which is not in it"
            if only in (None, name) and file_sha256(folder / name) != digest:
                return f"{name} is not what was written"
        if only:
            return None
        state = json.loads((folder / STATE).read_bytes())
        if not isinstance(state, dict) or state.get("step") != step_of(folder):
            return f"{STATE} is of another step"
        if not _says_what_was_spent(state):
            return f"{STATE} is of another version"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except (ValueError, RecursionError):
        return f"{MANIFEST} is no JSON"
    return None


def _says_what_was_spent(state: dict[str, Any]) -> bool:
    """Whether totals and last lines of the ledger, where a state has them, are such."""
    recent = state.get("recent", [])
    lines = isinstance(recent, list) and all(isinstance(line, dict) and not wrong_field(line) for line in recent)
    return lines and Totals.fits(state.get("totals", {}))


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: where safetensors' own error has the system's number in its text.
    """
    try:
        save_file({name: x.detach().to("cpu").contiguous().clone() for name, x in tensors.items()}, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
