"""Cases of hidden_l1, and its launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bench.roofline import Step
from fastkd.kernels import hidden_l1  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from bench.step_model import Work


@dataclass(frozen=True)
class Case:
    name: str
    rows: int
    width: int
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-5

    def inputs(self, device: str | torch.device = "cpu", seed: int = 0) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        student, teacher = (torch.randn(self.rows, self.width, generator=generator).to(device) for _ in range(2))
        return {"student": student.requires_grad_(), "teacher": teacher}


CASES = (Case("one number", 1, 1), Case("odd width", 7, 33), Case("many blocks", 40, 312))
COUNTED = Case("counted", 8, 16)
BENCHES = (Case("512x64", 512, 64),)


def flops(case: Case) -> int:
    return hidden_l1.flops(case.rows, case.width)


def steps(case: Case) -> list[Step]:
    return [Step(0, 12 * case.rows * case.width, kernel="absolute")]


def in_step(work: Work) -> list[Step]:
    return [Step(0, 20 * work.tokens * work.student.hidden_size)]


def host_operations(work: Work, calls: Sequence[dict[str, Any]]) -> int:
    return 6 * len(calls)
