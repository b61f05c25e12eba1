"""MiniLM relations: the KL divergence between two attention distributions, without a T×T matrix.

Per sequence and relation head, with Z = α_s q kᵀ of the student, Y = α_t Q Kᵀ of the teacher and α = 1/√(D/A):

    loss = 1/(A·T) Σ_{heads, rows i} KL(P_i ‖ Q_i),   Q = softmax_row(Z),  P = softmax_row(Y)

With G = Q − P the gradients are dq = α_s G k /(A·T) and dk = α_s Gᵀ q /(A·T); a self-relation, where q = k = s, adds
them up: ds = α_s (G + Gᵀ) s /(A·T). The loss is a scalar, so they are made in the forward and scaled in the backward.

Sources: MiniLM (Wang et al. 2020, arXiv 2002.10957, eq. 4-8) for query-key attention and value relations, MiniLMv2 (Wang
et al. 2021, arXiv 2012.15828, eq. 5-7) for multi-head self-relations of queries, keys and values.

Shapes: T packed tokens, B sequences, A relation heads, D width (s student, t teacher), n length of a sequence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastkd.kernels import packed

LN2 = math.log(2)


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
    """KL(teacher ‖ student) of the relations of packed sequences, averaged over heads and rows; a float32 scalar.

    `student` and `teacher` hold queries, keys or values, one row a token, and are regrouped into `num_heads` slices,
    whatever heads the models have. Without keys it is the self-relation of MiniLMv2, with both keys the query-key
    attention of MiniLM. Sequences lie end to end: `cu_seqlens` runs from 0 to T and may repeat T (empty sequences).
    `max_seqlen` bounds every length; without it the Triton backend assumes T and launches needless programs.
    Differentiable once, in the student's tensors; their gradients have their dtype. Float64 is kept as float64.
    Column slices of a fused projection need no copy.

    Raises ValueError for shapes that do not fit.
    """
    _check(student, teacher, cu_seqlens, num_heads, student_key, teacher_key)
    teacher = teacher.detach()
    teacher_key = None if teacher_key is None else teacher_key.detach()
    if backend == "reference":
        return reference(
            student,
            teacher,
            cu_seqlens,
            num_heads,
            student_key=student_key,
            teacher_key=teacher_key,
            max_seqlen=max_seqlen,
        )
    bound = student.shape[0] if max_seqlen is None else max_seqlen
    return _relation_kl(student, student_key, teacher, teacher_key, cu_seqlens, num_heads, bound, "blocked")[0]


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
    bound = student.shape[0] if max_seqlen is None else max_seqlen
    starts, lengths = cu_seqlens[:-1, None], cu_seqlens.diff()[:, None]
    position = torch.arange(bound, device=student.device)
    valid = position < lengths  # [B, n]
    rows = torch.where(valid, starts + position, 0)

    def log_relation(query: Tensor, key: Tensor) -> Tensor:
        q, k = (x[rows].unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (query, key))
        scores = (q @ k.transpose(2, 3)).to(torch.promote_types(query.dtype, torch.float32)) / math.sqrt(q.shape[-1])
        return scores.masked_fill(~valid[:, None, None], packed.MASKED).log_softmax(-1)

    log_q = log_relation(student, student if student_key is None else student_key)
    log_p = log_relation(teacher, teacher if teacher_key is None else teacher_key)
    rows_kl = (log_p.exp() * (log_p - log_q)).sum(-1)  # [B, A, n]
    return torch.where(valid[:, None], rows_kl, 0).sum() / (num_heads * student.shape[0])


def _blocked(
    query_s: Tensor, key_s: Tensor | None, query_t: Tensor, key_t: Tensor | None, cu_seqlens: Tensor, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of whole score rows in reused buffers: Σ KL, and dq, dk without their factor 1/(A·T)."""
    dtype = torch.float64 if query_s.dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=torch.float64, device=query_s.device)
    dq, dk = torch.zeros_like(query_s, memory_format=torch.contiguous_format), query_s.new_empty(0)
    if key_s is not None:
        dk = torch.zeros_like(key_s, memory_format=torch.contiguous_format)
    buffers = packed.Buffers(dtype, query_s.device)
    with packed.exact_products(*(x for x in (query_s, key_s, query_t, key_t) if x is not None)):
        for group in packed.groups(cu_seqlens, num_heads):
            qs = group.heads(query_s, num_heads, dtype, feature="query")
            ks = group.heads(query_s if key_s is None else key_s, num_heads, dtype, feature="key")
            qt = group.heads(query_t, num_heads, dtype, feature="query")
            kt = group.heads(query_t if key_t is None else key_t, num_heads, dtype, feature="key")
            width = query_s.shape[1] // num_heads
            grad_q = torch.zeros_like(qs[..., :width], memory_format=torch.contiguous_format)
            grad_k = grad_q if key_s is None else torch.zeros_like(grad_q)
            alpha_s, alpha_t = (1 / math.sqrt(x.shape[1] / num_heads) for x in (query_s, query_t))
            for pair, row in packed.blocks(qs.shape[0], group.length):
                z = buffers.product(0, qs[pair, row], ks[pair], alpha_s / LN2)
                y = buffers.product(1, qt[pair, row], kt[pair], alpha_t / LN2)
                total += _kl_and_difference(z, y, buffers.take(2, z.shape))
                grad_q[pair, row].baddbmm_(z, ks[pair][..., :width], alpha=alpha_s)
                grad_k[pair].baddbmm_(z.transpose(1, 2), qs[pair, row][..., :width], alpha=alpha_s)
            group.scatter(dq, grad_q)
            if key_s is not None:
                group.scatter(dk, grad_k)
    return total, dq, dk


