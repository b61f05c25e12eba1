"""Part of a build of shards as a build of its own, for where a whole corpus does not fit."""

import json
import os
import shutil
from pathlib import Path

import numpy as np

from fastkd.data.shards import Shards
from fastkd.data.writer import sync_folder, write_durably


def write_sample(shards: Shards, folder: str | os.PathLike[str], *, tokens: int, seed: int) -> Shards:
    """Write a random part of a build's training documents, whole and in their order, with all that it holds out.

    Documents are taken in an order that the seed decides, up to the first that would bring their tokens over
    ``tokens``; at least one is. So a smaller sample of a seed is part of every larger one. All of them is the same
    build again, of the same version.

    Args:
        shards: the build to draw from.
        folder: of the new build; one that is there is replaced.
        tokens: of the training split, at most.
        seed: of the order.
    """
    target = Path(folder)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    ids, offsets = shards.documents("train")
    kept = _drawn(np.diff(offsets), tokens, seed)
    held_ids, held_offsets = shards.documents("validation")
    ids = ids[np.repeat(kept, np.diff(offsets))]
    arrays = {
        "train.tokens.bin": ids,
        "train.offsets.bin": np.concatenate([[0], np.diff(offsets)[kept]]).cumsum(dtype=np.int64),
        "validation.tokens.bin": held_ids,
        "validation.offsets.bin": held_offsets,
        "unigrams.bin": np.bincount(ids, minlength=shards.vocab_size).astype(np.int64),
    }
    files = {name: write_durably(target / name, array.tobytes()) for name, array in arrays.items()}
    recipe, drawn = shards.index["recipe"], {"of": shards.version, "tokens": len(ids), "seed": seed}
    index = shards.index | {
        "tokens": shards.index["tokens"] | {"train": len(ids)},
        "documents": shards.index["documents"] | {"train": int(kept.sum())},
        "files": files,
        "recipe": recipe if kept.all() else recipe | {"sample": drawn},
    }
    write_durably(target / "index.json", json.dumps(index, indent=1).encode())
    sync_folder(target)
    return Shards(target)


def _drawn(lengths: np.ndarray, tokens: int, seed: int) -> np.ndarray:
    """Which documents are taken, [documents] bool."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    count = max(int(np.searchsorted(lengths[order].cumsum(), tokens, side="right")), 1)
    kept = np.zeros(len(lengths), bool)
    kept[order[:count]] = True
    return kept
