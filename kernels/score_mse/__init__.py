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

import math

import torch
from torch import Tensor

from fastkd.kernels import buckets, packed
from fastkd.kernels.score_mse.operator import score_mse_operator


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
    rows, valid = buckets.padded_rows(cu_seqlens, len(student_query) if max_seqlen is None else max_seqlen)

    def scores(query: Tensor, key: Tensor) -> Tensor:
        q, k = (x[rows].unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (query, key))
        return (q @ k.transpose(2, 3)).to(buckets.accumulator(query.dtype)) / math.sqrt(q.shape[-1])

    difference = scores(student_query, student_key) - scores(teacher_query, teacher_key)
    pairs = valid[:, None, :, None] & valid[:, None, None, :]
    return torch.where(pairs, difference.square(), 0).sum() / (num_heads * cu_seqlens.diff().square().sum())


def flops(pairs: int, student_width: int, teacher_width: int) -> int:
    """Scores of both models and the student's two gradients: 2·pairs·(3·Ds + Dt), with pairs = Σ n².

    Matrix products only, 2·m·n·k each.
    """
    return 2 * pairs * (3 * student_width + teacher_width)


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

    Sequences follow each other: ``cu_seqlens`` rises from 0 to T and may repeat T (empty sequences). ``max_seqlen`` bounds
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
    return score_mse_operator(*args, bound, backend)[0]
