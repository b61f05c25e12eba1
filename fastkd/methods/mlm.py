"""mlm: masked language modelling from scratch, the baseline. Cross-entropy at the masked positions.

Source: Devlin et al. 2019 (BERT), without next-sentence prediction; RECIPES of Bui et al. 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastkd.methods import FusedLosses, Method, MethodLoss, Padded
from fastkd.models.needs import Needs, Outputs

if TYPE_CHECKING:
    from torch import Tensor

    from fastkd.data.batches import Batch
    from fastkd.models.encoder import EncoderConfig


@dataclass(frozen=True)
class Config:
    """Options of mlm: none of its own."""


class METHOD(Method):
    """Cross-entropy of the student's logits at the masked positions."""

    name = "mlm"
    uses_teacher = False
    trains_mlm_head = True
    default_lr = 1e-3
    reads_masked = True

    def __init__(self, config: Config, student: EncoderConfig, teacher: EncoderConfig | None) -> None:
        super().__init__(config, student, teacher)
        self.student_needs = Needs(logits=True)

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> MethodLoss:
        return head_cross_entropy(student, batch, "ce")

    def loss_flops(self, *, tokens: int, pairs: int, predicted: int) -> int:
        from fastkd.kernels.linear_kd import flops

        return flops(predicted, self.student_config.vocab_size, self.student_config.hidden_size, 0)

    def fused_losses(self) -> FusedLosses:
        return [("linear_kd", {"kl_weight": 0.0, "ce_weight": 1.0})]

    def plain(self, student: Padded, teacher: Padded | None, labels: Tensor, mask: Tensor) -> Tensor:
        import torch.nn.functional as F

        assert student.logits is not None
        return F.cross_entropy(student.logits.flatten(0, -2).float(), labels.flatten(), ignore_index=-100)


def head_cross_entropy(student: Outputs, batch: Batch, term: str) -> MethodLoss:
    """The cross-entropy of an MLM head's logits at the predicted positions, under the name ``term`` in the log."""
    from fastkd.kernels.linear_kd import linear_kd

    assert student.head_rows is not None and student.decoder_weight is not None
    out = linear_kd(
        student.head_rows,
        student.decoder_weight,
        batch.labels,
        student_bias=student.decoder_bias,
        kl_weight=0.0,
        ce_weight=1.0,
    )
    return MethodLoss(out.loss, {term: out.ce}) * batch.predicted_share
