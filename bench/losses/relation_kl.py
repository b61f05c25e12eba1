"""Cases of relation_kl, and its launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from bench.losses.packed import PackedCase
from bench.roofline import Step
from fastkd.kernels import relation_kl

if TYPE_CHECKING:
    from bench.step_model import Work

_RAGGED = (128, 1, 17, 64, 65, 127, 2, 0, 0)  # trailing zeros: static shapes hold empty sequences
_TEXT = (8, 60, 20, 38, 110, 14, 31, 77, 25, 47)  # tokens of ten passages, 43 on average
CASES: tuple[PackedCase, ...] = (
    PackedCase("one token", (1, 1, 1), 2, 16, 16),
    PackedCase("ragged", _RAGGED, 3, 36, 24),
    PackedCase("ragged cross", _RAGGED, 3, 36, 24, cross=True),
    *(PackedCase(f"head width {d}", (70, 33), 2, 2 * d, 2 * d) for d in (8, 12, 16, 24, 32, 64)),
    *(PackedCase(f"head width {d} cross", (140, 33), 2, 2 * d, 2 * d, cross=True) for d in (8, 12, 16, 24, 32, 64)),
    PackedCase("wide heads", (70, 150), 1, 80, 128),
    PackedCase("long", (129, 300, 2, 0), 2, 32, 64),
    PackedCase("long cross", (129, 300, 2, 0), 2, 32, 64, cross=True),
    PackedCase("longest", (2049, 3), 1, 16, 16),
    PackedCase("all-positive cross", (9, 20), 1, 24, 36, cross=True, spread=0.1, offset=10.0),
    PackedCase("peaked", (97, 150), 2, 64, 64, spread=8),
    PackedCase("peaked cross", (97, 150), 2, 64, 64, cross=True, spread=8),
    PackedCase("near", (97, 150), 2, 64, 64, gap=0.1),
    PackedCase("peaked near", (97, 150), 2, 64, 64, spread=8, gap=0.1),
    PackedCase("peaked near cross", (97, 150), 2, 64, 64, cross=True, spread=8, gap=0.1),
    PackedCase("maxima far apart", (150, 40), 1, 16, 16, spread=60, grid=1 / 16),
    *(
        PackedCase(f"{name} bfloat16", lengths, 2, 64, 64, torch.bfloat16, cross, spread, gap)
        for name, lengths, cross, spread, gap in (
            ("ragged", _RAGGED, False, 1, None),
            ("ragged cross", _RAGGED, True, 1, None),
            ("long", (129, 300, 2, 0), False, 1, None),
            ("long cross", (129, 300, 2, 0), True, 1, None),
            ("peaked near", (97, 150), False, 8, 0.1),
            ("peaked near cross", (97, 150), True, 8, 0.1),
        )
    ),
)
COUNTED = PackedCase("counted", (32,) * 4, 4, 48, 96)
BENCHES: tuple[PackedCase, ...] = (
    PackedCase("32×128, 384, A=12", (128,) * 32, 12, 384, 384, torch.bfloat16, gap=0.3),
    PackedCase("256×128, 768, A=12", (128,) * 256, 12, 768, 768, torch.bfloat16, gap=0.3),
    PackedCase("256×128, 768, A=48", (128,) * 256, 48, 768, 768, torch.bfloat16, gap=0.3),
    PackedCase("512×64, 768, A=48", (64,) * 512, 48, 768, 768, torch.bfloat16, gap=0.3),
    PackedCase("1024×32, 768, A=48", (32,) * 1024, 48, 768, 768, torch.bfloat16, gap=0.3),
    PackedCase("text, 760×43, 768, A=48", _TEXT * 76, 48, 768, 768, torch.bfloat16, gap=0.3),
    PackedCase("256×128, 768, A=12 cross", (128,) * 256, 12, 768, 768, torch.bfloat16, cross=True, gap=0.3),
    PackedCase("ragged 256, 384/768, A=12", (128, 90, 55, 20) * 64, 12, 384, 768, torch.bfloat16),
    PackedCase("8×1024, 768, A=48", (1024,) * 8, 48, 768, 768, torch.bfloat16, gap=0.3),
    PackedCase("8×1024, 768, A=12 cross", (1024,) * 8, 12, 768, 768, torch.bfloat16, cross=True, gap=0.3),
)


def flops(case: PackedCase) -> int:
    return relation_kl.flops(case.pairs, case.student_width, case.teacher_width)


def steps(case: PackedCase) -> list[Step]:
    """Up to length 128 one launch, 2n²(D_t + 2D_s) FLOPs, else one for the rows' statistics and one for the gradient.

    Two exponentials a score and launch. A cross relation has a second gradient and, past length 128, a second
    pass, over the columns.
    """
    pairs, tokens = case.pairs, case.tokens
    ds, dt, cross = case.student_width, case.teacher_width, case.cross
    inputs = case.dtype.itemsize * tokens * (1 + cross) * (ds + dt)
    outputs = case.dtype.itemsize * tokens * (1 + cross) * ds
    exponentials = 2 * case.num_heads * pairs
    scores, gradient = 2 * pairs * (ds + dt), 2 * pairs * ds
    if max(case.lengths) <= 128:
        return [Step(scores + (1 + cross) * gradient, inputs + outputs, exponentials, "short", "short")]
    kernel = "cross" if cross else "self"
    second = Step((1 + cross) * (scores + gradient), inputs + outputs, (1 + cross) * exponentials, "rows", kernel)
    return [Step(scores, inputs, exponentials, "rows", "stats"), second]


def in_step(work: Work, *, heads: int, cross: bool = False) -> list[Step]:
    """A relation over every sequence of the step, of queries with keys (``cross``) or of one projection with itself."""
    widths = work.student.hidden_size, work.teacher.hidden_size
    return steps(PackedCase("step", work.lengths, heads, *widths, torch.bfloat16, cross=cross))


def host_operations(work: Work, calls: Sequence[dict[str, Any]]) -> int:
    """Relations are few, and counted together."""
    return 30
