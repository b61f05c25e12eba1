"""What each fused loss launches in one training step, gradients included, in closed form.

Launches assumed of linear_kd: the logits' kernel of each model and the gradient's, dx and dW, for each chunk of at
most 4,096 rows; the bias's gradient comes with one of them, and a later chunk adds to dW inside its product. What only
touches the statistics of tiles is not counted.
T tokens, M predicted rows, V vocabulary, D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bench import roofline
from bench.losses.linear_kd import HeadCase
from bench.losses.packed import PackedCase
from bench.losses.score_mse import ScoreCase
from bench.roofline import Step
from bench.step_model import VOCABULARY, Work, product
from fastkd.methods import Method

HALF = torch.bfloat16
CHUNK_ROWS = 4096  # of linear_kd


def scaling(kernel: str, case: Any) -> list[Step]:
    """The passes that a floor takes for free, with a loss whose own gradient is 1: nothing is scaled then.

    linear_kd reads dx in float32 and writes it in the operands' dtype, where that is another, and copies half-precision
    weights whose rows are not aligned for products; score_mse's dq and dk still lack the factor 2/(A·Σ n²).
    """
    size = case.dtype.itemsize
    if kernel == "linear_kd" and size < 4:
        copied = 2 * size * case.vocabulary if case.vocabulary % 64 else 0
        return [Step(0, case.student_width * ((4 + size) * case.rows + copied))]
    return [Step(0, 4 * size * sum(case.lengths) * case.student_width)] if kernel == "score_mse" else []


def parts(method: Method, work: Work) -> dict[str, list[Step]]:
    """The launches of a method's fused losses, by the kernel's name.

    Raises:
        ValueError: a fused loss that is not described here.
    """
    found: dict[str, list[Step]] = {}
    for kernel, options in method.fused_losses():
        if kernel not in LOSSES:
            raise ValueError(f"no prediction of the fused loss {kernel!r}: describe it in bench/step_losses.py")
        found.setdefault(kernel, []).extend(LOSSES[kernel](work, **options))
    return found


def host_operations(method: Method, work: Work) -> int:
    """What the host issues for a method's losses. Relations are few, and counted together."""
    calls = Counter(kernel for kernel, _ in method.fused_losses())
    chunks = -(-work.predicted // CHUNK_ROWS)
    of_teacher = 3 * chunks * (method.teacher_needs is not None)
    counts = {
        "linear_kd": 14 + 7 * chunks + of_teacher,
        "relation_kl": 30,
        "score_mse": 18 * calls["score_mse"],
        "hidden_mse": 6 * calls["hidden_mse"],
    }
    return sum(counts[kernel] for kernel in calls)


def fused(kernel: str, case: Any) -> list[Step]:
    """The launches of one call, and what its gradients and weights take beside."""
    return roofline.steps(kernel, case) + scaling(kernel, case)


def linear_kd_loss(work: Work, *, kl_weight: float, ce_weight: float, temperature: float = 1.0) -> list[Step]:
    """At the predicted rows, with float32 parameters; without a teacher where the KL has no weight.

    On top of the launches: a chunk after the first reads W again and adds to dW (4 + 4); W is cast (4 + 2), the teacher's
    is bfloat16 already; and the gradient of the tied word embeddings is added to the decoder's (12).
    """
    D, teacher_width = work.student.hidden_size, work.teacher.hidden_size if kl_weight else None
    case = HeadCase(
        "step", work.predicted, VOCABULARY, D, teacher_width, HALF, kl_weight=kl_weight, ce_weight=ce_weight,
        temperature=temperature,
    )  # fmt: skip
    later = -(-case.rows // CHUNK_ROWS) - 1
    bytes_ = later * (8 * D + 2 * 2 * D + 2 * (teacher_width or 0)) + (6 + 12) * D
    in_float32 = replace(case, dtype=torch.float32)
    return [*roofline.steps("linear_kd", case), *scaling("linear_kd", in_float32), Step(0, case.vocabulary * bytes_)]


def relation_kl_loss(work: Work, *, heads: int, cross: bool = False) -> list[Step]:
    """A relation over every sequence of the step, of queries with keys (``cross``) or of one projection with itself."""
    widths = work.student.hidden_size, work.teacher.hidden_size
    return fused("relation_kl", PackedCase("step", _lengths(work), heads, *widths, HALF, cross=cross))


def score_mse_loss(work: Work) -> list[Step]:
    """dq and dk become a gradient of the whole projection, with zeros for dv (14), which the layer adds (6)."""
    widths = work.student.hidden_size, work.teacher.hidden_size
    case = ScoreCase("step", _lengths(work), work.student.num_heads, *widths, HALF)
    return [*fused("score_mse", case), Step(0, 20 * work.tokens * work.student.hidden_size)]


def hidden_mse_loss(work: Work, *, projected: bool) -> list[Step]:
    """Reads both states (4 + 4), writes the gradient (4), and scales it and adds it to the layer's (8).

    A learned projection to the teacher's width is a product, and two in the backward.
    """
    T, D = work.tokens, work.student.hidden_size
    return [Step(0, 20 * T * D), *(3 * [product(T, D, work.teacher.hidden_size)] if projected else [])]


def _lengths(work: Work) -> tuple[int, ...]:
    return (work.length,) * work.sequences


LOSSES: dict[str, Callable[..., list[Step]]] = {
    "linear_kd": linear_kd_loss,
    "relation_kl": relation_kl_loss,
    "score_mse": score_mse_loss,
    "hidden_mse": hidden_mse_loss,
}
