"""A fused loss that fastkd does not have: the mean absolute difference of two matrices.

    loss = 1/(T·D) Σ |s − t|,   ds = sign(s − t)/(T·D)

tests/test_new_kernel.py copies this folder into kernels/, cases.py and audited.py into bench/.
"""

from __future__ import annotations

from fastkd.kernels.hidden_l1.operator import hidden_l1_operator
from torch import Tensor

from fastkd.kernels import tiling


def reference(student: Tensor, teacher: Tensor) -> Tensor:
    """The definition."""
    return (student - teacher).abs().mean()


def flops(rows: int, width: int) -> int:
    """None: only matrix products count."""
    return 0


def hidden_l1(student: Tensor, teacher: Tensor, *, backend: str | None = None) -> Tensor:
    """Mean absolute difference of [T, D] and [T, D]: a float32 scalar."""
    backend = tiling.backend(backend, student)
    if backend == "reference":
        return reference(student, teacher)
    return hidden_l1_operator(student, teacher, backend)[0]
