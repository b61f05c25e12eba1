"""linear_kd's Triton kernels.

A chunk of R rows takes four steps. Logits are not rounded at their own magnitude: a tile of TILE columns is stored as its
difference from its row maxima ("centred"), with the maxima beside it in float32.

  1. _logits_kernel, once a model: x Wᵀ + b → centred logits [R, stride] in x's dtype; per tile and row, in float32 from the
     accumulators, max and Σ exp [R, tiles]
  2. _offsets_kernel: those statistics → what each tile's centred logits lack to log-probabilities [R, tiles]; CE [R]
  3. _gradient_kernel: both models' tiles and offsets → dz in place of the student's logits; per block of rows, in float32,
     Σ dz over the rows, and KL
  4. the vendor's GEMM (launch.py): dz, W → dx; dzᵀ, x → dW, in float32 if later chunks add to it

Before all chunks _labels_kernel makes 1/N of the labels; after them _values_kernel makes loss, KL and CE of their parts. Each is
one program and one launch, in place of ten operations.

Logits and dz have whole tiles of columns: past V logits are −∞ and dz is 0. So rows start aligned, and accesses are 16 bytes wide.
"""

from __future__ import annotations

import math

from fastkd.kernels import tiling
from fastkd.kernels.linear_kd.head import IGNORED, LOG2E

try:
    import triton.language as tl
except ImportError:  # macOS and Windows: every backend but "triton" works
    tl = None

_IGNORED = tiling.constant(IGNORED)
_LOG2_E = tiling.constant(LOG2E)
_LN_2 = tiling.constant(math.log(2.0))


@tiling.jit
def _logits(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr, first_row, first_column, rows, vocabulary,
    WIDTH: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x Wᵀ + b of one tile [BLOCK_M, BLOCK_N] in float32; UPCAST: the interpreter's tl.dot is wrong for bf16 operands."""
    rows_M, columns_N, depth_K = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    # Rows and columns past the end read the last one, so that loads need no mask. Nobody reads such a row's result;
    # a bias of −∞ takes such a column out of the maximum and the sum. Offsets inside a tile fit 32 bits.
    x_ptr += first_row.to(tl.int64) * WIDTH
    weight_ptr += first_column.to(tl.int64) * WIDTH
    x_ptrs = x_ptr + tl.minimum(rows_M, rows - 1 - first_row)[:, None] * WIDTH + depth_K[None, :]
    last = tl.minimum(columns_N, vocabulary - 1 - first_column)
    weight_ptrs = weight_ptr + last[None, :] * WIDTH + depth_K[:, None]
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, WIDTH, BLOCK_K):
        if WIDTH % BLOCK_K == 0:
            x, weight = tl.load(x_ptrs + k), tl.load(weight_ptrs + k)
        else:
            x = tl.load(x_ptrs + k, mask=depth_K[None, :] < WIDTH - k, other=0.0)
            weight = tl.load(weight_ptrs + k, mask=depth_K[:, None] < WIDTH - k, other=0.0)
        if UPCAST:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        z = tl.dot(x, weight, z, input_precision="ieee")
    return z + tl.load(bias_ptr + first_column + columns_N)[None, :]


@tiling.jit
def _logits_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [R, WIDTH]
    weight_ptr,  # [V, WIDTH]
    bias_ptr,  # [stride] in float32, −∞ from V on
    labels_ptr,  # [R]
    logits_ptr,  # [R, stride], as the statistics with rows up to a multiple of BLOCK_M
    maximum_ptr,  # [R, tiles]
    sum_ptr,  # [R, tiles]: Σ exp((z − max)/τ)
    sum_ce_ptr,  # [R, tiles]: Σ exp(z − max)
    rows,
    vocabulary,
    stride,
    exponent,  # log₂e / τ
    WIDTH: tl.constexpr,
    HAS_LABELS: tl.constexpr,  # ignored rows may be skipped
    HAS_SUM_CE: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter's tl.dot is wrong for bf16 operands
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Row blocks run fastest: those of one weight tile share it in L2, and x stays there throughout.
    first_row = tl.program_id(0) * BLOCK_M
    first_column = tl.program_id(1) * BLOCK_N
    rows_M, columns_N = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    if HAS_LABELS:
        labels = tl.load(labels_ptr + first_row + rows_M, mask=first_row + rows_M < rows, other=_IGNORED)
        if tl.max(labels, 0) == _IGNORED:
            return

    z = _logits(
        x_ptr, weight_ptr, bias_ptr, first_row, first_column, rows, vocabulary, WIDTH, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K
    )
    maximum = tl.max(z, 1)
    z -= maximum[:, None]
    statistics = (first_row + rows_M) * tl.num_programs(1) + tl.program_id(1)
    tl.store(maximum_ptr + statistics, maximum)
    tl.store(sum_ptr + statistics, tl.sum(tl.exp2(z * exponent), 1))
    if HAS_SUM_CE:
        tl.store(sum_ce_ptr + statistics, tl.sum(tl.exp2(z * _LOG2_E), 1))
    logits_ptr += first_row.to(tl.int64) * stride + first_column
    tl.store(logits_ptr + rows_M[:, None] * stride + columns_N[None, :], z.to(logits_ptr.dtype.element_ty))


