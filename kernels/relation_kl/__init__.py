"""MiniLM relations: the KL divergence between two attention distributions, without a T×T matrix.

Per sequence and relation head, with Z = α_s q kᵀ of the student, Y = α_t Q Kᵀ of the teacher and α = 1/√(D/A):

    loss = 1/(A·T) Σ_{heads, rows i} KL(P_i ‖ Q_i),   Q = softmax_row(Z),  P = softmax_row(Y)

With G = Q − P the gradients are dq = α_s G k/(A·T) and dk = α_s Gᵀ q/(A·T). A self-relation has q = k = s, so
ds = α_s (G + Gᵀ) s/(A·T), and Z_ji = Z_ij: a block of rows finds G_ji in its own tile, with the other row's softmax
statistics, and no other block writes its gradient. No atomics, no transpose, the same bits every time. The loss is a
scalar, so the gradient is made in the forward and scaled in the backward.

Sources: MiniLM (Wang et al. 2020, arXiv 2002.10957, eq. 4-8): query-key attention and value relations. MiniLMv2
(Wang et al. 2021, arXiv 2012.15828, eq. 5-7): multi-head self-relations of queries, keys and values.

Shapes: T packed tokens, B sequences, A relation heads, D width (s student, t teacher), n length of a sequence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastkd.kernels import buckets, packed
from fastkd.kernels.relation_kl.operator import relation_kl_operator


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
    rows, valid = buckets.padded_rows(cu_seqlens, len(student) if max_seqlen is None else max_seqlen)

    def log_relation(query: Tensor, key: Tensor) -> Tensor:
        q, k = (x[rows].unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (query, key))
        scores = (q @ k.transpose(2, 3)).to(buckets.accumulator(query.dtype)) / math.sqrt(q.shape[-1])
        return scores.masked_fill(~valid[:, None, None], buckets.MASKED).log_softmax(-1)

    log_q = log_relation(student, student if student_key is None else student_key)
    log_p = log_relation(teacher, teacher if teacher_key is None else teacher_key)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)  # [B, A, n]
    return torch.where(valid[:, None], divergence, 0).sum() / (num_heads * len(student))


def flops(pairs: int, student_width: int, teacher_width: int) -> int:
    """Scores of both models and the student's two gradients: 2·pairs·(3·Ds + Dt), with pairs = Σ n², for either relation.

    Matrix products only, 2·m·n·k each. The fused self-relation makes one product of its two gradients; the plain definition's
    are counted.
    """
    return 2 * pairs * (3 * student_width + teacher_width)


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
    attention of MiniLM. Sequences follow each other: ``cu_seqlens`` rises from 0 to T and may repeat T (empty sequences).
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
    return relation_kl_operator(student, student_key, teacher, teacher_key, cu_seqlens, num_heads, bound, backend)[0]
