"""Closed-form FLOPs of encoders and losses: matrix products alone, 2·m·n·k each, from real lengths.

T tokens, M predicted rows, pairs = Σ len² over sequences, D width, I intermediate width, V vocabulary.
A backward costs twice its forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastkd.models.encoder import EncoderConfig
    from fastkd.models.needs import Needs


def forward_flops(config: EncoderConfig, needs: Needs, *, tokens: int, pairs: int, predicted: int) -> int:
    """FLOPs of one `Encoder.forward` with these needs; the decoder to the vocabulary is the loss's.

    Predicted rows attend to their own sequence: their share of ``pairs`` is taken as predicted / tokens.
    """
    D, I = config.hidden_size, config.intermediate_size  # noqa: E741
    depth, total = needs.depth(config.num_layers), 0
    for number in range(1, depth + 1):
        extent = needs.extent(number, config.num_layers)
        if extent == "predicted":
            total += 4 * tokens * D * D + predicted * (4 * D * D + 4 * D * I)
            total += 4 * D * pairs * predicted // tokens
            continue
        total += 6 * tokens * D * D
        if extent == "all":
            total += tokens * (2 * D * D + 4 * D * I) + 4 * D * pairs
    return total + (2 * predicted * D * D if needs.logits else 0)


def backward_flops(forward: int) -> int:
    """FLOPs of a backward through something that took ``forward`` FLOPs forward."""
    return 2 * forward


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