def _kl_and_difference(z: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """Σ KL(P ‖ Q) of a block of base-2 scores; leaves G = Q − P in `z`.

    KL_i = Σ_j P_ij (Y_ij − Z_ij) − (L_t − L_s): differences of scores, of maxima and a ratio of sums, so that a good student's
    small KL is not the difference of two large numbers.
    """
    max_s, max_t = z.amax(-1, keepdim=True), y.amax(-1, keepdim=True)
    torch.sub(y, z, out=w)
    sum_s = z.sub_(max_s).exp2_().sum(-1, keepdim=True)
    sum_t = y.sub_(max_t).exp2_().sum(-1, keepdim=True)
    rows = w.mul_(y).sum(-1, keepdim=True).div_(sum_t)
    rows -= (max_t - max_s) + torch.log2(sum_t / sum_s)
    z.div_(sum_s).addcmul_(y, sum_t.reciprocal_(), value=-1)
    return LN2 * rows.sum(dtype=torch.float64)


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
    total, dq, dk = _blocked(student, student_key, teacher, teacher_key, cu_seqlens, num_heads)
    loss = total / (num_heads * student.shape[0])
    return loss.to(torch.promote_types(student.dtype, torch.float32)), dq, dk


@_relation_kl.register_fake
def _(student, student_key, teacher, teacher_key, cu_seqlens, num_heads, max_seqlen, backend):  # type: ignore[no-untyped-def]
    loss = student.new_empty((), dtype=torch.promote_types(student.dtype, torch.float32))
    dk = student.new_empty(0) if student_key is None else student_key.new_empty(student_key.shape)
    return loss, student.new_empty(student.shape), dk


@torch.library.custom_op("fastkd::relation_kl_scale", mutates_args=())
def _scale(grad_loss: Tensor, gradient: Tensor, factor: float) -> Tensor:
    return (gradient.to(torch.promote_types(gradient.dtype, torch.float32)) * (grad_loss * factor)).to(gradient.dtype)


@_scale.register_fake
def _(grad_loss, gradient, factor):  # type: ignore[no-untyped-def]
    return torch.empty_like(gradient)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    student, student_key, *_, num_heads, _max, _backend = inputs
    _, dq, dk = output
    ctx.set_materialize_grads(False)
    ctx.factor, ctx.cross = 1 / (num_heads * student.shape[0]), student_key is not None
    ctx.save_for_backward(dq, dk)


def _backward(ctx, grad_loss, _dq, _dk):  # type: ignore[no-untyped-def]
    dq, dk = ctx.saved_tensors
    grad_query = _scale(grad_loss, dq, ctx.factor)
    grad_key = _scale(grad_loss, dk, ctx.factor) if ctx.cross else None
    return grad_query, grad_key, None, None, None, None, None, None


def _no_second_derivative(ctx, grad):  # type: ignore[no-untyped-def]
    raise RuntimeError("relation_kl is differentiable once; use backend='reference' for second derivatives")


_relation_kl.register_autograd(_backward, setup_context=_setup)
_scale.register_autograd(_no_second_derivative)


def _check(
    student: Tensor,
    teacher: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    student_key: Tensor | None,
    teacher_key: Tensor | None,
) -> None:
    if (student_key is None) != (teacher_key is None):
        raise ValueError(
            "relation_kl got one key: give student_key and teacher_key for query-key attention, or neither"
        )
    for name, x, like in (("teacher_key", teacher_key, teacher), ("student_key", student_key, student)):
        if x is not None and x.shape != like.shape:
            raise ValueError(
                f"relation_kl: {name} has shape {tuple(x.shape)}, its query {tuple(like.shape)}: make them equal"
            )
    if student.ndim != 2 or teacher.ndim != 2 or student.shape[0] != teacher.shape[0]:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(
            f"relation_kl: student and teacher have shapes {shapes}: give [T, Ds] and [T, Dt], one row a token"
        )
    for name, x in (("student", student), ("teacher", teacher)):
        if x.shape[1] % num_heads:
            raise ValueError(
                f"relation_kl: {name} width {x.shape[1]} is no multiple of num_heads={num_heads}: choose a divisor"
            )
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"relation_kl: cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}: give [B+1] int32")
