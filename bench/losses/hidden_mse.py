"""Cases of hidden_mse, and its launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bench.roofline import Step, product
from fastkd.kernels import hidden_mse

if TYPE_CHECKING:
    from bench.step_model import Work


@dataclass(frozen=True)
class HiddenCase:
    """Shape, dtypes and values of one call; ``gap`` is the standard deviation of the student's difference."""

    name: str
    rows: int
    width: int
    dtype: torch.dtype = torch.float32
    teacher_dtype: torch.dtype = torch.float32
    gap: float = 1.0

    @property
    def tolerance(self) -> float:
        """‖out − ref‖/‖ref‖ against float64, of the value and of the gradient."""
        return 1e-5 if self.dtype == torch.float32 else 1e-2

    def inputs(self, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of ``hidden_mse``; the student asks for a gradient."""
        generator = torch.Generator().manual_seed(seed)
        teacher = torch.randn(self.rows, self.width, generator=generator)
        student = teacher + self.gap * torch.randn(self.rows, self.width, generator=generator)
        moved = student.to(device, self.dtype), teacher.to(device, self.teacher_dtype)
        return {"student": moved[0].requires_grad_(), "teacher": moved[1]}


_BF16 = torch.bfloat16
CASES = (
    HiddenCase("one number", 1, 1),
    HiddenCase("odd width", 7, 33),
    HiddenCase("many blocks", 40, 312),
    HiddenCase("near", 30, 64, gap=0.01),
    HiddenCase("bfloat16 teacher", 40, 312, teacher_dtype=_BF16),
    HiddenCase("bfloat16 student", 40, 312, _BF16),
    HiddenCase("bfloat16", 40, 312, _BF16, _BF16),
    HiddenCase("float16", 40, 312, torch.float16, torch.float16),
)
COUNTED = HiddenCase("counted", 40, 48)
BENCHES = (
    HiddenCase("4096×384", 4096, 384, teacher_dtype=_BF16),
    HiddenCase("32768×768", 32768, 768, teacher_dtype=_BF16),
    HiddenCase("131072×768", 131072, 768, teacher_dtype=_BF16),
)


def flops(case: HiddenCase) -> int:
    return hidden_mse.flops(case.rows, case.width)


def steps(case: HiddenCase) -> list[Step]:
    """One launch that reads both matrices and writes the student's gradient."""
    size = case.rows * case.width
    return [Step(3 * size, size * (2 * case.dtype.itemsize + case.teacher_dtype.itemsize), kernel="difference")]


def in_step(work: Work, *, projected: bool) -> list[Step]:
    """Reads both states (4 + 4), writes the gradient (4), and scales it and adds it to the layer's (8).

    A learned projection to the teacher's width is a product, and two in the backward.
    """
    T, D = work.tokens, work.student.hidden_size
    return [Step(0, 20 * T * D), *(3 * [product(T, D, work.teacher.hidden_size)] if projected else [])]


def host_operations(work: Work, calls: Sequence[dict[str, Any]]) -> int:
    return 6 * len(calls)
