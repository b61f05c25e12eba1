"""TinyBERT attention scores: the squared difference of two score matrices, without a T×T matrix.

Per sequence and head, with R = α_s q kᵀ − α_t Q Kᵀ of the student and the teacher and α = 1/√(D/A):

    loss = 1/(A·Σ n²) Σ_{heads, i, j} R_ij²,   dq = 2 α_s R k /(A·Σ n²),   dk = 2 α_s Rᵀ q /(A·Σ n²)

No softmax: a tile of R needs no statistics of its row. The gradients are made in the forward and scaled in the backward.

Source: TinyBERT (Jiao et al. 2020, arXiv 1909.10351, eq. 7), on unnormalised attention scores.

Shapes: T packed tokens, B sequences, A heads, D width (s student, t teacher), n length of a sequence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastkd.kernels import packed


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
    """Mean squared difference of scaled attention scores over heads and the valid pairs (i, j); a float32 scalar.

    Sequences lie end to end: `cu_seqlens` runs from 0 to T and may repeat T (empty sequences). `max_seqlen` bounds every
    length; without it the Triton backend assumes T and launches needless programs. Differentiable once, in the student's two;
    their gradients have their dtype. Float64 is kept as float64. Column slices of a fused projection need no copy.

    Raises ValueError for shapes that do not fit.
    """
    _check(student_query, student_key, teacher_query, teacher_key, cu_seqlens, num_heads)
    teacher_query, teacher_key = teacher_query.detach(), teacher_key.detach()
    bound = student_query.shape[0] if max_seqlen is None else max_seqlen
    args = (student_query, student_key, teacher_query, teacher_key, cu_seqlens, num_heads)
    if backend == "reference":
        return reference(*args, max_seqlen=bound)
    return _score_mse(*args, bound, "blocked")[0]


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
    bound = student_query.shape[0] if max_seqlen is None else max_seqlen
    starts, lengths = cu_seqlens[:-1, None], cu_seqlens.diff()[:, None]
    position = torch.arange(bound, device=student_query.device)
    valid = position < lengths  # [B, n]
    rows = torch.where(valid, starts + position, 0)

    def scores(query: Tensor, key: Tensor) -> Tensor:
        q, k = (x[rows].unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (query, key))
        return (q @ k.transpose(2, 3)).to(torch.promote_types(query.dtype, torch.float32)) / math.sqrt(q.shape[-1])

    difference = scores(student_query, student_key) - scores(teacher_query, teacher_key)
    pairs = valid[:, None, :, None] & valid[:, None, None, :]
    return torch.where(pairs, difference.square(), 0).sum() / (num_heads * lengths.square().sum())


def _blocked(
    query_s: Tensor, key_s: Tensor, query_t: Tensor, key_t: Tensor, cu_seqlens: Tensor, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of whole score rows in a reused buffer: Σ R², and dq, dk without their factor 2/(A·Σ n²)."""
    dtype = torch.float64 if query_s.dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=torch.float64, device=query_s.device)
    dq = torch.zeros_like(query_s, memory_format=torch.contiguous_format)
    dk = torch.zeros_like(key_s, memory_format=torch.contiguous_format)
    buffers = packed.Buffers(dtype, query_s.device)
    alpha_s, alpha_t = (1 / math.sqrt(x.shape[1] / num_heads) for x in (query_s, query_t))
    with packed.exact_products(query_s, key_s, query_t, key_t):
        for group in packed.groups(cu_seqlens, num_heads):
            qs, ks, qt, kt = (group.heads(x, num_heads, dtype) for x in (query_s, key_s, query_t, key_t))
            grad_q, grad_k = torch.zeros_like(qs), torch.zeros_like(ks)
            for pair, row in packed.blocks(qs.shape[0], group.length):
                r = buffers.product(0, qs[pair, row], ks[pair], alpha_s)
                r.baddbmm_(qt[pair, row], kt[pair].transpose(1, 2), alpha=-alpha_t)
                total += torch.dot(r.flatten(), r.flatten())
                grad_q[pair, row] = torch.bmm(r, ks[pair]).mul_(alpha_s)
                grad_k[pair].baddbmm_(r.transpose(1, 2), qs[pair, row], alpha=alpha_s)
            group.scatter(dq, grad_q)
            group.scatter(dk, grad_k)
    return total, dq, dk


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
    """The loss; dq and dk without their factor; the factor 2/(A·Σ n²)."""
    dtype = torch.promote_types(student_query.dtype, torch.float32)
    scale = 1 / (num_heads * cu_seqlens.diff().to(torch.float64).square().sum())
    total, dq, dk = _blocked(student_query, student_key, teacher_query, teacher_key, cu_seqlens, num_heads)
    return (total * scale).to(dtype), dq, dk, (2 * scale).to(dtype)


@_score_mse.register_fake
def _(student_query, student_key, teacher_query, teacher_key, cu_seqlens, num_heads, max_seqlen, backend):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(student_query.dtype, torch.float32)
    dq, dk = student_query.new_empty(student_query.shape), student_key.new_empty(student_key.shape)
    return student_query.new_empty((), dtype=dtype), dq, dk, student_query.new_empty((), dtype=dtype)


@torch.library.custom_op("fastkd::score_mse_scale", mutates_args=())
def _scale(grad_loss: Tensor, gradient: Tensor, factor: Tensor) -> Tensor:
    return (gradient.to(factor.dtype) * (grad_loss * factor)).to(gradient.dtype)


@_scale.register_fake
def _(grad_loss, gradient, factor):  # type: ignore[no-untyped-def]
    return torch.empty_like(gradient)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _backward(ctx, grad_loss, _dq, _dk, _factor):  # type: ignore[no-untyped-def]
    dq, dk, factor = ctx.saved_tensors
    return _scale(grad_loss, dq, factor), _scale(grad_loss, dk, factor), None, None, None, None, None, None


def _no_second_derivative(ctx, grad):  # type: ignore[no-untyped-def]
    raise RuntimeError("score_mse is differentiable once; use backend='reference' for second derivatives")


_score_mse.register_autograd(_backward, setup_context=_setup)
_scale.register_autograd(_no_second_derivative)


def _check(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
) -> None:
    for who, query, key in (("student", student_query, student_key), ("teacher", teacher_query, teacher_key)):
        if query.ndim != 2 or query.shape != key.shape or query.shape[0] != student_query.shape[0]:
            shapes = f"{tuple(query.shape)} and {tuple(key.shape)}"
            raise ValueError(f"score_mse: {who} query and key have shapes {shapes}: give [T, D] both, one row a token")
        if query.shape[1] % num_heads:
            raise ValueError(
                f"score_mse: {who} width {query.shape[1]} is no multiple of num_heads={num_heads}: choose a divisor"
            )
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"score_mse: cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}: give [B+1] int32")
