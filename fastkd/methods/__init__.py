"""Methods: one file each. A method says what it reads from student and teacher, and makes one loss of it.

A file here defines a frozen dataclass ``Config`` (the method's own options, each with its help text) and one
subclass of :class:`Method` called ``METHOD``. Commands, tests and benches find it by listing this folder; tests and benches
also need its plain definition (``docs/methods.md`` lists where). ``--help`` loads every file, and must not load torch:
functions that compute import it themselves.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from types import ModuleType

    import torch
    from torch import Tensor, nn

    from fastkd.data.batches import Batch
    from fastkd.models.encoder import Encoder, EncoderConfig
    from fastkd.models.needs import Needs, Outputs
    from fastkd.models.teacher import Teacher


@dataclass(frozen=True)
class MethodLoss:
    """A differentiable scalar and the detached terms that it is made of (for the log)."""

    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)

    def __mul__(self, share: float) -> MethodLoss:
        """Loss and parts times the share that a mean over few positions has in the mean over the whole step."""
        if share == 1:  # nearly always: a text with ordinary tokens enough costs no product
            return self
        return MethodLoss(self.loss * share, {name: value * share for name, value in self.parts.items()})


class Method:
    """A training objective. The first line of the docstring of a ``METHOD`` is its line in ``--help``."""

    name: ClassVar[str]
    uses_teacher: ClassVar[bool] = True
    trains_mlm_head: ClassVar[bool] = False
    default_lr: ClassVar[float]

    student_needs: Needs
    teacher_needs: Needs | None = None
    reads_masked: bool = False

    def __init__(self, config: Any, student: EncoderConfig, teacher: EncoderConfig | None) -> None:
        """Check that student and teacher fit; raises ValueError naming the fix where they do not."""
        self.config = config
        self.student_config, self.teacher_config = student, teacher
        self.modules: dict[str, nn.Module] = {}  # trained beside the student; checkpoints hold them under these names

    def initialise(self, generator: torch.Generator, device: torch.device) -> None:
        """Make ``modules``, their weights drawn from ``generator``. Most methods have none."""

    def text(self, batch: Batch) -> Tensor:
        """The ids [T] that student and teacher read: masked or plain text."""
        return batch.masked_ids if self.reads_masked else batch.input_ids

    def compute(
        self,
        student: Outputs,
        teacher: Outputs | None,
        batch: Batch,
        student_model: Encoder,
        teacher_model: Teacher | None,
    ) -> MethodLoss:
        """The loss of one micro-batch, so that those of a step, over all ranks, average to the step's own mean.

        A mean over tokens is one already, since micro-batches have as many; one over predicted positions takes
        ``batch.predicted_share``, one over pairs of tokens ``batch.pairs_share``.
        """
        raise NotImplementedError

    def loss_flops(self, *, tokens: int, pairs: int, predicted: int) -> int:
        """FLOPs of the loss itself, gradient included, for a micro-batch (``pairs`` is the sum of squared lengths)."""
        raise NotImplementedError


def available() -> list[str]:
    """The methods in this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The module of a method.

    Raises:
        ValueError: no such method.
    """
    if name not in available():
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(available())}")
    return importlib.import_module(f"fastkd.methods.{name}")


def descriptions() -> dict[str, str]:
    """Each method's line for ``--help``: the first of the docstring of its ``METHOD``."""
    return {name: (load(name).METHOD.__doc__ or "").partition("\n")[0].rstrip(".") for name in available()}


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
