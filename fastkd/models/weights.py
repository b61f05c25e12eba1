"""The weights of a Hugging Face folder: which files hold them, what is in these, a digest of the numbers, and whether they
are usable.

The files are read here and not by transformers: nothing in a folder chooses another file, and none of them runs code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastkd.files import file_sha256, json_sha256
from fastkd.models.parameter_names import body_prefix

if TYPE_CHECKING:
    from fastkd.models.encoder import Encoder, EncoderConfig

log = logging.getLogger(__name__)
SAFETENSORS = "model.safetensors"
STORAGES = (SAFETENSORS, f"{SAFETENSORS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def files(folder: Path) -> list[Path]:
    """The files of a folder's weights: one, or those that an index names. Pickled ones only where there are no others.

    Raises:
        ValueError: there is none, it is empty, or the index is damaged or names a file that is not beside it.
    """
    first = next((folder / name for name in STORAGES if (folder / name).is_file()), None)
    if first is None:
        raise ValueError(f"{folder} holds neither {SAFETENSORS} nor other weights; export or download them")
    found = _shards(first) if first.suffix == ".json" else [first]
    for path in found:
        if not path.is_file() or path.stat().st_size == 0:
            raise ValueError(f"{path} is missing or empty; download it again")
    return found


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        found = [index.parent / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of weights; download it again") from error
    for path, name in zip(found, names, strict=True):
        if path.name != name or not _is_beside(path, index):
            raise ValueError(
                f"{index} names {name!r}, which is not in its folder: put the file there, or take another model"
            )
    return found


def _is_beside(path: Path, index: Path) -> bool:
    """Whether a file is in the folder of an index, or is a link to where a hub's cache holds the contents of its files."""
    real = path.resolve()
    return real.parent == index.parent.resolve() or real.parent.name == "blobs"


def read(folder: Path) -> dict[str, Tensor]:
    """The tensors of all weight files by name, as they are stored. A pickled file is read as tensors only: what else is in it
    is refused and not run.

    Raises:
        ValueError: as ``files``; a file that holds no tensors.
        Exception: what the reader of a damaged file raises.
    """
    found: dict[str, Tensor] = {}
    for path in files(folder):
        pickled = path.suffix == ".bin"
        if pickled:
            log.info("%s is pickled: its tensors are read, and nothing in it is run", path)
        stored = torch.load(path, map_location="cpu", weights_only=True) if pickled else load_file(path)
        if not isinstance(stored, dict) or not all(isinstance(name, str) for name in stored):
            raise ValueError(f"{path} holds no named tensors; take a sound checkpoint")
        found |= {name: value for name, value in stored.items() if isinstance(value, Tensor)}
    return found


def check_file(folder: Path, expected: str) -> None:
    """Refuse a folder whose model.safetensors has another sha256 than the expected one.

    Raises:
        ValueError: naming both.
    """
    if (found := file_sha256(folder / SAFETENSORS)) != expected:
        raise ValueError(f"{folder / SAFETENSORS} has sha256 {found}, not {expected}; download it again")


def digest(encoder: Encoder) -> str:
    """sha256 over what an encoder computes with: its configuration and its numbers in float32, however they were stored."""
    state = encoder.state_dict()

    def of(name: str) -> str:
        return hashlib.sha256(state[name].detach().float().cpu().contiguous().numpy()).hexdigest()

    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        numbers = dict(zip(state, pool.map(of, state), strict=True))
    return json_sha256([config_digest(encoder.config), numbers])


def config_digest(config: EncoderConfig) -> str:
    """sha256 over the fields that are not at their defaults: a field that a later version adds changes nothing."""
    fields = dataclasses.fields(config)
    return json_sha256(
        {field.name: value for field in fields if (value := getattr(config, field.name)) != field.default}
    )


def check_size(stored: dict[str, Tensor], config: EncoderConfig, source: str) -> None:
    """Refuse a configuration of a far larger model than the weights are, before memory is taken for it.

    Raises:
        ValueError: with both sizes.
    """
    held, wanted = sum(tensor.numel() for tensor in stored.values()), config.family.parameters(config)
    if wanted > 2 * held:  # a smaller difference is named by the first weight that is missing or of another shape
        raise ValueError(
            f"{source}: its config.json describes a model of {wanted:,} numbers, but its weights hold {held:,}; download or "
            "export both again"
        )


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
