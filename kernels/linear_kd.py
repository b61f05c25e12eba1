"""Output head, teacher softmax, KL divergence and cross-entropy in one loss that never holds [M, V].

With z = x Wᵀ + b for student and teacher, p = softmax(z_s/τ), q = softmax(z_t/τ) and N rows not ignored,

    KL   = τ²/N · Σ_rows Σ_v q (log q − log p)           (Hinton, Vinyals, Dean 2015, arXiv 1503.02531)
    CE   = 1/N · Σ_rows −log softmax(z_s)[y]
    loss = kl_weight·KL + ce_weight·CE
    dz_s = [kl_weight·τ·(p − q) + ce_weight·(softmax(z_s) − onehot(y))] / N,  dx = dz W,  dW = dzᵀ x,  db = Σ dz.

The loss is a scalar, so its gradient is made in the forward pass, a chunk of rows at a time, and the backward
only multiplies it by the loss's own. Shapes: M rows, V vocabulary, D width (D_s, D_t), R rows of a chunk, C columns of a block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.kernels import scaling, tiling

try:
    import triton.language as tl
except ImportError:  # macOS and Windows: every backend but "triton" works
    tl = None

IGNORED = -100
LOG2E = math.log2(math.e)
_COLUMNS = 1024  # of a block of the blocked path
_CHUNK_BYTES = 96 << 20  # of a chunk's exponentials in the blocked path


class LinearKD(NamedTuple):
    """The loss (differentiable) and its two terms before weighting (detached; 0 where the weight is 0)."""

    loss: Tensor
    kl: Tensor
    ce: Tensor


def reference(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
) -> LinearKD:
    """The definition in plain PyTorch: holds every logit. Arguments as in ``linear_kd``."""
    student = _at_least_float32(F.linear(student_hidden, student_weight, student_bias))
    valid = torch.ones_like(student[:, 0], dtype=torch.bool) if labels is None else labels != IGNORED
    rows = valid.sum().clamp(min=1)
    kl = ce = student.new_zeros(())
    if teacher_hidden is not None and teacher_weight is not None and kl_weight:
        teacher = _at_least_float32(F.linear(teacher_hidden, teacher_weight, teacher_bias))
        log_p = F.log_softmax(student / temperature, dim=-1)
        log_q = F.log_softmax(teacher / temperature, dim=-1)
        divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
        kl = temperature**2 * divergence.masked_fill(~valid, 0.0).sum() / rows
    if labels is not None and ce_weight:
        ce = F.cross_entropy(student, labels, ignore_index=IGNORED, reduction="sum") / rows
    return LinearKD(kl_weight * kl + ce_weight * ce, kl.detach(), ce.detach())


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- what both paths share ------------------------------------------------------------------------------------


class _Head(NamedTuple):
    """One model's side of the loss.

    In full precision the mean row is taken from every row of the weight. The softmax does not see that, and Σ dz = 0 takes
    it out of dx; but a float32 logit of 130 is known to 1e-5, and dz·W would cancel.
    """

    hidden: Tensor  # [M, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]; not centred, since one entry of −1e10, which masks a word, would be all of a mean
    centre: Tensor | None = None  # [D]: the mean row, which ``columns`` subtracts

    def centred(self, dtype: torch.dtype) -> _Head:
        """The head with the mean row of its weight as centre, unless ``dtype`` rounds to half precision."""
        return self if dtype.itemsize < 4 else self._replace(centre=self.weight.to(dtype).mean(0))

    def columns(self, chosen: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the weight [C, D], which make columns of the logits, less the centre."""
        weight = self.weight[chosen].to(dtype)
        return weight if self.centre is None else weight - self.centre

    def rows(self, rows: slice | Tensor, dtype: torch.dtype | None = None) -> _Head:
        return self._replace(hidden=self.hidden[rows].to(dtype or self.hidden.dtype))

    def cast(self, dtype: torch.dtype, columns: int, rows: int) -> _Head:
        """Contiguous operands in ``dtype``: the weight with zeros from V up to ``rows``, and a float32 bias for ``columns``,
        −∞ from V on and 0 if there was none."""
        vocabulary = len(self.weight)
        bias = self.weight.new_full((columns,), -math.inf, dtype=torch.float32)
        bias[:vocabulary] = 0.0 if self.bias is None else self.bias
        if rows == vocabulary:
            return _Head(self.hidden.to(dtype).contiguous(), self.columns(slice(None), dtype).contiguous(), bias)
        weight = self.weight.new_empty((rows, self.weight.shape[1]), dtype=dtype)
        if self.centre is None:
            weight[:vocabulary] = self.weight  # cast as it is copied
        else:
            torch.sub(self.weight.to(dtype), self.centre, out=weight[:vocabulary])
        weight[vocabulary:] = 0.0
        return _Head(self.hidden.to(dtype).contiguous(), weight, bias)


class _Terms(NamedTuple):
    kl_weight: float
    ce_weight: float
    temperature: float

    @property
    def two_softmaxes(self) -> bool:
        """Whether the cross-entropy's softmax is not the divergence's."""
        return self.ce_weight != 0 and self.temperature != 1


class _Gradients(NamedTuple):
    """The gradients, in float32 (float64 for float64) but for ``_weight_dtype``; one that is not wanted is None."""

    hidden: Tensor | None
    weight: Tensor | None  # [V, D], on the Triton path with rows up to a multiple of _ALIGNED
    bias: Tensor | None

    @property
    def wanted(self) -> list[Tensor]:
        return [x for x in self if x is not None]


class _Sums(NamedTuple):
    """Sums over the rows that are not ignored; from the Triton path what adds up to them, the divergence's without τ²."""

    kl: Tensor
    ce: Tensor


# ---- Triton ---------------------------------------------------------------------------------------------------
#
# A chunk of R rows takes four steps. Both models' logits are never rounded at their own magnitude: a tile of
# TILE columns is stored as its difference from its row maxima.
#   1. _logits_kernel, once a model: x Wᵀ + b → centred logits [R, V] in x's dtype; per tile and row, in float32
#      from the accumulators, max and Σ exp
#   2. _offsets_kernel: those statistics → what each tile's centred logits lack to log-probabilities; CE [R]
#   3. _gradient_kernel: both models' tiles and offsets → dz in place of the student's logits; per block of rows, in
#      float32, Σ dz over the rows, and KL
#   4. the vendor's GEMM: dz, W → dx; dzᵀ, x → dW, in float32 if later chunks add to it
# Before and after all chunks, in one program and launch each instead of ten: _labels_kernel, labels → 1/N; _values_kernel,
# parts of the sums → loss, KL, CE.
# Logits and dz have whole tiles of columns: what lies past V is −∞ and 0, rows are aligned, and accesses 16 bytes wide.
# Products take V up to a multiple of 64 as if it were the vocabulary: with 30,522, no multiple of 8, cuBLAS 13 takes kernels of
# an older GPU on an H100, which need 787 µs for the dx and 410 µs for the dW of 4,096 rows, 192 GFLOP each. There W has rows of
# zeros, and dW rows that nobody reads.


_ALIGNED = 64  # what divides the vocabulary of a product

