"""minilm: KL between last-layer attention distributions and between value relations.

    loss = 1/(A·T) Σ KL( softmax(Q_t K_tᵀ/√d) ‖ softmax(Q_s K_sᵀ/√d) ) + 1/(A·T) Σ KL( softmax(V_t V_tᵀ/√d) ‖ softmax(V_s V_sᵀ/√d) )

over the A attention heads, which student and teacher must share; widths may differ. Source: Wang et al. 2020 (MiniLM), eq. 5–9.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastkd.methods import (
    ENDS_AT_QKV,
    FusedLosses,
    Method,
    MethodLoss,
    Padded,
    plain_relation_kl,
    plain_scores,
    require_equal_heads,
    require_teacher,
)
from fastkd.models.needs import Needs, Outputs

if TYPE_CHECKING:
    from torch import Tensor

    from fastkd.data.batches import Batch
    from fastkd.models.encoder import EncoderConfig


@dataclass(frozen=True)
class Config:
    """Options of minilm."""

    as_released: bool = field(default=False, metadata={"help": "feed masked text, as the paper's released code does"})


class METHOD(Method):
    """Attention and value relations of the last layers."""

    name = "minilm"
    default_lr = 5e-4

    def __init__(self, config: Config, student: EncoderConfig, teacher: EncoderConfig | None) -> None:
        super().__init__(config, student, teacher)
        teacher = require_teacher(self.name, teacher)
        require_equal_heads(self.name, student, teacher)
        self.reads_masked = config.as_released
        self.student_needs = Needs(qkv=(student.num_layers,))
        self.teacher_needs = Needs(qkv=(teacher.num_layers,))

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> MethodLoss:
        from fastkd.kernels.relation_kl import relation_kl

        assert teacher is not None and self.teacher_config is not None
        q_s, k_s, v_s = student.qkv[self.student_config.num_layers]
        q_t, k_t, v_t = teacher.qkv[self.teacher_config.num_layers]
        heads, bound = self.student_config.num_heads, batch.max_seqlen
        attention = relation_kl(q_s, q_t, batch.sequences, heads, student_key=k_s, teacher_key=k_t, max_seqlen=bound)
        value = relation_kl(v_s, v_t, batch.sequences, heads, max_seqlen=bound)
        return MethodLoss(attention + value, {"attention": attention.detach(), "value": value.detach()})

    def loss_flops(self, *, tokens: int, pairs: int, predicted: int) -> int:
        from fastkd.kernels.relation_kl import flops

        assert self.teacher_config is not None
        widths = self.student_config.hidden_size, self.teacher_config.hidden_size
        return 2 * flops(pairs, *widths)

    def fused_losses(self) -> FusedLosses:
        heads = self.student_config.num_heads
        return [("relation_kl", {"heads": heads, "cross": True}), ("relation_kl", {"heads": heads})]

    def plain(self, student: Padded, teacher: Padded | None, labels: Tensor, mask: Tensor) -> Tensor:
        assert teacher is not None and self.teacher_config is not None
        heads = self.student_config.num_heads
        q_s, k_s, v_s = student.qkv[self.student_config.num_layers]
        q_t, k_t, v_t = teacher.qkv[self.teacher_config.num_layers]
        attention = plain_relation_kl(plain_scores(q_s, k_s, heads), plain_scores(q_t, k_t, heads), mask)
        return attention + plain_relation_kl(plain_scores(v_s, v_s, heads), plain_scores(v_t, v_t, heads), mask)

    @classmethod
    def card_note(cls, options: Mapping[str, Any]) -> str:
        return ENDS_AT_QKV
