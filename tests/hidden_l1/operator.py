"""The operator ``fastkd::hidden_l1``."""

from __future__ import annotations

import torch
from fastkd.kernels.hidden_l1 import blocked, triton
from torch import Tensor

from fastkd.kernels import scaling


@torch.library.custom_op("fastkd::hidden_l1", mutates_args=())
def hidden_l1_operator(student: Tensor, teacher: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    total, sign = (triton if backend == "triton" else blocked).value_and_gradient(student, teacher)
    return (total / student.numel()).float(), sign


@hidden_l1_operator.register_fake
def _(student: Tensor, teacher: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return student.new_empty((), dtype=torch.float32), torch.empty_like(student)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.backend = inputs[-1]


def _backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled():
        raise RuntimeError("hidden_l1 has no second derivative")
    (sign,) = ctx.saved_tensors
    return scaling.scaled(sign, grad_loss, late=1 / sign.numel(), backend=ctx.backend), None, None


hidden_l1_operator.register_autograd(_backward, setup_context=_setup_context)
