"""Cases of losses over packed sequences."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedCase:
    """Shapes, dtype and values of one call, of tests and benches.

    ``spread`` is the standard deviation of the scores, 8 being a peaked softmax; ``gap`` that of the student's
    difference from the teacher (None: unrelated models), which needs equal widths. ``offset`` is added to every value.
    Values are multiples of ``grid``, if that is not 0: then large scores are exact, in whatever order a product is summed.
    """

    name: str
    lengths: tuple[int, ...]
    num_heads: int
    student_width: int
    teacher_width: int
    dtype: torch.dtype = torch.float32
    cross: bool = False
    spread: float = 1.0
    gap: float | None = None
    offset: float = 0.0
    grid: float = 0.0

    @property
    def tolerance(self) -> float:
        """‖out − ref‖/‖ref‖ against float64, of the value and of every gradient."""
        return 1e-5 if self.dtype == torch.float32 else 1e-2

    @property
    def scores(self) -> int:
        """Entries of one model's score matrices."""
        return self.num_heads * self.pairs

    @property
    def pairs(self) -> int:
        """Σ n²."""
        return sum(n * n for n in self.lengths)

    @property
    def tokens(self) -> int:
        """Σ n."""
        return sum(self.lengths)

    def inputs(self, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of ``relation_kl``; the student's tensors ask for gradients."""
        q_s, k_s, q_t, k_t = self.tensors(device, seed)
        keys = {"student_key": k_s.requires_grad_(), "teacher_key": k_t} if self.cross else {}
        return {"student": q_s.requires_grad_(), "teacher": q_t, **keys, **self.layout(device)}

    def layout(self, device: torch.device | str) -> dict[str, Any]:
        cu_seqlens = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=device)
        return {"cu_seqlens": cu_seqlens, "num_heads": self.num_heads, "max_seqlen": max(self.lengths)}

    def tensors(self, device: torch.device | str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Student query and key [T, Ds], teacher query and key [T, Dt]: column slices of fused projections.

        Rows scatter around seven centres, so that a row of a peaked self-relation has rivals to its own diagonal.
        """
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.arange(self.tokens)

        def noise(rows: int, width: int, deviation: float) -> Tensor:
            return torch.randn(rows, 3 * width, generator=generator) * deviation

        def model(width: int) -> Tensor:
            centres, own = noise(7, width, self.spread**0.5), noise(len(tokens), width, self.spread**0.5)
            return 0.9**0.5 * centres[tokens % 7] + 0.1**0.5 * own + self.offset

        teacher = model(self.teacher_width)
        if self.gap is None:
            student = model(self.student_width)
        else:  # the scores of s + δ differ by √2·|s|·|δ| in standard deviation
            student = teacher + noise(len(tokens), self.student_width, self.gap / (2 * self.spread) ** 0.5)
        if self.grid:
            student, teacher = ((x / self.grid).round() * self.grid for x in (student, teacher))
        q_s, k_s, _ = student.to(device, self.dtype).split(self.student_width, dim=1)
        q_t, k_t, _ = teacher.to(device, self.dtype).split(self.teacher_width, dim=1)
        return q_s.detach(), k_s.detach(), q_t, k_t
