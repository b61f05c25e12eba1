"""Attention over packed sequences of at most 128 tokens.

Per sequence and head, with S = α q kᵀ, α = 1/√d, P = softmax_row(S) and o = P v:

    dv = Pᵀ do,   dS = P ∘ (do vᵀ − Δ),   Δ_i = Σ_c o_ic do_ic,   dq = α dS k,   dk = α dSᵀ q

Kernels for long sequences take 128 × 128 scores at a time, add up dq in float32 through memory, and read o and do once more
for Δ. Here a tile has 64 rows where they hold the sequence, one program has all queries of a sequence and head, and the
backward reads each tensor once and writes each gradient once: no atomics, no buffers in float32, the same bits every time.

Source: FlashAttention-2 (Dao 2023, arXiv 2307.08691, section 3.1), whose statistics of a row, one number, are kept here too.

Shapes: Tq query rows, Tk key rows, B sequences, H heads, d head width, n length of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.kernels import packed, tiling
from fastkd.kernels.packed import load_tile, store_tile
from fastkd.kernels.tiling import Rule, Tile, jit

try:
    import triton.language as tl
except ImportError:
    tl = None

LN2 = math.log(2)
MAX_LENGTH, MAX_WIDTH = 128, 64
LAUNCHED = 65_520  # sequences of a launch at most: CUDA takes 65,535 in a grid's second dimension; 16 divides it
HEADS = 4  # of a program, one after the other
LENGTHS = (64, MAX_LENGTH)  # of tiles
_DTYPES = (torch.float16, torch.bfloat16, *((torch.float32,) if tiling.INTERPRETED else ()))

# block_m rows hold a whole sequence; the backward takes block_n of its keys at a time.
# On sm_90 four warps, or 128 registers with eight, let two programs of 128 tokens share a multiprocessor; on others that limit
# spills; with heads of 64 in Triton 3.9 it spills on sm_90 too.
_FORWARD = (Rule(Tile(64, 0, 0, 4, 1), 64, 64), Rule(Tile(128, 0, 0, 8, 1), 64))
_BACKWARD = (Rule(Tile(64, 64, 0, 4, 1), 64, 64), Rule(Tile(128, 64, 0, 8, 1), 64))
TILES: dict[str, tiling.Rules] = {
    "packed_attention.forward": {
        "any": _FORWARD,
        90: (
            Rule(Tile(64, 0, 0, 4, 2, 128), 64, 64),
            Rule(Tile(128, 0, 0, 8, 1, 128), 32),
            Rule(Tile(128, 0, 0, 4, 1), 64),
        ),
        100: _FORWARD,
    },
    "packed_attention.backward": {
        "any": _BACKWARD,
        90: (_BACKWARD[0], Rule(Tile(128, 32, 0, 8, 1, 128), 32), Rule(Tile(128, 32, 0, 4, 1), 64)),
        100: _BACKWARD,
        120: (Rule(Tile(64, 32, 0, 4, 1), 64, 64), Rule(Tile(128, 64, 0, 8, 1), 32), Rule(Tile(128, 32, 0, 8, 1), 64)),
        "gfx942": (_BACKWARD[0], Rule(Tile(128, 64, 0, 4, 1), 64)),
    },
}
tiling.register(TILES)


def reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Tensor:
    """The definition, sequence by sequence, as in a textbook; it reads the lengths on the host."""
    lengths = [cu.diff().tolist() for cu in (cu_seqlens_q, cu_seqlens_k)]
    rows = []
    for a, b, c in zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True):
        weights = torch.softmax(torch.einsum("ihd,jhd->hij", a, b) / math.sqrt(q.shape[-1]), dim=-1)
        rows.append(torch.einsum("hij,jhd->ihd", weights, c))
    return torch.cat(rows)


# ---- Triton ---------------------------------------------------------------------------------------------------
#
# One launch for each length of a tile, which skips the sequences of the others. A program takes some heads of its sequence in
# turn: it checks once whether this launch handles the sequence, and while it computes one head it can load the next.
# Exponentials are powers of two, with 1/ln 2 in the scale. Rows past a sequence's end load as zeros: as queries they have
# do = 0 and Δ = 0, so they add nothing to dk and dv; as keys they are masked.


@jit
def _sequence(cu_q_ptr, cu_k_ptr, SHORTEST: tl.constexpr, LENGTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """First row and rows of the program's queries and of its keys; whether SHORTEST ≤ max(queries, keys) ≤ LENGTH."""
    sequence = tl.program_id(1)
    start_q, start_k = tl.load(cu_q_ptr + sequence), tl.load(cu_k_ptr + sequence)
    queries, keys = tl.load(cu_q_ptr + sequence + 1) - start_q, tl.load(cu_k_ptr + sequence + 1) - start_k
    longer = tl.maximum(queries, keys)
    return start_q, queries, start_k, keys, (longer >= SHORTEST) & (longer <= LENGTH)


@jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    cu_q_ptr, cu_k_ptr,  # [B+1]
    q_ptr, k_ptr, v_ptr,  # [Tq, H, d], [Tk, H, d], [Tk, H, d]
    out_ptr,  # [Tq, H, d]
    lse_ptr,  # [H, ≥ Tq]: log2 Σ 2^S
    q_stride, k_stride, v_stride, out_stride, lse_stride, heads, scale,
    WIDTH: tl.constexpr, PAD: tl.constexpr, DOT: tl.constexpr, HEADS: tl.constexpr,
    SHORTEST: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Program (HEADS heads, sequence): all of its scores at once."""
    start_q, queries, start_k, keys, mine = _sequence(cu_q_ptr, cu_k_ptr, SHORTEST, BLOCK_M)
    if mine & (queries > 0):  # mine: this launch handles sequences of this length
        first, row = tl.program_id(0) * HEADS, tl.arange(0, BLOCK_M)
        for head in tl.range(first, tl.minimum(first + HEADS, heads), disable_licm=True):
            q = load_tile((q_ptr, q_stride), start_q, queries, head, WIDTH, BLOCK_M, PAD, DOT)
            k = load_tile((k_ptr, k_stride), start_k, keys, head, WIDTH, BLOCK_M, PAD, DOT)
            v = load_tile((v_ptr, v_stride), start_k, keys, head, WIDTH, BLOCK_M, PAD, DOT)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            s = tl.where((row < keys)[None, :], s, -1e30)
            maxima = tl.max(s, 1) * scale  # those of s · scale, since scale > 0, for one product a row
            p = tl.exp2(s * scale - maxima[:, None])
            sums = tl.sum(p, 1)
            out = tl.dot(p.to(DOT), v, input_precision="ieee") * (1 / sums)[:, None]
            store_tile(out_ptr, out_stride, start_q, queries, head, out, WIDTH, BLOCK_M, PAD)
            place = lse_ptr + head * lse_stride + start_q + row
            tl.store(place, maxima + tl.log2(sums), mask=row < queries)


@jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    cu_q_ptr, cu_k_ptr,  # [B+1]
    grad_ptr,  # [Tq, H, d]: do
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,  # as in the forward
    dq_ptr, dk_ptr, dv_ptr,  # as q, k and v
    grad_stride, q_stride, k_stride, v_stride, out_stride, dq_stride, dk_stride, dv_stride, lse_stride, heads, scale, alpha,
    WIDTH: tl.constexpr, PAD: tl.constexpr, DOT: tl.constexpr, HEADS: tl.constexpr,
    SHORTEST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (HEADS heads, sequence): all of its queries, keys BLOCK_N at a time."""
    start_q, queries, start_k, keys, mine = _sequence(cu_q_ptr, cu_k_ptr, SHORTEST, BLOCK_M)
    if mine:
        first, row, column = tl.program_id(0) * HEADS, tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        for head in tl.range(first, tl.minimum(first + HEADS, heads), disable_licm=True):
            grad = load_tile((grad_ptr, grad_stride), start_q, queries, head, WIDTH, BLOCK_M, PAD, DOT)
            out = load_tile((out_ptr, out_stride), start_q, queries, head, WIDTH, BLOCK_M, PAD, DOT)
            q = load_tile((q_ptr, q_stride), start_q, queries, head, WIDTH, BLOCK_M, PAD, DOT)
            place = lse_ptr + head * lse_stride + start_q + row
            lse = tl.load(place, mask=row < queries, other=0.0)
            delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
            dq = tl.zeros([BLOCK_M, PAD], tl.float32)
            # The scores' two products come first: what a tile then keeps is in half precision.
            for j in tl.range(0, BLOCK_M, BLOCK_N, num_stages=1, disable_licm=True):
                k = load_tile((k_ptr, k_stride), start_k + j, keys - j, head, WIDTH, BLOCK_N, PAD, DOT)
                v = load_tile((v_ptr, v_stride), start_k + j, keys - j, head, WIDTH, BLOCK_N, PAD, DOT)
                s = tl.dot(q, tl.trans(k), input_precision="ieee")
                dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
                p = tl.where((column < keys - j)[None, :], tl.exp2(s * scale - lse[:, None]), 0.0)
                ds = (p * (dp - delta[:, None])).to(DOT)
                dv = tl.dot(tl.trans(p.to(DOT)), grad, input_precision="ieee")
                store_tile(dv_ptr, dv_stride, start_k + j, keys - j, head, dv, WIDTH, BLOCK_N, PAD)
                dk = tl.dot(tl.trans(ds), q, input_precision="ieee") * alpha
                store_tile(dk_ptr, dk_stride, start_k + j, keys - j, head, dk, WIDTH, BLOCK_N, PAD)
                dq = tl.dot(ds, k, dq, input_precision="ieee")
            store_tile(dq_ptr, dq_stride, start_q, queries, head, dq * alpha, WIDTH, BLOCK_M, PAD)


