"""Unpadded, masked micro-batches. Step i depends only on (seed, i), not on the number of ranks or micro-batches.

T tokens of a micro-batch, B sequences at most, M predicted positions; P tokens of a pack.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastkd.data.assembly import Assembler, Plain, SpecialIds
from fastkd.data.masking import Masker
from fastkd.data.packing import Fragments, Packer
from fastkd.data.sequences import Texts
from fastkd.data.sizes import check_sizes, pack_size

if TYPE_CHECKING:
    from fastkd.data.shards import Shards

STEPS_AHEAD = 2
VALIDATION_SEED = 20_240_430

__all__ = ["Batch", "BatchStream", "SpecialIds", "StepTokens", "pack_size", "validation_batches"]


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Shapes are the same in every step."""

    input_ids: Tensor  # [T] int64, plain text
    masked_ids: Tensor  # [T] int64, with the predicted positions hidden
    position_ids: Tensor  # [T] int64, from 0 in every sequence
    cu_seqlens: Tensor  # [B + 1] int32, trailing entries repeat T
    predicted: Tensor  # [M] int64, ascending rows of T
    labels: Tensor  # [M] int64, −100 where a pack had too few ordinary tokens
    max_seqlen: int
    lengths: tuple[int, ...]  # of the sequences, fillers included
    real_tokens: int  # tokens of all sequences but fillers
    pairs: int  # Σ length², fillers included
    pairs_share: float  # pairs ÷ mean pairs of the step's micro-batches on all ranks
    predicted_share: float  # the same of the labels that are not −100

    @property
    def sequences(self) -> Tensor:
        """[n + 1] int32: ``cu_seqlens`` of the n sequences of this batch, without the repeats of T.

        A view whose size the host knows. About half of the B sequences are empty. Code whose shapes may change from step
        to step, such as the relations, takes this; compiled or captured code takes ``cu_seqlens``.
        """
        return self.cu_seqlens[: len(self.lengths) + 1]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same micro-batch on another device."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = value.to(device, non_blocking=non_blocking)
        return Batch(**values)


@dataclass(frozen=True)
class StepTokens:
    """Sizes of one step over all ranks."""

    real: int  # tokens without fillers
    predicted: int  # rows, those with label −100 included
    pairs: int  # Σ length²


