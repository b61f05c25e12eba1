"""Cases of score_mse, and its launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bench.losses.packed import PackedCase
from bench.roofline import Step
from fastkd.kernels import score_mse

if TYPE_CHECKING:
    from bench.step_model import Work


@dataclass(frozen=True)
class ScoreCase(PackedCase):
    """A call of ``score_mse``."""

    def inputs(self, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of ``score_mse``; the student's tensors ask for gradients."""
        q_s, k_s, q_t, k_t = self.tensors(device, seed)
        student = {"student_query": q_s.requires_grad_(), "student_key": k_s.requires_grad_()}
        return {**student, "teacher_query": q_t, "teacher_key": k_t, **self.layout(device)}


_RAGGED = (128, 1, 17, 64, 65, 127, 2, 0, 0)  # trailing zeros: static shapes hold empty sequences
_LONG = (129, 300, 2, 0)
CASES = (
    ScoreCase("one token", (1, 1, 1), 2, 16, 16),
    ScoreCase("ragged", _RAGGED, 3, 36, 24),
    *(ScoreCase(f"head width {d}", (140, 33), 2, 2 * d, 2 * d) for d in (8, 12, 16, 24, 32, 64)),
    ScoreCase("wide heads", (70, 150), 1, 80, 128),
    ScoreCase("long", _LONG, 2, 32, 64),
    ScoreCase("longest", (2049, 3), 1, 16, 16),
    ScoreCase("peaked", (97, 150), 2, 64, 64, spread=8),
    ScoreCase("near", (97, 150), 2, 64, 64, gap=0.1),
    ScoreCase("peaked near", (97, 150), 2, 64, 64, spread=8, gap=0.1),
    ScoreCase("ragged bfloat16", _RAGGED, 2, 64, 64, torch.bfloat16),
    ScoreCase("long bfloat16", _LONG, 2, 64, 64, torch.bfloat16),
    ScoreCase("peaked near bfloat16", (97, 150), 2, 64, 64, torch.bfloat16, spread=8, gap=0.1),
    ScoreCase("ragged float16", _RAGGED, 2, 64, 64, torch.float16),
)
COUNTED = ScoreCase("counted", (32,) * 4, 4, 48, 96)
BENCHES = (
    ScoreCase("32×128, 384/384, A=12", (128,) * 32, 12, 384, 384, torch.bfloat16, gap=0.3),
    ScoreCase("256×128, 768/768, A=12", (128,) * 256, 12, 768, 768, torch.bfloat16, gap=0.3),
    ScoreCase("ragged 256, 384/768, A=12", (128, 90, 55, 20) * 64, 12, 384, 768, torch.bfloat16),
    ScoreCase("16×512, 768/768, A=12", (512,) * 16, 12, 768, 768, torch.bfloat16, gap=0.3),
)


def flops(case: ScoreCase) -> int:
    return score_mse.flops(case.pairs, case.student_width, case.teacher_width)


def steps(case: ScoreCase) -> list[Step]:
    """One launch: 2n²(D_t + 3D_s) FLOPs up to length 128, else the residual twice, for dq and for dk."""
    pairs, tokens = case.pairs, case.tokens
    ds, dt = case.student_width, case.teacher_width
    passes = 1 if max(case.lengths) <= 128 else 2
    flops = 2 * pairs * (passes * (ds + dt) + 2 * ds)
    kind = "short" if passes == 1 else "rows"
    return [Step(flops, case.dtype.itemsize * tokens * 2 * (2 * ds + dt), kind=kind, kernel=kind)]


def scaling(case: ScoreCase) -> list[Step]:
    """dq and dk still lack the factor 2/(A·Σ n²)."""
    return [Step(0, 4 * case.dtype.itemsize * case.tokens * case.student_width)]


def in_step(work: Work) -> list[Step]:
    """dq and dk become a gradient of the whole projection, with zeros for dv (14), which the layer adds (6)."""
    widths = work.student.hidden_size, work.teacher.hidden_size
    case = ScoreCase("step", work.lengths, work.student.num_heads, *widths, torch.bfloat16)
    return [*steps(case), *scaling(case), Step(0, 20 * work.tokens * work.student.hidden_size)]


def host_operations(work: Work, calls: Sequence[dict[str, Any]]) -> int:
    return 18 * len(calls)