_IGNORED = tiling.constant(IGNORED)
_LOG2_E = tiling.constant(LOG2E)
_LN_2 = tiling.constant(math.log(2.0))


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
    rows_M, columns_N, depth_K = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    if HAS_LABELS:
        labels = tl.load(labels_ptr + first_row + rows_M, mask=first_row + rows_M < rows, other=_IGNORED)
        if tl.max(labels, 0) == _IGNORED:
            return

    # Rows and columns past the end read the last one, so that loads need no mask. Such a row is never read again,
    # and its bias of −∞ takes such a column out of the maximum and the sum. Offsets inside a tile fit 32 bits.
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
    z += tl.load(bias_ptr + first_column + columns_N)[None, :]

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
def _gradient_kernel(  # type: ignore[no-untyped-def]
    student_ptr,  # [R, stride] centred logits, replaced by dz
    student_offset_ptr,  # [R, tiles]
    student_offset_ce_ptr,  # [R, tiles]
    teacher_ptr,  # [R, stride] centred logits
    teacher_offset_ptr,  # [R, tiles]
    labels_ptr,  # [R]
    share_ptr,  # []: what dz is multiplied with
    kl_ptr,  # [row blocks, tiles], added to: Σ q (log q − log p)
    db_ptr,  # [row blocks, stride], added to: Σ dz
    rows,
    stride,
    exponent,  # log₂e / τ
    kl_factor,  # kl_weight·τ
    ce_weight,
    TILE: tl.constexpr,  # columns that share an offset
    HAS_TEACHER: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_CE: tl.constexpr,
    HAS_SUM_CE: tl.constexpr,
    HAS_DB: tl.constexpr,
    WRITE: tl.constexpr,  # the gradient is wanted
    BLOCK_M: tl.constexpr,  # rows of a program
    BLOCK_N: tl.constexpr,  # logits of a step
):
    # Tiles run fastest: programs at work together read long pieces of the same rows.
    STEP: tl.constexpr = BLOCK_N // TILE
    tile, block = tl.program_id(0), tl.program_id(1)
    first_row = block * BLOCK_M
    student_ptr += first_row.to(tl.int64) * stride + tile * TILE
    if HAS_TEACHER:
        teacher_ptr += first_row.to(tl.int64) * stride + tile * TILE
    columns_C = tl.arange(0, TILE)
    share = tl.load(share_ptr).to(tl.float32)
    kl_RC = tl.zeros((STEP, TILE), tl.float32)
    db_RC = tl.zeros((STEP, TILE), tl.float32)
    for start in range(0, BLOCK_M, STEP):
        rows_R = start + tl.arange(0, STEP)
        exists = first_row + rows_R < rows
        counts = exists
        if HAS_LABELS:
            labels = tl.load(labels_ptr + first_row + rows_R, mask=exists, other=_IGNORED)
            counts = labels != _IGNORED
        # Rows that do not count are not read, for nothing was written there: p = q, and the cross-entropy's factor
        # is 0. Columns past V need no mask: −∞ there becomes a number, so that p, q and q·(log q − log p) are 0.
        logits = rows_R[:, None] * stride + columns_C[None, :]
        offsets = (first_row + rows_R) * tl.num_programs(0) + tile
        z_s = tl.load(student_ptr + logits, mask=counts[:, None], other=0.0).to(tl.float32)
        offset = tl.load(student_offset_ptr + offsets, mask=counts, other=0.0)
        log2_p = tl.maximum(z_s * exponent + offset[:, None], -1e30)
        p = tl.exp2(log2_p)
        dz = tl.zeros((STEP, TILE), tl.float32)
        if HAS_TEACHER:
            z_t = tl.load(teacher_ptr + logits, mask=counts[:, None], other=0.0).to(tl.float32)
            offset = tl.load(teacher_offset_ptr + offsets, mask=counts, other=0.0)
            log2_q = tl.maximum(z_t * exponent + offset[:, None], -1e30)
            q = tl.exp2(log2_q)
            # Σ(p − q) = 0, and with it every term is ≥ 0 and of second order in p − q: a rounding of the logits
            # moves the sum in second order only, where Σ q (log q − log p) alone cancels for a good student.
            kl_RC += q * (log2_q - log2_p) * _LN_2 + (p - q)
            dz += kl_factor * share * (p - q)
        if HAS_CE:
            if HAS_SUM_CE:
                offset = tl.load(student_offset_ce_ptr + offsets, mask=counts, other=0.0)
                p = tl.exp2(z_s * _LOG2_E + offset[:, None])
            one_hot = tl.where(columns_C[None, :] == (labels - tile * TILE).to(tl.int32)[:, None], 1.0, 0.0)
            dz += tl.where(counts, ce_weight * share, 0.0)[:, None] * (p - one_hot)
        if WRITE:
            db_RC += dz
            tl.store(student_ptr + logits, dz.to(student_ptr.dtype.element_ty), mask=exists[:, None])
    if HAS_TEACHER:
        kl_ptr += block * tl.num_programs(0) + tile
        tl.store(kl_ptr, tl.load(kl_ptr) + tl.sum(tl.sum(kl_RC, 1), 0))
    if HAS_DB:
        db_ptr += block.to(tl.int64) * stride + tile * TILE + columns_C
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


