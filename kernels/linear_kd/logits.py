"""A chunk's logits on the Triton path: the buffers, and the launch that fills them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.kernels import tiling
from fastkd.kernels.linear_kd.head import LOG2E, Head
from fastkd.kernels.linear_kd.triton import _logits_kernel
from fastkd.kernels.tiling import Tile


class Logits(NamedTuple):
    """Centred logits of a chunk and their tiles' statistics: one buffer for all chunks."""

    centred: Tensor  # [R, stride]
    maximum: Tensor  # [R, tiles]
    total: Tensor  # [R, tiles]: Σ exp((z − max)/τ)
    total_ce: Tensor | None  # [R, tiles]: Σ exp(z − max)

    @classmethod
    def empty(cls, head: Head, rows: int, tile: Tile, with_ce: bool) -> Logits:
        like, tiles = head.hidden, -(-len(head.weight) // tile.block_n)
        rows = -(-rows // tile.block_m) * tile.block_m
        centred = like.new_empty((rows, tiles * tile.block_n))
        maximum, total, total_ce = (like.new_empty((rows, tiles), dtype=torch.float32) for _ in range(3))
        return cls(centred, maximum, total, total_ce if with_ce else None)


def fill(head: Head, labels: Tensor | None, out: Logits, temperature: float, tile: Tile) -> None:
    """The launch for one model: fill ``out``."""
    rows, width = head.hidden.shape
    vocabulary = head.weight.shape[0]
    grid = (-(-rows // tile.block_m), -(-vocabulary // tile.block_n))
    _logits_kernel[grid](
        head.hidden,
        head.weight,
        head.bias,
        labels,
        out.centred,
        out.maximum,
        out.total,
        out.total_ce,
        rows,
        vocabulary,
        out.centred.stride(0),
        LOG2E / temperature,
        WIDTH=width,
        HAS_LABELS=labels is not None,
        HAS_SUM_CE=out.total_ce is not None,
        UPCAST=tiling.INTERPRETED,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is at least ``n``."""
    return -(-n // multiple) * multiple


def power_of_two(n: int) -> int:
    """The smallest that is at least ``n``."""
    return 1 << (n - 1).bit_length()
