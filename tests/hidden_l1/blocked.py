"""hidden_l1 in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def value_and_gradient(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Σ |s − t|, and sign(s − t)."""
    difference = student - teacher
    return difference.abs().sum(dtype=torch.float64), difference.sign()