class _Logits(NamedTuple):
    """Centred logits of a chunk and their tiles' statistics, reused by every chunk."""

    centred: Tensor  # [R, stride]
    maximum: Tensor  # [R, tiles]
    total: Tensor  # [R, tiles]: Σ exp((z − max)/τ)
    total_ce: Tensor | None  # [R, tiles]: Σ exp(z − max)

    @classmethod
    def empty(cls, head: _Head, rows: int, tile: tiling.Tile, with_ce: bool) -> _Logits:
        like, tiles = head.hidden, -(-len(head.weight) // tile.block_n)
        rows = -(-rows // tile.block_m) * tile.block_m
        centred = like.new_empty((rows, tiles * tile.block_n))
        maximum, total, total_ce = (like.new_empty((rows, tiles), dtype=torch.float32) for _ in range(3))
        return cls(centred, maximum, total, total_ce if with_ce else None)


def _logits(head: _Head, labels: Tensor | None, out: _Logits, temperature: float, tile: tiling.Tile) -> None:
    """Step 1 for one model: fill ``out``."""
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


class _Partial(NamedTuple):
    """What each block of rows adds up over the chunks; sums of theirs are the same in every run."""

    kl: Tensor  # [row blocks, tiles]
    db: Tensor | None  # [row blocks, stride]

    @classmethod
    def zeros(cls, logits: _Logits, rows: int, launch: tiling.Tile, with_db: bool) -> _Partial:
        blocks = -(-rows // launch.block_m)
        db = logits.maximum.new_zeros((blocks, logits.centred.shape[1])) if with_db else None
        return cls(logits.maximum.new_zeros((blocks, logits.maximum.shape[1])), db)


def _offsets(
    head: _Head, student: _Logits, teacher: _Logits | None, labels: Tensor | None, ce: Tensor, terms: _Terms
) -> None:
    """Step 2: statistics → offsets in the place of both models' sums; fill ``ce`` [R] where there is one."""
    rows, width = head.hidden.shape
    tiles = student.maximum.shape[1]
    launch = tiling.tile("linear_kd.offsets", width=width, arch=tiling.architecture(ce.device))
    _offsets_kernel[(rows,)](
        student.maximum,
        student.total,
        student.total_ce,
        None if teacher is None else teacher.maximum,
        None if teacher is None else teacher.total,
        labels,
        head.hidden,
        head.weight,
        head.bias,
        ce,
        LOG2E / terms.temperature,
        WIDTH=width,
        WIDTH_UP=_power_of_two(width),
        TILES=tiles,
        TILES_UP=_power_of_two(tiles),
        HAS_TEACHER=teacher is not None,
        HAS_LABELS=labels is not None,
        HAS_CE=terms.ce_weight != 0,
        HAS_SUM_CE=student.total_ce is not None,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def _gradient(
    rows: int,
    student: _Logits,
    teacher: _Logits | None,
    labels: Tensor | None,
    share: Tensor,
    partial: _Partial,
    terms: _Terms,
    launch: tiling.Tile,
    write: bool,
) -> None:
    """Step 3: add to ``partial``, and leave dz in the student's logits if they are to be written."""
    tiles, stride = student.maximum.shape[1], student.centred.stride(0)
    tile = stride // tiles
    block_m = min(launch.block_m, max(launch.block_n // tile, _power_of_two(rows)))  # few rows need no empty steps
    _gradient_kernel[(tiles, -(-rows // block_m))](
        student.centred,
        student.total,
        student.total_ce if write else None,
        None if teacher is None else teacher.centred,
        None if teacher is None else teacher.total,
        labels,
        share,
        partial.kl,
        partial.db,
        rows,
        stride,
        LOG2E / terms.temperature,
        terms.kl_weight * terms.temperature,
        terms.ce_weight,
        TILE=tile,
        HAS_TEACHER=teacher is not None,
        HAS_LABELS=labels is not None,
        HAS_CE=write and terms.ce_weight != 0,
        HAS_SUM_CE=write and student.total_ce is not None,
        HAS_DB=partial.db is not None,
        WRITE=write,
        BLOCK_M=block_m,
        BLOCK_N=launch.block_n,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def _triton(
    student: _Head,
    teacher: _Head | None,
    labels: Tensor | None,
    terms: _Terms,
    chunk_rows: int,
    dtype: torch.dtype,
    share: Tensor,
    out: _Gradients,
) -> _Sums:
    """The four steps for each chunk of rows."""
    vocabulary, x = len(student.weight), student.hidden
    tile, launch = _logits_tile(dtype, student, teacher), _gradient_tile(dtype, x.device)
    columns, aligned = _up(vocabulary, tile.block_n), _up(vocabulary, _ALIGNED)
    student = student.centred(dtype).cast(dtype, columns, aligned)
    teacher = None if teacher is None else teacher.centred(dtype).cast(dtype, columns, vocabulary)
    rows = min(chunk_rows, len(x))
    logits_s = _Logits.empty(student, rows, tile, terms.two_softmaxes)
    logits_t = None if teacher is None else _Logits.empty(student, rows, tile, False)
    ce, partial = x.new_zeros(len(x), dtype=torch.float32), _Partial.zeros(logits_s, rows, launch, out.bias is not None)
    write = bool(out.wanted)
    final = out.weight
    if final is not None and final.dtype != torch.float32 and len(x) > rows:
        out = out._replace(weight=torch.empty_like(final, dtype=torch.float32))  # the sum over chunks
    for start in range(0, len(x), chunk_rows):
        part = slice(start, start + chunk_rows)
        y, head = None if labels is None else labels[part], student.rows(part)
        r = len(head.hidden)
        with torch.cuda.device_of(x):
            _logits(head, y, logits_s, terms.temperature, tile)
            if teacher is not None and logits_t is not None:
                _logits(teacher.rows(part), y, logits_t, terms.temperature, tile)
            _offsets(head, logits_s, logits_t, y, ce[part], terms)
            if write or logits_t is not None:
                _gradient(r, logits_s, logits_t, y, share, partial, terms, launch, write)
        _products(logits_s.centred[:r, :aligned], head, start, out)
    if final is not None and out.weight is not None and out.weight is not final:
        final.copy_(out.weight)
    if out.bias is not None and partial.db is not None:
        torch.sum(partial.db[:, :vocabulary], 0, out=out.bias)
    return _Sums(partial.kl, ce)


def _triton_share(labels: Tensor, vocabulary: int) -> Tensor:
    """1/N in float64, on the device; labels are checked as in ``_check_labels``."""
    launch = tiling.tile("linear_kd.sums", width=0, arch=tiling.architecture(labels.device))
    share, right = labels.new_empty((), dtype=torch.float64), labels.new_empty((), dtype=torch.int32)
    with torch.cuda.device_of(labels):
        _labels_kernel[(1,)](labels, share, right, len(labels), vocabulary, BLOCK_N=launch.block_n, **launch.options)
    if labels.device.type != "cpu":
        torch._assert_async(right)
    elif not right:
        _check_labels(labels, vocabulary)
    return share


def _triton_values(sums: _Sums, share: Tensor, terms: _Terms, with_teacher: bool, out: tuple[Tensor, ...]) -> None:
    """Fill the loss, KL and CE."""
    launch = tiling.tile("linear_kd.sums", width=0, arch=tiling.architecture(share.device))
    with torch.cuda.device_of(share):
        _values_kernel[(1,)](
            sums.kl,
            sums.ce,
            share,
            *out,
            sums.kl.numel(),
            sums.ce.numel(),
            float(terms.temperature**2),
            float(terms.kl_weight),
            float(terms.ce_weight),
            HAS_TEACHER=with_teacher,
            HAS_CE=terms.ce_weight != 0,
            BLOCK_N=launch.block_n,
            **launch.options,
        )


def _logits_tile(dtype: torch.dtype, student: _Head, teacher: _Head | None) -> tiling.Tile:
    """One tile for both models, since their blocks of columns share dz."""
    widths = [head.hidden.shape[1] for head in (student, teacher) if head is not None]
    arch = tiling.architecture(student.hidden.device)
    tile = tiling.tile(_logits_tile_name(dtype, *widths), width=max(widths), arch=arch)
    assert tile.block_n % _ALIGNED == 0, f"{tile}: whole tiles hold the vocabulary of the products"
    return tile


def _logits_tile_name(dtype: torch.dtype, *widths: int) -> str:
    if dtype == torch.float32:
        return "linear_kd.logits_float32"
    return "linear_kd.logits_ragged" if any(width % 64 for width in widths) else "linear_kd.logits"


def _gradient_tile(dtype: torch.dtype, device: torch.device) -> tiling.Tile:
    return tiling.tile(_gradient_tile_name(dtype), width=0, arch=tiling.architecture(device))


def _gradient_tile_name(dtype: torch.dtype) -> str:
    return "linear_kd.gradient_float32" if dtype == torch.float32 else "linear_kd.gradient"


def _products(dz: Tensor, student: _Head, start: int, out: _Gradients) -> None:
    """Step 4 for one chunk: dx of its rows, and its share of dW, which the first chunk writes and the others add to.

    A row of dz starts at a multiple of its tile's columns, so at 16 bytes; cuBLAS wants its leading dimension aligned.
    """
    if out.hidden is not None:
        _product(dz, student.weight, out.hidden[start : start + len(dz)])
    if out.weight is not None:
        _product(dz.t(), student.hidden, out.weight, add=start > 0)


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a b, or out += a b, in float32, rounded to the dtype of ``out`` as it is written."""
    if not a.is_cuda:  # no out_dtype there
        product = a.float() @ b.float()
        out.copy_(out + product if add else product)
        return
    options: dict[str, Any] = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, a, b, out=out, **options)
    else:
        torch.mm(a, b, out=out, **options)


def _up(n: int, multiple: int) -> int:
    """The smallest multiple from ``n`` on."""
    return -(-n // multiple) * multiple


def _power_of_two(n: int) -> int:
    """The smallest from ``n`` on."""
    return 1 << (n - 1).bit_length()


# ---- blocked PyTorch ------------------------------------------------------------------------------------------
#
# A chunk of R rows in two passes over blocks of C columns, so that a block stays in cache through its operations.
#   1. x Wᵀ + b of both models → exp((z − m)/τ) with the block's row maxima m, kept for the chunk; block statistics
#   2. exponentials and statistics → dz of a block → its share of dx, dW, db
# One exponential a logit, and no logit is kept: the divergence's cross term is summed in the first pass.


class _Softmax:
    """exp(z/τ) of a chunk's rows, each block of columns relative to its own row maxima."""

    def __init__(self, exponentials: Tensor, temperature: float, exact: bool) -> None:
        self.exponentials = exponentials  # [R, V]
        self.exponent = LOG2E / temperature
        self.row_sums = _exact_sums if exact else _sums
        self.blocks: list[tuple[Tensor, Tensor]] = []

    def add(self, columns: slice, centred: Tensor, maximum: Tensor) -> Tensor:
        """Take a block of logits, given as its difference from its row maxima; return its exponentials."""
        block = torch.mul(centred, self.exponent, out=self.exponentials[:, columns]).exp2_()  # a quarter of exp's time
        self.blocks.append((maximum, self.row_sums(block)))
        return block

    def close(self) -> None:
        """Turn the blocks' statistics into each block's factor to a probability. In float64: R × blocks numbers."""
        maxima, sums = zip(*self.blocks, strict=True)
        self.maxima, self.sums = torch.stack(maxima).double() * (self.exponent / LOG2E), torch.stack(sums).double()
        self.maximum = self.maxima.amax(0)
        factor = torch.exp(self.maxima - self.maximum)
        self.total = (factor * self.sums).sum(0)
        self.factor = factor / self.total

    def weighted(self, block: int, columns: slice, weight: Tensor) -> Tensor:
        """weight · softmax of one block [R, C], weight [R]."""
        factor = (weight * self.factor[block]).to(self.exponentials.dtype)
        return self.exponentials[:, columns] * factor[:, None]


class _Chunk:
    """Both models' softmaxes for R rows: p and q at temperature τ, p_ce the student's at 1."""

    def __init__(
        self,
        student: _Head,
        teacher: _Head | None,
        labels: Tensor | None,
        terms: _Terms,
        share: Tensor,
        buffers: Tensor,
    ):
        self.terms, self.labels, self.student, self.teacher = terms, labels, student, teacher
        self.valid = torch.ones_like(student.hidden[:, 0]).double() if labels is None else (labels != IGNORED).double()
        self.share = share * self.valid  # [R]
        temperatures = (terms.temperature, terms.temperature, 1.0)  # of p, q and p_ce
        exact = student.centre is not None
        softmaxes = [_Softmax(b[: len(student.hidden)], t, exact) for b, t in zip(buffers, temperatures, strict=False)]
        self.p = self.p_ce = softmaxes[0]
        self.q = softmaxes[1] if teacher is not None else None
        if terms.two_softmaxes:
            self.p_ce = softmaxes[2]
        self.cross: list[Tensor] = []

    def read_logits(self) -> None:
        """Pass one."""
        for columns in _blocks(self.student):
            z_s, m_s = _centred_logits(self.student, columns)
            if self.p_ce is not self.p:
                self.p_ce.add(columns, z_s, m_s)
            self.p.add(columns, z_s, m_s)
            if self.teacher is not None and self.q is not None:
                z_t, m_t = _centred_logits(self.teacher, columns)
                q = self.q.add(columns, z_t, m_t)
                self.cross.append(torch.linalg.vecdot(q, z_t.sub_(z_s)))
        for softmax in {self.p, self.p_ce, self.q}:
            if softmax is not None:
                softmax.close()

    def kl(self) -> Tensor:
        """τ² Σ_rows KL(q‖p), from differences of logits, of maxima and a ratio of totals.

        log-sum-exps are ten times the logits' gap: their float32 rounding would show in a good student's divergence.
        """
        if self.q is None:
            return self.valid.new_zeros(())
        offsets = (self.q.maxima - self.p.maxima) - (self.q.maximum - self.p.maximum)
        cross = self.q.factor * (torch.stack(self.cross).double() / self.terms.temperature + self.q.sums * offsets)
        rows = cross.sum(0) - torch.log(self.q.total / self.p.total)
        return self.terms.temperature**2 * (rows * self.valid).sum()

    def ce(self) -> Tensor:
        """Σ_rows −log softmax(z_s)[y]."""
        if self.labels is None or not self.terms.ce_weight:
            return self.valid.new_zeros(())
        y = self.labels.clamp(min=0)
        logit = torch.linalg.vecdot(self.student.hidden, self.student.columns(y, self.student.hidden.dtype)).double()
        if self.student.bias is not None:
            logit += self.student.bias[y]
        rows = self.p_ce.maximum - logit + torch.log(self.p_ce.total)
        return (rows * self.valid).sum()

    def dz(self) -> Iterator[tuple[slice, Tensor]]:
        """Pass two: dz of each block of columns, without the one-hot."""
        kl = self.terms.kl_weight * self.terms.temperature * self.share if self.q is not None else 0 * self.share
        ce = self.terms.ce_weight * self.share
        for i, columns in enumerate(_blocks(self.student)):
            dz = self.p.weighted(i, columns, kl + ce if self.p_ce is self.p else kl)
            if self.q is not None:
                dz -= self.q.weighted(i, columns, kl)
            if self.p_ce is not self.p:
                dz += self.p_ce.weighted(i, columns, ce)
            yield columns, dz


def _sums(block: Tensor) -> Tensor:
    """Σ over the columns of [R, C]."""
    return block.sum(1)


def _exact_sums(block: Tensor) -> Tensor:
    """The same in float64, from sums of C/32 numbers in their own dtype, in twice the time.

    What a float32 sum of 1,024 numbers rounds off is 1e-8 of a divergence, however small that is.
    """
    whole = block.shape[1] // 32 * 32
    lanes = block[:, :whole].unflatten(1, (-1, 32)).sum(1)
    return lanes.sum(1, dtype=torch.float64) + block[:, whole:].sum(1)


def _blocks(head: _Head) -> list[slice]:
    vocabulary = head.weight.shape[0]
    return [slice(start, min(start + _COLUMNS, vocabulary)) for start in range(0, vocabulary, _COLUMNS)]


def _centred_logits(head: _Head, columns: slice) -> tuple[Tensor, Tensor]:
    """Logits [R, C] minus their row maxima, and the maxima [R]."""
    dtype = head.hidden.dtype
    bias = None if head.bias is None else head.bias[columns].to(dtype)
    z = _linear(head.hidden, head.columns(columns, dtype), bias)
    maximum = z.amax(1)
    return z.sub_(maximum[:, None]), maximum


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b. In float32 on a CPU through oneDNN, 2.3 times as fast as MKL on AMD."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)
    return F.linear(x, weight, bias)


def _blocked(
    student: _Head,
    teacher: _Head | None,
    labels: Tensor | None,
    terms: _Terms,
    chunk_rows: int,
    dtype: torch.dtype,
    share: Tensor,
    out: _Gradients,
) -> _Sums:
    """Every chunk of rows. On a CPU ignored rows are left out; elsewhere, finding them would wait for the device.

    Logits are float32 whatever the operands, so that ``dtype`` rounds only those of the products for dx and dW.
    """
    x = student.hidden
    wide = torch.promote_types(dtype, torch.float32)
    student = student.centred(dtype)
    teacher = None if teacher is None else teacher.centred(dtype)
    kept = torch.arange(len(x), device=x.device)
    if labels is not None and x.device.type == "cpu":
        kept = (labels != IGNORED).nonzero()[:, 0]
    softmaxes = 1 + (teacher is not None) + terms.two_softmaxes
    buffers = x.new_empty((softmaxes, min(chunk_rows, len(kept)), len(student.weight)), dtype=wide)
    sums = x.new_zeros(2, dtype=torch.float64)
    for gradient in out.wanted:
        gradient.zero_()
    for rows in kept.split(chunk_rows) if len(kept) else ():
        y = None if labels is None else labels[rows]
        part_t = None if teacher is None else teacher.rows(rows, wide)
        chunk = _Chunk(student.rows(rows, wide), part_t, y, terms, share, buffers)
        chunk.read_logits()
        sums += torch.stack([chunk.kl(), chunk.ce()])
        if out.wanted:
            _accumulate(chunk, rows, _gradient_dtype(dtype, x.device), out)
    return _Sums(*sums)


def _gradient_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """``dtype``, but on a CPU half precision only where it multiplies in hardware: else it is a slower float32."""
    fast = device.type != "cpu" or (dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported())
    return dtype if fast else torch.promote_types(dtype, torch.float32)


def _accumulate(chunk: _Chunk, rows: Tensor, dtype: torch.dtype, out: _Gradients) -> None:
    """Add a chunk's share of dx, dW and db."""
    x, head = chunk.student.hidden.to(dtype), chunk.student
    dx = torch.zeros_like(chunk.student.hidden)
    for columns, dz in chunk.dz():
        if out.bias is not None:
            out.bias[columns] += dz.sum(0)
        dz = dz.to(dtype)
        if out.hidden is not None:
            dx += _linear(dz, head.columns(columns, dtype).t())
        if out.weight is not None:
            out.weight[columns] += _linear(dz.t(), x.t())
    if chunk.labels is not None and chunk.terms.ce_weight:
        _subtract_one_hot(chunk, dx, out)
    if out.hidden is not None:
        out.hidden[rows] = dx


def _subtract_one_hot(chunk: _Chunk, dx: Tensor, out: _Gradients) -> None:
    """The label's part of dz, unrounded. Rows of one label are added in a fixed order, on a GPU too (index_add_ is not)."""
    assert chunk.labels is not None
    y, ce = chunk.labels.clamp(min=0), (chunk.terms.ce_weight * chunk.share).to(dx.dtype)
    dx -= ce[:, None] * chunk.student.columns(y, dx.dtype)
    if out.weight is not None:
        out.weight.index_put_((y,), -ce[:, None] * chunk.student.hidden, accumulate=True)
    if out.bias is not None:
        out.bias.index_put_((y,), -ce, accumulate=True)


# ---- the operator ---------------------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor student_hidden, Tensor student_weight, Tensor? labels, Tensor? student_bias, Tensor? teacher_hidden, "
    "Tensor? teacher_weight, Tensor? teacher_bias, float kl_weight, float ce_weight, float temperature, "
    "int chunk_rows, str backend, ScalarType dtype, bool need_hidden, bool need_weight, bool need_bias"
)
_RETURNS = "Tensor loss, Tensor kl, Tensor ce, Tensor dx, Tensor dw, Tensor db"


@torch.library.custom_op("fastkd::linear_kd", mutates_args=(), schema=f"({_ARGUMENTS}) -> ({_RETURNS})")
def _operator(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor | None,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    kl_weight: float,
    ce_weight: float,
    temperature: float,
    chunk_rows: int,
    backend: str,
    dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    """The values and the gradients, which are empty where they are not needed.

    The weight's may be the first rows of a few more.
    """
    teacher = None
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = _Head(teacher_hidden, teacher_weight, teacher_bias)
    student = _Head(student_hidden, student_weight, student_bias)
    labels = None if labels is None else labels.contiguous()  # kernels take them side by side
    terms = _Terms(kl_weight, ce_weight, temperature if teacher is not None else 1.0)
    needed, vocabulary = (need_hidden, need_weight, need_bias), len(student_weight)
    aligned = _up(vocabulary, _ALIGNED) if backend == "triton" else vocabulary
    outputs = _empty_outputs(student_hidden, student_weight, dtype, backend, *needed, aligned)
    out = _Gradients(*(x if need else None for x, need in zip(outputs[3:], needed, strict=True)))
    compiled = backend == "triton" and len(student_hidden) > 0
    rows = chunk_rows or _default_chunk(student_hidden, student_weight, teacher is not None, backend)
    share = _share(student_hidden, labels, vocabulary, backend)
    # dz/N is below float16's smallest number where a softmax is small and N large: there the result is divided.
    early = share if dtype != torch.float16 else torch.ones_like(share)
    with torch.autocast(student_hidden.device.type, enabled=False):
        path = _triton if compiled else _blocked
        sums = path(student, teacher, labels, terms, rows, dtype, early, out)
    for x in out.wanted if dtype == torch.float16 else ():
        x.mul_(share)
    if compiled:
        _triton_values(sums, share, terms, teacher is not None, outputs[:3])
    else:
        kl, ce = sums.kl * share, sums.ce * share
        for x, value in zip(outputs, (kl_weight * kl + ce_weight * ce, kl, ce), strict=False):
            x.copy_(value)
    return *outputs[:4], outputs[4][:vocabulary], outputs[5]


def _check_labels(labels: Tensor, vocabulary: int) -> None:
    """ValueError for an id outside the vocabulary; on a GPU, which the host does not wait for, a failed assertion there."""
    wrong = (labels != IGNORED) & (labels != labels.clamp(0, vocabulary - 1))
    if labels.device.type != "cpu":
        torch._assert_async(~wrong.any())
    elif wrong.any():
        label = int(labels[wrong][0])
        raise ValueError(
            f"linear_kd: label {label} lies outside the vocabulary of {vocabulary:,}, and {IGNORED} ignores a row"
        )


def _share(hidden: Tensor, labels: Tensor | None, vocabulary: int, backend: str) -> Tensor:
    """1/N in float64, a tensor on the device: the host does not wait for the count. Labels are checked."""
    if labels is None:
        return hidden.new_full((), 1 / max(1, len(hidden)), dtype=torch.float64)
    if backend == "triton" and len(labels):
        return _triton_share(labels, vocabulary)
    _check_labels(labels, vocabulary)
    return (labels != IGNORED).sum().clamp(min=1).double().reciprocal()


def _empty_outputs(
    hidden: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    backend: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    weight_rows: int,
) -> tuple[Tensor, ...]:
    wide = torch.promote_types(dtype, torch.float32)
    loss, kl, ce = (hidden.new_empty((), dtype=wide) for _ in range(3))
    dx = hidden.new_empty(hidden.shape if need_hidden else (0,), dtype=wide)
    shape = (weight_rows, weight.shape[1]) if need_weight else (0,)
    dw = weight.new_empty(shape, dtype=_weight_dtype(weight, dtype, backend))
    return loss, kl, ce, dx, dw, hidden.new_empty(weight.shape[:1] if need_bias else (0,), dtype=wide)


def _weight_dtype(weight: Tensor, dtype: torch.dtype, backend: str) -> torch.dtype:
    """Of the dW that the operator returns: bfloat16 for bfloat16 parameters on the Triton path, where the last product or
    sum rounds as it writes, and the backward seldom has to scale; else float32, or float64."""
    final = backend == "triton" and weight.dtype == dtype == torch.bfloat16
    return dtype if final else torch.promote_types(dtype, torch.float32)


@_operator.register_fake
def _fake(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor | None,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    kl_weight: float,
    ce_weight: float,
    temperature: float,
    chunk_rows: int,
    backend: str,
    dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    needed = (need_hidden, need_weight, need_bias)
    return _empty_outputs(student_hidden, student_weight, dtype, backend, *needed, len(student_weight))


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, kl, ce, *gradients = output
    ctx.backend, ctx.needed = inputs[-5], inputs[-3:]
    ctx.dtypes = [None if x is None else x.dtype for x in (inputs[0], inputs[1], inputs[3])]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(kl, ce, *gradients)
    ctx.save_for_backward(*gradients)


def _scale_gradients(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_kd has no second derivative: leave out create_graph=True, or use backend='reference'"
        )
    if grad_loss is None:
        return (None,) * 16
    dx, dw, db = (
        scaling.scaled(x, grad_loss, dtype, backend=ctx.backend) if needed else None
        for x, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needed, strict=True)
    )
    return dx, dw, None, db, *[None] * 12


_operator.register_autograd(_scale_gradients, setup_context=_save_gradients)


# ---- the public function --------------------------------------------------------------------------------------


def linear_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> LinearKD:
    """kl_weight·KL(teacher ‖ student) + ce_weight·CE through both output heads, without an [M, V] matrix.

    Args:
        student_hidden: [M, D_s], the rows at predicted positions after the head's transform.
        student_weight: [V, D_s], the output embedding.
        labels: [M] int64, -100 where a row is ignored. Needed when ce_weight > 0. Rows beyond the predicted ones
            should not be passed: on a GPU an ignored row still takes part in the products that make dx and dW.
        student_bias: [V].
        teacher_hidden, teacher_weight, teacher_bias: [M, D_t], [V, D_t] and [V]; never differentiated. None:
            cross-entropy alone.
        kl_weight, ce_weight: a term with weight 0 is not computed and reads 0.
        temperature: τ, of the divergence alone.
        chunk_rows: rows whose logits are in memory at a time; by default up to 4,096 on a GPU, and on a CPU what
            fits 96 MiB.
        backend: "triton" (the default on a GPU), "blocked" (the default elsewhere) or "reference".

    Under autocast the products run in its dtype, else in the widest dtype given. Logits are float32, except that the
    Triton path stores those of half-precision operands in half precision, relative to their tile's maximum. The
    gradients are accumulated in float32 and arrive in each parameter's dtype. With no row left the loss is 0.

    Raises ValueError for shapes, labels or weights that do not fit together; RuntimeError for a second derivative.
    """
    if not kl_weight:
        teacher_hidden = teacher_weight = teacher_bias = None
    given = (student_hidden, student_weight, labels, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    _check(*given, kl_weight, ce_weight, temperature, chunk_rows)
    operands = [x for x in (student_hidden, student_weight, teacher_hidden, teacher_weight) if x is not None]
    in_float64 = [x for x in operands if x.dtype == torch.float64]  # which Triton does not take
    backend = tiling.backend(backend, (in_float64 or operands)[0])
    if backend == "reference":
        return reference(
            student_hidden,
            student_weight,
            labels,
            student_bias=student_bias,
            teacher_hidden=teacher_hidden,
            teacher_weight=teacher_weight,
            teacher_bias=teacher_bias,
            kl_weight=kl_weight,
            ce_weight=ce_weight,
            temperature=temperature,
        )
    learns = [
        x is not None and x.requires_grad and torch.is_grad_enabled()
        for x in (student_hidden, student_weight, student_bias)
    ]
    dtype = _product_dtype(operands)
    loss, kl, ce, *_ = _operator(*given, kl_weight, ce_weight, temperature, chunk_rows or 0, backend, dtype, *learns)
    return LinearKD(loss, kl.detach(), ce.detach())


def _product_dtype(operands: Sequence[Tensor]) -> torch.dtype:
    """Autocast's dtype where it is on and nothing is float64, else the widest of the operands'."""
    device = operands[0].device.type
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in operands))
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


def _default_chunk(hidden: Tensor, weight: Tensor, with_teacher: bool, backend: str) -> int:
    """Equal chunks of at most 4,096 rows on a GPU, of ``_CHUNK_BYTES`` of logits on a CPU; a multiple of 16."""
    rows = len(hidden)
    largest = 4096 if backend == "triton" else max(64, _CHUNK_BYTES // (4 * len(weight) * (1 + with_teacher)))
    chunks = max(1, -(-rows // largest))
    return max(16, -(-rows // (16 * chunks)) * 16)


def _check(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor | None,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    kl_weight: float,
    ce_weight: float,
    temperature: float,
    chunk_rows: int | None,
) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"linear_kd: temperature is {temperature}, give a finite one above 0")
    if not (math.isfinite(kl_weight) and math.isfinite(ce_weight)):
        raise ValueError(f"linear_kd: kl_weight is {kl_weight} and ce_weight {ce_weight}, give finite ones")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"linear_kd: chunk_rows is {chunk_rows}, give at least 1")
    if ce_weight and labels is None:
        raise ValueError(f"linear_kd: ce_weight is {ce_weight} but labels is None: pass labels or ce_weight=0")
    if (teacher_hidden is None) != (teacher_weight is None) or (teacher_hidden is None and teacher_bias is not None):
        raise ValueError(
            "linear_kd: give both teacher_hidden and teacher_weight (and maybe teacher_bias), or none of them"
        )
    if teacher_hidden is None and not ce_weight:
        raise ValueError("linear_kd: nothing to compute: give teacher_hidden with a kl_weight, or a ce_weight")
    _check_head("student", student_hidden, student_weight, student_bias)
    rows, vocabulary = len(student_hidden), len(student_weight)
    if labels is not None and (labels.shape != (rows,) or labels.dtype != torch.int64):
        shape = list(labels.shape)
        raise ValueError(f"linear_kd: labels are {labels.dtype} {shape}, give int64 [{rows}], one a row")
    if teacher_hidden is not None and teacher_weight is not None:
        _check_head("teacher", teacher_hidden, teacher_weight, teacher_bias)
        if len(teacher_hidden) != rows:
            raise ValueError(f"linear_kd: {len(teacher_hidden)} teacher rows for {rows} student rows, give as many")
        if len(teacher_weight) != vocabulary:
            sizes = f"{len(teacher_weight):,} for the teacher, {vocabulary:,} for the student"
            raise ValueError(f"linear_kd: vocabularies differ, {sizes}: cut both weights to the ids they share")


def _check_head(model: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for x in (hidden, weight):
        if x.dtype not in tiling.FLOATS:
            raise ValueError(f"linear_kd: the {model} is {x.dtype}, give float16, bfloat16, float32 or float64")
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or not weight.numel():
        shapes = f"hidden {list(hidden.shape)} and weight {list(weight.shape)}"
        raise ValueError(f"linear_kd: the {model}'s {shapes} do not fit, give [M, D] and [V, D], V and D above 0")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_kd: the {model}'s bias is {list(bias.shape)}, give [{weight.shape[0]}]")


# ---- what tests, benches and the audit iterate over -----------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Shapes, dtype and values of one call.

    ``spread`` is the standard deviation of the logits, 8 being a peaked softmax; ``gap`` that of the student's
    difference from the teacher (None: unrelated models), which needs a teacher at least as wide. ``offset`` is added to
    hidden states and weights: 1 makes logits near their width, all of whose common part the softmax does not see.
    """

    name: str
    rows: int
    vocabulary: int
    student_width: int
    teacher_width: int | None  # None: cross-entropy alone
    dtype: torch.dtype = torch.float32
    spread: float = 2.0
    gap: float | None = None
    offset: float = 0.0
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    temperature: float = 1.0
    bias: bool = True
    ignored: int | None = None  # rows; None: no labels unless the cross-entropy needs them

    @property
    def tolerance(self) -> float:
        """‖out − ref‖/‖ref‖ against float64, of the value and of every gradient."""
        return {torch.float64: 1e-10, torch.float32: 1e-5}.get(self.dtype, 1e-2)

    def inputs(self, device: str | torch.device = "cpu", seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of ``linear_kd``; the student's tensors ask for gradients."""
        generator = torch.Generator().manual_seed(seed)
        m, v, d = self.rows, self.vocabulary, self.student_width
        draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        tensors = {"student_hidden": draw(m, d), "student_weight": draw(v, d) * self.spread / math.sqrt(d)}
        tensors = {name: x + self.offset for name, x in tensors.items()}
        if self.bias:
            tensors["student_bias"] = draw(v) / 2
        if self.teacher_width is not None:
            tensors |= self._teacher(tensors, self.teacher_width, draw)
        arguments: dict[str, Any] = {name: x.to(device, self.dtype) for name, x in tensors.items()}
        for name in ("student_hidden", "student_weight", "student_bias"):
            if name in arguments:
                arguments[name].requires_grad_()
        if self.ignored is not None or self.ce_weight:
            labels = torch.randint(v, (m,), generator=generator)
            labels[torch.randperm(m, generator=generator)[: self.ignored or 0]] = IGNORED
            arguments["labels"] = labels.to(device)
        terms = {"kl_weight": self.kl_weight, "ce_weight": self.ce_weight, "temperature": self.temperature}
        return arguments | terms

    def _teacher(self, student: dict[str, Tensor], width: int, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
        weight = draw(self.vocabulary, width) / math.sqrt(width) * (self.spread if self.gap is None else self.gap)
        hidden, d = draw(self.rows, width) + self.offset, self.student_width
        weight += self.offset if self.gap is None else 0.0
        if self.gap is not None:  # the student's logits plus an independent difference
            hidden[:, :d] = student["student_hidden"]
            weight[:, :d] += student["student_weight"]
        teacher = {"teacher_hidden": hidden, "teacher_weight": weight}
        if self.bias:
            near = self.gap is not None
            teacher["teacher_bias"] = student["student_bias"] if near else draw(self.vocabulary) / 2
        return teacher


_half = torch.bfloat16
CASES = (
    Case("kl", 70, 1000, 32, 48),
    Case("kl-no-bias", 33, 257, 16, 16, bias=False),
    Case("ce", 40, 1000, 32, None, ce_weight=1.0, kl_weight=0.0, ignored=7),
    Case("kl-ce", 150, 1500, 40, 24, kl_weight=0.5, ce_weight=0.7, ignored=11),
    Case("kl-ce-tempered", 70, 1000, 32, 48, kl_weight=0.3, ce_weight=0.7, temperature=2.5, ignored=7),
    Case("tempered", 64, 1024, 64, 64, temperature=0.5),
    Case("odd", 123, 507, 252, 77, ce_weight=0.5),
    Case("one-row", 1, 130, 8, 12, ce_weight=0.5, bias=False),
    Case("tiny-vocabulary", 20, 5, 8, 8, ce_weight=0.5),
    Case("last-column-alone", 20, 1025, 24, 24, ce_weight=0.5),
    Case("all-ignored-but-one", 65, 600, 16, 24, ce_weight=0.5, ignored=64),
    Case("peaked", 60, 2000, 64, 96, spread=8.0, ce_weight=0.5),
    Case("near-equal", 60, 2000, 64, 96, spread=1.0, gap=0.1),
    Case("peaked-near-equal", 60, 2000, 64, 96, spread=8.0, gap=0.1),
    Case("all-positive", 24, 300, 128, 96, spread=0.5, offset=1.0),
    Case("uncased", 9, 30522, 48, 64, spread=4.0, ce_weight=0.5, ignored=2),
    Case("modern", 4, 50368, 32, 48, spread=4.0, ce_weight=0.5),
    Case("half-kl-ce", 150, 1500, 40, 24, _half, kl_weight=0.5, ce_weight=0.7, temperature=2.0, ignored=11),
    Case("half-peaked", 60, 2000, 64, 96, _half, spread=8.0, ce_weight=0.5),
    Case("half-near-equal", 60, 2000, 64, 96, _half, spread=4.0, gap=0.3),
    Case("half-peaked-near-equal", 60, 2000, 64, 96, _half, spread=8.0, gap=0.1),
    Case("half-uncased", 9, 30522, 48, 64, _half, spread=4.0, gap=0.3, ignored=2),
    Case("float16", 60, 2000, 64, 96, torch.float16, spread=4.0, gap=0.3, ce_weight=0.5),
)
BENCHES = (
    Case("kl 384/768", 4096, 30522, 384, 768, _half, spread=4.0),
    Case("kl 768/1024", 4096, 30522, 768, 1024, _half, spread=4.0),
    Case("kl+ce 768/768", 4096, 50368, 768, 768, _half, spread=4.0, ce_weight=0.5, temperature=2.0),
    Case("ce 768", 4096, 30522, 768, None, _half, spread=4.0, kl_weight=0.0, ce_weight=1.0),
    Case("kl 384/768 float32", 4096, 30522, 384, 768, spread=4.0),
)

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


_KL, _CE = ("HAS_TEACHER",), ("HAS_LABELS", "HAS_CE")
_TERMS = {  # what a loss is made of: the arguments that are there
    "KL": _KL,
    "KL of labelled rows": (*_KL, "HAS_LABELS"),
    "CE": _CE,
    "KL+CE at τ=1": (*_KL, *_CE),
    "KL+CE": (*_KL, *_CE, "HAS_SUM_CE"),
}
_OPTIONAL = {
    "sum_ce_ptr": "HAS_SUM_CE",
    "student_sum_ce_ptr": "HAS_SUM_CE",
    "student_offset_ce_ptr": "HAS_SUM_CE",
    "teacher_maximum_ptr": "HAS_TEACHER",
    "teacher_sum_ptr": "HAS_TEACHER",
    "teacher_ptr": "HAS_TEACHER",
    "teacher_offset_ptr": "HAS_TEACHER",
    "labels_ptr": "HAS_LABELS",
    "db_ptr": "HAS_DB",
}


def _variant(on: tuple[str, ...], signature: dict[str, str], *flags: str) -> tuple[dict[str, str], dict[str, Any]]:
    """The signature and the constants of a kernel with some of its flags on."""
    absent = [name for name, flag in _OPTIONAL.items() if name in signature and flag not in on]
    constants = {flag: flag in on for flag in flags} | dict.fromkeys(absent, None)
    return {name: kind for name, kind in signature.items() if name not in absent}, constants


def _logits_build(dtype: torch.dtype, width: int, terms: str = "KL+CE") -> tiling.Build:
    pointer = f"*{_TYPES[dtype]}"
    signature = {"x_ptr": pointer, "weight_ptr": pointer, "bias_ptr": "*fp32", "labels_ptr": "*i64"}
    signature |= {"logits_ptr": pointer, **dict.fromkeys(("maximum_ptr", "sum_ptr", "sum_ce_ptr"), "*fp32")}
    signature |= {"rows": "i32", "vocabulary": "i32", "stride": "i32", "exponent": "fp32"}
    signature, constants = _variant(_TERMS[terms], signature, "HAS_LABELS", "HAS_SUM_CE")
    return tiling.Build(
        name=f"linear_kd.logits {_TYPES[dtype]} D={width} {terms}",
        kernel=_logits_kernel,
        signature=signature,
        constants={**constants, "WIDTH": width, "UPCAST": False},
        tile=_logits_tile_name(dtype, width),
        width=width,
        divisible=("stride",),
        matrix=dtype != torch.float32,
        wide=True,
    )


def _offsets_build(dtype: torch.dtype, tile: int, terms: str = "KL+CE") -> tiling.Build:
    vocabulary, width = 30522, 768
    statistics = ("student_maximum_ptr", "student_sum_ptr", "student_sum_ce_ptr", "teacher_maximum_ptr")
    signature = dict.fromkeys((*statistics, "teacher_sum_ptr", "bias_ptr", "ce_ptr"), "*fp32")
    signature |= dict.fromkeys(("x_ptr", "weight_ptr"), f"*{_TYPES[dtype]}") | {
        "labels_ptr": "*i64",
        "exponent": "fp32",
    }
    flags = ("HAS_TEACHER", "HAS_LABELS", "HAS_CE", "HAS_SUM_CE")
    signature, constants = _variant(_TERMS[terms], signature, *flags)
    tiles = -(-vocabulary // tile)
    sizes = {"WIDTH": width, "WIDTH_UP": _power_of_two(width), "TILES": tiles, "TILES_UP": _power_of_two(tiles)}
    return tiling.Build(
        name=f"linear_kd.offsets {_TYPES[dtype]} tiles of {tile} {terms}",
        kernel=_offsets_kernel,
        signature=signature,
        constants={**constants, **sizes},
        tile="linear_kd.offsets",
        width=width,
        blocks=(),
        matrix=False,
    )


def _gradient_build(
    dtype: torch.dtype, tile: int, terms: str = "KL+CE", *, write: bool = True, db: bool = True
) -> tiling.Build:
    """Without ``write`` it is the value's alone; without ``db`` the head has no bias that learns."""
    logits = dict.fromkeys(("student_ptr", "teacher_ptr"), f"*{_TYPES[dtype]}")
    offsets = dict.fromkeys(("student_offset_ptr", "student_offset_ce_ptr", "teacher_offset_ptr"), "*fp32")
    signature = logits | offsets | {"labels_ptr": "*i64", "share_ptr": "*fp64", "kl_ptr": "*fp32", "db_ptr": "*fp32"}
    signature |= {"rows": "i32", "stride": "i32", "exponent": "fp32", "kl_factor": "fp32", "ce_weight": "fp32"}
    flags = ("HAS_TEACHER", "HAS_LABELS", "HAS_CE", "HAS_SUM_CE", "HAS_DB", "WRITE")
    on = (*_TERMS[terms], *("WRITE",) * write, *("HAS_DB",) * (write and db))
    case = ("" if db else ", no db") if write else ", value"
    signature, constants = _variant(on, signature, *flags)
    return tiling.Build(
        name=f"linear_kd.gradient {_TYPES[dtype]} tiles of {tile} {terms}{case}",
        kernel=_gradient_kernel,
        signature=signature,
        constants={**constants, "TILE": tile},
        tile=_gradient_tile_name(dtype),
        width=0,
        blocks=("BLOCK_M", "BLOCK_N"),
        divisible=("stride",),
        matrix=False,
        wide=write,
    )


def _labels_build() -> tiling.Build:
    pointers = {"labels_ptr": "*i64", "share_ptr": "*fp64", "right_ptr": "*i32"}
    return tiling.Build(
        name="linear_kd.labels",
        kernel=_labels_kernel,
        signature=pointers | {"rows": "i32", "vocabulary": "i32"},
        constants={},
        tile="linear_kd.sums",
        width=0,
        blocks=("BLOCK_N",),
        matrix=False,
    )


def _values_build(terms: str) -> tiling.Build:
    pointers = dict.fromkeys(("kl_ptr", "ce_ptr", "loss_out_ptr", "kl_out_ptr", "ce_out_ptr"), "*fp32")
    numbers = {"kl_size": "i32", "ce_size": "i32", "kl_factor": "fp32", "kl_weight": "fp32", "ce_weight": "fp32"}
    signature, constants = _variant(_TERMS[terms], pointers | {"share_ptr": "*fp64"} | numbers, "HAS_TEACHER", "HAS_CE")
    return tiling.Build(
        name=f"linear_kd.values {terms}",
        kernel=_values_kernel,
        signature=signature,
        constants=constants,
        tile="linear_kd.sums",
        width=0,
        blocks=("BLOCK_N",),
        matrix=False,
    )


AUDIT = (
    _labels_build(),
    *(_values_build(terms) for terms in ("KL", "CE", "KL+CE")),
    *(_logits_build(torch.bfloat16, width) for width in (312, 384, 768, 1024)),
    *(_logits_build(torch.bfloat16, 768, terms) for terms in ("KL", "CE")),
    _logits_build(torch.float16, 768),
    _logits_build(torch.float32, 384),
    *(_offsets_build(torch.bfloat16, 128, terms) for terms in _TERMS),
    _offsets_build(torch.float32, 64),
    *(_gradient_build(torch.bfloat16, 128, terms, db=db) for terms in _TERMS for db in (True, False)),
    *(_gradient_build(torch.bfloat16, 128, terms, write=False) for terms in ("KL", "KL of labelled rows")),
    _gradient_build(torch.bfloat16, 256),
    _gradient_build(torch.float32, 64),
)
