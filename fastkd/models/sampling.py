"""Tokens drawn from softmaxes over the vocabulary, by noise that is a hash of the text: no state, and no run differs from another.

A token is argmax_v (z_v + G_v) with Gumbel noise G (Gumbel 1954), which has the distribution softmax(z). The noise of a position
depends on its sequence's ids and on its place there, and so neither on the size of micro-batches nor on the number of ranks.
Shapes: T packed tokens, B sequences, M rows, R rows of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastkd.data.masking import mix_tensor

ROWS = {"cpu": 64}  # of a chunk: a few buffers of [R, V] numbers are in memory at the same time
MOST_ROWS = 2048  # elsewhere
# Two multipliers of "lowbias32" (Wellons, "Hash Prospector", public domain), and 2^32 over the golden ratio, as int32
_FIRST, _SECOND, _GOLDEN = 0x7FEB352D, 0x846CA68B - 2**32, 0x9E3779B9 - 2**32

Draw = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def token_hashes(ids: Tensor, position_ids: Tensor) -> Tensor:
    """A hash of each token's id and place, int64 of the same shape: their sum over a sequence is the sequence's."""
    return mix_tensor(mix_tensor(ids) + position_ids)


def row_keys(ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, rows: Tensor) -> Tensor:
    """A hash of the sequence and the place of each row: ids and places [T], ``cu_seqlens`` [B + 1], rows [M] → [M] int64."""
    before = torch.nn.functional.pad(token_hashes(ids, position_ids).cumsum(0), (1, 0))  # of the tokens before each
    ends = before[cu_seqlens.long()]
    sequence = torch.searchsorted(cu_seqlens.long(), rows, right=True) - 1
    return mix_tensor((ends[1:] - ends[:-1])[sequence] + position_ids[rows])


def draw(hidden: Tensor, weight: Tensor, bias: Tensor, keys: Tensor) -> Tensor:
    """A token for each row: [R, D], [V, D] of the same dtype, [V] and keys [R] int64 → [R] int64."""
    logits = (hidden @ weight.T).to(bias.dtype).add_(bias)
    return logits.sub_(_exponential(keys, len(weight)).log_()).argmax(-1)


def _exponential(keys: Tensor, count: int) -> Tensor:
    """[R] int64 → [R, count] float32 of the exponential distribution. The smallest, which decide, are the most exact."""
    low, high = (keys & 2**31 - 1).int()[:, None], (keys >> 31 & 2**31 - 1).int()[:, None]
    x = low + _GOLDEN * torch.arange(count, dtype=torch.int32, device=keys.device)
    x ^= x >> 16 & 0xFFFF  # a shift that fills up with zeros
    x *= _FIRST  # modulo 2^32
    x ^= (x >> 15 & 0x1FFFF) ^ high
    x *= _SECOND
    x ^= x >> 16 & 0xFFFF
    x &= 2**31 - 1
    return x.add(0.5).mul_(-(2.0**-31)).log1p_().neg_()


@torch.no_grad()
def sample(hidden: Tensor, weight: Tensor, bias: Tensor, keys: Tensor, *, draw: Draw = draw) -> Tensor:
    """The same for any number of rows [M, D], a chunk at a time: [M, V] is never held. The product has autocast's dtype, if on.

    ``draw`` may be a compiled one.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    # Cast once, and not by autocast: it would keep a copy for the loss that has no gradient.
    hidden, weight, bias = hidden.detach().to(dtype), weight.detach().to(dtype), bias.detach()
    size = ROWS.get(device, MOST_ROWS)
    chunks = zip(hidden.split(size), keys.split(size), strict=True)
    return torch.cat([draw(rows, weight, bias, part) for rows, part in chunks])
