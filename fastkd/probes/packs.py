"""Texts through a frozen encoder, packed end to end: hidden states of all layers, or log-probabilities of tokens.

Shapes: N tokens of all texts, W windows, T tokens of a batch, n rows that are read, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastkd.models.needs import Needs

if TYPE_CHECKING:
    from fastkd.data.assembly import SpecialIds
    from fastkd.models.encoder import Encoder

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Batch:
    """Whole windows, with the fields that the encoder reads."""

    ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, from 0 in every window
    cu_seqlens: Tensor  # [windows + 1] int32
    max_seqlen: int
    predicted: Tensor  # [rows] int64, ascending: the rows that are read


@dataclass(frozen=True)
class Packs:
    """Texts as the encoder reads them: cut into windows [CLS] content [SEP] of at most ``longest`` tokens, end to end."""

    ids: np.ndarray  # [N + 2·W] int64, special tokens included
    begin: np.ndarray  # [W + 1] int64, where each window begins, and the end
    place: np.ndarray  # [N] int64, where each token of the texts is

    @classmethod
    def of(cls, ids: np.ndarray, lengths: np.ndarray, special: SpecialIds, longest: int) -> Packs:
        """From the texts' ids [N] end to end and their lengths [texts]."""
        room = longest - 2
        count = -(-lengths // room)  # windows of each text
        number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)  # of a window within its text
        size = np.minimum(np.repeat(lengths, count) - number * room, room)
        begin = np.concatenate([[0], np.cumsum(size + 2)])
        place = np.arange(len(ids)) + 2 * np.repeat(np.arange(len(size)), size) + 1
        packed = np.full(begin[-1], special.sep, np.int64)
        packed[begin[:-1]], packed[place] = special.cls, ids
        return cls(packed, begin, place)

    def batches(self, rows: np.ndarray, device: torch.device) -> Iterator[Batch]:
        """Batches of about ``BATCH_TOKENS`` that together hold the rows [n], ascending positions in the texts, in order."""
        at, first = self.place[rows], 0
        while first < len(self.begin) - 1:
            start = self.begin[first]
            last = max(first + 1, int(np.searchsorted(self.begin, start + BATCH_TOKENS, side="right")) - 1)
            end, begin = self.begin[last], self.begin[first : last + 1] - start
            wanted = at[np.searchsorted(at, start) : np.searchsorted(at, end)] - start
            if len(wanted):
                size = np.diff(begin)
                position = np.arange(end - start) - np.repeat(begin[:-1], size)
                yield Batch(
                    torch.from_numpy(self.ids[start:end]).to(device),
                    torch.from_numpy(position).to(device),
                    torch.from_numpy(begin.astype(np.int32)).to(device),
                    int(size.max()),
                    torch.from_numpy(wanted).to(device),
                )
            first = last


@torch.inference_mode()
def hidden_states(encoder: Encoder, packs: Packs, rows: np.ndarray) -> list[Tensor]:
    """The hidden states at rows [n], ascending: for each layer, 0 is the embeddings' output, [n, D] float32 on the CPU."""
    layers = encoder.config.num_layers
    needs = Needs(hidden=tuple(range(layers)), last_rows=True)  # the last layer runs for the rows only
    states = [torch.empty(len(rows), encoder.config.hidden_size) for _ in range(layers + 1)]
    done = 0
    for batch in packs.batches(rows, encoder.word_embeddings.weight.device):
        out, here = encoder(batch.ids, batch, needs), slice(done, done + len(batch.predicted))
        assert out.last_rows is not None
        for layer in range(layers):
            states[layer][here] = out.hidden[layer].index_select(0, batch.predicted)
        states[layers][here] = out.last_rows
        done = here.stop
    return states


@torch.inference_mode()
def log_probabilities(encoder: Encoder, packs: Packs, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """log P(label | the window) by the MLM head at rows [n], ascending, of labels [n]: [n] float64."""
    device, wanted = encoder.word_embeddings.weight.device, torch.from_numpy(labels)
    found = torch.empty(len(rows), dtype=torch.float64)
    done = 0
    for batch in packs.batches(rows, device):
        out = encoder(batch.ids, batch, Needs(logits=True))
        assert out.head_rows is not None and out.decoder_weight is not None and out.decoder_bias is not None
        logits = torch.addmm(out.decoder_bias, out.head_rows, out.decoder_weight.t())  # [rows, V]
        here = slice(done, done + len(logits))
        chosen = logits.gather(1, wanted[here, None].to(device)).squeeze(1)
        found[here] = (chosen.double() - logits.logsumexp(1).double()).cpu()
        done = here.stop
    return found.numpy()
