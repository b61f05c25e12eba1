"""Cases of linear_kd, and its launches."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.roofline import Step
from fastkd.kernels import linear_kd
from fastkd.kernels.linear_kd import IGNORED

if TYPE_CHECKING:
    from bench.step_model import Work

CHUNK_ROWS = 4096  # of a training step, at most


@dataclass(frozen=True)
class HeadCase:
    """Shapes, dtype and values of one call.

    ``spread`` is the standard deviation of the logits, 8 being a peaked softmax; ``gap`` that of the student's
    difference from the teacher (None: unrelated models), which needs a teacher at least as wide. ``offset`` is added to
    hidden states and weights: 1 makes logits near their width, a common part that the softmax does not see.
    """

    name: str
    rows: int
    vocabulary: int
    student_width: int
    teacher_width: int | None  # None: cross-entropy only
    dtype: torch.dtype = torch.float32
    spread: float = 2.0
    gap: float | None = None
    offset: float = 0.0
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    temperature: float = 1.0
    divergence: str = "kl"
    bias: bool = True
    ignored: int | None = None  # rows; None: no labels unless the cross-entropy needs them

    @property
    def tolerance(self) -> float:
        """‖out − ref‖/‖ref‖ against float64, of the value and of every gradient."""
        return {torch.float64: 1e-10, torch.float32: 1e-5}.get(self.dtype, 1e-2)

    def inputs(self, device: str | torch.device = "cpu", seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of ``linear_kd``; the student's tensors ask for gradients."""
        generator = torch.Generator().manual_seed(seed)
        m, v, d = self.rows, self.vocabulary, self.student_width
        draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        tensors = {"student_hidden": draw(m, d), "student_weight": draw(v, d) * self.spread / math.sqrt(d)}
        tensors = {name: x + self.offset for name, x in tensors.items()}
        if self.bias:
            tensors["student_bias"] = draw(v) / 2
        if self.teacher_width is not None:
            tensors |= self._teacher(tensors, self.teacher_width, draw)
        arguments: dict[str, Any] = {name: x.to(device, self.dtype) for name, x in tensors.items()}
        for name in ("student_hidden", "student_weight", "student_bias"):
            if name in arguments:
                arguments[name].requires_grad_()
        if self.ignored is not None or self.ce_weight:
            labels = torch.randint(v, (m,), generator=generator)
            labels[torch.randperm(m, generator=generator)[: self.ignored or 0]] = IGNORED
            arguments["labels"] = labels.to(device)
        terms = ("kl_weight", "ce_weight", "temperature", "divergence")
        return arguments | {name: getattr(self, name) for name in terms}

    def _teacher(self, student: dict[str, Tensor], width: int, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
        weight = draw(self.vocabulary, width) / math.sqrt(width) * (self.spread if self.gap is None else self.gap)
        hidden, d = draw(self.rows, width) + self.offset, self.student_width
        weight += self.offset if self.gap is None else 0.0
        if self.gap is not None:  # the student's logits plus an independent difference
            hidden[:, :d] = student["student_hidden"]
            weight[:, :d] += student["student_weight"]
        teacher = {"teacher_hidden": hidden, "teacher_weight": weight}
        if self.bias:
            near = self.gap is not None
            teacher["teacher_bias"] = student["student_bias"] if near else draw(self.vocabulary) / 2
        return teacher


_half = torch.bfloat16
CASES = (
    HeadCase("kl", 70, 1000, 32, 48),
    HeadCase("kl-no-bias", 33, 257, 16, 16, bias=False),
    HeadCase("ce", 40, 1000, 32, None, ce_weight=1.0, kl_weight=0.0, ignored=7),
    HeadCase("kl-ce", 150, 1500, 40, 24, kl_weight=0.5, ce_weight=0.7, ignored=11),
    HeadCase("kl-ce-tempered", 70, 1000, 32, 48, kl_weight=0.3, ce_weight=0.7, temperature=2.5, ignored=7),
    HeadCase("tempered", 64, 1024, 64, 64, temperature=0.5),
    HeadCase("odd", 123, 507, 252, 77, ce_weight=0.5),
    HeadCase("one-row", 1, 130, 8, 12, ce_weight=0.5, bias=False),
    HeadCase("tiny-vocabulary", 20, 5, 8, 8, ce_weight=0.5),
    HeadCase("last-column-alone", 20, 1025, 24, 24, ce_weight=0.5),
    HeadCase("all-ignored-but-one", 65, 600, 16, 24, ce_weight=0.5, ignored=64),
    HeadCase("peaked", 60, 2000, 64, 96, spread=8.0, ce_weight=0.5),
    HeadCase("near-equal", 60, 2000, 64, 96, spread=1.0, gap=0.1),
    HeadCase("peaked-near-equal", 60, 2000, 64, 96, spread=8.0, gap=0.1),
    HeadCase("all-positive", 24, 300, 128, 96, spread=0.5, offset=1.0),
    HeadCase("uncased", 9, 30522, 48, 64, spread=4.0, ce_weight=0.5, ignored=2),
    HeadCase("modern", 4, 50368, 32, 48, spread=4.0, ce_weight=0.5),
    HeadCase("half-kl-ce", 150, 1500, 40, 24, _half, kl_weight=0.5, ce_weight=0.7, temperature=2.0, ignored=11),
    HeadCase("half-peaked", 60, 2000, 64, 96, _half, spread=8.0, ce_weight=0.5),
    HeadCase("half-near-equal", 60, 2000, 64, 96, _half, spread=4.0, gap=0.3),
    HeadCase("half-peaked-near-equal", 60, 2000, 64, 96, _half, spread=8.0, gap=0.1),
    HeadCase("half-uncased", 9, 30522, 48, 64, _half, spread=4.0, gap=0.3, ignored=2),
    HeadCase("float16", 60, 2000, 64, 96, torch.float16, spread=4.0, gap=0.3, ce_weight=0.5),
    HeadCase("reverse", 20, 257, 16, 24, divergence="reverse_kl", bias=False),
    HeadCase("reverse-ce", 33, 1100, 40, 24, kl_weight=0.5, ce_weight=0.7, divergence="reverse_kl", ignored=5),
    HeadCase("reverse-tempered", 20, 507, 24, 32, ce_weight=0.5, temperature=2.5, divergence="reverse_kl", ignored=3),
    HeadCase("reverse-peaked-near-equal", 24, 1100, 64, 96, spread=8.0, gap=0.2, divergence="reverse_kl"),
    HeadCase("mse", 20, 257, 16, 24, divergence="mse", bias=False),
    HeadCase("mse-ce", 33, 1100, 40, 24, kl_weight=0.5, ce_weight=0.7, temperature=2.0, divergence="mse", ignored=5),
    HeadCase("mse-last-column-alone", 20, 1025, 24, 32, divergence="mse", ignored=3),
    HeadCase("mse-near-equal", 24, 600, 64, 96, spread=8.0, gap=0.1, ce_weight=0.5, divergence="mse"),
    HeadCase("half-reverse", 24, 600, 64, 96, _half, spread=4.0, gap=0.3, ce_weight=0.5, divergence="reverse_kl"),
    HeadCase("half-reverse-near-equal", 24, 1100, 64, 96, _half, spread=8.0, gap=0.2, divergence="reverse_kl"),
    HeadCase("half-mse", 24, 600, 64, 96, _half, spread=4.0, gap=0.3, ce_weight=0.5, divergence="mse"),
    HeadCase("half-mse-odd", 33, 1025, 52, 77, _half, divergence="mse", ignored=5),
    HeadCase("float16-mse", 24, 1100, 64, 96, torch.float16, spread=4.0, gap=0.3, ce_weight=0.5, divergence="mse"),
)
COUNTED = HeadCase("counted", 40, 300, 24, 32, ce_weight=0.5)
BENCHES = (
    HeadCase("kl 384/768", 4096, 30522, 384, 768, _half, spread=4.0),
    HeadCase("kl 768/1024", 4096, 30522, 768, 1024, _half, spread=4.0),
    HeadCase("kl+ce 768/768", 4096, 50368, 768, 768, _half, spread=4.0, ce_weight=0.5, temperature=2.0),
    HeadCase("ce 768", 4096, 30522, 768, None, _half, spread=4.0, kl_weight=0.0, ce_weight=1.0),
    HeadCase("kl 384/768 float32", 4096, 30522, 384, 768, spread=4.0),
)


def flops(case: HeadCase) -> int:
    return linear_kd.flops(case.rows, case.vocabulary, case.student_width, case.teacher_width or 0)


def steps(case: HeadCase) -> list[Step]:
    """Logits of each model, dz, dx, dW: 2MV(D_t + 3D_s) FLOPs, and M·V written once and read twice a model.

    Exponentials: one a logit for its tile's sum and one for its probability, again for a second temperature. The
    gradient of the bias can ride on dz or dW. One chunk of rows is assumed: each further one reads W again and adds
    to dW. reverse_kl reads both models' logits once more for a row's mean; mse makes their difference in one launch, and
    has a softmax only for the cross-entropy.
    """
    if case.divergence == "mse" and case.teacher_width is not None:
        return _steps_of_differences(case, case.teacher_width)
    m, v, d, size = case.rows, case.vocabulary, case.student_width, case.dtype.itemsize
    tempered = case.teacher_width is not None and case.ce_weight != 0 and case.temperature != 1
    softmaxes = 1 + tempered
    models = 1 + (case.teacher_width is not None)

    def logits(width: int, softmaxes: int) -> Step:
        return Step(2 * m * v * width, size * (m * width + v * width + m * v), softmaxes * m * v, "logits", "logits")

    steps = [logits(d, softmaxes)]
    if case.teacher_width is not None:
        steps.append(logits(case.teacher_width, 1))
        if case.divergence == "reverse_kl":
            steps.append(Step(0, size * m * v * 2, 2 * m * v, kernel="expected"))
    dz = Step(0, size * m * v * (models + 1), (softmaxes + models - 1) * m * v, kernel="gradient")
    return [*steps, dz, *_products(case)]


def _steps_of_differences(case: HeadCase, teacher_width: int) -> list[Step]:
    m, v, size, both = case.rows, case.vocabulary, case.dtype.itemsize, case.student_width + teacher_width
    ce = case.ce_weight != 0
    operands = size * both * (m + v)
    logits = Step(2 * m * v * both, operands + size * m * v * (1 + ce), ce * m * v, "logits", "difference")
    dz = Step(0, size * m * v * (2 + ce), ce * m * v, kernel="gradient")
    return [logits, dz, *_products(case)]


def _products(case: HeadCase) -> list[Step]:
    """dx and dW."""
    m, v, d, size = case.rows, case.vocabulary, case.student_width, case.dtype.itemsize
    dx = Step(2 * m * v * d, size * (m * v + v * d) + 4 * m * d, kind="product")
    dw = Step(2 * m * v * d, size * (m * v + m * d) + 4 * v * d, kind="product")
    return [dx, dw]


def scaling(case: HeadCase) -> list[Step]:
    """Of half precision: dx is read in float32 and written again, and weights whose rows are not aligned for products copied."""
    size = case.dtype.itemsize
    if size >= 4:
        return []
    copied = 2 * size * case.vocabulary if case.vocabulary % 64 else 0
    return [Step(0, case.student_width * ((4 + size) * case.rows + copied))]


def in_step(
    work: Work, *, kl_weight: float, ce_weight: float, temperature: float = 1.0, divergence: str = "kl"
) -> list[Step]:
    """At the predicted rows, with float32 parameters; without a teacher where the KL has no weight.

    Launches assumed: the logits' kernel of each model and the gradient's, dx and dW, for each chunk of rows; the bias's
    gradient comes with one of them, and a later chunk adds to dW inside its product. What only touches the statistics of
    tiles is not counted.

    On top of the launches: a chunk after the first reads W again and adds to dW (4 + 4); W is cast (4 + 2), the teacher's
    is bfloat16 already; and the gradient of the tied word embeddings is added to the decoder's (12).
    """
    D, teacher_width = work.student.hidden_size, work.teacher.hidden_size if kl_weight else None
    case = HeadCase(
        "step", work.predicted, work.student.vocab_size, D, teacher_width, _half, kl_weight=kl_weight,
        ce_weight=ce_weight, temperature=temperature, divergence=divergence,
    )  # fmt: skip
    bytes_ = (_chunks(work) - 1) * (8 * D + 2 * 2 * D + 2 * (teacher_width or 0)) + (6 + 12) * D
    in_float32 = replace(case, dtype=torch.float32)
    return [*steps(case), *scaling(in_float32), Step(0, case.vocabulary * bytes_)]


def host_operations(work: Work, calls: Sequence[dict[str, Any]]) -> int:
    """A chunk has three more with a teacher, and reverse_kl a buffer and a launch."""

    def of_chunk(options: dict[str, Any]) -> int:
        return 7 + 3 * bool(options["kl_weight"]) + 2 * (options.get("divergence") == "reverse_kl")

    return sum(14 + of_chunk(options) * _chunks(work) for options in calls)


def _chunks(work: Work) -> int:
    return -(-work.predicted // CHUNK_ROWS)
