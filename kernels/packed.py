"""Packed sequences in Triton: what the kernels of ``relation_kl``, ``score_mse`` and ``packed_attention`` share.

Rows of a [T, D] tensor are tokens, sequences follow each other, and ``cu_seqlens`` says where each begins; a head is a slice
of D/A columns. Here are the checks of the losses' arguments, the tiles of that layout as kernels load and store them, and how a
call is launched.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.kernels import tiling
from fastkd.kernels.tiling import Rule, Tile, jit

try:
    import triton.language as tl
except ImportError:
    tl = None

MAX_HEAD_WIDTH = 128  # of the Triton kernels, which hold a head's whole width
PROGRAMS = 8192  # of a launch over whole sequences: 20 times as many as an H100 holds at once


# ---- arguments ------------------------------------------------------------------------------------------------


def check_pair(op: str, who: str, query: Tensor, key: Tensor, like: Tensor, num_heads: int) -> None:
    """Raise ValueError unless query and key are floats [T, D] with D a multiple of ``num_heads`` and T that of ``like``."""
    if query.dtype not in tiling.FLOATS or key.dtype not in tiling.FLOATS:
        raise ValueError(f"{op}: {who} is {query.dtype}: give float16, bfloat16, float32 or float64")
    if query.ndim != 2 or query.shape != key.shape or query.shape[0] != like.shape[0]:
        shapes = f"{tuple(query.shape)} and {tuple(key.shape)}"
        raise ValueError(f"{op}: {who} has shapes {shapes}: give [{like.shape[0]}, D] both, one row a token")
    if num_heads < 1 or query.shape[1] < 1 or query.shape[1] % num_heads:
        raise ValueError(
            f"{op}: {who} width {query.shape[1]} is no positive multiple of num_heads={num_heads}: choose a divisor"
        )


def check_cu_seqlens(op: str, cu_seqlens: Tensor, like: Tensor) -> None:
    """Raise ValueError unless ``cu_seqlens`` is an integer [B+1] beside ``like``; its values are read on a CPU only."""
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        given = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        raise ValueError(f"{op}: cu_seqlens is {given}: give B+1 int32 row numbers, from 0 to {like.shape[0]}")
    if cu_seqlens.device != like.device:
        raise ValueError(f"{op}: cu_seqlens is on {cu_seqlens.device}, its rows on {like.device}: move it there")


def choose_backend(op: str, backend: str | None, like: Tensor, head_width: int) -> str:
    """``tiling.backend``, with a ValueError for a head too wide for the Triton kernels."""
    backend = tiling.backend(backend, like)
    if backend == "triton" and head_width > MAX_HEAD_WIDTH:
        raise ValueError(f"{op}: head width {head_width} exceeds {MAX_HEAD_WIDTH}: use more heads or backend='blocked'")
    return backend


def in_one_dtype(*tensors: Tensor | None) -> list[Any]:
    """The tensors in the widest of their dtypes, so that products of mixed ones are exact too."""
    widest = functools.reduce(torch.promote_types, (x.dtype for x in tensors if x is not None))
    return [None if x is None else x.to(widest) for x in tensors]


# ---- Triton ---------------------------------------------------------------------------------------------------


@jit
def _tile(  # type: ignore[no-untyped-def]
    pointer, stride, first, count, head, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Pointers [ROWS, COLUMNS] to one head's slice of packed rows, and which are inside.

    One 64-bit base, and 32-bit distances inside the tile: half the registers of a 64-bit address for every row.
    """
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    base = pointer + first.to(tl.int64) * stride + head * WIDTH
    return base + (row * stride + column), (row < count) & (column < WIDTH)


