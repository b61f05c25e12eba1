"""What the loss of each method launches in one training step, gradients included, in closed form.

Launches assumed of linear_kd: the logits' kernel of each model and the gradient's, dx and dW, for each chunk of at
most 4,096 rows; the bias's gradient comes with one of them, and a later chunk adds to dW inside its product. What only
touches the statistics of tiles is not counted.
T tokens, M predicted rows, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bench import roofline
from bench.roofline import Step
from bench.step_model import VOCABULARY, Work, product
from fastkd.kernels import linear_kd, packed, score_mse

HALF = torch.bfloat16
CHUNK_ROWS = 4096  # of linear_kd


def scaling(kernel: str, case: Any) -> list[Step]:
    """The passes that a floor takes for free, with a loss whose own gradient is 1: nothing is scaled then.

    linear_kd reads dx in float32 and writes it in the operands' dtype, where that is another, and copies half-precision
    weights whose rows products cannot take as they are; score_mse's dq and dk still lack the factor 2/(A·Σ n²).
    """
    size = case.dtype.itemsize
    if kernel == "linear_kd" and size < 4:
        copied = 2 * size * case.vocabulary if case.vocabulary % 64 else 0
        return [Step(0, case.student_width * ((4 + size) * case.rows + copied))]
    return [Step(0, 4 * size * sum(case.lengths) * case.student_width)] if kernel == "score_mse" else []


def parts(method: Any, work: Work) -> dict[str, list[Step]]:
    """The losses of a method by name.

    Raises:
        ValueError: a method that is not described here.
    """
    if method.name not in LOSSES:
        raise ValueError(f"method {method.name!r} has no predicted loss: describe it in bench/step_losses.py")
    return LOSSES[method.name](method, work)


def host_operations(method: Any, work: Work) -> int:
    """What the host issues for a method's losses."""
    chunks = -(-work.predicted // CHUNK_ROWS)
    of_teacher = 3 * chunks * (method.teacher_needs is not None)
    counts = {
        "linear_kd": 14 + 7 * chunks + of_teacher,
        "relation_kl": 30,
        "score_mse": 18 * len(getattr(method, "score_pairs", ())),
        "hidden states": 6 * len(getattr(method, "hidden_pairs", ())),
    }
    return sum(counts[part] for part in parts(method, work))


def fused(kernel: str, case: Any) -> list[Step]:
    """The launches of one call, and what its gradients and weights take beside."""
    return roofline.STEPS[kernel](case) + scaling(kernel, case)


def head_loss(case: linear_kd.Case) -> list[Step]:
    """linear_kd at the predicted rows, with float32 parameters.

    On top of the launches: a chunk after the first reads W again and adds to dW (4 + 4); W is cast (4 + 2), the teacher's
    is bfloat16 already; and the gradient of the tied word embeddings is added to the decoder's (12).
    """
    D, later = case.student_width, -(-case.rows // CHUNK_ROWS) - 1
    weights = later * (8 * D + 2 * 2 * D + 2 * (case.teacher_width or 0)) + (6 + 12) * D
    in_float32 = replace(case, dtype=torch.float32)
    return [*roofline.linear_kd_steps(case), *scaling("linear_kd", in_float32), Step(0, case.vocabulary * weights)]


def packed_case(work: Work, heads: int, cross: bool = False) -> packed.Case:
    """A relation over every sequence of the step."""
    widths = work.student.hidden_size, work.teacher.hidden_size
    return packed.Case("step", (work.length,) * work.sequences, heads, *widths, HALF, cross=cross)


def tinybert(method: Any, work: Work) -> dict[str, list[Step]]:
    """Scores and hidden states of each pair of layers.

    Hidden: reads both states (4 + 4), writes the gradient (4), and scales it and adds it to the layer's (8). A score's
    dq and dk become a gradient of the whole projection, with zeros for dv (14), which the layer adds (6).
    """
    T, D = work.tokens, work.student.hidden_size
    widths = D, work.teacher.hidden_size
    case = score_mse.Case("step", (work.length,) * work.sequences, work.student.num_heads, *widths, HALF)
    hidden = [Step(0, 20 * T * D)]
    if method.projects:
        hidden += 3 * [product(T, *widths)]
    return {
        "score_mse": len(method.score_pairs) * [*fused("score_mse", case), Step(0, 20 * T * D)],
        "hidden states": len(method.hidden_pairs) * hidden,
    }


def minilm(method: Any, work: Work) -> dict[str, list[Step]]:
    heads = work.student.num_heads
    cases = packed_case(work, heads, cross=True), packed_case(work, heads)
    return {"relation_kl": [step for case in cases for step in fused("relation_kl", case)]}


def minilmv2(method: Any, work: Work) -> dict[str, list[Step]]:
    return {"relation_kl": 3 * fused("relation_kl", packed_case(work, method.relation_heads))}


def mlm(method: Any, work: Work) -> dict[str, list[Step]]:
    rows, width = work.predicted, work.student.hidden_size
    case = linear_kd.Case("step", rows, VOCABULARY, width, None, HALF, kl_weight=0.0, ce_weight=1.0)
    return {"linear_kd": head_loss(case)}


def logit_kd(method: Any, work: Work) -> dict[str, list[Step]]:
    case = linear_kd.Case(
        "step",
        work.predicted,
        VOCABULARY,
        work.student.hidden_size,
        work.teacher.hidden_size,
        HALF,
        kl_weight=method.kl_weight,
        ce_weight=method.config.ce_weight,
        temperature=method.temperature,
    )
    return {"linear_kd": head_loss(case)}


LOSSES: dict[str, Callable[[Any, Work], dict[str, list[Step]]]] = {
    "mlm": mlm,
    "logit_kd": logit_kd,
    "tinybert": tinybert,
    "minilm": minilm,
    "minilmv2": minilmv2,
}
