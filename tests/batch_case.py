"""A corpus in which an id says where it comes from, and the streams and digests of its batches."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastkd.data.batches import Batch, BatchStream, SpecialIds, pack_size
from fastkd.data.shards import Shards, build_shards

PACK = pack_size(128)
SPECIAL = SpecialIds(cls=0, sep=1, mask=2, pad=3, all_special=frozenset({0, 1, 2, 3, 4}))
WORDS = 70_000


def made_shards(folder: Path) -> Shards:
    """A corpus in which every word stands once, so that an id says which document and place it comes from."""
    special = ["[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]"]
    words = [*special, *(f"w{i}" for i in range(len(special), WORDS))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    lengths = np.random.default_rng(0).geometric(1 / 90, size=2_000)
    ends = np.minimum(np.cumsum(lengths) + len(special), WORDS)
    bounds = np.unique([len(special), *ends])
    texts = [" ".join(words[a:b]) for a, b in itertools.pairwise(bounds)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    return build_shards(str(folder / "a.jsonl"), tokenizer, folder / "shards", validation_fraction=0.15)


def stream(shards: Shards, **options: object) -> BatchStream:
    defaults = {"batch_tokens": 8 * PACK, "micro_tokens": 2 * PACK, "seed": 5, "device": "cpu"}
    return BatchStream(shards, SPECIAL, **(defaults | options))


def documents(shards: Shards, split: str = "train") -> list[list[int]]:
    tokens, offsets = shards.documents(split)
    return [tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def sequences(batch: Batch) -> list[list[int]]:
    return [part.tolist() for part in batch.input_ids.split(batch.lengths)]


def contents(batch: Batch) -> list[list[int]]:
    """What stands between [CLS] and [SEP] in every sequence that is no filler."""
    return [sequence[1:-1] for sequence in sequences(batch) if sequence[0] != SPECIAL.pad]


def digest(batches: Sequence[Batch]) -> str:
    sha256 = hashlib.sha256()
    for batch in batches:
        for field in fields(batch):
            if field.name == "predicted_share":  # follows from the labels, and came later than the digest below
                continue
            value = getattr(batch, field.name)
            sha256.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return sha256.hexdigest()