@jit
def load_tile(  # type: ignore[no-untyped-def]
    source,  # (pointer, stride of a row)
    first, count, head, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``count`` rows from ``first`` on, zero past them and past the head's width."""
    pointers, inside = _tile(source[0], source[1], first, count, head, WIDTH, ROWS, COLUMNS)
    return tl.load(pointers, mask=inside, other=0.0).to(DTYPE)


@jit
def store_tile(  # type: ignore[no-untyped-def]
    pointer, stride, first, count, head, value, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The same rows, in the dtype of the pointer."""
    pointers, inside = _tile(pointer, stride, first, count, head, WIDTH, ROWS, COLUMNS)
    tl.store(pointers, value.to(pointer.dtype.element_ty), mask=inside)


@jit
def row_block(cu_ptr, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program (head, row block, sequence): first row and rows of its block, start and length of its sequence."""
    sequence, offset = tl.program_id(2), tl.program_id(1) * BLOCK_M
    start = tl.load(cu_ptr + sequence)
    count = tl.load(cu_ptr + sequence + 1) - start
    return start + offset, tl.minimum(count - offset, BLOCK_M), start, count


def unit_stride(x: Tensor) -> Tensor:
    """``x`` if its columns are side by side, as in a slice of a wider projection; else a copy. Kernels take the stride of a row."""
    return x if x.stride(1) == 1 else x.contiguous()


def pad_width(width: int) -> int:
    """Columns of a head's tile: a power of two, at least the matrix unit's 16."""
    return max(16, 1 << (width - 1).bit_length())


def dot_dtype(dtype: torch.dtype) -> Any:
    """The dtype of the kernels' matrix operands: float32 in the interpreter, which multiplies bfloat16 wrongly."""
    if tiling.INTERPRETED or dtype == torch.float32:
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


# ---- launches -------------------------------------------------------------------------------------------------
#
# Kernels called "short" hold all scores of a sequence: block_m is the longest sequence of a launch, and each tile takes the
# sequences that are too long for the tile before it. In a short tile a warp has 16 whole rows of scores, whose sums then need no
# exchange between warps; at 128 tokens that fits the registers of sm_90 and of gfx942. Where no tile is long enough, the other
# kernels serve, in which block_m is a block of rows that streams block_n columns: sm_120 has no room for 128 × 128 scores beside
# 64 columns.

UP_TO_32, UP_TO_64 = Rule(Tile(32, 0, 0, 2, 1), 64, 32), Rule(Tile(64, 0, 0, 4, 1), 64, 64)
SHORT = (UP_TO_32, UP_TO_64, Rule(Tile(128, 0, 0, 8, 1), 64))
SHORT_90 = (UP_TO_32, UP_TO_64, Rule(Tile(128, 0, 0, 4, 1), 64))
SHORT_120 = (UP_TO_32, UP_TO_64, Rule(Tile(128, 0, 0, 8, 1), 32), Rule(Tile(64, 0, 0, 4, 1), 64))
ROWS = (Rule(Tile(64, 32, 0, 4, 2), 64), Rule(Tile(64, 16, 0, 4, 2)))
ROWS_FLOAT32 = (Rule(Tile(32, 16, 0, 8, 2), 64), Rule(Tile(16, 16, 0, 8, 2)))


class Launch:
    """One call of a loss: what all of its kernels take.

    ``tensors`` are the student's query and key [T, Ds] and the teacher's [T, Dt].
    """

    def __init__(
        self, loss: str, tensors: Sequence[Tensor], cu_seqlens: Tensor, num_heads: int, max_seqlen: int
    ) -> None:
        self.loss = loss  # its name in the table of tiles
        self.tensors, self.cu_seqlens = [unit_stride(x) for x in tensors], cu_seqlens.contiguous()
        self.heads, self.length, self.sequences = num_heads, max_seqlen, len(cu_seqlens) - 1
        query_s, _, query_t, _ = self.tensors
        self.device, self.dtype = query_s.device, query_s.dtype
        self.width_s, self.width_t = (x.shape[1] // num_heads for x in (query_s, query_t))  # of a head
        pads = {"PAD_S": pad_width(self.width_s), "PAD_T": pad_width(self.width_t)}
        self.constants = {"WIDTH_S": self.width_s, "WIDTH_T": self.width_t, **pads, "DOT": dot_dtype(self.dtype)}
        self.width = max(pads.values())

    def strides(self) -> dict[str, int]:
        """Of a row of each tensor."""
        names = ("q_stride", "k_stride", "qt_stride", "kt_stride")
        return {name: x.stride(0) for name, x in zip(names, self.tensors, strict=True)}

    def tile(self, kernel: str, length: int) -> Tile:
        """The tile of one of the loss's kernels for sequences of ``length``."""
        name = f"{self.loss}.{kernel}{'_float32' if self.dtype == torch.float32 else ''}"
        return tiling.tile(name, width=self.width, length=length, arch=tiling.architecture(self.device))

    def fits_one_tile(self) -> bool:
        """Whether one program can hold the scores of the longest sequence."""
        return self.width <= 64 and self.length <= self.tile("short", self.length).block_m

    def short_tiles(self) -> list[tuple[Tile, int]]:
        """Tiles that together hold sequences of up to the longest length, the shortest first.

        Beside each is the length of the tile before it: its launch takes the sequences that are longer. A short sequence then
        costs a small tile, and fewer registers and warps, however long the longest is; lengths are not read from the device.
        """
        found, shorter = list[tuple[Tile, int]](), 0
        while shorter < self.length:
            tile = self.tile("short", shorter + 1)
            found.append((tile, shorter))
            shorter = tile.block_m
        return found

    def short_grid(self) -> tuple[int, int]:
        """Programs (head, i), each for every n-th sequence: skipping a sequence costs less than another program."""
        return self.heads, min(self.sequences, -(-PROGRAMS // self.heads))

    def row_blocks(self, kernel: str) -> tuple[dict[str, int], tuple[int, int, int]]:
        """Launch options of a kernel that takes blocks of rows, and its grid (heads, row blocks, sequences)."""
        tile = self.tile(kernel, self.length)
        options = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, **tile.options}
        return options, (self.heads, -(-self.length // tile.block_m), self.sequences)
