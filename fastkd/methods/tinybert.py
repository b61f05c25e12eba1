"""tinybert: mean squared errors of attention scores and hidden states, layer by layer.

    loss = Σ_{m=1..L_s} MSE(scores_s^m, scores_t^{g(m)}) + Σ_{m=0..L_s} MSE(W h_s^m, h_t^{g(m)}),  g(m) = m·L_t/L_s

h^0 are the embeddings; W is one learned matrix shared by all layers where the widths differ and the identity where
they do not; scores are q·k/√d before the softmax. Source: Jiao et al. 2020 (TinyBERT), eq. 7–9, general distillation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastkd.methods import FusedLosses, Method, MethodLoss, Padded, plain_scores, require_equal_heads, require_teacher
from fastkd.models.needs import Needs, Outputs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fastkd.data.batches import Batch
    from fastkd.models.encoder import EncoderConfig


@dataclass(frozen=True)
class Config:
    """Options of tinybert."""

    as_released: bool = field(
        default=False,
        metadata={
            "help": "the paper's released objective: scores of the first and last layer and the last hidden states "
            "only, no projection, masked text"
        },
    )


class METHOD(Method):
    """Attention scores and hidden states under a uniform layer map."""

    name = "tinybert"
    default_lr = 5e-4

    def __init__(self, config: Config, student: EncoderConfig, teacher: EncoderConfig | None) -> None:
        super().__init__(config, student, teacher)
        teacher = require_teacher(self.name, teacher)
        require_equal_heads(self.name, student, teacher)
        if teacher.num_layers % student.num_layers:
            raise ValueError(
                f"--method tinybert maps student layers evenly onto the teacher's, but {teacher.num_layers} layers are no "
                f"multiple of {student.num_layers}: give --student a number of layers that divides {teacher.num_layers}"
            )
        if config.as_released and student.hidden_size != teacher.hidden_size:
            raise ValueError(
                "the released tinybert objective has no projection: --as-released needs a student of the teacher's width "
                f"{teacher.hidden_size}, got {student.hidden_size}"
            )
        self.reads_masked = config.as_released
        stride, last = teacher.num_layers // student.num_layers, student.num_layers
        self.score_pairs = [(m, m * stride) for m in range(1, last + 1)]
        self.hidden_pairs = [(0, 0), *self.score_pairs]
        if config.as_released:
            self.score_pairs = sorted({(1, 1), (last, teacher.num_layers)})
            self.hidden_pairs = [(last, teacher.num_layers)]
        self.student_needs = Needs(
            hidden=tuple(m for m, _ in self.hidden_pairs), qkv=tuple(m for m, _ in self.score_pairs)
        )
        self.teacher_needs = Needs(
            hidden=tuple(g for _, g in self.hidden_pairs), qkv=tuple(g for _, g in self.score_pairs)
        )
        self.widths = student.hidden_size, teacher.hidden_size
        self.projects = student.hidden_size != teacher.hidden_size

    def initialise(self, generator: torch.Generator, device: torch.device) -> None:
        from torch import nn

        if self.projects:
            projection = nn.Linear(*self.widths, bias=False)
            nn.init.normal_(projection.weight, std=self.student_config.initializer_range, generator=generator)
            self.modules["projection"] = projection.to(device)

    def _projected(self, hidden: Tensor) -> Tensor:
        """W h, of the teacher's width."""
        return self.modules["projection"](hidden) if self.projects else hidden

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> MethodLoss:
        import torch

        from fastkd.kernels.hidden_mse import hidden_mse
        from fastkd.kernels.score_mse import score_mse

        assert teacher is not None
        sequences, heads = batch.sequences, self.student_config.num_heads
        scores, states = [], []
        for m, g in self.score_pairs:
            (q_s, k_s, _), (q_t, k_t, _) = student.qkv[m], teacher.qkv[g]
            error = score_mse(q_s, k_s, q_t, k_t, sequences, heads, max_seqlen=batch.max_seqlen)
            # The mean over the pairs of the whole batch, not of this micro-batch.
            scores.append(error * batch.pairs_share)
        for m, g in self.hidden_pairs:
            states.append(hidden_mse(self._projected(student.hidden[m]), teacher.hidden[g]))
        score, hidden = torch.stack(scores).sum(), torch.stack(states).sum()
        return MethodLoss(score + hidden, {"score": score.detach(), "hidden": hidden.detach()})

    def loss_flops(self, *, tokens: int, pairs: int, predicted: int) -> int:
        from fastkd.kernels.score_mse import flops

        d_s, d_t = self.widths
        project = 3 * 2 * tokens * d_s * d_t * len(self.hidden_pairs) if self.projects else 0
        return project + len(self.score_pairs) * flops(pairs, d_s, d_t)

    def fused_losses(self) -> FusedLosses:
        scores: FusedLosses = [("score_mse", {}) for _ in self.score_pairs]
        return scores + [("hidden_mse", {"projected": self.projects}) for _ in self.hidden_pairs]

    def plain(self, student: Padded, teacher: Padded | None, labels: Tensor, mask: Tensor) -> Tensor:
        import torch

        assert teacher is not None
        losses, heads = [], self.student_config.num_heads
        pairs = (mask[:, None, :, None] & mask[:, None, None, :]).float()
        for m, g in self.score_pairs:
            (q_s, k_s, _), (q_t, k_t, _) = student.qkv[m], teacher.qkv[g]
            error = plain_scores(q_s, k_s, heads) - plain_scores(q_t, k_t, heads)
            losses.append((error.float().square() * pairs).sum() / (pairs.sum() * heads))
        for m, g in self.hidden_pairs:
            errors = (self._projected(student.hidden[m]).float() - teacher.hidden[g].float()).square().mean(-1)
            losses.append((errors * mask).sum() / mask.sum())
        return torch.stack(losses).sum()
