"""minilmv2: KL between the self-relations of queries, keys and values, one layer of each model.

    loss = Σ_{X ∈ {Q, K, V}} 1/(A·T) Σ_{heads, rows} KL( softmax(X_t X_tᵀ/√d_t) ‖ softmax(X_s X_sᵀ/√d_s) )

with the projections regrouped into A relation heads, so that widths and attention heads of student and teacher
may differ. Both models stop at the distilled layer's QKV projection. Source: Wang et al. 2021 (MiniLMv2), eq. 2–6.
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
    require_teacher,
)
from fastkd.models.needs import Needs, Outputs

if TYPE_CHECKING:
    from torch import Tensor

    from fastkd.data.batches import Batch
    from fastkd.models.encoder import EncoderConfig


@dataclass(frozen=True)
class Config:
    """Options of minilmv2."""

    relation_heads: int | None = field(
        default=None,
        metadata={"help": "relation heads A; default 48 for BERT-base, 64 for BERT-large, else the teacher's heads"},
    )
    teacher_layer: int | None = field(
        default=None,
        metadata={"help": "teacher layer to distil, from 1; default 21 for a teacher of 24 layers, else the last"},
    )
    as_released: bool = field(
        default=False,
        metadata={
            "help": "the paper's released objective: the teacher's attention heads as relation heads, its last layer, "
            "masked text"
        },
    )

    def __post_init__(self) -> None:
        for name, value in (("--relation-heads", self.relation_heads), ("--teacher-layer", self.teacher_layer)):
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} is below 1: count from 1, or leave it out")


def default_relation_heads(teacher: EncoderConfig) -> int:
    """48 for BERT-base, 64 for BERT-large (MiniLMv2, section 4.1), elsewhere the teacher's attention heads."""
    return {(12, 768): 48, (24, 1024): 64}.get((teacher.num_layers, teacher.hidden_size), teacher.num_heads)


def default_teacher_layer(teacher: EncoderConfig) -> int:
    """21 for the 24 layers of the large models (MiniLMv2, section 4.1), elsewhere the last."""
    return 21 if teacher.num_layers == 24 else teacher.num_layers


class METHOD(Method):
    """Query, key and value relations of the student's last layer against one teacher layer."""

    name = "minilmv2"
    default_lr = 6e-4

    def __init__(self, config: Config, student: EncoderConfig, teacher: EncoderConfig | None) -> None:
        super().__init__(config, student, teacher)
        teacher = require_teacher(self.name, teacher)
        default = teacher.num_heads if config.as_released else default_relation_heads(teacher)
        self.relation_heads = default if config.relation_heads is None else config.relation_heads
        default = teacher.num_layers if config.as_released else default_teacher_layer(teacher)
        self.layer = default if config.teacher_layer is None else config.teacher_layer
        self.reads_masked = config.as_released
        for who, width in (("student", student.hidden_size), ("teacher", teacher.hidden_size)):
            if width % self.relation_heads:
                raise ValueError(
                    f"--relation-heads {self.relation_heads} does not divide the {who}'s width {width}: give a common divisor "
                    f"of {student.hidden_size} and {teacher.hidden_size}"
                )
        if self.layer > teacher.num_layers:
            raise ValueError(
                f"--teacher-layer {self.layer} is not among the teacher's layers 1 to {teacher.num_layers}"
            )
        self.student_needs = Needs(qkv=(student.num_layers,))
        self.teacher_needs = Needs(qkv=(self.layer,))

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> MethodLoss:
        from fastkd.kernels.relation_kl import relation_kl

        assert teacher is not None
        relations = [
            relation_kl(s_TD, t_TD, batch.sequences, self.relation_heads, max_seqlen=batch.max_seqlen)
            for s_TD, t_TD in zip(student.qkv[self.student_config.num_layers], teacher.qkv[self.layer], strict=True)
        ]
        terms = {name: value.detach() for name, value in zip(("query", "key", "value"), relations, strict=True)}
        return MethodLoss(relations[0] + relations[1] + relations[2], terms)

    def loss_flops(self, *, tokens: int, pairs: int, predicted: int) -> int:
        from fastkd.kernels.relation_kl import flops

        assert self.teacher_config is not None
        return 3 * flops(pairs, self.student_config.hidden_size, self.teacher_config.hidden_size)

    def fused_losses(self) -> FusedLosses:
        return 3 * [("relation_kl", {"heads": self.relation_heads})]

    def plain(self, student: Padded, teacher: Padded | None, labels: Tensor, mask: Tensor) -> Tensor:
        import torch

        assert teacher is not None
        losses, heads = [], self.relation_heads
        for x_s, x_t in zip(student.qkv[self.student_config.num_layers], teacher.qkv[self.layer], strict=True):
            losses.append(plain_relation_kl(plain_scores(x_s, x_s, heads), plain_scores(x_t, x_t, heads), mask))
        return torch.stack(losses).sum()

    @classmethod
    def card_note(cls, options: Mapping[str, Any]) -> str:
        return ENDS_AT_QKV
