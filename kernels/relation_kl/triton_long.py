"""relation_kl's Triton kernels for sequences of any length: two passes over the scores, a block of rows a program.

  1. _stats_kernel streams columns → the rows' maxima and sums of exponentials [4, A, T]
  2. _self_kernel or _cross_kernel streams them again → loss and gradient of a block of rows

Exponentials, padding and NEAR are as in triton_short.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd.kernels import tiling
from fastkd.kernels.packed import ROWS, ROWS_FLOAT32, Launch, load_tile, row_block, store_tile
from fastkd.kernels.tiling import Rule, Tile, jit

try:
    import triton.language as tl
except ImportError:
    tl = None

TILES: dict[str, tiling.Rules] = {
    "relation_kl.stats": {"any": ROWS},
    "relation_kl.stats_float32": {"any": ROWS_FLOAT32},
    "relation_kl.self": {
        "any": ROWS,
        # Heads of 16 on an H100, 8×1024: a call takes 920 µs, with two stages 1,149.
        90: (Rule(Tile(64, 32, 0, 4, 1), 16), *ROWS),
        100: ROWS,
        120: (Rule(Tile(64, 16, 0, 4, 2)),),
    },
    "relation_kl.self_float32": {"any": ROWS_FLOAT32},
    "relation_kl.cross": {
        "any": ROWS,
        100: (Rule(Tile(64, 32, 0, 4, 1), 16), *ROWS),  # two stages spill 16 bytes in Triton 3.9
        120: (ROWS[0], Rule(Tile(64, 16, 0, 4, 1))),
    },
    "relation_kl.cross_float32": {"any": ROWS_FLOAT32},
}
tiling.register(TILES)


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
def _stats_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr,  # [T, Ds]
    qt_ptr, kt_ptr,  # [T, Dt]
    cu_ptr,  # [B+1]
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
            # Online softmax: when a maximum grows, the sum so far shrinks by 2^(old − new).
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

    Past the end the values are ``centre``, 1, 0 and 1, so that nothing overflows.
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
    s_ptr,  # [T, Ds]
    r_ptr,  # [T, Dt]
    cu_ptr,  # [B+1]
    stats_ptr,  # [4, A, T]
    ds_ptr,  # [T, Ds], times the first of ``factors``
    loss_ptr,  # [B, blocks, A]: KL in bits, summed over a block's rows
    s_stride, r_stride, total, width, alpha, scale_s, scale_t,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, PAD_S: tl.constexpr, PAD_T: tl.constexpr,
    DOT: tl.constexpr, NEAR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (head, row block, sequence): loss and gradient of a block of rows, which no other program writes."""
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
    q_ptr, k_ptr, qt_ptr, kt_ptr, cu_ptr, stats_ptr,  # as in _stats_kernel
    dq_ptr, dk_ptr,  # [T, Ds], times the first of ``factors``
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


def loss_and_gradient(call: Launch, dq: Tensor, dk: Tensor, cross: bool, alpha: float, **scales: Any) -> Tensor:
    """Fill dq, and dk of a cross relation; return the KL of each block of rows in bits, [B, row blocks, A]."""
    rows = len(dq)
    stats = dq.new_empty((4, call.heads, rows), dtype=torch.float32)
    blocks, grid = call.row_blocks("stats")
    _stats_kernel[grid](
        *call.tensors, call.cu_seqlens, stats, **call.strides(), total=rows, **scales, **call.constants, **blocks
    )
    blocks, grid = call.row_blocks("cross" if cross else "self")
    loss = dq.new_empty(grid, dtype=torch.float32)
    rest: dict[str, Any] = {"total": rows, "width": dq.shape[1], "alpha": alpha, **scales, **call.constants, **blocks}
    if cross:
        _cross_kernel[grid](*call.tensors, call.cu_seqlens, stats, dq, dk, loss, **call.strides(), **rest)
    else:
        student, _, teacher, _ = call.tensors
        strides = {"s_stride": student.stride(0), "r_stride": teacher.stride(0)}
        _self_kernel[grid](student, teacher, call.cu_seqlens, stats, dq, loss, **strides, **rest)
    return loss
