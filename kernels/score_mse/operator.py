"""The operator ``fastkd::score_mse``: all paths behind one schema, its fake, and the backward that scales the gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.kernels import buckets, scaling
from fastkd.kernels.score_mse import blocked, triton
from fastkd.kernels.score_mse.blocked import stored

_PATHS = {"triton": triton.value_and_gradients, "blocked": blocked.value_and_gradients, "gram": blocked.gram}


@torch.library.custom_op("fastkd::score_mse", mutates_args=())
def score_mse_operator(
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
    dtype = buckets.accumulator(student_query.dtype)
    return (total / pairs).to(dtype), dq, dk, (2 / pairs).to(dtype)


@score_mse_operator.register_fake
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
    loss, factor = (student_query.new_empty((), dtype=buckets.accumulator(student_query.dtype)) for _ in range(2))
    dq, dk = (x.new_empty(x.shape, dtype=stored(x.dtype)) for x in (student_query, student_key))
    return loss, dq, dk, factor


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.dtype = inputs[0].dtype
    ctx.backend = None if inputs[-1] == "gram" else inputs[-1]  # of the backward, which only scales


def _backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled():
        raise RuntimeError("score_mse has no second derivative: call backward without create_graph=True")
    if grad_loss is None:
        return (None,) * 8
    dq, dk, factor = ctx.saved_tensors
    factor = grad_loss * factor
    dq, dk = (scaling.scaled(x, factor, ctx.dtype, backend=ctx.backend) for x in (dq, dk))
    return dq, dk, *[None] * 6


score_mse_operator.register_autograd(_backward, setup_context=_setup_context)