def _flat(x: Tensor) -> Tensor:
    """[T, H, d] as [T, H·d] with columns side by side; a slice of a wider projection is not copied."""
    return packed.unit_stride(x.flatten(1))


def _lse_shape(q: Tensor) -> tuple[int, int]:
    """Multiples of 16 rows: Triton compiles a kernel for them, and another one for all other numbers."""
    return q.shape[1], -(-q.shape[0] // 16) * 16


def _launch(kernel: Any, name: str, like: Tensor, cu_seqlens: Sequence[Tensor], longest: int, *arguments: Any) -> None:
    """For each tile length that sequences of at most ``longest`` need, a launch for each LAUNCHED sequences."""
    _, heads, width = like.shape
    arch, pad = tiling.architecture(like.device), packed.pad_width(width)
    constants = {"WIDTH": width, "PAD": pad, "DOT": packed.dot_dtype(like.dtype), "HEADS": HEADS}
    shortest = 1
    for length in LENGTHS:
        if shortest <= longest:
            tile = tiling.tile(f"packed_attention.{name}", width=pad, length=length, arch=arch)
            blocks = {"BLOCK_M": tile.block_m, **({"BLOCK_N": tile.block_n} if tile.block_n else {})}
            for first in range(0, len(cu_seqlens[0]) - 1, LAUNCHED):
                cu = [x.contiguous()[first : first + LAUNCHED + 1] for x in cu_seqlens]
                with torch.cuda.device_of(like):
                    kernel[-(-heads // HEADS), len(cu[0]) - 1](
                        *cu, *arguments, SHORTEST=shortest, **constants, **blocks, **tile.options
                    )
        shortest = length + 1


# ---- the operator ---------------------------------------------------------------------------------------------


@torch.library.custom_op("fastkd::packed_attention", mutates_args=())
def _packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    """o [Tq, H, d], and the base-2 logarithms of the rows' sums of exponentials, [H, ≥ Tq] float32."""
    if tiling.triton is None or not (q.is_cuda or tiling.INTERPRETED):
        raise ValueError(f"packed_attention needs Triton and a GPU, not device {q.device}: take another attention")
    _, heads, width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(_lse_shape(q), dtype=torch.float32, device=q.device)
    tensors = [_flat(x) for x in (q, k, v)]
    _launch(
        _forward_kernel, "forward", q, (cu_seqlens_q, cu_seqlens_k), longest, *tensors, out, lse,
        *(x.stride(0) for x in tensors), heads * width, lse.stride(0), heads, 1 / (math.sqrt(width) * LN2),
    )  # fmt: skip
    return out, lse


@_packed_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(_lse_shape(q), dtype=torch.float32)


@torch.library.custom_op("fastkd::packed_attention_backward", mutates_args=())
def _packed_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    longest: int,
) -> list[Tensor]:
    """With as many queries as keys [T, 3·H·d], the columns of dq, dk and dv side by side; else dq, and dk and dv side by side.

    Queries, keys and values are cut from a projection, whose gradient then is there without a copy.
    """
    _, heads, width = q.shape
    buffers = [torch.empty(shape, dtype=q.dtype, device=q.device) for shape in _gradient_shapes(q, k)]
    gradients = [part for buffer in buffers for part in buffer.split(heads * width, 1)]
    tensors, alpha = [_flat(x) for x in (grad, q, k, v, out)], 1 / math.sqrt(width)
    _launch(
        _backward_kernel, "backward", q, (cu_seqlens_q, cu_seqlens_k), longest, *tensors, lse, *gradients,
        *(x.stride(0) for x in (*tensors, *gradients)), lse.stride(0), heads, alpha / LN2, alpha,
    )  # fmt: skip
    return buffers


def _gradient_shapes(q: Tensor, k: Tensor) -> list[tuple[int, int]]:
    columns = q.shape[1] * q.shape[2]
    return [(len(q), 3 * columns)] if len(q) == len(k) else [(len(q), columns), (len(k), 2 * columns)]


@_packed_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, *_: Any) -> list[Tensor]:
    return [q.new_empty(shape) for shape in _gradient_shapes(q, k)]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, cu_seqlens_q, cu_seqlens_k, ctx.longest = inputs
    out, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled():
        raise RuntimeError("packed_attention has no second derivative: call backward without create_graph=True")
    if grad is None:
        return (None,) * 6
    q, *saved = ctx.saved_tensors
    buffers = _packed_attention_backward(grad, q, *saved, ctx.longest)
    columns = q.shape[1] * q.shape[2]
    # Split by sizes along dimension 1, so that Inductor sees that concatenating the parts gives the buffer.
    parts = [x for buffer in buffers for x in buffer.split([columns] * (buffer.shape[1] // columns), 1)]
    return *(part.unflatten(1, q.shape[1:]) for part in parts), None, None, None


_packed_attention.register_autograd(_backward, setup_context=_setup_context)


# ---- public ---------------------------------------------------------------------------------------------------


def packed_attention(
    q: Tensor,  # [Tq, H, d]
    k: Tensor,  # [Tk, H, d]
    v: Tensor,  # [Tk, H, d]
    cu_seqlens_q: Tensor,  # [B+1] int32
    cu_seqlens_k: Tensor,  # [B+1] int32
    longest: int,
) -> Tensor:  # [Tq, H, d]
    """softmax(q kᵀ / √d) v within each sequence, by Triton: on CUDA, or interpreted (``TRITON_INTERPRET=1``).

    Tensors are float16 or bfloat16 (interpreted: float32 too), of heads at most 64 wide; slices of a wider projection need no
    copy. ``longest`` ≤ 128 bounds the queries and the keys of every sequence. Both ``cu_seqlens`` rise from 0 to the number of
    their rows and may repeat it; a sequence that has queries has keys. Differentiable once, in q, k and v; sums are float32.
    Raises ValueError for shapes, a dtype or lengths that do not fit; nothing waits for the device.
    """
    if q.ndim != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:] or not q.dtype == k.dtype == v.dtype:
        shapes = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in (q, k, v))
        raise ValueError(f"packed_attention got {shapes}: give [Tq, H, d], [Tk, H, d] and [Tk, H, d] of one dtype")
    if q.dtype not in _DTYPES:
        raise ValueError(f"packed_attention takes float16 and bfloat16, not {q.dtype}: cast, or take another attention")
    if q.shape[2] > MAX_WIDTH or longest > MAX_LENGTH:
        raise ValueError(
            f"packed_attention got heads of {q.shape[2]} and sequences of {longest}: it takes up to {MAX_WIDTH} and {MAX_LENGTH}"
        )
    packed.check_cu_seqlens("packed_attention", cu_seqlens_q, q)
    packed.check_cu_seqlens("packed_attention", cu_seqlens_k, k)
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        bounds = f"{len(cu_seqlens_q)} and {len(cu_seqlens_k)}"
        raise ValueError(f"packed_attention got {bounds} boundaries: give B+1 of the same sequences, twice")
    out, _ = _packed_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, longest)
    return out
