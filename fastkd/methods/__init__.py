"""A method is one file of this folder: its formula, its options, its loss, and the plain definition that checks the loss.

A file defines a frozen dataclass ``Config`` (the method's own options, each with its help text) and one subclass of
:class:`Method` called ``METHOD``. Commands, tests, benches and model cards find it by listing the folder. ``--help`` loads
every file, and must not load torch: functions that compute import it themselves.

Shapes: T packed tokens, M predicted positions; B padded sequences of length S; D width, A heads, V vocabulary.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from types import ModuleType

    import torch
    from torch import Tensor, nn

    from fastkd.data.batches import Batch
    from fastkd.models.encoder import Encoder, EncoderConfig
    from fastkd.models.needs import Needs, Outputs


@dataclass(frozen=True)
class MethodLoss:
    """A differentiable scalar and the detached terms that it is made of (for the log)."""

    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)

    def __mul__(self, share: float) -> MethodLoss:
        """Loss and terms times the share that a mean over few positions has in the mean over the whole step."""
        if share == 1:  # nearly always: where a text has enough ordinary tokens, no product is computed
            return self
        return MethodLoss(self.loss * share, {name: value * share for name, value in self.terms.items()})


@dataclass(frozen=True)
class Padded:
    """All that a model computes of a padded batch, for :meth:`Method.plain`. Layers count from 1, as in ``Needs``."""

    logits: Tensor | None  # [B, S, V]; None: no MLM head
    hidden: Mapping[int, Tensor]  # layer: [B, S, D]; 0 is the embeddings' output
    qkv: Mapping[int, tuple[Tensor, Tensor, Tensor]]  # layer: queries, keys and values, [B, S, D] each
    replaced: Tensor | None = None  # [B, S] bool: tokens that the method put into the text that was read


class PlainModel(Protocol):
    """A student on padded batches, as :meth:`Method.plain_read` runs it."""

    @property
    def word_embeddings(self) -> Tensor: ...  # [V, D]
    def embed(self, ids: Tensor) -> Tensor: ...  # [B, S] → [B, S, D], the first layer's input
    def __call__(self, ids: Tensor, mask: Tensor) -> Padded: ...


# Name of a folder of kernels/, and options: keyword arguments that describe the call's shape.
FusedLosses = list[tuple[str, dict[str, Any]]]


class Method:
    """A training objective. The first line of the docstring of a ``METHOD`` is its line in ``--help``."""

    name: ClassVar[str]
    uses_teacher: ClassVar[bool] = True
    trains_mlm_head: ClassVar[bool] = False
    default_lr: ClassVar[float]

    student_needs: Needs
    teacher_needs: Needs | None = None
    reads_masked: bool = False
    rate_share: float = 1.0  # the step's learning rate over its peak, for weights that follow it; 1 in a validation

    def __init__(self, config: Any, student: EncoderConfig, teacher: EncoderConfig | None) -> None:
        """Check that student and teacher fit; raises ValueError naming the fix where they do not."""
        self.config = config
        self.student_config, self.teacher_config = student, teacher
        self.modules: dict[str, nn.Module] = {}  # trained beside the student; checkpoints hold them under these names

    def initialise(self, generator: torch.Generator, device: torch.device) -> None:
        """Make ``modules``, their weights drawn from ``generator``. Most methods have none."""

    def compile_graphs(self) -> None:
        """Compile what of ``modules`` is worth it. Most methods have nothing."""

    def beside(self) -> list[tuple[EncoderConfig, Needs]]:
        """Encoders among ``modules`` and how far they run: for the memory of a micro-batch. Their FLOPs are the loss's."""
        return []

    def text(self, batch: Batch) -> Tensor:
        """The ids [T] that student and teacher read: masked or plain text."""
        return batch.masked_ids if self.reads_masked else batch.input_ids

    def read(self, student: Encoder, batch: Batch, dropout: float = 0.0) -> Outputs:
        """What ``loss`` is given of the student: its forward over ``text``.

        A method whose text is made by weights that it trains, as ``rtd``'s is, makes it here. It depends on the batch and the
        weights only: how a step is cut into micro-batches, or shared among ranks, changes nothing.
        """
        return student(self.text(batch), batch, self.student_needs, dropout=dropout)

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> MethodLoss:
        """The loss of one micro-batch, so that those of a step, over all ranks, average to the step's own mean.

        A mean over tokens is one already, since micro-batches have as many; one over predicted positions takes
        ``batch.predicted_share``, one over pairs of tokens ``batch.pairs_share``.
        """
        raise NotImplementedError

    def loss_flops(self, *, tokens: int, pairs: int, predicted: int) -> int:
        """FLOPs of the loss itself, gradient included, for a micro-batch (``pairs`` is the sum of squared lengths)."""
        raise NotImplementedError

    def fused_losses(self) -> FusedLosses:
        """The fused losses that ``loss`` calls, each call once: from them the time of a step is predicted."""
        raise NotImplementedError

    def plain_read(self, student: PlainModel, ids: Tensor, masked: Tensor, labels: Tensor, mask: Tensor) -> Padded:
        """What ``plain`` is given of the student: ``read`` on padded text. Plain and masked ids, labels and mask are [B, S]."""
        return student(masked if self.reads_masked else ids, mask)

    def plain(self, student: Padded, teacher: Padded | None, labels: Tensor, mask: Tensor) -> Tensor:
        """The same loss in plain PyTorch on padded text: what gradients and FLOPs are checked against, and the paper's way.

        labels: [B, S], −100 where nothing is predicted; mask: [B, S], False at padding. Logits, and hidden states that are
        read at predicted positions only, may come as [M, …] with labels [M].
        """
        raise NotImplementedError

    @classmethod
    def parts(cls, config: Any) -> list[tuple[float, Any]]:
        """How the method divides its time: the share at which each part ends, 1 for the last, and the part's ``Config``."""
        return [(1.0, config)]

    @classmethod
    def card_note(cls, options: Mapping[str, Any]) -> str:
        """What a model card says of this method with these options: what it leaves untrained, what differs from its source."""
        return ""


