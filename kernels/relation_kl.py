"""MiniLM relations: the KL divergence between two attention distributions, without a T×T matrix.

Per sequence and relation head, with Z = α_s q kᵀ of the student, Y = α_t Q Kᵀ of the teacher and α = 1/√(D/A):

    loss = 1/(A·T) Σ_{heads, rows i} KL(P_i ‖ Q_i),   Q = softmax_row(Z),  P = softmax_row(Y)

With G = Q − P the gradients are dq = α_s G k/(A·T) and dk = α_s Gᵀ q/(A·T). A self-relation has q = k = s, so
ds = α_s (G + Gᵀ) s/(A·T), and Z_ji = Z_ij: a block of rows finds its G_ji in the tile it has, with the other row's
softmax statistics, and alone owns its gradient. No atomics, no transpose, the same bits every time. The loss is a
scalar, so the gradient is made in the forward and scaled in the backward.

Sources: MiniLM (Wang et al. 2020, arXiv 2002.10957, eq. 4-8): query-key attention and value relations. MiniLMv2
(Wang et al. 2021, arXiv 2012.15828, eq. 5-7): multi-head self-relations of queries, keys and values.

Shapes: T packed tokens, B sequences, A relation heads, D width (s student, t teacher), n length of a sequence.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fastkd.kernels import packed, scaling, tiling
from fastkd.kernels.packed import Case, build, load_tile, row_block, store_tile
from fastkd.kernels.tiling import jit

try:
    import triton.language as tl
except ImportError:
    tl = None

LN2 = math.log(2)


def reference(
    student: Tensor,
    teacher: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    *,
    student_key: Tensor | None = None,
    teacher_key: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """The definition, batched and padded as it is usually written: every [B, A, n, n] matrix in memory."""
    rows, valid = packed.padded_rows(cu_seqlens, len(student) if max_seqlen is None else max_seqlen)

    def log_relation(query: Tensor, key: Tensor) -> Tensor:
        q, k = (x[rows].unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (query, key))
        scores = (q @ k.transpose(2, 3)).to(packed.accumulator(query.dtype)) / math.sqrt(q.shape[-1])
        return scores.masked_fill(~valid[:, None, None], packed.MASKED).log_softmax(-1)

    log_q = log_relation(student, student if student_key is None else student_key)
    log_p = log_relation(teacher, teacher if teacher_key is None else teacher_key)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)  # [B, A, n]
    return torch.where(valid[:, None], divergence, 0).sum() / (num_heads * len(student))


def _centred(key: Tensor | None) -> Tensor | None:
    """Keys less their mean, where half precision does not round them anyway.

    It adds one number to all scores of a query, which the softmax does not see; what keys have in common would make large
    scores, whose rounding shows in the small differences that are left, and Σ G k would cancel.
    """
    return key if key is None or key.dtype.itemsize < 4 else key - key.mean(0)


# ---- Triton ---------------------------------------------------------------------------------------------------
#
# Sequences of one tile's length: one launch for each tile, the programs of which make G of a sequence and head, at most 64 rows
# of scores at a time, and pass over sequences that another tile fits.
# Longer ones: _stats_kernel streams columns → row maxima and sums of exponentials, [4, A, T];
#              _self_kernel or _cross_kernel streams them again → loss and gradient of a block of rows.
# Exponentials are powers of two, with 1/ln 2 in the scale of the scores. A padded row loads as zeros, so Q = P and
# G = 0 there; padded columns are masked. Maxima are subtracted first, so no power exceeds 1.
#
# A peaked relation has scores near 100, rounded to 4e-6, and a good student differs from its teacher by 0.1: from rounded
# scores Q − P would be wrong by 1e-4. So float32 operands of one width (NEAR) give the difference D = Z − Y itself, and
# the student's score is the teacher's, less the row's maximum, plus D: rounding errors are common to both.


@jit
def _teacher_scores(qt, kt, columns, scale):  # type: ignore[no-untyped-def]
    """Y of a tile, base 2, masked past ``columns``."""
    inside = (tl.arange(0, kt.shape[0]) < columns)[None, :]
    return tl.where(inside, tl.dot(qt, tl.trans(kt), input_precision="ieee"), -1e30) * scale


@jit
def _student_scores(q, k, qt, kt, columns, scale, NEAR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Z of a tile, or D, for ``_from_maxima``."""
    inside = (tl.arange(0, k.shape[0]) < columns)[None, :]
    if NEAR:
        d = tl.dot(q - qt, tl.trans(k), input_precision="ieee")
        return tl.where(inside, tl.dot(qt, tl.trans(k - kt), d, input_precision="ieee"), 0.0) * scale
    return tl.where(inside, tl.dot(q, tl.trans(k), input_precision="ieee"), -1e30) * scale


