"""The operator ``fastkd::hidden_mse``: both paths behind one schema, its fake, and the backward that scales the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.kernels import scaling
from fastkd.kernels.hidden_mse import blocked, triton
from fastkd.kernels.hidden_mse.blocked import accumulator


@torch.library.custom_op("fastkd::hidden_mse", mutates_args=())
def hidden_mse_operator(student: Tensor, teacher: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The loss; s − t times the first of ``_factors``."""
    total, gradient = (triton if backend == "triton" else blocked).value_and_gradient(
        student, teacher, _factors(student)[0]
    )
    return (total / max(student.numel(), 1)).to(accumulator(student, teacher)), gradient


@hidden_mse_operator.register_fake
def _(student: Tensor, teacher: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return student.new_empty((), dtype=accumulator(student, teacher)), student.new_empty(student.shape)


def _factors(student: Tensor) -> tuple[float, float]:
    """What the forward and the backward multiply s − t with: together 2/(T·D)."""
    return scaling.early_and_late(2 / max(student.numel(), 1), student.dtype)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.backend = inputs[-1]


def _backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled():
        raise RuntimeError("hidden_mse has no second derivative: call backward without create_graph=True")
    if grad_loss is None:
        return (None,) * 3
    (gradient,) = ctx.saved_tensors
    return scaling.scaled(gradient, grad_loss, late=_factors(gradient)[1], backend=ctx.backend), None, None


hidden_mse_operator.register_autograd(_backward, setup_context=_setup_context)
