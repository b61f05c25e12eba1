"""The weights of a Hugging Face folder: which files hold them, their digest, and whether they are usable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastkd.files import file_sha256
from fastkd.models.parameter_names import body_prefix

if TYPE_CHECKING:
    from fastkd.models.encoder import EncoderConfig

SAFETENSORS = "model.safetensors"
STORAGES = (SAFETENSORS, f"{SAFETENSORS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def files(folder: Path) -> list[Path]:
    """The files that transformers reads a folder's weights from: one, or an index and what it names.

    Raises:
        ValueError: there is none, it is empty, or the index is damaged or names a file that is not there.
    """
    first = next((folder / name for name in STORAGES if (folder / name).is_file()), None)
    if first is None:
        raise ValueError(f"{folder} holds neither {SAFETENSORS} nor other weights; export or download them")
    found = [first, *(_shards(first) if first.suffix == ".json" else ())]
    for path in found:
        if not path.is_file() or path.stat().st_size == 0:
            raise ValueError(f"{path} is missing or empty; download it again")
    return found


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        return [index.parent / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of weights; download it again") from error


def digest(folder: Path, expected: str | None = None) -> str:
    """sha256 over the names and contents of config.json and all weight files, which decide a model's numbers.

    ``expected`` is the sha256 of its model.safetensors.

    Raises:
        ValueError: as ``files``, or another digest than the expected one.
    """
    contents = {path.name: file_sha256(path) for path in (folder / "config.json", *files(folder))}
    if expected is not None and (found := contents.get(SAFETENSORS)) != expected:
        raise ValueError(f"{folder / SAFETENSORS} has sha256 {found}, not {expected}; download it again")
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def has_head(found: dict[str, Any], config: EncoderConfig, source: str) -> bool:
    """Whether the checkpoint holds an MLM head, from transformers' report of what it ``found``.

    Raises:
        ValueError: a weight has another shape than config.json says, or something is missing that is not the whole head.
    """
    if found["mismatched_keys"]:
        name, stored, wanted = sorted(found["mismatched_keys"])[0]
        raise ValueError(
            f"{source}: {name} is {list(stored)}, but its config.json wants {list(wanted)}; download or export both again"
        )
    missing, head = set(found["missing_keys"]), config.family.head_in_file(config)
    lacks = sorted(name for name in missing if name.startswith(body_prefix(config)))
    if head & missing != head:
        lacks += sorted(head & missing)
    if lacks:
        raise ValueError(f"{source} lacks {lacks[0]} and {len(lacks) - 1} more weights; download or export it again")
    return not head & missing


def check_finite(tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Refuse weights that hold NaN or infinity: one such number makes every loss NaN.

    Raises:
        ValueError: naming the first such weight.
    """
    for name, tensor in tensors:
        # A sum reads each number once and writes none; the slower test runs only where the sum is not finite.
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(f"{source}: {name} holds {bad} numbers that are NaN or infinite; take a sound checkpoint")
