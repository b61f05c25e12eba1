"""hidden_mse in PyTorch: on a CPU, in float64, or where there is no Triton."""

from __future__ import annotations

import torch
from torch import Tensor


def value_and_gradient(student: Tensor, teacher: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Σ (s − t)², and (s − t) · scale, without a float32 copy of either."""
    dtype = accumulator(student, teacher)
    difference = torch.sub(student, teacher) if student.dtype == dtype else student.to(dtype).sub_(teacher)
    total = torch.linalg.vector_norm(difference, dim=1).double().square().sum()
    return total, difference.mul_(scale).to(student.dtype).contiguous()


def accumulator(student: Tensor, teacher: Tensor) -> torch.dtype:
    """float32, or float64 where an input is."""
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