def available() -> list[str]:
    """The methods in this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The module of a method.

    Raises:
        ValueError: no such method, or a file that cannot be loaded.
    """
    if name not in available():
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(available())}")
    try:
        return importlib.import_module(f"fastkd.methods.{name}")
    except Exception as error:
        raise ValueError(f"fastkd/methods/{name}.py cannot be loaded ({type(error).__name__}: {error})") from error


def descriptions() -> dict[str, str]:
    """Each method's line for ``--help``: the first of the docstring of its ``METHOD``, or why its file cannot be loaded."""
    return {name: _description(name) for name in available()}


def _description(name: str) -> str:
    try:
        return (load(name).METHOD.__doc__ or "").partition("\n")[0].rstrip(".")
    except ValueError as error:  # other methods can be trained
        return str(error)


# ---- what several methods say and refuse ------------------------------------------------------------------------------

ENDS_AT_QKV = (
    "The method trains nothing above the query, key and value projections of the student's last layer: that layer's "
    "attention output and feed-forward part keep the weights with which it began."
)


def require_teacher(name: str, teacher: EncoderConfig | None) -> EncoderConfig:
    """The teacher's configuration of a method that cannot do without."""
    if teacher is None:
        raise ValueError(
            f"--method {name} distils from a teacher: give --teacher, or train without one by --method mlm"
        )
    return teacher


def require_equal_heads(name: str, student: EncoderConfig, teacher: EncoderConfig) -> None:
    """Refuse a pair whose attention heads cannot be matched one to one."""
    if student.num_heads != teacher.num_heads:
        raise ValueError(
            f"--method {name} matches attention heads one to one, but the student has {student.num_heads} and the "
            f"teacher {teacher.num_heads}: give --student {teacher.num_heads} heads (…-{teacher.num_heads}A), or use "
            "--method minilmv2"
        )


# ---- what several plain definitions read ----------------------------------------------------------------------


def plain_scores(x: Tensor, y: Tensor, heads: int) -> Tensor:
    """[B, S, D] twice → scaled products [B, A, S, S]."""
    x_BASd, y_BASd = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (x, y))
    return x_BASd @ y_BASd.transpose(-1, -2) / x_BASd.shape[-1] ** 0.5


def plain_relation_kl(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher ‖ student) of the softmaxes of scores [B, A, S, S] over real keys, averaged over heads and real rows."""
    import torch
    import torch.nn.functional as F

    padding = ~mask[:, None, None, :]
    student, teacher = (x.float().masked_fill(padding, torch.finfo(torch.float32).min) for x in (student, teacher))
    kl = F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1), reduction="none").sum(-1)
    return (kl * mask[:, None]).sum() / (mask.sum() * student.shape[1])
