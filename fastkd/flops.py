"""Closed-form FLOPs of the losses: matrix products only, 2·m·n·k each, from real lengths.

M predicted rows, pairs = Σ len² over sequences, D width, V vocabulary. Those of encoders are in ``fastkd/models/flops.py``.
"""

from __future__ import annotations


def linear_kd_flops(predicted: int, vocab: int, student_width: int, teacher_width: int = 0) -> int:
    """Decoder logits of student and teacher, and the student's two gradients: 2MV(3·Ds + Dt)."""
    return 2 * predicted * vocab * (3 * student_width + teacher_width)


def relation_kl_flops(pairs: int, student_width: int, teacher_width: int) -> int:
    """Scores of both models and the student's two gradients: 2·pairs·(3·Ds + Dt), self-relation or query–key alike.

    The fused self-relation makes one product of its two gradients; what is counted is the plain definition's.
    """
    return 2 * pairs * (3 * student_width + teacher_width)


def score_mse_flops(pairs: int, student_width: int, teacher_width: int) -> int:
    """Scores of both models and the student's two gradients: 2·pairs·(3·Ds + Dt)."""
    return 2 * pairs * (3 * student_width + teacher_width)