class BatchStream:
    """The endless batches of a split: epoch after epoch, each in its own order.

    Args:
        shards: the corpus.
        special: the tokenizer's special ids.
        split: ``train`` or ``validation``.
        seq_length: longest sequence, [CLS] and [SEP] included.
        batch_tokens: tokens of a step over all ranks, fillers included.
        micro_tokens: T, tokens of a micro-batch.
        mask_rate: share of the tokens that are predicted; exactly round(mask_rate · P) a pack.
        seed: of order and masks.
        rank, world: number of this process, and of processes that share a step; each takes a contiguous part.
        device: of the batches.
        max_unique_tokens: tokens of the split to use at most, of documents in a fixed random order.
        packing: ``documents``, or ``full-sentences``: documents follow each other in a sequence, a [SEP] between two.

    Raises:
        ValueError: sizes that do not divide (with the nearest that do), or values out of range.
    """

    def __init__(
        self,
        shards: Shards,
        special: SpecialIds,
        *,
        split: str = "train",
        seq_length: int = 128,
        batch_tokens: int,
        micro_tokens: int,
        mask_rate: float = 0.15,
        seed: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str,
        max_unique_tokens: int | None = None,
        packing: str = "documents",
    ) -> None:
        self._pack_tokens = pack_size(seq_length)
        check_sizes(batch_tokens, micro_tokens, self._pack_tokens, world)
        if not 0 < mask_rate < 1:
            raise ValueError(f"mask_rate is {mask_rate}: take one between 0 and 1, such as 0.15")
        texts = Texts(shards, special, split, seq_length, packing, max_unique_tokens)
        self._packer = Packer(texts, pack_tokens=self._pack_tokens, seed=seed)
        self._shards, self._most = shards if split == "train" else None, max_unique_tokens
        self._wanted = 0  # packs that will be read, as far as is known
        self._seq_length = seq_length
        self._device = torch.device(device)
        self._packs_per_step, self._rank, self._world = batch_tokens // self._pack_tokens, rank, world
        self._masked_per_pack = round(mask_rate * self._pack_tokens)
        self._plain = Assembler(self._packer, special, seed, micro_tokens // self._pack_tokens)
        never = special.all_special | special.absent
        self._mask = Masker(shards.vocab_size, never, special.mask, self._masked_per_pack, self._device)

    @property
    def unique_tokens(self) -> int:
        """Tokens of the split in use, without special tokens; an estimate until their last part exists."""
        if self._packer.is_complete or self._shards is None:
            return self._packer.unique(self._packer.packs)
        return min(self._most or self._shards.unique_tokens, self._shards.unique_tokens)

    @property
    def mean_sequence(self) -> float:
        """Mean tokens of a sequence, [CLS] and [SEP] included, before packs cut some in two."""
        return self._packer.mean_length

    def recut(self, micro_tokens: int) -> BatchStream:
        """The same steps in micro-batches of another size. Both streams share their shuffled epochs.

        Raises:
            ValueError: as when a stream is made.
        """
        check_sizes(self._packs_per_step * self._pack_tokens, micro_tokens, self._pack_tokens, self._world)
        other = copy.copy(self)
        other._plain = dataclasses.replace(self._plain, packs=micro_tokens // self._pack_tokens)
        return other

    def step(self, i: int) -> list[Batch]:
        """This rank's micro-batches of step ``i``, on the device."""
        return [self._batch(plain) for plain in self._assemble(i)]

    def prefetch(self, start: int) -> Generator[list[Batch], None, None]:
        """Yield step(start), step(start + 1), …; meanwhile a thread assembles the next ones on the host.

        Another thread shuffles the next epoch half an epoch ahead. Work of the device (copies, masks) is queued from the
        caller's thread and stream. An exception in a thread is raised here. Closing the iterator ends the threads; a
        shuffle that has begun is finished first, and only the end of the process waits for it.
        """
        assembling, shuffling = ThreadPoolExecutor(1, "batches"), ThreadPoolExecutor(1, "epochs")

        def assemble(i: int) -> Future[list[Plain]]:
            self._look_ahead(i, shuffling)
            return assembling.submit(self._assemble, i)

        try:
            ahead: deque[Future[list[Plain]]] = deque()
            for i in count(start):
                if not ahead:  # the first step, or one whose text was not there yet
                    self.wait(i)
                while len(ahead) <= STEPS_AHEAD and self.is_there(i + len(ahead)):
                    ahead.append(assemble(i + len(ahead)))
                yield [self._batch(micro) for micro in ahead.popleft().result()]
        finally:
            assembling.shutdown(cancel_futures=True)
            shuffling.shutdown(wait=False, cancel_futures=True)

    # ---- a corpus in parts, of which later ones may still be built ------------------------------------------

    def is_there(self, i: int) -> bool:
        """Whether step ``i`` can be read without waiting for its text."""
        pack = (i + 1) * self._packs_per_step - 1
        while not self._packer.has(pack):
            if self._shards is None or not self._shards.is_there(self._packer.parts):
                return False
            self._packer.extend()
        return True

    def wait(self, i: int, stop: Callable[[], bool] = lambda: False) -> None:
        """Wait until step ``i`` can be read.

        Args:
            i: the step.
            stop: asked now and then; True ends the waiting.

        Raises:
            BuildingFailed: its text could not be built; in one line.
            InterruptedError: ``stop`` returned True.
        """
        while not self.is_there(i):
            assert self._shards is not None
            self._shards.part(self._packer.parts, stop)

    def enters_part(self, i: int) -> bool:
        """Whether step ``i`` is the first that reads a new part of the corpus: the same on every rank."""
        return self._packer.enters_part(i * self._packs_per_step, (i + 1) * self._packs_per_step - 1)

    def want(self, steps: int) -> None:
        """Tell how many steps will be read: later parts are built ahead for that many."""
        self._wanted = steps * self._packs_per_step

    def _look_ahead(self, i: int, pool: Executor) -> None:
        """Let the pool shuffle the epoch or part that comes next, and build later parts."""
        pack = (i + 1) * self._packs_per_step - 1
        self._packer.look_ahead(pack, pool)
        if not self._packer.is_complete and self._wanted > self._packer.packs:
            pool.submit(self._build_ahead, self._packer.part_of(pack))

    def _build_ahead(self, part: int) -> None:
        """Keep two parts ahead of part ``part``, which is read, as far as they will be needed."""
        shards, packer = self._shards, self._packer
        assert shards is not None
        for number in (part + 1, part + 2):
            if packer.is_complete or packer.packs_of(shards.tokens_before(number)) >= self._wanted:
                return
            if not shards.is_there(number):
                shards.ahead(number)
                return
            if number == part + 1 == packer.parts:
                packer.extend()
            if shards.is_last(number):
                return

    def epoch_of(self, i: int) -> float:
        """Epochs read before step ``i``."""
        return self._packer.epochs(i * self._packs_per_step, self.unique_tokens)

    def unique_of(self, i: int) -> int:
        """Different corpus tokens read before step ``i``."""
        return self._packer.unique(i * self._packs_per_step)

    def tokens_of(self, i: int) -> StepTokens:
        """Sizes of step ``i`` over all ranks."""
        length, is_filler = self._fragments(i).sizes(self._packs_per_step, self._pack_tokens)
        predicted = self._packs_per_step * self._masked_per_pack
        return StepTokens(int(length[~is_filler].sum()), predicted, int((length**2).sum()))

    def _fragments(self, i: int) -> Fragments:
        if i < 0:
            raise ValueError(f"step is {i}: steps count from 0")
        return self._packer.fragments(i * self._packs_per_step, (i + 1) * self._packs_per_step)

    def _assemble(self, i: int) -> list[Plain]:
        everything = self._fragments(i)  # of all ranks: the shares of a micro-batch are of the whole step
        length, _ = everything.sizes(self._packs_per_step, self._pack_tokens)
        packs, own = self._plain.packs, self._packs_per_step // self._world
        mean_pairs = float((length**2).sum()) * packs / self._packs_per_step  # of a micro-batch
        predicted = self._plain.predicted(everything, self._packs_per_step, self._masked_per_pack)
        mean_predicted = max(float(predicted.sum()), 1.0) * packs / self._packs_per_step
        micros = []
        for first in range(self._rank * own, (self._rank + 1) * own, packs):
            fragments = everything.of(first, first + packs)
            share = float(predicted[first : first + packs].sum()) / mean_predicted
            micros.append(self._plain(fragments, i * self._packs_per_step + first, mean_pairs, share))
        return [micro.pinned() for micro in micros] if self._device.type == "cuda" else micros

    def _batch(self, plain: Plain) -> Batch:
        host = (plain.ids, plain.position_ids, plain.cu_seqlens, plain.keys)
        ids, position_ids, cu_seqlens, keys = (tensor.to(self._device, non_blocking=True) for tensor in host)
        masked_ids, predicted, labels = self._mask(ids.view(-1, self._pack_tokens), keys)
        return Batch(
            ids, masked_ids, position_ids, cu_seqlens, predicted, labels, self._seq_length,
            plain.lengths, plain.real_tokens, plain.pairs, plain.pairs_share, plain.predicted_share,
        )  # fmt: skip


def validation_batches(
    shards: Shards,
    special: SpecialIds,
    *,
    seq_length: int = 128,
    micro_tokens: int,
    mask_rate: float = 0.15,
    max_tokens: int = 2**20,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str,
    packing: str = "documents",
) -> list[Batch]:
    """This rank's part of the validation split, with the same masks for every training seed.

    The whole split, except for less than a pack, or about ``max_tokens`` of it. Where it does not fill the last micro-batches,
    it is read again in another order.
    """
    pack_tokens = pack_size(seq_length)
    texts = Texts(shards, special, "validation", seq_length, packing, None)
    packs = Packer(texts, pack_tokens=pack_tokens, seed=VALIDATION_SEED).packs_per_epoch
    unit = micro_tokens * world
    stream = BatchStream(
        shards, special, split="validation", seq_length=seq_length,
        batch_tokens=-(-min(packs * pack_tokens, max_tokens) // unit) * unit, micro_tokens=micro_tokens,
        mask_rate=mask_rate, seed=VALIDATION_SEED, rank=rank, world=world, device=device, packing=packing,
    )  # fmt: skip
    return stream.step(0)
