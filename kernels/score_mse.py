"""TinyBERT attention scores: the squared difference of two score matrices, without a T×T matrix.

Per sequence and head, with R = α_s q kᵀ − α_t Q Kᵀ of the student and the teacher and α = 1/√(D/A):

    loss = 1/(A·Σ n²) Σ_{heads, i, j} R_ij²,   dq = 2 α_s R k/(A·Σ n²),   dk = 2 α_s Rᵀ q/(A·Σ n²)

There is no softmax, so a tile of R needs nothing of the rest of its row. The loss is a scalar, so the gradient is made in
the forward and scaled in the backward. With Gram matrices the same sum takes time linear in n:

    Σ R² = α_s² ⟨qᵀq, kᵀk⟩ − 2 α_s α_t ⟨qᵀQ, kᵀK⟩ + α_t² ⟨QᵀQ, KᵀK⟩,   R k = α_s q (kᵀk) − α_t Q (Kᵀk)

which is exact, but subtracts large numbers where student ≈ teacher: an option for sequences longer than twice a head.

Source: TinyBERT (Jiao et al. 2020, arXiv 1909.10351, eq. 7), on scores before the softmax.

Shapes: T packed tokens, B sequences, A heads, D width (s student, t teacher), n length of a sequence.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd.kernels import packed, scaling, tiling
from fastkd.kernels.packed import build, load_tile, row_block, store_tile
from fastkd.kernels.tiling import jit

try:
    import triton.language as tl
except ImportError:
    tl = None


def reference(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    *,
    max_seqlen: int | None = None,
) -> Tensor:
    """The definition, batched and padded as it is usually written: every [B, A, n, n] matrix in memory."""
    rows, valid = packed.padded_rows(cu_seqlens, len(student_query) if max_seqlen is None else max_seqlen)

    def scores(query: Tensor, key: Tensor) -> Tensor:
        q, k = (x[rows].unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (query, key))
        return (q @ k.transpose(2, 3)).to(packed.accumulator(query.dtype)) / math.sqrt(q.shape[-1])

    difference = scores(student_query, student_key) - scores(teacher_query, teacher_key)
    pairs = valid[:, None, :, None] & valid[:, None, None, :]
    return torch.where(pairs, difference.square(), 0).sum() / (num_heads * cu_seqlens.diff().square().sum())


# ---- Triton ---------------------------------------------------------------------------------------------------
#
# Sequences of one tile's length: one launch for each tile, the programs of which hold R of a sequence and head, at most 64 rows
# at a time, and pass over sequences that another tile fits.
# Longer ones: _rows_kernel streams R of a block of tokens, as queries for the loss and dq, then as keys for dk.
# Rows past a sequence's end load as zeros, so R is 0 there: nothing needs a mask.


@jit
def _residual(q, k, qt, kt, alpha_s, alpha_t):  # type: ignore[no-untyped-def]
    """R of a tile, or Rᵀ with queries and keys exchanged."""
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
    q_ptr, k_ptr, qt_ptr, kt_ptr, cu_ptr, dq_ptr, dk_ptr,
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


def _triton(
    query_s: Tensor,
    key_s: Tensor,
    query_t: Tensor,
    key_t: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ R², and dq, dk without their factor 2/(A·Σ n²)."""
    tensors = [packed.unit_stride(x) for x in (query_s, key_s, query_t, key_t)]
    cu_seqlens = cu_seqlens.contiguous()
    dq, dk = (torch.empty(x.shape, dtype=_stored(x.dtype), device=x.device) for x in (query_s, key_s))
    width_s, width_t = (x.shape[1] // num_heads for x in (query_s, query_t))
    pads, sequences = [packed.pad_width(width) for width in (width_s, width_t)], len(cu_seqlens) - 1
    device, where = query_s.device, {"width": max(pads), "length": max_seqlen}
    strides = [x.stride(0) for x in tensors]
    rest: dict[str, Any] = {
        "width": dq.shape[1], "alpha_s": 1 / math.sqrt(width_s), "alpha_t": 1 / math.sqrt(width_t),
        "WIDTH_S": width_s, "WIDTH_T": width_t, "PAD_S": pads[0], "PAD_T": pads[1],
        "DOT": packed.dot_dtype(query_s.dtype),
    }  # fmt: skip
    key = packed.table_key("score_mse.short", query_s.dtype)
    if packed.fits_one_tile(key, device=device, **where):
        loss = dq.new_zeros((sequences, num_heads), dtype=torch.float32)
        with torch.cuda.device_of(query_s):
            for tile, shorter in packed.tiles_by_length(key, device=device, **where):
                _short_kernel[packed.one_tile_grid(num_heads, sequences)](
                    *tensors, cu_seqlens, dq, dk, loss, *strides, sequences=sequences, shorter=shorter,
                    BLOCK_M=tile.block_m, **rest, **tile.options,
                )  # fmt: skip
        return loss.sum(), dq, dk
    tile = tiling.tile(packed.table_key("score_mse.rows", query_s.dtype), arch=tiling.architecture(device), **where)
    grid = (num_heads, -(-max_seqlen // tile.block_m), sequences)
    loss = dq.new_empty(grid, dtype=torch.float32)
    with torch.cuda.device_of(query_s):
        _rows_kernel[grid](
            *tensors, cu_seqlens, dq, dk, loss, *strides,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **rest, **tile.options,
        )  # fmt: skip
    return loss.sum(), dq, dk


# ---- blocked PyTorch ------------------------------------------------------------------------------------------


def _blocked(
    query_s: Tensor,
    key_s: Tensor,
    query_t: Tensor,
    key_t: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of whole score rows in a reused buffer: Σ R², and dq, dk without their factor 2/(A·Σ n²)."""
    total = torch.zeros((), dtype=torch.float64, device=query_s.device)
    dq, dk = (torch.zeros(x.shape, dtype=_stored(x.dtype), device=x.device) for x in (query_s, key_s))
    buffers = packed.Buffers(query_s)
    alpha_s, alpha_t = (1 / math.sqrt(x.shape[1] / num_heads) for x in (query_s, query_t))
    with packed.exact_products(query_s, key_s, query_t, key_t):
        for group in packed.groups(cu_seqlens, num_heads, len(query_s), max_seqlen):
            qs, ks, qt, kt = (group.heads(x, num_heads) for x in (query_s, key_s, query_t, key_t))
            grad_q, grad_k = torch.zeros_like(qs), torch.zeros_like(ks)
            for pair, row in packed.blocks(len(qs), group.length):
                r = buffers.product(0, qs[pair, row], ks[pair], alpha_s)
                r.baddbmm_(qt[pair, row], kt[pair].transpose(1, 2), alpha=-alpha_t)
                total += torch.linalg.vector_norm(r, dim=-1).double().square().sum()
                grad_q[pair, row].baddbmm_(r, ks[pair], alpha=alpha_s)
                grad_k[pair].baddbmm_(r.transpose(1, 2), qs[pair, row], alpha=alpha_s)
            group.scatter(dq, grad_q)
            group.scatter(dk, grad_k)
    return total, dq, dk


def _gram(
    query_s: Tensor,
    key_s: Tensor,
    query_t: Tensor,
    key_t: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The linear-time form, on any device: Σ R², and dq, dk without their factor 2/(A·Σ n²)."""
    dq, dk = (torch.zeros(x.shape, dtype=_stored(x.dtype), device=x.device) for x in (query_s, key_s))
    on_host = cu_seqlens.device.type == "cpu"
    groups = packed.groups(cu_seqlens, num_heads, len(query_s), max_seqlen) if on_host else [
        packed.padded(cu_seqlens, max_seqlen)
    ]  # fmt: skip
    alpha_s, alpha_t = (1 / math.sqrt(x.shape[1] / num_heads) for x in (query_s, query_t))
    total = torch.zeros((), dtype=torch.float64, device=query_s.device)
    with packed.exact_products(query_s.float()):
        for group in groups:
            q, k, qt, kt = (group.heads(x, num_heads) for x in (query_s, key_s, query_t, key_t))
            qq, kk, qtq, ktk = q.mT @ q, k.mT @ k, qt.mT @ q, kt.mT @ k
            total += alpha_s**2 * (qq * kk).sum(dtype=torch.float64)
            total -= 2 * alpha_s * alpha_t * (qtq * ktk).sum(dtype=torch.float64)
            total += alpha_t**2 * ((qt.mT @ qt) * (kt.mT @ kt)).sum(dtype=torch.float64)
            group.scatter(dq, alpha_s * (alpha_s * (q @ kk) - alpha_t * (qt @ ktk)))
            group.scatter(dk, alpha_s * (alpha_s * (k @ qq) - alpha_t * (kt @ qtq)))
    return total, dq, dk


def _stored(dtype: torch.dtype) -> torch.dtype:
    """Of gradients without their factor, which are beyond float16's largest number where scores differ by 100."""
    return torch.float32 if dtype == torch.float16 else dtype


# ---- the operator ---------------------------------------------------------------------------------------------

_PATHS = {"triton": _triton, "blocked": _blocked, "gram": _gram}


@torch.library.custom_op("fastkd::score_mse", mutates_args=())
def _score_mse(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    max_seqlen: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss; dq and dk without their factor; that factor, 2/(A·Σ n²)."""
    tensors = (student_query, student_key, teacher_query, teacher_key)
    total, dq, dk = _PATHS[backend](*tensors, cu_seqlens, num_heads, max_seqlen)
    pairs = (num_heads * cu_seqlens.diff().double().square().sum()).clamp(min=1)
    dtype = packed.accumulator(student_query.dtype)
    return (total / pairs).to(dtype), dq, dk, (2 / pairs).to(dtype)


@_score_mse.register_fake
def _(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    max_seqlen: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, factor = (student_query.new_empty((), dtype=packed.accumulator(student_query.dtype)) for _ in range(2))
    dq, dk = (x.new_empty(x.shape, dtype=_stored(x.dtype)) for x in (student_query, student_key))
    return loss, dq, dk, factor


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.dtype, ctx.backend = inputs[0].dtype, inputs[-1]


def _backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled():
        raise RuntimeError("score_mse has no second derivative: call backward without create_graph=True")
    if grad_loss is None:
        return (None,) * 8
    dq, dk, factor = ctx.saved_tensors
    factor = grad_loss * factor
    dq, dk = (scaling.scaled(x, factor, ctx.dtype, backend=ctx.backend) for x in (dq, dk))
    return dq, dk, *[None] * 6


_score_mse.register_autograd(_backward, setup_context=_setup_context)


# ---- public ---------------------------------------------------------------------------------------------------


def score_mse(
    student_query: Tensor,  # [T, Ds]
    student_key: Tensor,  # [T, Ds]
    teacher_query: Tensor,  # [T, Dt]
    teacher_key: Tensor,  # [T, Dt]
    cu_seqlens: Tensor,  # [B+1] int32
    num_heads: int,
    *,
    max_seqlen: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean squared difference of scaled attention scores over heads and the valid pairs (i, j): a float32 scalar.

    Sequences lie end to end: ``cu_seqlens`` rises from 0 to T and may repeat T (empty sequences). ``max_seqlen`` bounds
    every length; without it the Triton backend assumes T and launches needless programs. ``backend``: None takes
    "triton" on CUDA, else "blocked"; "gram" is the linear-time form, which loses digits as the student comes
    close to the teacher; "reference" holds every score.

    Differentiable once, in the student's two tensors, whose gradients have their dtype. Products are exact and everything
    else is float32, or float64 for float64; autocast changes nothing. Column slices of a fused projection need no copy.
    Raises ValueError for shapes, values or a backend that do not fit.
    """
    packed.check_pair("score_mse", "student", student_query, student_key, student_query, num_heads)
    packed.check_pair("score_mse", "teacher", teacher_query, teacher_key, student_query, num_heads)
    packed.check_cu_seqlens("score_mse", cu_seqlens, student_query)
    tensors = packed.in_one_dtype(student_query, student_key, teacher_query.detach(), teacher_key.detach())
    if backend != "gram":
        width = max(student_query.shape[1], teacher_query.shape[1]) // num_heads
        backend = packed.choose_backend("score_mse", backend, tensors[0], width)
    bound = len(student_query) if max_seqlen is None else max_seqlen
    args = (*tensors, cu_seqlens, num_heads)
    if backend == "reference":
        return reference(*args, max_seqlen=bound)
    return _score_mse(*args, bound, backend)[0]


# ---- for tests, benches and the audit -------------------------------------------------------------------------


@dataclass(frozen=True)
class Case(packed.Case):
    """A call of ``score_mse``."""

    def inputs(self, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of ``score_mse``; the student's tensors ask for gradients."""
        q_s, k_s, q_t, k_t = self.tensors(device, seed)
        student = {"student_query": q_s.requires_grad_(), "student_key": k_s.requires_grad_()}
        return {**student, "teacher_query": q_t, "teacher_key": k_t, **self.layout(device)}


_RAGGED = (128, 1, 17, 64, 65, 127, 2, 0, 0)  # trailing zeros: static shapes hold empty sequences
_LONG = (129, 300, 2, 0)
CASES = (
    Case("one token", (1, 1, 1), 2, 16, 16),
    Case("ragged", _RAGGED, 3, 36, 24),
    *(Case(f"head width {d}", (140, 33), 2, 2 * d, 2 * d) for d in (8, 12, 16, 24, 32, 64)),
    Case("wide heads", (70, 150), 1, 80, 128),
    Case("long", _LONG, 2, 32, 64),
    Case("longest", (2049, 3), 1, 16, 16),
    Case("peaked", (97, 150), 2, 64, 64, spread=8),
    Case("near", (97, 150), 2, 64, 64, gap=0.1),
    Case("peaked near", (97, 150), 2, 64, 64, spread=8, gap=0.1),
    Case("ragged bfloat16", _RAGGED, 2, 64, 64, torch.bfloat16),
    Case("long bfloat16", _LONG, 2, 64, 64, torch.bfloat16),
    Case("peaked near bfloat16", (97, 150), 2, 64, 64, torch.bfloat16, spread=8, gap=0.1),
    Case("ragged float16", _RAGGED, 2, 64, 64, torch.float16),
)
BENCHES = (
    Case("32×128, 384/384, A=12", (128,) * 32, 12, 384, 384, torch.bfloat16, gap=0.3),
    Case("256×128, 768/768, A=12", (128,) * 256, 12, 768, 768, torch.bfloat16, gap=0.3),
    Case("ragged 256, 384/768, A=12", (128, 90, 55, 20) * 64, 12, 384, 768, torch.bfloat16),
    Case("16×512, 768/768, A=12", (512,) * 16, 12, 768, 768, torch.bfloat16, gap=0.3),
)

_WIDTHS = ((64, 64), (16, 16), (24, 64))
AUDIT = (
    *(build(_short_kernel, "score_mse.short", widths=widths, length=n) for widths in _WIDTHS for n in (128, 64, 32)),
    *(build(_rows_kernel, "score_mse.rows", widths=widths) for widths in (*_WIDTHS, (128, 128))),
    build(_short_kernel, "score_mse.short_float32", widths=(64, 64), length=32, dtype=torch.float32),
    *(build(_rows_kernel, "score_mse.rows_float32", widths=(d, d), dtype=torch.float32) for d in (64, 128)),
)