@jit
def _from_maxima(z, y, max_t, NEAR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Z less the teacher's maxima; ``y`` is Y less the same."""
    if NEAR:
        return y + z
    return z - max_t


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
    # Addresses and masks are made anew for each half (no LICM): kept from the first, they do not fit the registers.
    upper = tl.zeros([HALF, LENGTH], DOT)
    lower = tl.zeros([HALF, LENGTH], DOT)
    for i in tl.range(0, LENGTH, HALF, num_stages=1, disable_licm=True):
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
    dq = tl.reshape(tl.permute(halves, (2, 0, 1)), (LENGTH, PAD_S))
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
    dq_ptr, dk_ptr,  # [T, Ds], times the first of ``_factors``
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


@jit
def _stats_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, qt_ptr, kt_ptr, cu_ptr,
    stats_ptr,  # [4, A, T]: the teacher's row maxima and reciprocal row sums of powers, then the student's (see _load_stats)
    q_stride, k_stride, qt_stride, kt_stride, total, scale_s, scale_t,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, PAD_S: tl.constexpr, PAD_T: tl.constexpr,
    DOT: tl.constexpr, NEAR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (head, row block, sequence): softmax statistics of a block of rows."""
    head = tl.program_id(0)
    first, rows, start, count = row_block(cu_ptr, BLOCK_M)
    if rows > 0:
        q = load_tile((q_ptr, q_stride), first, rows, head, WIDTH_S, BLOCK_M, PAD_S, DOT)
        qt = load_tile((qt_ptr, qt_stride), first, rows, head, WIDTH_T, BLOCK_M, PAD_T, DOT)
        max_t = tl.full([BLOCK_M], -1e30, tl.float32)
        max_s = tl.zeros([BLOCK_M], tl.float32)
        sum_t = tl.zeros([BLOCK_M], tl.float32)
        sum_s = tl.zeros([BLOCK_M], tl.float32)
        for j in range(0, count, BLOCK_N):
            k = load_tile((k_ptr, k_stride), start + j, count - j, head, WIDTH_S, BLOCK_N, PAD_S, DOT)
            kt = load_tile((kt_ptr, kt_stride), start + j, count - j, head, WIDTH_T, BLOCK_N, PAD_T, DOT)
            z = _student_scores(q, k, qt, kt, count - j, scale_s, NEAR)
            y = _teacher_scores(qt, kt, count - j, scale_t)
            new = tl.maximum(max_t, tl.max(y, 1))
            max_s += max_t - new  # the student's maximum counts from the teacher's
            sum_t *= tl.exp2(max_t - new)
            max_t = new
            y -= new[:, None]
            sum_t += tl.sum(tl.exp2(y), 1)
            z = _from_maxima(z, y, max_t[:, None], NEAR)
            new = tl.maximum(max_s, tl.max(z, 1))
            sum_s = sum_s * tl.exp2(max_s - new) + tl.sum(tl.exp2(z - new[:, None]), 1)
            max_s = new
        row = tl.arange(0, BLOCK_M)
        plane = tl.num_programs(0).to(tl.int64) * total
        out = stats_ptr + head.to(tl.int64) * total + first + row
        tl.store(out, max_t, mask=row < rows)
        tl.store(out + plane, 1 / sum_t, mask=row < rows)
        tl.store(out + 2 * plane, max_s, mask=row < rows)
        tl.store(out + 3 * plane, 1 / sum_s, mask=row < rows)


@jit
def _load_stats(stats_ptr, plane, first, count, centre, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Maximum and reciprocal sum of the teacher's rows, and of the student's, whose maximum counts from the teacher's.

    ``centre``, 0 and ones past the end, where nothing may overflow.
    """
    row = tl.arange(0, ROWS)
    source = stats_ptr + first + row
    max_t = tl.load(source, mask=row < count, other=centre)
    inverse_t = tl.load(source + plane, mask=row < count, other=1.0)
    max_s = tl.load(source + 2 * plane, mask=row < count, other=0.0)
    return max_t, inverse_t, max_s, tl.load(source + 3 * plane, mask=row < count, other=1.0)


@jit
def _spread(stats_ptr, plane, start, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Range of a sequence's row maxima, the teacher's or the student's, whichever is larger."""
    row = tl.arange(0, BLOCK)
    low_t = tl.full([BLOCK], 1e30, tl.float32)
    high_t = tl.full([BLOCK], -1e30, tl.float32)
    low_s, high_s = low_t, high_t
    for i in range(0, count, BLOCK):
        inside = row < count - i
        source = stats_ptr + start + i + row
        max_t = tl.load(source, mask=inside, other=0.0)
        max_s = max_t + tl.load(source + 2 * plane, mask=inside, other=0.0)
        low_t = tl.where(inside, tl.minimum(low_t, max_t), low_t)
        high_t = tl.where(inside, tl.maximum(high_t, max_t), high_t)
        low_s = tl.where(inside, tl.minimum(low_s, max_s), low_s)
        high_s = tl.where(inside, tl.maximum(high_s, max_s), high_s)
    return tl.maximum(tl.max(high_t) - tl.min(low_t), tl.max(high_s) - tl.min(low_s))


@jit
def _self_rows(  # type: ignore[no-untyped-def]
    student, teacher, stats_ptr, plane, first, rows, start, count, head, scale_s, scale_t,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, PAD_S: tl.constexpr, PAD_T: tl.constexpr,
    DOT: tl.constexpr, NEAR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """(G + Gᵀ) s and the KL of a block of rows.

    While a sequence's row maxima differ by little (SINGLE), one power serves P_ij and P_ji, and one Q_ij and Q_ji:
    P_ji = P_ij · (sum_i 2^(max_i − c)) · (2^(c − max_j) / sum_j).
    """
    s = load_tile(student, first, rows, head, WIDTH_S, BLOCK_M, PAD_S, DOT)
    r = load_tile(teacher, first, rows, head, WIDTH_T, BLOCK_M, PAD_T, DOT)
    centre = tl.load(stats_ptr + start)
    max_t, inverse_t, max_s, inverse_s = _load_stats(stats_ptr, plane, first, rows, centre, BLOCK_M)
    if SINGLE:
        weight_t = tl.exp2(max_t - centre)
        weight_s = weight_t * tl.exp2(max_s) / inverse_s
        weight_t /= inverse_t
    ds = tl.zeros([BLOCK_M, PAD_S], tl.float32)
    kl = tl.zeros([BLOCK_M], tl.float32)
    for j in range(0, count, BLOCK_N):
        s_j = load_tile(student, start + j, count - j, head, WIDTH_S, BLOCK_N, PAD_S, DOT)
        r_j = load_tile(teacher, start + j, count - j, head, WIDTH_T, BLOCK_N, PAD_T, DOT)
        column_t, norm_t, column_s, norm_s = _load_stats(stats_ptr, plane, start + j, count - j, centre, BLOCK_N)
        z = _student_scores(s, s_j, r, r_j, count - j, scale_s, NEAR)
        y = _teacher_scores(r, r_j, count - j, scale_t)
        own_y = y - max_t[:, None]
        own_z = _from_maxima(z, own_y, max_t[:, None], NEAR)
        p = tl.exp2(own_y) * inverse_t[:, None]
        kl += tl.sum(p * (own_y - own_z), 1)
        g = tl.exp2(own_z - max_s[:, None]) * inverse_s[:, None]
        if SINGLE:
            shift = tl.exp2(centre - column_t)
            g += g * (weight_s[:, None] * (shift * tl.exp2(-column_s) * norm_s)[None, :])
            g -= p + p * (weight_t[:, None] * (shift * norm_t)[None, :])
        else:
            y -= column_t[None, :]
            z = _from_maxima(z, y, column_t[None, :], NEAR)
            g += tl.exp2(z - column_s[None, :]) * norm_s[None, :]
            g -= p + tl.exp2(y) * norm_t[None, :]
        ds = tl.dot(g.to(DOT), s_j, ds, input_precision="ieee")
    return ds, kl + max_s + tl.log2(inverse_t / inverse_s)


@jit
def _self_kernel(  # type: ignore[no-untyped-def]
    s_ptr, r_ptr, cu_ptr, stats_ptr, ds_ptr,
    loss_ptr,  # [B, blocks, A]: KL in bits, summed over a block's rows
    s_stride, r_stride, total, width, alpha, scale_s, scale_t,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, PAD_S: tl.constexpr, PAD_T: tl.constexpr,
    DOT: tl.constexpr, NEAR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (head, row block, sequence): loss and gradient of a block of rows, which it alone writes."""
    head = tl.program_id(0)
    first, rows, start, count = row_block(cu_ptr, BLOCK_M)
    loss = 0.0
    if rows > 0:
        plane = tl.num_programs(0).to(tl.int64) * total
        stats = stats_ptr + head.to(tl.int64) * total
        student, teacher = (s_ptr, s_stride), (r_ptr, r_stride)
        if _spread(stats, plane, start, count, 128) < 80:  # else 2^(z − max_i) can vanish where 2^(z − max_j) does not
            ds, kl = _self_rows(
                student, teacher, stats, plane, first, rows, start, count, head, scale_s, scale_t,
                WIDTH_S, WIDTH_T, PAD_S, PAD_T, DOT, NEAR, BLOCK_M, BLOCK_N, True,
            )  # fmt: skip
        else:
            ds, kl = _self_rows(
                student, teacher, stats, plane, first, rows, start, count, head, scale_s, scale_t,
                WIDTH_S, WIDTH_T, PAD_S, PAD_T, DOT, NEAR, BLOCK_M, BLOCK_N, False,
            )  # fmt: skip
        store_tile(ds_ptr, width, first, rows, head, ds * alpha, WIDTH_S, BLOCK_M, PAD_S)
        loss = tl.sum(tl.where(tl.arange(0, BLOCK_M) < rows, kl, 0.0))
    block = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    tl.store(loss_ptr + block * tl.num_programs(0) + head, loss)


@jit
def _cross_rows(  # type: ignore[no-untyped-def]
    sources, stats_ptr, plane, first, rows, start, count, head, scale_s, scale_t,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, PAD_S: tl.constexpr, PAD_T: tl.constexpr,
    DOT: tl.constexpr, NEAR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """G k and the KL of a block of queries against every key."""
    query_s, key_s, query_t, key_t = sources
    q = load_tile(query_s, first, rows, head, WIDTH_S, BLOCK_M, PAD_S, DOT)
    qt = load_tile(query_t, first, rows, head, WIDTH_T, BLOCK_M, PAD_T, DOT)
    max_t, inverse_t, max_s, inverse_s = _load_stats(stats_ptr, plane, first, rows, 0.0, BLOCK_M)
    dq = tl.zeros([BLOCK_M, PAD_S], tl.float32)
    kl = tl.zeros([BLOCK_M], tl.float32)
    for j in range(0, count, BLOCK_N):
        k = load_tile(key_s, start + j, count - j, head, WIDTH_S, BLOCK_N, PAD_S, DOT)
        kt = load_tile(key_t, start + j, count - j, head, WIDTH_T, BLOCK_N, PAD_T, DOT)
        z = _student_scores(q, k, qt, kt, count - j, scale_s, NEAR)
        y = _teacher_scores(qt, kt, count - j, scale_t)
        y -= max_t[:, None]
        z = _from_maxima(z, y, max_t[:, None], NEAR)
        p = tl.exp2(y) * inverse_t[:, None]
        kl += tl.sum(p * (y - z), 1)
        g = tl.exp2(z - max_s[:, None]) * inverse_s[:, None] - p
        dq = tl.dot(g.to(DOT), k, dq, input_precision="ieee")
    return dq, kl + max_s + tl.log2(inverse_t / inverse_s)


@jit
def _cross_columns(  # type: ignore[no-untyped-def]
    sources, stats_ptr, plane, first, rows, start, count, head, scale_s, scale_t,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, PAD_S: tl.constexpr, PAD_T: tl.constexpr,
    DOT: tl.constexpr, NEAR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gᵀ q of a block of keys against every query: tiles with keys as rows, so that G needs no transpose."""
    query_s, key_s, query_t, key_t = sources
    k = load_tile(key_s, first, rows, head, WIDTH_S, BLOCK_M, PAD_S, DOT)
    kt = load_tile(key_t, first, rows, head, WIDTH_T, BLOCK_M, PAD_T, DOT)
    dk = tl.zeros([BLOCK_M, PAD_S], tl.float32)
    for i in range(0, count, BLOCK_N):
        q = load_tile(query_s, start + i, count - i, head, WIDTH_S, BLOCK_N, PAD_S, DOT)
        qt = load_tile(query_t, start + i, count - i, head, WIDTH_T, BLOCK_N, PAD_T, DOT)
        max_t, inverse_t, max_s, inverse_s = _load_stats(stats_ptr, plane, start + i, count - i, 0.0, BLOCK_N)
        z = _student_scores(k, q, kt, qt, count - i, scale_s, NEAR)
        y = _teacher_scores(kt, qt, count - i, scale_t)
        y -= max_t[None, :]
        z = _from_maxima(z, y, max_t[None, :], NEAR)
        g = tl.exp2(z - max_s[None, :]) * inverse_s[None, :] - tl.exp2(y) * inverse_t[None, :]
        dk = tl.dot(g.to(DOT), q, dk, input_precision="ieee")
    return dk


@jit
def _cross_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, qt_ptr, kt_ptr, cu_ptr, stats_ptr, dq_ptr, dk_ptr,
    loss_ptr,  # [B, blocks, A]: KL in bits, summed over a block's rows
    q_stride, k_stride, qt_stride, kt_stride, total, width, alpha, scale_s, scale_t,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, PAD_S: tl.constexpr, PAD_T: tl.constexpr,
    DOT: tl.constexpr, NEAR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (head, block, sequence): its tokens as queries against every key, then as keys against every query."""
    head = tl.program_id(0)
    first, rows, start, count = row_block(cu_ptr, BLOCK_M)
    loss = 0.0
    if rows > 0:
        plane = tl.num_programs(0).to(tl.int64) * total
        stats = stats_ptr + head.to(tl.int64) * total
        sources = ((q_ptr, q_stride), (k_ptr, k_stride), (qt_ptr, qt_stride), (kt_ptr, kt_stride))
        dq, kl = _cross_rows(
            sources, stats, plane, first, rows, start, count, head, scale_s, scale_t,
            WIDTH_S, WIDTH_T, PAD_S, PAD_T, DOT, NEAR, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        store_tile(dq_ptr, width, first, rows, head, dq * alpha, WIDTH_S, BLOCK_M, PAD_S)
        loss = tl.sum(tl.where(tl.arange(0, BLOCK_M) < rows, kl, 0.0))
        dk = _cross_columns(
            sources, stats, plane, first, rows, start, count, head, scale_s, scale_t,
            WIDTH_S, WIDTH_T, PAD_S, PAD_T, DOT, NEAR, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        store_tile(dk_ptr, width, first, rows, head, dk * alpha, WIDTH_S, BLOCK_M, PAD_S)
    block = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    tl.store(loss_ptr + block * tl.num_programs(0) + head, loss)


def _triton(
    query_s: Tensor,
    key_s: Tensor | None,
    query_t: Tensor,
    key_t: Tensor | None,
    cu_seqlens: Tensor,
    num_heads: int,
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ KL, and dq, dk times the first of ``_factors``."""
    cross, cu_seqlens = key_s is not None, cu_seqlens.contiguous()
    key_s, key_t = _centred(key_s), _centred(key_t)
    query_s, query_t = packed.unit_stride(query_s), packed.unit_stride(query_t)
    key_s = query_s if key_s is None else packed.unit_stride(key_s)
    key_t = query_t if key_t is None else packed.unit_stride(key_t)
    dq = torch.empty(query_s.shape, dtype=query_s.dtype, device=query_s.device)
    dk = torch.empty(key_s.shape if cross else 0, dtype=key_s.dtype, device=key_s.device)
    launch = _Launch(query_s, key_s, query_t, key_t, cu_seqlens, num_heads, max_seqlen)
    with torch.cuda.device_of(query_s):
        loss = launch.short(dq, dk, cross) if launch.fits_one_tile() else launch.long(dq, dk, cross)
    return LN2 * loss.sum(), dq, dk


class _Launch:
    """The kernels' common arguments for one call."""

    def __init__(
        self,
        query_s: Tensor,
        key_s: Tensor,
        query_t: Tensor,
        key_t: Tensor,
        cu_seqlens: Tensor,
        num_heads: int,
        max_seqlen: int,
    ) -> None:
        self.tensors, self.cu_seqlens = (query_s, key_s, query_t, key_t), cu_seqlens
        self.heads, self.length, self.sequences = num_heads, max_seqlen, len(cu_seqlens) - 1
        width_s, width_t = (x.shape[1] // num_heads for x in (query_s, query_t))
        self.alpha = 1 / math.sqrt(width_s)
        self.scales = {"scale_s": self.alpha / LN2, "scale_t": 1 / (math.sqrt(width_t) * LN2)}
        self.alpha *= _factors(query_s, num_heads)[0]  # of the gradients
        pads = {"PAD_S": packed.pad_width(width_s), "PAD_T": packed.pad_width(width_t)}
        self.constants = {"WIDTH_S": width_s, "WIDTH_T": width_t, **pads}
        self.constants["DOT"] = packed.dot_dtype(query_s.dtype)
        self.constants["NEAR"] = query_s.dtype == torch.float32 and width_s == width_t
        self.width = max(pads.values())

    def tile(self, kernel: str) -> tiling.Tile:
        query = self.tensors[0]
        arch = tiling.architecture(query.device)
        return tiling.tile(packed.table_key(kernel, query.dtype), width=self.width, length=self.length, arch=arch)

    def strides(self) -> dict[str, int]:
        names = ("q_stride", "k_stride", "qt_stride", "kt_stride")
        return {name: x.stride(0) for name, x in zip(names, self.tensors, strict=True)}

    def fits_one_tile(self) -> bool:
        query = self.tensors[0]
        key = packed.table_key("relation_kl.short", query.dtype)
        return packed.fits_one_tile(key, width=self.width, length=self.length, device=query.device)

    def short(self, dq: Tensor, dk: Tensor, cross: bool) -> Tensor:
        loss = dq.new_zeros((self.sequences, self.heads), dtype=torch.float32)
        key = packed.table_key("relation_kl.short", dq.dtype)
        for tile, shorter in packed.tiles_by_length(key, width=self.width, length=self.length, device=dq.device):
            _short_kernel[packed.one_tile_grid(self.heads, self.sequences)](
                *self.tensors, self.cu_seqlens, dq, dk if cross else dq, loss, **self.strides(),
                sequences=self.sequences, shorter=shorter, width=dq.shape[1], alpha=self.alpha, **self.scales,
                CROSS=cross, **self.constants, BLOCK_M=tile.block_m, **tile.options,
            )  # fmt: skip
        return loss

    def long(self, dq: Tensor, dk: Tensor, cross: bool) -> Tensor:
        rows = len(dq)
        stats = dq.new_empty((4, self.heads, rows), dtype=torch.float32)
        tile, grid = self._blocks("relation_kl.stats")
        _stats_kernel[grid](
            *self.tensors, self.cu_seqlens, stats, **self.strides(), total=rows, **self.scales, **self.constants, **tile
        )
        tile, grid = self._blocks("relation_kl.cross" if cross else "relation_kl.self")
        loss = dq.new_empty(grid, dtype=torch.float32)
        rest: dict[str, Any] = {
            "total": rows, "width": dq.shape[1], "alpha": self.alpha, **self.scales, **self.constants, **tile
        }  # fmt: skip
        if cross:
            _cross_kernel[grid](*self.tensors, self.cu_seqlens, stats, dq, dk, loss, **self.strides(), **rest)
        else:
            student, _, teacher, _ = self.tensors
            strides = {"s_stride": student.stride(0), "r_stride": teacher.stride(0)}
            _self_kernel[grid](student, teacher, self.cu_seqlens, stats, dq, loss, **strides, **rest)
        return loss

    def _blocks(self, kernel: str) -> tuple[dict[str, int], tuple[int, int, int]]:
        """Launch options of a row-block kernel and its grid."""
        tile = self.tile(kernel)
        options = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, **tile.options}
        return options, (self.heads, -(-self.length // tile.block_m), self.sequences)


# ---- blocked PyTorch ------------------------------------------------------------------------------------------


def _blocked(
    query_s: Tensor,
    key_s: Tensor | None,
    query_t: Tensor,
    key_t: Tensor | None,
    cu_seqlens: Tensor,
    num_heads: int,
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of whole score rows in reused buffers: Σ KL, and dq, dk times the first of ``_factors``."""
    cross = key_s is not None
    key_s, key_t = _centred(key_s), _centred(key_t)
    key_s, key_t = query_s if key_s is None else key_s, query_t if key_t is None else key_t
    total = torch.zeros((), dtype=torch.float64, device=query_s.device)
    dq = torch.zeros(query_s.shape, dtype=query_s.dtype, device=query_s.device)
    dk = torch.zeros(key_s.shape if cross else 0, dtype=key_s.dtype, device=key_s.device)
    buffers = packed.Buffers(query_s)
    alpha_s, alpha_t = (1 / math.sqrt(x.shape[1] / num_heads) for x in (query_s, query_t))
    alpha = alpha_s * _factors(query_s, num_heads)[0]  # of the gradients
    width = query_s.shape[1] // num_heads
    near = query_s.dtype != torch.bfloat16 and query_s.shape == query_t.shape
    with packed.exact_products(query_s, key_s, query_t, key_t):
        for group in packed.groups(cu_seqlens, num_heads, len(query_s), max_seqlen):
            qs, qt = ks, kt = [group.heads(x, num_heads, feature="query") for x in (query_s, query_t)]
            if cross or group.padded:
                ks, kt = (group.heads(x, num_heads, feature="key") for x in (key_s, key_t))
            q_d, k_d = (torch.cat((qs - qt, qt), -1), torch.cat((ks, ks - kt), -1)) if near else (qs, ks)
            grad_q = torch.zeros_like(qs[..., :width], memory_format=torch.contiguous_format)
            grad_k = torch.zeros_like(grad_q) if cross else grad_q
            for pair, row in packed.blocks(len(qs), group.length):
                y = buffers.product(0, qt[pair, row], kt[pair], alpha_t / LN2)
                d = buffers.product(1, q_d[pair, row], k_d[pair], alpha_s / LN2)
                if not near:
                    d -= y
                z = buffers.take(2, y.shape)
                total += _kl_and_difference(y, d, z)
                grad_q[pair, row].baddbmm_(z, ks[pair][..., :width], alpha=alpha)
                grad_k[pair].baddbmm_(z.transpose(1, 2), qs[pair, row][..., :width], alpha=alpha)
            group.scatter(dq, grad_q)
            if cross:
                group.scatter(dk, grad_k)
    return total, dq, dk


def _kl_and_difference(y: Tensor, d: Tensor, g: Tensor) -> Tensor:
    """Σ KL(P ‖ Q) of a block of base-2 scores Y and differences D = Z − Y, both overwritten; G = Q − P into ``g``.

    KL_i = L_s − L_t − Σ_j P_ij D_ij with log-sums L counted from the row's maximum of Y, as Z is: a good student's small
    divergence and gradient are not the difference of two large numbers. Powers of two cost a quarter of exp.
    """
    y.sub_(y.amax(-1, keepdim=True))
    torch.add(y, d, out=g)
    max_s = g.amax(-1, keepdim=True)
    sum_s = g.sub_(max_s).exp2_().sum(-1, keepdim=True)
    sum_t = y.exp2_().sum(-1, keepdim=True)
    rows = max_s + torch.log2(sum_s / sum_t) - d.mul_(y).sum(-1, keepdim=True).div_(sum_t)
    g.div_(sum_s).addcmul_(y, sum_t.reciprocal_(), value=-1)
    return LN2 * rows.sum(dtype=torch.float64)


def _factors(query: Tensor, num_heads: int) -> tuple[float, float]:
    """What the forward and the backward multiply the gradients with: together 1/(A·T)."""
    return scaling.early_and_late(1 / (num_heads * max(len(query), 1)), query.dtype)


# ---- the operator ---------------------------------------------------------------------------------------------


@torch.library.custom_op("fastkd::relation_kl", mutates_args=())
def _relation_kl(
    student: Tensor,
    student_key: Tensor | None,
    teacher: Tensor,
    teacher_key: Tensor | None,
    cu_seqlens: Tensor,
    num_heads: int,
    max_seqlen: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss; dq, and dk in a cross relation, times the first of ``_factors``."""
    path = _triton if backend == "triton" else _blocked
    total, dq, dk = path(student, student_key, teacher, teacher_key, cu_seqlens, num_heads, max_seqlen)
    return (total / (num_heads * max(len(student), 1))).to(packed.accumulator(student.dtype)), dq, dk


@_relation_kl.register_fake
def _(
    student: Tensor,
    student_key: Tensor | None,
    teacher: Tensor,
    teacher_key: Tensor | None,
    cu_seqlens: Tensor,
    num_heads: int,
    max_seqlen: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = student.new_empty((), dtype=packed.accumulator(student.dtype))
    dk = student.new_empty(0) if student_key is None else student_key.new_empty(student_key.shape)
    return loss, student.new_empty(student.shape), dk


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _student, student_key, *_, num_heads, _max_seqlen, ctx.backend = inputs
    _, dq, dk = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(dq, dk)
    ctx.heads, ctx.cross = num_heads, student_key is not None
    ctx.save_for_backward(dq, dk)


def _backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled():
        raise RuntimeError("relation_kl has no second derivative: call backward without create_graph=True")
    if grad_loss is None:
        return (None,) * 8
    dq, dk = ctx.saved_tensors
    _, late = _factors(dq, ctx.heads)
    dq, dk = (scaling.scaled(x, grad_loss, late=late, backend=ctx.backend) for x in (dq, dk))
    return dq, dk if ctx.cross else None, *[None] * 6


_relation_kl.register_autograd(_backward, setup_context=_setup_context)


# ---- public ---------------------------------------------------------------------------------------------------


def relation_kl(
    student: Tensor,  # [T, Ds]
    teacher: Tensor,  # [T, Dt]
    cu_seqlens: Tensor,  # [B+1] int32
    num_heads: int,
    *,
    student_key: Tensor | None = None,  # [T, Ds]
    teacher_key: Tensor | None = None,  # [T, Dt]
    max_seqlen: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """KL(teacher ‖ student) of the relations of packed sequences, averaged over heads and rows: a float32 scalar.

    ``student`` and ``teacher`` hold queries, keys or values, one row a token, and are regrouped into ``num_heads``
    slices whatever heads the models have. Without keys it is the self-relation of MiniLMv2, with both keys the query-key
    attention of MiniLM. Sequences lie end to end: ``cu_seqlens`` rises from 0 to T and may repeat T (empty sequences).
    ``max_seqlen`` bounds every length; without it the Triton backend assumes T and launches needless programs.
    ``backend``: None takes "triton" on CUDA, else "blocked"; "reference" holds every score.

    Differentiable once, in the student's tensors, whose gradients have their dtype. Products are exact and everything
    else is float32, or float64 for float64; autocast changes nothing. Column slices of a fused projection need no copy.
    Raises ValueError for shapes, values or a backend that do not fit.
    """
    if (student_key is None) != (teacher_key is None):
        raise ValueError(
            "relation_kl got one key: give student_key and teacher_key for query-key attention, or neither"
        )
    packed.check_pair(
        "relation_kl", "student", student, student if student_key is None else student_key, student, num_heads
    )
    packed.check_pair(
        "relation_kl", "teacher", teacher, teacher if teacher_key is None else teacher_key, student, num_heads
    )
    packed.check_cu_seqlens("relation_kl", cu_seqlens, student)
    teacher, teacher_key = teacher.detach(), None if teacher_key is None else teacher_key.detach()
    student, student_key, teacher, teacher_key = packed.in_one_dtype(student, student_key, teacher, teacher_key)
    width = max(student.shape[1], teacher.shape[1]) // num_heads
    backend = packed.choose_backend("relation_kl", backend, student, width)
    bound = len(student) if max_seqlen is None else max_seqlen
    if backend == "reference":
        keys = {"student_key": student_key, "teacher_key": teacher_key}
        return reference(student, teacher, cu_seqlens, num_heads, **keys, max_seqlen=bound)
    return _relation_kl(student, student_key, teacher, teacher_key, cu_seqlens, num_heads, bound, backend)[0]


# ---- for tests, benches and the audit -------------------------------------------------------------------------

_RAGGED = (128, 1, 17, 64, 65, 127, 2, 0, 0)  # trailing zeros: static shapes hold empty sequences
_TEXT = (8, 60, 20, 38, 110, 14, 31, 77, 25, 47)  # tokens of ten passages, 43 on average
CASES: tuple[Case, ...] = (
    Case("one token", (1, 1, 1), 2, 16, 16),
    Case("ragged", _RAGGED, 3, 36, 24),
    Case("ragged cross", _RAGGED, 3, 36, 24, cross=True),
    *(Case(f"head width {d}", (70, 33), 2, 2 * d, 2 * d) for d in (8, 12, 16, 24, 32, 64)),
    *(Case(f"head width {d} cross", (140, 33), 2, 2 * d, 2 * d, cross=True) for d in (8, 12, 16, 24, 32, 64)),
    Case("wide heads", (70, 150), 1, 80, 128),
    Case("long", (129, 300, 2, 0), 2, 32, 64),
    Case("long cross", (129, 300, 2, 0), 2, 32, 64, cross=True),
    Case("longest", (2049, 3), 1, 16, 16),
    Case("all-positive cross", (9, 20), 1, 24, 36, cross=True, spread=0.1, offset=10.0),
    Case("peaked", (97, 150), 2, 64, 64, spread=8),
    Case("peaked cross", (97, 150), 2, 64, 64, cross=True, spread=8),
    Case("near", (97, 150), 2, 64, 64, gap=0.1),
    Case("peaked near", (97, 150), 2, 64, 64, spread=8, gap=0.1),
    Case("peaked near cross", (97, 150), 2, 64, 64, cross=True, spread=8, gap=0.1),
    Case("maxima far apart", (150, 40), 1, 16, 16, spread=60, grid=1 / 16),
    *(
        Case(f"{name} bfloat16", lengths, 2, 64, 64, torch.bfloat16, cross, spread, gap)
        for name, lengths, cross, spread, gap in (
            ("ragged", _RAGGED, False, 1, None),
            ("ragged cross", _RAGGED, True, 1, None),
            ("long", (129, 300, 2, 0), False, 1, None),
            ("long cross", (129, 300, 2, 0), True, 1, None),
            ("peaked near", (97, 150), False, 8, 0.1),
            ("peaked near cross", (97, 150), True, 8, 0.1),
        )
    ),
)
BENCHES: tuple[Case, ...] = (
    Case("32×128, 384, A=12", (128,) * 32, 12, 384, 384, torch.bfloat16, gap=0.3),
    Case("256×128, 768, A=12", (128,) * 256, 12, 768, 768, torch.bfloat16, gap=0.3),
    Case("256×128, 768, A=48", (128,) * 256, 48, 768, 768, torch.bfloat16, gap=0.3),
    Case("512×64, 768, A=48", (64,) * 512, 48, 768, 768, torch.bfloat16, gap=0.3),
    Case("1024×32, 768, A=48", (32,) * 1024, 48, 768, 768, torch.bfloat16, gap=0.3),
    Case("text, 760×43, 768, A=48", _TEXT * 76, 48, 768, 768, torch.bfloat16, gap=0.3),
    Case("256×128, 768, A=12 cross", (128,) * 256, 12, 768, 768, torch.bfloat16, cross=True, gap=0.3),
    Case("ragged 256, 384/768, A=12", (128, 90, 55, 20) * 64, 12, 384, 768, torch.bfloat16),
    Case("8×1024, 768, A=48", (1024,) * 8, 48, 768, 768, torch.bfloat16, gap=0.3),
    Case("8×1024, 768, A=12 cross", (1024,) * 8, 12, 768, 768, torch.bfloat16, cross=True, gap=0.3),
)

_LONG_KERNELS = (
    (_stats_kernel, "relation_kl.stats"), (_self_kernel, "relation_kl.self"), (_cross_kernel, "relation_kl.cross"),
)  # fmt: skip
AUDIT = (
    *(
        build(_short_kernel, "relation_kl.short", widths=widths, length=n, constants={"NEAR": False, "CROSS": cross})
        for widths in ((64, 64), (16, 16), (24, 64))
        for n in (128, 64, 32)
        for cross in (False, True)
    ),
    *(
        build(kernel, tile, widths=widths, constants={"NEAR": False}, wide=kernel is not _stats_kernel)
        for kernel, tile in _LONG_KERNELS
        for widths in ((64, 64), (16, 16), (128, 128))
    ),
    *(
        build(kernel, f"{tile}_float32", widths=widths, dtype=torch.float32, constants={"NEAR": near})
        for kernel, tile in _LONG_KERNELS
        for widths, near in (((64, 64), True), ((32, 64), False), ((128, 128), True))
    ),
    *(
        build(
            _short_kernel, "relation_kl.short_float32", widths=widths, length=32, dtype=torch.float32,
            constants={"NEAR": widths == (64, 64), "CROSS": cross},
        )
        for widths in ((64, 64), (32, 64))
        for cross in (False, True)
    ),
)  # fmt: skip
