"""relation_kl's Triton kernel for sequences that one tile holds, of up to 128 tokens: loss and gradient in one launch.

There is a launch for each tile's length, whose programs pass over sequences that another tile fits. A program makes G of a sequence
and head, at most 64 rows of scores at a time. Exponentials are powers of two, with 1/ln 2 in the scale of the scores. A padded row
loads as zeros, so Q = P and G = 0 there; padded columns are masked. Maxima are subtracted first, so no power exceeds 1.

A peaked relation has scores near 100, rounded to 4e-6, and a good student differs from its teacher by 0.1: from rounded
scores Q − P would be wrong by 1e-4. So float32 operands of one width (NEAR) give the difference D = Z − Y itself, and
the student's score is the teacher's, less the row's maximum, plus D: rounding errors are common to both.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastkd.kernels import tiling
from fastkd.kernels.packed import SHORT, SHORT_90, SHORT_120, UP_TO_32, UP_TO_64, Launch, load_tile, store_tile
from fastkd.kernels.tiling import Rule, Tile, jit

try:
    import triton.language as tl
except ImportError:
    tl = None

_SHORT_80 = (UP_TO_32, Rule(Tile(64, 0, 0, 4, 1), 32, 64), Rule(Tile(64, 0, 0, 4, 1, 255), 64, 64), SHORT[-1])
# No tile of 128 tokens is free of spills for all pairs of heads up to 64 in Triton 3.9: the kernels for longer sequences serve.
_RELATION_90 = (UP_TO_32, UP_TO_64, Rule(Tile(128, 0, 0, 4, 1), 32), Rule(Tile(64, 0, 0, 4, 1), 64))
TILES: dict[str, tiling.Rules] = {
    "relation_kl.short": {
        "any": SHORT,
        80: _SHORT_80,
        90: _RELATION_90,
        100: SHORT,
        120: SHORT_120,
        "gfx942": SHORT_90,
    },
    "relation_kl.short_float32": {"any": (Rule(Tile(32, 0, 0, 8, 1), 64),)},
}
tiling.register(TILES)


@jit
def _short_scores(  # type: ignore[no-untyped-def]
    q, k, qt, kt, count, scale_s, scale_t, NEAR: tl.constexpr, LENGTH: tl.constexpr
):
    """Y and Z of some rows, base 2 and less their rows' maxima."""
    inside = (tl.arange(0, LENGTH) < count)[None, :]
    y = tl.where(inside, tl.dot(qt, tl.trans(kt), input_precision="ieee"), -1e30)
    if NEAR:
        d = tl.dot(q - qt, tl.trans(k), input_precision="ieee")
        d = tl.where(inside, tl.dot(qt, tl.trans(k - kt), d, input_precision="ieee"), 0.0)
        # The difference first: it is exact, and its product is rounded once. Else a row of one token would not be zero.
        y = (y - tl.max(y, 1)[:, None]) * scale_t
        z = y + d * scale_s
        z -= tl.max(z, 1)[:, None]
    else:
        z = tl.where(inside, tl.dot(q, tl.trans(k), input_precision="ieee"), -1e30)
        max_t, max_s = tl.max(y, 1), tl.max(z, 1)
        y = y * scale_t - (max_t * scale_t)[:, None]
        z = z * scale_s - (max_s * scale_s)[:, None]
    return y, z


@jit
def _short_rows(  # type: ignore[no-untyped-def]
    q, k, qt, kt, count, scale_s, scale_t, DOT: tl.constexpr, NEAR: tl.constexpr, LENGTH: tl.constexpr
):
    """G of some rows of a sequence against all of its columns, and their KL."""
    y, z = _short_scores(q, k, qt, kt, count, scale_s, scale_t, NEAR, LENGTH)
    p = tl.exp2(y)
    e = tl.exp2(z)
    sum_t = tl.sum(p, 1)
    sum_s = tl.sum(e, 1)
    kl = tl.sum(p * (y - z), 1)
    g = e * (1 / sum_s)[:, None] - p * (1 / sum_t)[:, None]
    # Σ P (log₂ P − log₂ Q) = Σ p (y − z)/sum_t − log₂ sum_t + log₂ sum_s
    return g.to(DOT), kl / sum_t + tl.log2(sum_s / sum_t)


