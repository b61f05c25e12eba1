"""logit_kd: the teacher's softmax at the masked positions, with cross-entropy beside it.

    loss = kl_weight · T² · KL(teacher ‖ student) + ce_weight · CE + cosine_weight · (1 − cos(h_s, h_t))

With ``--divergence`` another one takes the place of T² · KL(teacher ‖ student):

    reverse_kl = T² · KL(student ‖ teacher)
    mse        = mean over the vocabulary of (z_s − z_t)², each logit without the mean of its row

The mse has no temperature (Kim et al. 2021, arXiv 2105.08919). A softmax does not see a shift of a row's logits, and what it
does not see must not be learnt; so centred, mse/2 is the limit of T²·KL for a large T. For small differences T²·KL is half their
variance under the teacher's softmax, at any T, and mse/2 that over the vocabulary. Published claims about it contradict each
other: worse by 7.6% (Peng et al. 2024, arXiv 2410.16215), better for encoders (arXiv 2505.16956).

All terms are averaged over the masked positions. After the share ``--kd-until`` of its time the method goes on by ce_weight · CE
only: no teacher runs, and none is charged. With ``--kl-schedule lr`` the divergence's weight is kl_weight times the learning
rate over its peak (after Peng et al. 2024, arXiv 2410.16215, who let it be high while the rate is high).

Source: Hinton et al. 2015; Sanh et al. 2019 (DistilBERT: T 2, weights 5, 2 and 1, the cosine between last hidden states); Bui
et al. 2024.

Sanh et al. take the cosine of all tokens, here it is that of the masked positions: both models compute their last layer
at these rows only, and at all of them a step of 6L-768H under BERT-base would cost 10% more FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from fastkd.methods import FusedLosses, Method, MethodLoss, Padded, require_teacher
from fastkd.models.needs import Needs, Outputs

if TYPE_CHECKING:
    from torch import Tensor

    from fastkd.data.batches import Batch
    from fastkd.models.encoder import EncoderConfig


_NAMES = {"reverse_kl": "KL(student ‖ teacher)", "mse": "the mean square of the differences of centred logits"}


@dataclass(frozen=True)
class Config:
    """Options of logit_kd."""

    temperature: float = field(default=2.0, metadata={"help": "softmax temperature T of both distributions"})
    divergence: Literal["kl", "reverse_kl", "mse"] = field(
        default="kl",
        metadata={
            "help": "what is between the distributions: T²·KL(teacher‖student), T²·KL(student‖teacher), or the mean square of the "
            "differences of centred logits, which has no temperature"
        },
    )
    kl_weight: float = field(
        default=0.5, metadata={"help": "weight of the divergence, T²·KL(teacher‖student) or what --divergence names"}
    )
    ce_weight: float = field(default=0.5, metadata={"help": "weight of the cross-entropy with the true tokens"})
    cosine_weight: float = field(
        default=0.0,
        metadata={
            "help": "weight of 1 − cosine between last hidden states at the masked positions (DistilBERT: of all tokens); "
            "equal widths only"
        },
    )
    kd_until: float = field(
        default=1.0, metadata={"help": "share of the method's time after which it goes on without the teacher"}
    )
    kl_schedule: Literal["constant", "lr"] = field(
        default="constant", metadata={"help": "lr: --kl-weight follows the learning rate"}
    )
    as_released: bool = field(
        default=False,
        metadata={"help": "the paper's released objective: KL divided by the vocabulary's size, T 1, no cosine"},
    )

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"--temperature must be above 0 and finite, got {self.temperature}")
        others = (self.ce_weight, self.cosine_weight)
        if not 0 < self.kl_weight < math.inf or not all(0 <= weight < math.inf for weight in others):
            raise ValueError("--kl-weight must be above 0, --ce-weight and --cosine-weight not below 0, and all finite")
        if self.as_released and self.divergence != "kl":
            raise ValueError(f"--as-released is the KL: leave it out, or --divergence {self.divergence}")
        if self.as_released and (self.temperature != Config.temperature or self.cosine_weight):
            raise ValueError("--as-released has T 1 and no cosine: leave it out, or --temperature and --cosine-weight")
        if self.divergence == "mse" and self.temperature != Config.temperature:
            raise ValueError(f"--divergence mse has no temperature: leave out --temperature {self.temperature:g}")
        if not 0 < self.kd_until <= 1:
            raise ValueError(f"--kd-until is a share above 0 and at most 1, got {self.kd_until:g}")
        if self.kd_until < 1 and not self.ce_weight:
            raise ValueError("--kd-until leaves only the cross-entropy: give --ce-weight above 0")


@dataclass(frozen=True)
class Untaught(Config):
    """The same options where the time of the teacher is over."""


class METHOD(Method):
    """KL to the teacher's softmax and cross-entropy at the masked positions."""

    name = "logit_kd"
    trains_mlm_head = True
    default_lr = 5e-4
    reads_masked = True

    def __init__(self, config: Config, student: EncoderConfig, teacher: EncoderConfig | None) -> None:
        super().__init__(config, student, teacher)
        teacher = require_teacher(self.name, teacher)
        self.taught = not isinstance(config, Untaught)
        self.cosine = 0.0 if config.as_released or not self.taught else config.cosine_weight
        if self.cosine and student.hidden_size != teacher.hidden_size:
            raise ValueError(
                f"--cosine-weight compares hidden states of one width, but the student has {student.hidden_size} and "
                f"the teacher {teacher.hidden_size}: leave it at 0, or give --student a width of {teacher.hidden_size}"
            )
        self.temperature = 1.0 if config.as_released else config.temperature
        weight = config.kl_weight / student.vocab_size if config.as_released else config.kl_weight
        self.kl_weight = weight if self.taught else 0.0
        self.student_needs = Needs(logits=True, last_rows=self.cosine > 0)
        self.teacher_needs = Needs(logits=True, last_rows=self.cosine > 0) if self.taught else None

    @classmethod
    def parts(cls, config: Config) -> list[tuple[float, Config]]:
        if config.kd_until == 1:
            return [(1.0, config)]
        same = {each.name: getattr(config, each.name) for each in fields(Config)}
        return [(config.kd_until, config), (1.0, Untaught(**same))]

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> MethodLoss:
        import torch
        import torch.nn.functional as F

        from fastkd.kernels.linear_kd import linear_kd

        assert student.head_rows is not None and student.decoder_weight is not None
        taught: dict[str, Any] = {}
        if teacher is not None:
            follows = self.config.kl_schedule == "lr"
            taught = {
                "teacher_hidden": teacher.head_rows,
                "teacher_weight": teacher.decoder_weight,
                "teacher_bias": teacher.decoder_bias,
                "kl_weight": self.kl_weight * (self.rate_share if follows else 1.0),
                "temperature": self.temperature,
                "divergence": self.config.divergence,
            }
        out = linear_kd(
            student.head_rows,
            student.decoder_weight,
            batch.labels,
            student_bias=student.decoder_bias,
            ce_weight=self.config.ce_weight,
            **({"kl_weight": 0.0} | taught),
        )
        loss, terms = out.loss, ({self.config.divergence: out.kl} if taught else {}) | {"ce": out.ce}
        if self.cosine:
            assert teacher is not None and student.last_rows is not None and teacher.last_rows is not None
            valid = (batch.labels >= 0).float()
            h_t_MD = teacher.last_rows.to(torch.float32, copy=True)  # inference tensors cannot be saved for a backward
            distance = 1 - F.cosine_similarity(student.last_rows.float(), h_t_MD, dim=-1)
            cosine = (distance * valid).sum() / valid.sum().clamp(min=1)
            loss = loss + self.cosine * cosine
            terms["cosine"] = cosine.detach()
        return MethodLoss(loss, terms) * batch.predicted_share

    def loss_flops(self, *, tokens: int, pairs: int, predicted: int) -> int:
        from fastkd.kernels.linear_kd import flops

        assert self.teacher_config is not None
        return flops(
            predicted,
            self.student_config.vocab_size,
            self.student_config.hidden_size,
            self.teacher_config.hidden_size if self.taught else 0,
        )

    def fused_losses(self) -> FusedLosses:
        weights = {"kl_weight": self.kl_weight, "ce_weight": self.config.ce_weight}
        kind = {"temperature": self.temperature, "divergence": self.config.divergence}
        return [("linear_kd", weights | kind)]

    def plain(self, student: Padded, teacher: Padded | None, labels: Tensor, mask: Tensor) -> Tensor:
        import torch.nn.functional as F

        assert student.logits is not None
        predicted = labels >= 0
        ce = F.cross_entropy(student.logits.flatten(0, -2).float(), labels.flatten(), ignore_index=-100)
        if not self.taught:
            return self.config.ce_weight * ce
        assert teacher is not None and teacher.logits is not None
        divergence = self.plain_divergence(student.logits, teacher.logits)[predicted].mean()
        loss = self.kl_weight * divergence + self.config.ce_weight * ce
        if self.cosine:
            assert self.teacher_config is not None
            h_s = student.hidden[self.student_config.num_layers][predicted].float()
            h_t = teacher.hidden[self.teacher_config.num_layers][predicted].float()
            loss = loss + self.cosine * (1 - F.cosine_similarity(h_s, h_t, dim=-1)).mean()
        return loss

    def plain_divergence(self, z_s: Tensor, z_t: Tensor) -> Tensor:
        """Of each position, from both models' logits [..., V] → [...]."""
        import torch.nn.functional as F

        T, z_s, z_t = self.temperature, z_s.float(), z_t.float()
        if self.config.divergence == "mse":
            return (z_s - z_t).var(-1, correction=0)
        if self.config.divergence == "reverse_kl":
            z_s, z_t = z_t, z_s
        log_p, q = F.log_softmax(z_s / T, -1), F.softmax(z_t / T, -1)
        return T * T * F.kl_div(log_p, q, reduction="none").sum(-1)

    @classmethod
    def card_note(cls, options: Mapping[str, Any]) -> str:
        notes = []
        if (divergence := options.get("divergence", "kl")) != "kl":
            notes.append(f"Distilled by {_NAMES[divergence]} in place of KL(teacher ‖ student).")
        if options.get("cosine_weight") and not options.get("as_released"):
            notes.append(
                "The cosine of last hidden states was that of the masked positions; DistilBERT's is that of all tokens."
            )
        return " ".join(notes)
