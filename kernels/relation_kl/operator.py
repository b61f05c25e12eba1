"""The operator ``fastkd::relation_kl``: both paths behind one schema, its fake, and the backward that scales the gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastkd.kernels import buckets, packed, scaling
from fastkd.kernels.relation_kl import blocked, triton_long, triton_short
from fastkd.kernels.relation_kl.blocked import LN2, centred, factors


def _triton(
    query_s: Tensor,
    key_s: Tensor | None,
    query_t: Tensor,
    key_t: Tensor | None,
    cu_seqlens: Tensor,
    num_heads: int,
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ KL, and dq, dk times the first of ``factors``."""
    cross = key_s is not None
    key_s, key_t = centred(key_s), centred(key_t)
    query_s, query_t = packed.unit_stride(query_s), packed.unit_stride(query_t)
    key_s, key_t = query_s if key_s is None else key_s, query_t if key_t is None else key_t
    dq = torch.empty(query_s.shape, dtype=query_s.dtype, device=query_s.device)
    dk = torch.empty(key_s.shape if cross else 0, dtype=key_s.dtype, device=key_s.device)
    call = packed.Launch("relation_kl", (query_s, key_s, query_t, key_t), cu_seqlens, num_heads, max_seqlen)
    alpha = 1 / math.sqrt(call.width_s)
    scales = {"scale_s": alpha / LN2, "scale_t": 1 / (math.sqrt(call.width_t) * LN2)}
    alpha *= factors(query_s, num_heads)[0]  # of the gradients
    call.constants["NEAR"] = query_s.dtype == torch.float32 and call.width_s == call.width_t
    kernels = triton_short if call.fits_one_tile() else triton_long
    with torch.cuda.device_of(query_s):
        loss = kernels.loss_and_gradient(call, dq, dk, cross, alpha=alpha, **scales)
    return LN2 * loss.sum(), dq, dk


@torch.library.custom_op("fastkd::relation_kl", mutates_args=())
def relation_kl_operator(
    student: Tensor,
    student_key: Tensor | None,
    teacher: Tensor,
    teacher_key: Tensor | None,
    cu_seqlens: Tensor,
    num_heads: int,
    max_seqlen: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss; dq, and dk in a cross relation, times the first of ``factors``."""
    path = _triton if backend == "triton" else blocked.value_and_gradients
    total, dq, dk = path(student, student_key, teacher, teacher_key, cu_seqlens, num_heads, max_seqlen)
    return (total / (num_heads * max(len(student), 1))).to(buckets.accumulator(student.dtype)), dq, dk


@relation_kl_operator.register_fake
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
    loss = student.new_empty((), dtype=buckets.accumulator(student.dtype))
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
    _, late = factors(dq, ctx.heads)
    dq, dk = (scaling.scaled(x, grad_loss, late=late, backend=ctx.backend) for x in (dq, dk))
    return dq, dk if ctx.cross else None, *[None] * 6


relation_kl_operator.register_autograd(_backward, setup_context=_setup_context)
