"""score_mse's Triton kernels, and their launches.

Sequences of up to 128 tokens: one launch for each tile's length, whose programs hold R of a sequence and head, at most 64 rows at a
time, and pass over sequences that another tile fits. Longer ones: _rows_kernel streams R of a block of tokens, as queries for the
loss and dq, then as keys for dk. Rows past a sequence's end load as zeros, so R is 0 there: nothing needs a mask.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fastkd.kernels import packed, tiling
from fastkd.kernels.packed import (
    ROWS,
    ROWS_FLOAT32,
    SHORT,
    SHORT_90,
    SHORT_120,
    UP_TO_32,
    load_tile,
    row_block,
    store_tile,
)
from fastkd.kernels.score_mse.blocked import stored
from fastkd.kernels.tiling import Rule, Tile, jit

try:
    import triton.language as tl
except ImportError:
    tl = None

TILES: dict[str, tiling.Rules] = {
    "score_mse.short": {
        "any": SHORT,
        # 128 tokens spill with heads wider than 16: the kernel for longer sequences serves
        80: (
            UP_TO_32,
            Rule(Tile(64, 0, 0, 4, 1, 255), 64, 64),
            Rule(Tile(128, 0, 0, 8, 1), 16),
            Rule(Tile(64, 0, 0, 4, 1, 255), 64),
        ),
        90: SHORT_90,
        100: SHORT,
        120: SHORT_120,
        "gfx942": SHORT_90,
    },
    "score_mse.short_float32": {"any": (Rule(Tile(32, 0, 0, 4, 1), 64),)},
    "score_mse.rows": {"any": ROWS, 100: (Rule(Tile(64, 64, 0, 4, 2), 64), *ROWS[1:]), 120: ROWS},
    "score_mse.rows_float32": {"any": ROWS_FLOAT32},
}
tiling.register(TILES)


@jit
def _residual(q, k, qt, kt, alpha_s, alpha_t):  # type: ignore[no-untyped-def]
    """R of a tile, [LENGTH, LENGTH], half of its rows, or [BLOCK_M, BLOCK_N]; Rᵀ with queries and keys exchanged."""
    student = tl.dot(q, tl.trans(k), input_precision="ieee")
    return student * alpha_s - tl.dot(qt, tl.trans(kt), input_precision="ieee") * alpha_t


@jit
def _short_tile(  # type: ignore[no-untyped-def]
    sources, dq_ptr, dk_ptr, start, count, head, width, alpha_s, alpha_t,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, PAD_S: tl.constexpr, PAD_T: tl.constexpr,
    DOT: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """Loss and gradients of a sequence and head, all rows at once."""
    query_s, key_s, query_t, key_t = sources
    qt = load_tile(query_t, start, count, head, WIDTH_T, LENGTH, PAD_T, DOT)
    q = load_tile(query_s, start, count, head, WIDTH_S, LENGTH, PAD_S, DOT)
    kt = load_tile(key_t, start, count, head, WIDTH_T, LENGTH, PAD_T, DOT)
    k = load_tile(key_s, start, count, head, WIDTH_S, LENGTH, PAD_S, DOT)
    r = _residual(q, k, qt, kt, alpha_s, alpha_t)
    squares = tl.sum(r * r, 1)
    r = r.to(DOT)
    dk = tl.dot(tl.trans(r), q, input_precision="ieee") * alpha_s
    store_tile(dk_ptr, width, start, count, head, dk, WIDTH_S, LENGTH, PAD_S)
    dq = tl.dot(r, k, input_precision="ieee") * alpha_s
    store_tile(dq_ptr, width, start, count, head, dq, WIDTH_S, LENGTH, PAD_S)
    return tl.sum(squares)


@jit
def _short_halves(  # type: ignore[no-untyped-def]
    sources, dq_ptr, dk_ptr, start, count, head, width, alpha_s, alpha_t,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, PAD_S: tl.constexpr, PAD_T: tl.constexpr,
    DOT: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """The same in two halves of the rows: all of R at once would not fit the registers."""
    query_s, key_s, query_t, key_t = sources
    HALF: tl.constexpr = LENGTH // 2
    kt = load_tile(key_t, start, count, head, WIDTH_T, LENGTH, PAD_T, DOT)
    k = load_tile(key_s, start, count, head, WIDTH_S, LENGTH, PAD_S, DOT)
    squares = tl.zeros([HALF], tl.float32)
    dk = tl.zeros([LENGTH, PAD_S], tl.float32)
    for i in tl.range(0, LENGTH, HALF, num_stages=1, disable_licm=True):
        qt = load_tile(query_t, start + i, count - i, head, WIDTH_T, HALF, PAD_T, DOT)
        q = load_tile(query_s, start + i, count - i, head, WIDTH_S, HALF, PAD_S, DOT)
        r = _residual(q, k, qt, kt, alpha_s, alpha_t)
        squares += tl.sum(r * r, 1)
        rounded = r.to(DOT)
        dk = tl.dot(tl.trans(rounded), q, dk, input_precision="ieee")
        dq = tl.dot(rounded, k, input_precision="ieee") * alpha_s
        store_tile(dq_ptr, width, start + i, count - i, head, dq, WIDTH_S, HALF, PAD_S)
    store_tile(dk_ptr, width, start, count, head, dk * alpha_s, WIDTH_S, LENGTH, PAD_S)
    return tl.sum(squares)


@functools.partial(jit, do_not_specialize=("sequences",))
def _short_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr,  # [T, Ds]
    qt_ptr, kt_ptr,  # [T, Dt]
    cu_ptr,  # [B+1]
    dq_ptr, dk_ptr,  # [T, Ds], without 2/(A·Σ n²)
    loss_ptr,  # [B, A]: Σ R² of a sequence
    q_stride, k_stride, qt_stride, kt_stride, sequences, shorter, width, alpha_s, alpha_t,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, PAD_S: tl.constexpr, PAD_T: tl.constexpr,
    DOT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Program (head, i): sequences i, i + programs, … of ``shorter`` < n ≤ BLOCK_M tokens."""
    head = tl.program_id(0)
    sources = ((q_ptr, q_stride), (k_ptr, k_stride), (qt_ptr, qt_stride), (kt_ptr, kt_stride))
    # Without LICM: addresses that are kept from one sequence to the next take the registers of another program.
    for sequence in tl.range(tl.program_id(1), sequences, tl.num_programs(1), num_stages=1, disable_licm=True):
        start = tl.load(cu_ptr + sequence)
        count = tl.load(cu_ptr + sequence + 1) - start
        if (count > shorter) & (count <= BLOCK_M):
            if BLOCK_M > 64:
                loss = _short_halves(
                    sources, dq_ptr, dk_ptr, start, count, head, width, alpha_s, alpha_t,
                    WIDTH_S, WIDTH_T, PAD_S, PAD_T, DOT, BLOCK_M,
                )  # fmt: skip
            else:
                loss = _short_tile(
                    sources, dq_ptr, dk_ptr, start, count, head, width, alpha_s, alpha_t,
                    WIDTH_S, WIDTH_T, PAD_S, PAD_T, DOT, BLOCK_M,
                )  # fmt: skip
            tl.store(loss_ptr + sequence * tl.num_programs(0) + head, loss)


@jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, qt_ptr, kt_ptr, cu_ptr, dq_ptr, dk_ptr,  # as in _short_kernel
    loss_ptr,  # [B, blocks, A]: Σ R² of a block's rows
    q_stride, k_stride, qt_stride, kt_stride, width, alpha_s, alpha_t,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, PAD_S: tl.constexpr, PAD_T: tl.constexpr,
    DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (head, block, sequence): its tokens as queries against every key, then as keys against every query."""
    head = tl.program_id(0)
    first, rows, start, count = row_block(cu_ptr, BLOCK_M)
    loss = 0.0
    if rows > 0:
        queries, keys = ((q_ptr, q_stride), (qt_ptr, qt_stride)), ((k_ptr, k_stride), (kt_ptr, kt_stride))
        dq, squares = _stream(
            queries, keys, first, rows, start, count, head, alpha_s, alpha_t,
            WIDTH_S, WIDTH_T, PAD_S, PAD_T, DOT, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        store_tile(dq_ptr, width, first, rows, head, dq * alpha_s, WIDTH_S, BLOCK_M, PAD_S)
        loss = tl.sum(squares)
        dk, _ = _stream(
            keys, queries, first, rows, start, count, head, alpha_s, alpha_t,
            WIDTH_S, WIDTH_T, PAD_S, PAD_T, DOT, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        store_tile(dk_ptr, width, first, rows, head, dk * alpha_s, WIDTH_S, BLOCK_M, PAD_S)
    block = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    tl.store(loss_ptr + block * tl.num_programs(0) + head, loss)


@jit
def _stream(  # type: ignore[no-untyped-def]
    own, others, first, rows, start, count, head, alpha_s, alpha_t,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, PAD_S: tl.constexpr, PAD_T: tl.constexpr,
    DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """R k and Σ R² of a block of queries, or Rᵀ q of a block of keys."""
    mine = load_tile(own[0], first, rows, head, WIDTH_S, BLOCK_M, PAD_S, DOT)
    mine_t = load_tile(own[1], first, rows, head, WIDTH_T, BLOCK_M, PAD_T, DOT)
    gradient = tl.zeros([BLOCK_M, PAD_S], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for j in range(0, count, BLOCK_N):
        other = load_tile(others[0], start + j, count - j, head, WIDTH_S, BLOCK_N, PAD_S, DOT)
        other_t = load_tile(others[1], start + j, count - j, head, WIDTH_T, BLOCK_N, PAD_T, DOT)
        r = _residual(mine, other, mine_t, other_t, alpha_s, alpha_t)
        squares += tl.sum(r * r, 1)
        gradient = tl.dot(r.to(DOT), other, gradient, input_precision="ieee")
    return gradient, squares


def value_and_gradients(
    query_s: Tensor,
    key_s: Tensor,
    query_t: Tensor,
    key_t: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ R², and dq, dk without their factor 2/(A·Σ n²)."""
    call = packed.Launch("score_mse", (query_s, key_s, query_t, key_t), cu_seqlens, num_heads, max_seqlen)
    dq, dk = (torch.empty(x.shape, dtype=stored(x.dtype), device=x.device) for x in (query_s, key_s))
    tensors = (*call.tensors, call.cu_seqlens, dq, dk)
    rest: dict[str, Any] = {
        **call.strides(), "width": dq.shape[1], **call.constants,
        "alpha_s": 1 / math.sqrt(call.width_s), "alpha_t": 1 / math.sqrt(call.width_t),
    }  # fmt: skip
    with torch.cuda.device_of(query_s):
        if call.fits_one_tile():
            loss = dq.new_zeros((call.sequences, call.heads), dtype=torch.float32)
            for tile, shorter in call.short_tiles():
                _short_kernel[call.short_grid()](
                    *tensors,
                    loss,
                    sequences=call.sequences,
                    shorter=shorter,
                    BLOCK_M=tile.block_m,
                    **rest,
                    **tile.options,
                )
        else:
            blocks, grid = call.row_blocks("rows")
            loss = dq.new_empty(grid, dtype=torch.float32)
            _rows_kernel[grid](*tensors, loss, **rest, **blocks)
    return loss.sum(), dq, dk