@tiling.jit
def _close(maximum_ptr, sum_ptr, exponent, TILES: tl.constexpr, TILES_UP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Put each tile's offset in place of its sum; return the row's maximum m and log₂ Σ exp((z − m)/τ)."""
    # A tile's Σ exp((z − max)/τ) counts from its own maximum: 2^shift makes it count from the row's.
    tiles = tl.arange(0, TILES_UP)
    maxima = tl.load(maximum_ptr + tiles, mask=tiles < TILES, other=float("-inf"))
    sums = tl.load(sum_ptr + tiles, mask=tiles < TILES, other=0.0)
    maximum = tl.max(maxima, 0)
    shift = (maxima - maximum) * exponent
    total = tl.log2(tl.sum(sums * tl.exp2(shift), 0))
    tl.store(sum_ptr + tiles, shift - total, mask=tiles < TILES)
    return maximum, total


@tiling.jit
def _offsets_kernel(  # type: ignore[no-untyped-def]
    student_maximum_ptr,  # [R, TILES]
    student_sum_ptr,  # [R, TILES], replaced by offsets: log₂ p = centred logit · exponent + offset
    student_sum_ce_ptr,  # [R, TILES], likewise, of the softmax at temperature 1
    teacher_maximum_ptr,  # [R, TILES]
    teacher_sum_ptr,  # [R, TILES], likewise
    labels_ptr,  # [R]
    x_ptr,  # [R, WIDTH] and
    weight_ptr,  # [V, WIDTH] and
    bias_ptr,  # [stride], the student's, for the label's logit
    ce_ptr,  # [R]
    exponent,  # log₂e / τ
    WIDTH: tl.constexpr,
    WIDTH_UP: tl.constexpr,  # the power of two from WIDTH on
    TILES: tl.constexpr,
    TILES_UP: tl.constexpr,  # the power of two from TILES on
    HAS_TEACHER: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_CE: tl.constexpr,
    HAS_SUM_CE: tl.constexpr,  # the cross-entropy's softmax is not the divergence's
):
    row = tl.program_id(0).to(tl.int64)
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        if label == _IGNORED:
            return
    tiles = row * TILES
    maximum, total = _close(student_maximum_ptr + tiles, student_sum_ptr + tiles, exponent, TILES, TILES_UP)
    if HAS_SUM_CE:
        _, total = _close(student_maximum_ptr + tiles, student_sum_ce_ptr + tiles, _LOG2_E, TILES, TILES_UP)
    if HAS_TEACHER:
        _close(teacher_maximum_ptr + tiles, teacher_sum_ptr + tiles, exponent, TILES, TILES_UP)
    if HAS_CE:
        depth = tl.arange(0, WIDTH_UP)
        x = tl.load(x_ptr + row * WIDTH + depth, mask=depth < WIDTH, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + label * WIDTH + depth, mask=depth < WIDTH, other=0.0).to(tl.float32)
        z_y = tl.sum(x * weight, 0) + tl.load(bias_ptr + label)
        tl.store(ce_ptr + row, maximum - z_y + total * _LN_2)


@tiling.jit
def _log2_probabilities(logits_ptr, offset_ptr, places, offsets, counts, exponent):  # type: ignore[no-untyped-def]
    """Centred logits of a step [STEP, TILE], and log₂ of their softmax; rows that do not count read as p = 1.

    Columns past the vocabulary need no mask: −∞ there becomes a number, so that p, q and q·(log q − log p) are 0.
    """
    z = tl.load(logits_ptr + places, mask=counts[:, None], other=0.0).to(tl.float32)
    offset = tl.load(offset_ptr + offsets, mask=counts, other=0.0)
    return z, tl.maximum(z * exponent + offset[:, None], -1e30)


@tiling.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    student_ptr,  # [R, stride] centred logits, replaced by dz
    student_offset_ptr,  # [R, tiles]
    student_offset_ce_ptr,  # [R, tiles]
    teacher_ptr,  # [R, stride] centred logits
    teacher_offset_ptr,  # [R, tiles]
    labels_ptr,  # [R]
    expected_ptr,  # [R], of reverse_kl: E_p[log₂ p − log₂ q]
    share_ptr,  # []: 1/N, or 1 for float16, whose result is divided later
    kl_ptr,  # [row blocks, tiles], added to: Σ q (log q − log p), or what the divergence has in its place
    db_ptr,  # [row blocks, stride], added to: Σ dz
    rows, stride, exponent,  # log₂e / τ
    kl_factor, ce_weight,  # the first: kl_weight·τ, or 2·kl_weight/V of mse
    TILE: tl.constexpr,  # columns that share an offset
    DIVERGENCE: tl.constexpr,  # "kl", "reverse_kl", or "mse", whose teacher_ptr has the centred differences z_s − z_t
    HAS_TEACHER: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_CE: tl.constexpr, HAS_SUM_CE: tl.constexpr, HAS_DB: tl.constexpr,
    WRITE: tl.constexpr,  # the gradient is wanted
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,  # rows of a program; logits of a step: STEP rows of a tile
):  # fmt: skip
    # Tiles run fastest: programs at work together read long pieces of the same rows.
    STEP: tl.constexpr = BLOCK_N // TILE
    tile, first_row = tl.program_id(0), tl.program_id(1) * BLOCK_M
    student_ptr += first_row.to(tl.int64) * stride + tile * TILE
    if HAS_TEACHER:
        teacher_ptr += first_row.to(tl.int64) * stride + tile * TILE
    columns_C, share = tl.arange(0, TILE), tl.load(share_ptr).to(tl.float32)
    kl_RC, db_RC = tl.zeros((STEP, TILE), tl.float32), tl.zeros((STEP, TILE), tl.float32)
    for start in range(0, BLOCK_M, STEP):
        rows_R = start + tl.arange(0, STEP)
        exists = first_row + rows_R < rows
        counts = exists
        if HAS_LABELS:
            labels = tl.load(labels_ptr + first_row + rows_R, mask=exists, other=_IGNORED)
            counts = labels != _IGNORED
        # Rows that do not count are not read, since nothing was written there: p = q, and the cross-entropy's factor is 0.
        logits = rows_R[:, None] * stride + columns_C[None, :]
        offsets = (first_row + rows_R) * tl.num_programs(0) + tile
        if DIVERGENCE != "mse" or HAS_CE:
            z_s, log2_p = _log2_probabilities(student_ptr, student_offset_ptr, logits, offsets, counts, exponent)
        else:  # nobody reads them
            z_s, log2_p = tl.zeros((STEP, TILE), tl.float32), tl.zeros((STEP, TILE), tl.float32)
        p = tl.exp2(log2_p)
        dz = tl.zeros((STEP, TILE), tl.float32)
        if HAS_TEACHER:
            terms, slope = _compared(
                p, log2_p, teacher_ptr, teacher_offset_ptr, expected_ptr, logits, offsets, first_row + rows_R, counts,
                exponent, DIVERGENCE,
            )  # fmt: skip
            kl_RC += terms
            dz += kl_factor * share * slope
        if HAS_CE:
            if HAS_SUM_CE:
                offset = tl.load(student_offset_ce_ptr + offsets, mask=counts, other=0.0)
                p = tl.exp2(z_s * _LOG2_E + offset[:, None])
            one_hot = tl.where(columns_C[None, :] == (labels - tile * TILE).to(tl.int32)[:, None], 1.0, 0.0)
            dz += tl.where(counts, ce_weight * share, 0.0)[:, None] * (p - one_hot)
        if WRITE:
            db_RC += dz
            tl.store(student_ptr + logits, dz.to(student_ptr.dtype.element_ty), mask=exists[:, None])
    _add_sums(kl_ptr, db_ptr, kl_RC, db_RC, stride, HAS_TEACHER, HAS_DB)


@tiling.jit
def _compared(  # type: ignore[no-untyped-def]
    p, log2_p, teacher_ptr, offset_ptr, expected_ptr, places, offsets, rows, counts, exponent, DIVERGENCE: tl.constexpr
):
    """The divergence's terms of a step [STEP, TILE], and its dz without a factor; of reverse_kl 0 where that is not wanted."""
    if DIVERGENCE == "mse":
        slope = _differences(teacher_ptr, offset_ptr, places, offsets, counts)
        terms = slope * slope
    else:
        _, log2_q = _log2_probabilities(teacher_ptr, offset_ptr, places, offsets, counts, exponent)
        q = tl.exp2(log2_q)
        if DIVERGENCE == "kl":
            terms, slope = _divergence(p, q, log2_p, log2_q), p - q
        else:
            terms, slope = _divergence(q, p, log2_q, log2_p), tl.zeros_like(p)
            if expected_ptr is not None:
                expected = tl.load(expected_ptr + rows, mask=counts, other=0.0)
                slope = p * (log2_p - log2_q - expected[:, None]) * _LN_2
    return terms, slope


@tiling.jit
def _differences(difference_ptr, offset_ptr, places, offsets, counts):  # type: ignore[no-untyped-def]
    """δ − mean δ of a step [STEP, TILE]; 0 in rows that do not count and in columns past the vocabulary, where −∞ is stored."""
    d = tl.load(difference_ptr + places, mask=counts[:, None], other=0.0).to(tl.float32)
    offset = tl.load(offset_ptr + offsets, mask=counts, other=0.0)
    return tl.where(d == float("-inf"), 0.0, d + offset[:, None])


@tiling.jit
def _divergence(p, q, log2_p, log2_q):  # type: ignore[no-untyped-def]
    """Terms whose sum over a row is Σ q (log q − log p).

    Σ(p − q) = 0, so it may be added: then every term is ≥ 0 and of second order in p − q, and rounded logits change the sum in
    second order only. The terms of Σ q (log q − log p) cancel for a good student.
    """
    return q * (log2_q - log2_p) * _LN_2 + (p - q)


@tiling.jit
def _add_sums(kl_ptr, db_ptr, kl_RC, db_RC, stride, HAS_TEACHER: tl.constexpr, HAS_DB: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add a program's sums to those of earlier chunks: each place belongs to one program, so the order is fixed."""
    tile, block = tl.program_id(0), tl.program_id(1)
    if HAS_TEACHER:
        kl_ptr += block * tl.num_programs(0) + tile
        tl.store(kl_ptr, tl.load(kl_ptr) + tl.sum(tl.sum(kl_RC, 1), 0))
    if HAS_DB:
        db_ptr += block.to(tl.int64) * stride + tile * db_RC.shape[1] + tl.arange(0, db_RC.shape[1])
        tl.store(db_ptr, tl.load(db_ptr) + tl.sum(db_RC, 0))


@tiling.jit
def _labels_kernel(  # type: ignore[no-untyped-def]
    labels_ptr,  # [M]
    share_ptr,  # []: 1/N
    right_ptr,  # []: whether every label is a word's or ignored
    rows,
    vocabulary,
    BLOCK_N: tl.constexpr,
):
    counts = tl.zeros((BLOCK_N,), tl.int32)
    wrong = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, rows, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        label = tl.load(labels_ptr + row, mask=row < rows, other=_IGNORED)
        counts += tl.where(label != _IGNORED, 1, 0)
        outside = tl.where(label < 0, 1, 0) + tl.where(label >= vocabulary, 1, 0)
        wrong += tl.where(label != _IGNORED, outside, 0)
    tl.store(share_ptr, 1.0 / tl.maximum(tl.sum(counts, 0), 1).to(tl.float64))
    tl.store(right_ptr, tl.where(tl.sum(wrong, 0) == 0, 1, 0))


@tiling.jit
def _values_kernel(  # type: ignore[no-untyped-def]
    kl_ptr,  # [kl_size]: parts of Σ q (log q − log p)
    ce_ptr,  # [ce_size]: parts of Σ −log p_y
    share_ptr,  # []: 1/N
    loss_out_ptr,  # []
    kl_out_ptr,  # []
    ce_out_ptr,  # []
    kl_size,
    ce_size,
    kl_factor,  # τ²
    kl_weight,
    ce_weight,
    HAS_TEACHER: tl.constexpr,
    HAS_CE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    kl_N = tl.zeros((BLOCK_N,), tl.float64)
    ce_N = tl.zeros((BLOCK_N,), tl.float64)
    if HAS_TEACHER:
        for start in range(0, kl_size, BLOCK_N):
            entry = start + tl.arange(0, BLOCK_N)
            kl_N += tl.load(kl_ptr + entry, mask=entry < kl_size, other=0.0).to(tl.float64)
    if HAS_CE:
        for start in range(0, ce_size, BLOCK_N):
            entry = start + tl.arange(0, BLOCK_N)
            ce_N += tl.load(ce_ptr + entry, mask=entry < ce_size, other=0.0).to(tl.float64)
    share = tl.load(share_ptr)
    kl, ce = tl.sum(kl_N, 0) * kl_factor * share, tl.sum(ce_N, 0) * share
    tl.store(loss_out_ptr, (kl * kl_weight + ce * ce_weight).to(tl.float32))
    tl.store(kl_out_ptr, kl.to(tl.float32))
    tl.store(ce_out_ptr, ce.to(tl.float32))
