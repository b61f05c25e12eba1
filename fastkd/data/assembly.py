"""Packs to the tensors of a micro-batch on the host, before masking."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastkd.data.masking import key_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastkd.data.packing import Fragments, Packer


@dataclass(frozen=True)
class SpecialIds:
    """The ids of [CLS], [SEP], [MASK] and [PAD], and all ids that are never predicted."""

    cls: int
    sep: int
    mask: int
    pad: int
    all_special: frozenset[int]
    absent: frozenset[int] = frozenset()  # ids below the largest that no token has

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> SpecialIds:
        """The special ids of a tokenizer. Raises ``ValueError`` where one is missing."""
        ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "mask", "pad")}
        missing = [name for name, token in ids.items() if token is None]
        if missing:
            raise ValueError(f"the tokenizer has no {', '.join(missing)} token: take that of a BERT or RoBERTa")
        used = frozenset(tokenizer.get_vocab().values()) | frozenset(tokenizer.all_special_ids)
        absent = frozenset(range(max(used) + 1)) - used
        return cls(**ids, all_special=frozenset(tokenizer.all_special_ids), absent=absent)


@dataclass(frozen=True)
class Plain:
    """A micro-batch of whole packs on the host, not masked. Fields as in ``batches.Batch``."""

    ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64
    cu_seqlens: Tensor  # [B + 1] int32
    keys: Tensor  # [packs] int64: the hash from which each pack's mask is drawn
    lengths: tuple[int, ...]
    real_tokens: int
    pairs: int
    pairs_share: float
    predicted_share: float

    def pinned(self) -> Plain:
        """The same in page-locked memory, from which the device copies while the host goes on."""
        tensors = {name: getattr(self, name).pin_memory() for name in ("ids", "position_ids", "cu_seqlens", "keys")}
        return dataclasses.replace(self, **tensors)


@dataclass(frozen=True)
class Assembler:
    """Makes micro-batches of ``packs`` packs each."""

    packer: Packer
    special: SpecialIds
    seed: int
    packs: int

    def __call__(self, fragments: Fragments, first_pack: int, mean_pairs: float, predicted_share: float) -> Plain:
        """Assemble one micro-batch.

        Args:
            fragments: of its packs.
            first_pack: the number of its first pack in the endless row.
            mean_pairs: Σ length² of an average micro-batch of the step.
            predicted_share: as in ``batches.Batch``.
        """
        size = self.packs * self.packer.pack_tokens
        length, is_filler = fragments.sizes(self.packs, self.packer.pack_tokens)
        # Where each sequence begins in the micro-batch; together they fill it exactly.
        begin = np.cumsum(length) - length
        cu_seqlens = np.full(self.packs * self.packer.max_sequences + 1, size, np.int32)
        cu_seqlens[: len(begin)] = begin
        pairs = int((length**2).sum())
        return Plain(
            ids=torch.from_numpy(self._ids(fragments, begin[~is_filler], size)),
            position_ids=torch.from_numpy(np.arange(size) - np.repeat(begin, length)),  # from 0 in every sequence
            cu_seqlens=torch.from_numpy(cu_seqlens),
            keys=torch.from_numpy(self._keys(first_pack)),
            lengths=tuple(length.tolist()),
            real_tokens=int(length[~is_filler].sum()),
            pairs=pairs,
            pairs_share=pairs / mean_pairs,
            predicted_share=predicted_share,
        )

    def predicted(self, fragments: Fragments, packs: int, masked: int) -> np.ndarray:
        """Predicted positions of each pack, [packs] int64: ``masked``, or its ordinary tokens where these are fewer.

        A micro-batch's loss is a mean over its own predicted positions; the step's mean needs the counts of all ranks.
        Reading the ids of the whole step here costs less than asking the other ranks.
        """
        _, ids = self._content(fragments)
        special = np.isin(ids, list(self.special.all_special), kind="table")
        ordinary = np.bincount(np.repeat(fragments.pack, fragments.length), ~special, minlength=packs)
        return np.minimum(ordinary, masked).astype(np.int64)

    def _ids(self, fragments: Fragments, begin: np.ndarray, size: int) -> np.ndarray:
        """[T] int64: [CLS] content [SEP] at each ``begin`` [F], [PAD] elsewhere."""
        within, content = self._content(fragments)
        ids = np.full(size, self.special.pad, np.int64)
        ids[begin] = self.special.cls
        ids[begin + fragments.length + 1] = self.special.sep
        ids[np.repeat(begin + 1, fragments.length) + within] = content
        return ids

    def _content(self, fragments: Fragments) -> tuple[np.ndarray, np.ndarray]:
        """(place within its fragment, id) of every corpus token of the fragments, [n] int64 each."""
        length = fragments.length
        # A running number over all tokens, minus that of the fragment's first token.
        within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        return within, self.packer.ids(np.repeat(fragments.source, length) + within)

    def _keys(self, first_pack: int) -> np.ndarray:
        """[packs] int64: the hash of (seed, epoch, pack of the epoch)."""
        keys = [key_of(self.seed, *self.packer.place(first_pack + pack)) for pack in range(self.packs)]
        return np.array(keys, np.uint64).view(np.int64)
