"""TinyBERT hidden states: the mean squared difference of two matrices, value and gradient in one pass.

    loss = 1/(T·D) Σ_{i, j} (s_ij − t_ij)²,   ds = 2 (s − t)/(T·D)

Written as ``(s.float() − t.float()).square().mean()`` it keeps a float32 difference for the backward, which reads and writes
such matrices again. Here both inputs are read once and the gradient is written once, in the student's dtype; the
backward only scales it.

Source: TinyBERT (Jiao et al. 2020, arXiv 1909.10351, eq. 8); where the widths differ, its W is applied before.

Shapes: T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.kernels import tiling
from fastkd.kernels.hidden_mse.blocked import accumulator
from fastkd.kernels.hidden_mse.operator import hidden_mse_operator


def reference(student: Tensor, teacher: Tensor) -> Tensor:
    """The definition."""
    dtype = accumulator(student, teacher)
    return (student.to(dtype) - teacher.to(dtype)).square().mean()


def flops(rows: int, width: int) -> int:
    """None: only matrix products count, here as everywhere."""
    return 0


def hidden_mse(
    student: Tensor,  # [T, D]
    teacher: Tensor,  # [T, D]
    *,
    backend: str | None = None,
) -> Tensor:
    """Mean squared difference of two models' hidden states: a float32 scalar.

    The dtypes may differ; the teacher may be an inference tensor. ``backend``: None takes "triton" on CUDA, else "blocked".
    Differentiable once, in the student, whose gradient has its dtype. Everything is summed in float32, or in float64 where an
    input is float64. Raises ValueError for shapes, dtypes or a backend that do not fit.
    """
    for who, x in (("student", student), ("teacher", teacher)):
        if x.dtype not in tiling.FLOATS:
            raise ValueError(f"hidden_mse: {who} is {x.dtype}: give float16, bfloat16, float32 or float64")
    if student.ndim != 2 or student.shape != teacher.shape:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"hidden_mse: student and teacher are {shapes}: give [T, D] both, projected to one width")
    backend = tiling.backend(backend, student)
    if teacher.dtype == torch.float64 and backend == "triton":
        backend = "blocked"
    if backend == "reference":
        return reference(student, teacher.detach())
    return hidden_mse_operator(student, teacher.detach(), backend)[0]