@jit
def _short_tile(  # type: ignore[no-untyped-def]
    sources, dq_ptr, dk_ptr, start, count, head, width, alpha, scale_s, scale_t,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, PAD_S: tl.constexpr, PAD_T: tl.constexpr,
    DOT: tl.constexpr, NEAR: tl.constexpr, CROSS: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of a sequence and head, all rows at once."""
    query_s, key_s, query_t, key_t = sources
    kt = load_tile(key_t, start, count, head, WIDTH_T, LENGTH, PAD_T, DOT)
    k = load_tile(key_s, start, count, head, WIDTH_S, LENGTH, PAD_S, DOT)
    qt = kt
    q = k
    if CROSS:
        qt = load_tile(query_t, start, count, head, WIDTH_T, LENGTH, PAD_T, DOT)
        q = load_tile(query_s, start, count, head, WIDTH_S, LENGTH, PAD_S, DOT)
    g, kl = _short_rows(q, k, qt, kt, count, scale_s, scale_t, DOT, NEAR, LENGTH)
    dq = tl.dot(g, k, input_precision="ieee")
    if CROSS:
        dk = tl.dot(tl.trans(g), q, input_precision="ieee") * alpha
        store_tile(dk_ptr, width, start, count, head, dk, WIDTH_S, LENGTH, PAD_S)
    else:
        dq = tl.dot(tl.trans(g), k, dq, input_precision="ieee")
    store_tile(dq_ptr, width, start, count, head, dq * alpha, WIDTH_S, LENGTH, PAD_S)
    return tl.sum(kl)


@jit
def _short_halves(  # type: ignore[no-untyped-def]
    sources, dq_ptr, dk_ptr, start, count, head, width, alpha, scale_s, scale_t,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, PAD_S: tl.constexpr, PAD_T: tl.constexpr,
    DOT: tl.constexpr, NEAR: tl.constexpr, CROSS: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """The same in two halves of the rows: all scores at once would not fit the registers."""
    query_s, key_s, query_t, key_t = sources
    HALF: tl.constexpr = LENGTH // 2
    kt = load_tile(key_t, start, count, head, WIDTH_T, LENGTH, PAD_T, DOT)
    k = load_tile(key_s, start, count, head, WIDTH_S, LENGTH, PAD_S, DOT)
    loss = tl.zeros([HALF], tl.float32)
    # Two zeros, not one with two names: the compiler would not see that the loop changes ``upper``, and keep its zeros.
    # Addresses and masks are made again for each half (no LICM): kept from the first, they do not fit the registers.
    upper = tl.zeros([HALF, LENGTH], DOT)
    lower = tl.zeros([HALF, LENGTH], DOT)
    for i in tl.range(0, LENGTH, HALF, num_stages=1, disable_licm=True):  # twice; then G is ``upper`` above ``lower``
        qt = load_tile(query_t, start + i, count - i, head, WIDTH_T, HALF, PAD_T, DOT)
        q = load_tile(query_s, start + i, count - i, head, WIDTH_S, HALF, PAD_S, DOT)
        upper = lower
        lower, kl = _short_rows(q, k, qt, kt, count, scale_s, scale_t, DOT, NEAR, LENGTH)
        loss += kl
    q = load_tile(query_s, start, count, head, WIDTH_S, HALF, PAD_S, DOT)
    dk = tl.dot(tl.trans(upper), q, input_precision="ieee")
    q = load_tile(query_s, start + HALF, count - HALF, head, WIDTH_S, HALF, PAD_S, DOT)
    dk = tl.dot(tl.trans(lower), q, dk, input_precision="ieee")
    halves = tl.join(tl.dot(upper, k, input_precision="ieee"), tl.dot(lower, k, input_precision="ieee"))
    dq = tl.reshape(tl.permute(halves, (2, 0, 1)), (LENGTH, PAD_S))  # [HALF, PAD_S, 2] → one above the other
    if CROSS:
        store_tile(dk_ptr, width, start, count, head, dk * alpha, WIDTH_S, LENGTH, PAD_S)
    else:
        dq += dk
    store_tile(dq_ptr, width, start, count, head, dq * alpha, WIDTH_S, LENGTH, PAD_S)
    return tl.sum(loss)


@functools.partial(jit, do_not_specialize=("sequences",))
def _short_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr,  # [T, Ds]; k_ptr is q_ptr in a self-relation
    qt_ptr, kt_ptr,  # [T, Dt]
    cu_ptr,  # [B+1]
    dq_ptr, dk_ptr,  # [T, Ds], times the first of ``factors``
    loss_ptr,  # [B, A]: KL in bits, summed over the rows of a sequence
    q_stride, k_stride, qt_stride, kt_stride, sequences, shorter, width, alpha, scale_s, scale_t,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, PAD_S: tl.constexpr, PAD_T: tl.constexpr,
    DOT: tl.constexpr, NEAR: tl.constexpr, CROSS: tl.constexpr, BLOCK_M: tl.constexpr,
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
                    sources, dq_ptr, dk_ptr, start, count, head, width, alpha, scale_s, scale_t,
                    WIDTH_S, WIDTH_T, PAD_S, PAD_T, DOT, NEAR, CROSS, BLOCK_M,
                )  # fmt: skip
            else:
                loss = _short_tile(
                    sources, dq_ptr, dk_ptr, start, count, head, width, alpha, scale_s, scale_t,
                    WIDTH_S, WIDTH_T, PAD_S, PAD_T, DOT, NEAR, CROSS, BLOCK_M,
                )  # fmt: skip
            tl.store(loss_ptr + sequence * tl.num_programs(0) + head, loss)


def loss_and_gradient(call: Launch, dq: Tensor, dk: Tensor, cross: bool, **scales: Any) -> Tensor:
    """Fill dq, and dk of a cross relation; return the KL of each sequence and head in bits, [B, A]."""
    loss = dq.new_zeros((call.sequences, call.heads), dtype=torch.float32)
    for tile, shorter in call.short_tiles():
        _short_kernel[call.short_grid()](
            *call.tensors, call.cu_seqlens, dq, dk if cross else dq, loss, **call.strides(),
            sequences=call.sequences, shorter=shorter, width=dq.shape[1], **scales,
            CROSS=cross, **call.constants, BLOCK_M=tile.block_m, **tile.options,
        )  # fmt: skip
    return loss
