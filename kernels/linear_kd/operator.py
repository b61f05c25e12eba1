"""The operator ``fastkd::linear_kd``: both paths behind one schema, its fake, and a backward that scales the gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd.kernels import scaling
from fastkd.kernels.linear_kd import blocked, launch
from fastkd.kernels.linear_kd.head import IGNORED, Gradients, Head, Terms, check_labels
from fastkd.kernels.linear_kd.logits import round_up

_CHUNK_BYTES = 96 << 20  # of a chunk's exponentials in the blocked path

_ARGUMENTS = (
    "Tensor student_hidden, Tensor student_weight, Tensor? labels, Tensor? student_bias, Tensor? teacher_hidden, "
    "Tensor? teacher_weight, Tensor? teacher_bias, float kl_weight, float ce_weight, float temperature, "
    "str divergence, int chunk_rows, str backend, ScalarType dtype, bool need_hidden, bool need_weight, bool need_bias"
)
_RETURNS = "Tensor loss, Tensor kl, Tensor ce, Tensor dx, Tensor dw, Tensor db"


@torch.library.custom_op("fastkd::linear_kd", mutates_args=(), schema=f"({_ARGUMENTS}) -> ({_RETURNS})")
def linear_kd_operator(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor | None,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    kl_weight: float,
    ce_weight: float,
    temperature: float,
    divergence: str,
    chunk_rows: int,
    backend: str,
    dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    """The values and the gradients; one that is not needed is empty. The weight's may be a view of a matrix with more rows."""
    teacher = None
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = Head(teacher_hidden, teacher_weight, teacher_bias)
    student = Head(student_hidden, student_weight, student_bias)
    labels = None if labels is None else labels.contiguous()  # kernels take them side by side
    divergence = divergence if teacher is not None else "kl"  # of none, so that kernels have one form
    tempered = teacher is not None and divergence != "mse"
    terms = Terms(kl_weight, ce_weight, temperature if tempered else 1.0, divergence)
    needed, vocabulary = (need_hidden, need_weight, need_bias), len(student_weight)
    aligned = round_up(vocabulary, launch.ALIGNED) if backend == "triton" else vocabulary
    outputs = _empty_outputs(student_hidden, student_weight, dtype, backend, *needed, aligned)
    out = Gradients(*(x if need else None for x, need in zip(outputs[3:], needed, strict=True)))
    compiled = backend == "triton" and len(student_hidden) > 0
    rows = chunk_rows or _default_chunk(student_hidden, student_weight, teacher is not None, backend)
    share = _share(student_hidden, labels, vocabulary, backend)
    # A small dz divided by a large N is below float16's smallest number: in float16 the result is divided instead. That of mse
    # is raised too, for it has a factor of 2/V.
    raised = 256.0 if divergence == "mse" else 1.0
    early = share if dtype != torch.float16 else torch.full_like(share, raised)
    with torch.autocast(student_hidden.device.type, enabled=False):
        path = launch if compiled else blocked
        sums = path.value_and_gradients(student, teacher, labels, terms, rows, dtype, early, out)
    for x in out.wanted if dtype == torch.float16 else ():
        x.mul_(share / raised)
    if compiled:
        launch.values(sums, share, terms, teacher is not None, vocabulary, outputs[:3])
    else:
        kl, ce = sums.kl * share, sums.ce * share
        for x, value in zip(outputs, (kl_weight * kl + ce_weight * ce, kl, ce), strict=False):
            x.copy_(value)
    # The products write dW with ``aligned`` rows: those beyond V are cut off only here, by a view, without a copy.
    return *outputs[:4], outputs[4][:vocabulary], outputs[5]


def _default_chunk(hidden: Tensor, weight: Tensor, with_teacher: bool, backend: str) -> int:
    """Equal chunks of at most 4,096 rows on a GPU, of ``_CHUNK_BYTES`` of logits on a CPU; a multiple of 16."""
    rows = len(hidden)
    largest = 4096 if backend == "triton" else max(64, _CHUNK_BYTES // (4 * len(weight) * (1 + with_teacher)))
    chunks = max(1, -(-rows // largest))
    return max(16, -(-rows // (16 * chunks)) * 16)


def _share(hidden: Tensor, labels: Tensor | None, vocabulary: int, backend: str) -> Tensor:
    """1/N in float64, a tensor on the device, so that the host does not wait for the count. Checks the labels."""
    if labels is None:
        return hidden.new_full((), 1 / max(1, len(hidden)), dtype=torch.float64)
    if backend == "triton" and len(labels):
        return launch.share_of(labels, vocabulary)
    check_labels(labels, vocabulary)
    return (labels != IGNORED).sum().clamp(min=1).double().reciprocal()


def _empty_outputs(
    hidden: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    backend: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    weight_rows: int,
) -> tuple[Tensor, ...]:
    wide = torch.promote_types(dtype, torch.float32)
    loss, kl, ce = (hidden.new_empty((), dtype=wide) for _ in range(3))
    dx = hidden.new_empty(hidden.shape if need_hidden else (0,), dtype=wide)
    shape = (weight_rows, weight.shape[1]) if need_weight else (0,)
    dw = weight.new_empty(shape, dtype=_weight_dtype(weight, dtype, backend))
    return loss, kl, ce, dx, dw, hidden.new_empty(weight.shape[:1] if need_bias else (0,), dtype=wide)


def _weight_dtype(weight: Tensor, dtype: torch.dtype, backend: str) -> torch.dtype:
    """Of dW: bfloat16 for bfloat16 parameters on the Triton path, where the last product or sum rounds as it writes and the
    backward rarely scales; else float32, or float64."""
    final = backend == "triton" and weight.dtype == dtype == torch.bfloat16
    return dtype if final else torch.promote_types(dtype, torch.float32)


@linear_kd_operator.register_fake
def _fake(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor | None,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    kl_weight: float,
    ce_weight: float,
    temperature: float,
    divergence: str,
    chunk_rows: int,
    backend: str,
    dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    needed = (need_hidden, need_weight, need_bias)
    return _empty_outputs(student_hidden, student_weight, dtype, backend, *needed, len(student_weight))


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, kl, ce, *gradients = output
    ctx.backend, ctx.needed = inputs[-5], inputs[-3:]
    ctx.dtypes = [None if x is None else x.dtype for x in (inputs[0], inputs[1], inputs[3])]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(kl, ce, *gradients)
    ctx.save_for_backward(*gradients)


def _scale_gradients(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_kd has no second derivative: leave out create_graph=True, or use backend='reference'"
        )
    if grad_loss is None:
        return (None,) * 17
    dx, dw, db = (
        scaling.scaled(x, grad_loss, dtype, backend=ctx.backend) if needed else None
        for x, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needed, strict=True)
    )
    return dx, dw, None, db, *[None] * 13


linear_kd_operator.register_autograd(_scale_gradients, setup_context=_save_gradients)
