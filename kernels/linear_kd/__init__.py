"""Output head, teacher softmax, a divergence and cross-entropy in one loss that never holds [M, V].

With z = x Wᵀ + b for student and teacher, p = softmax(z_s/τ), q = softmax(z_t/τ) and N rows not ignored,

    KL   = τ²/N · Σ_rows Σ_v q (log q − log p)           (Hinton, Vinyals, Dean 2015, arXiv 1503.02531)
    CE   = 1/N · Σ_rows −log softmax(z_s)[y]
    loss = kl_weight·KL + ce_weight·CE
    dz_s = [kl_weight·τ·(p − q) + ce_weight·(softmax(z_s) − onehot(y))] / N,  dx = dz W,  dW = dzᵀ x,  db = Σ dz.

Another divergence may take KL's place. With δ = z_s − z_t, E_p the mean over the vocabulary under p, and mean δ the plain one,

    reverse_kl = τ²/N · Σ_rows Σ_v p (log p − log q),    dz_s = p·(δ − E_p δ) / N
    mse        = 1/N · Σ_rows 1/V Σ_v (δ − mean δ)²,      dz_s = 2/V·(δ − mean δ) / N

reverse_kl (Gu et al. 2023, arXiv 2306.08543): log p − log q is δ/τ less one number a row, which p·(… − E_p …) takes out. mse (Kim
et al. 2021, arXiv 2105.08919) is of logits without their row's mean, and has no temperature. A softmax does not see a shift of a
row, so neither should the loss, and so centred it is the limit of KL: τ²·KL → mse/2 for τ → ∞. All three have Σ_v dz = 0, on which
the subtraction of the mean row of W rests (``Head``). mse counts a word that a bias masks out like any other.

The loss is a scalar, so its gradient is made in the forward pass, a chunk of rows at a time, and the backward
only scales it. Shapes: M rows, V vocabulary, D width (D_s, D_t), R rows of a chunk, C columns of a block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.kernels import tiling
from fastkd.kernels.linear_kd.head import DIVERGENCES, IGNORED
from fastkd.kernels.linear_kd.operator import linear_kd_operator


class LinearKD(NamedTuple):
    """The loss (differentiable) and its two terms before weighting (detached; 0 where the weight is 0)."""

    loss: Tensor
    kl: Tensor  # or the divergence in its place
    ce: Tensor


def reference(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    divergence: str = "kl",
) -> LinearKD:
    """The definition in plain PyTorch: holds every logit. Arguments as in ``linear_kd``."""
    student = _at_least_float32(F.linear(student_hidden, student_weight, student_bias))
    valid = torch.ones_like(student[:, 0], dtype=torch.bool) if labels is None else labels != IGNORED
    rows = valid.sum().clamp(min=1)
    kl = ce = student.new_zeros(())
    if teacher_hidden is not None and teacher_weight is not None and kl_weight:
        teacher = _at_least_float32(F.linear(teacher_hidden, teacher_weight, teacher_bias))
        of_rows = _divergence(student, teacher, divergence, temperature).masked_fill(~valid, 0.0)
        kl = (1.0 if divergence == "mse" else temperature**2) * of_rows.sum() / rows
    if labels is not None and ce_weight:
        ce = F.cross_entropy(student, labels, ignore_index=IGNORED, reduction="sum") / rows
    return LinearKD(kl_weight * kl + ce_weight * ce, kl.detach(), ce.detach())


def _divergence(student: Tensor, teacher: Tensor, divergence: str, temperature: float) -> Tensor:
    """Of each row of logits [M, V], without τ²: [M]."""
    if divergence == "mse":
        difference = student - teacher
        return (difference - difference.mean(-1, keepdim=True)).square().mean(-1)
    log_p = F.log_softmax(student / temperature, dim=-1)
    log_q = F.log_softmax(teacher / temperature, dim=-1)
    if divergence == "reverse_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def flops(rows: int, vocabulary: int, student_width: int, teacher_width: int = 0) -> int:
    """Logits of student and teacher, and the student's two gradients: 2MV(3·Ds + Dt). Matrix products only, 2·m·n·k each, of
    which every divergence has the same."""
    return 2 * rows * vocabulary * (3 * student_width + teacher_width)


def linear_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    divergence: str = "kl",
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> LinearKD:
    """kl_weight·KL(teacher ‖ student) + ce_weight·CE through both output heads, without an [M, V] matrix.

    Args:
        student_hidden: [M, D_s], the rows at predicted positions after the head's transform.
        student_weight: [V, D_s], the output embedding.
        labels: [M] int64, -100 where a row is ignored. Needed when ce_weight > 0. Rows beyond the predicted ones
            should not be passed: on a GPU an ignored row still takes part in the products that make dx and dW.
        student_bias: [V].
        teacher_hidden, teacher_weight, teacher_bias: [M, D_t], [V, D_t] and [V]; never differentiated. None:
            cross-entropy only.
        kl_weight, ce_weight: a term with weight 0 is not computed and reads 0.
        divergence, temperature: "kl", or in its place, weighed by kl_weight, "reverse_kl" or "mse", which has no τ.
        chunk_rows: rows whose logits are in memory at the same time; by default up to 4,096 on a GPU, and on a CPU as
            many as fit 96 MiB.
        backend: "triton" (the default on a GPU), "blocked" (the default elsewhere) or "reference".

    Under autocast the products run in its dtype, else in the widest dtype given. Logits are float32, except that the
    Triton path stores those of half-precision operands in half precision, relative to their tile's maximum. The
    gradients are accumulated in float32 and arrive in each parameter's dtype. If all rows are ignored the loss is 0.

    Raises ValueError for shapes, labels or weights that do not fit together; RuntimeError for a second derivative.
    """
    if not kl_weight:
        teacher_hidden = teacher_weight = teacher_bias = None
    given = (student_hidden, student_weight, labels, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    _check(*given, kl_weight, ce_weight, temperature, divergence, chunk_rows)
    operands = [x for x in (student_hidden, student_weight, teacher_hidden, teacher_weight) if x is not None]
    in_float64 = [x for x in operands if x.dtype == torch.float64]  # which Triton does not take
    backend = tiling.backend(backend, (in_float64 or operands)[0])
    if backend == "reference":
        return reference(
            student_hidden, student_weight, labels, student_bias=student_bias, teacher_hidden=teacher_hidden,
            teacher_weight=teacher_weight, teacher_bias=teacher_bias, kl_weight=kl_weight, ce_weight=ce_weight,
            temperature=temperature, divergence=divergence,
        )  # fmt: skip
    learns = [
        x is not None and x.requires_grad and torch.is_grad_enabled()
        for x in (student_hidden, student_weight, student_bias)
    ]
    dtype = _product_dtype(operands)
    loss, kl, ce, *_ = linear_kd_operator(
        *given, kl_weight, ce_weight, temperature, divergence, chunk_rows or 0, backend, dtype, *learns
    )
    return LinearKD(loss, kl.detach(), ce.detach())


def _product_dtype(operands: Sequence[Tensor]) -> torch.dtype:
    """Autocast's dtype where it is on and nothing is float64, else the widest of the operands'."""
    device = operands[0].device.type
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in operands))
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


def _check(
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
    chunk_rows: int | None,
) -> None:
    if divergence not in DIVERGENCES:
        raise ValueError(f"linear_kd: divergence is {divergence!r}, choose one of {', '.join(DIVERGENCES)}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"linear_kd: temperature is {temperature}, give a finite one above 0")
    if not (math.isfinite(kl_weight) and math.isfinite(ce_weight)):
        raise ValueError(f"linear_kd: kl_weight is {kl_weight} and ce_weight {ce_weight}, give finite ones")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"linear_kd: chunk_rows is {chunk_rows}, give at least 1")
    if ce_weight and labels is None:
        raise ValueError(f"linear_kd: ce_weight is {ce_weight} but labels is None: pass labels or ce_weight=0")
    if (teacher_hidden is None) != (teacher_weight is None) or (teacher_hidden is None and teacher_bias is not None):
        raise ValueError(
            "linear_kd: give both teacher_hidden and teacher_weight (and maybe teacher_bias), or none of them"
        )
    if teacher_hidden is None and not ce_weight:
        raise ValueError("linear_kd: nothing to compute: give teacher_hidden with a kl_weight, or a ce_weight")
    _check_head("student", student_hidden, student_weight, student_bias)
    rows, vocabulary = len(student_hidden), len(student_weight)
    if labels is not None and (labels.shape != (rows,) or labels.dtype != torch.int64):
        shape = list(labels.shape)
        raise ValueError(f"linear_kd: labels are {labels.dtype} {shape}, give int64 [{rows}], one a row")
    if teacher_hidden is not None and teacher_weight is not None:
        _check_head("teacher", teacher_hidden, teacher_weight, teacher_bias)
        if len(teacher_hidden) != rows:
            raise ValueError(f"linear_kd: {len(teacher_hidden)} teacher rows for {rows} student rows, give as many")
        if len(teacher_weight) != vocabulary:
            sizes = f"{len(teacher_weight):,} for the teacher, {vocabulary:,} for the student"
            raise ValueError(f"linear_kd: vocabularies differ, {sizes}: cut both weights to the ids they share")


def _check_head(model: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for x in (hidden, weight):
        if x.dtype not in tiling.FLOATS:
            raise ValueError(f"linear_kd: the {model} is {x.dtype}, give float16, bfloat16, float32 or float64")
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or not weight.numel():
        shapes = f"hidden {list(hidden.shape)} and weight {list(weight.shape)}"
        raise ValueError(f"linear_kd: the {model}'s {shapes} do not fit, give [M, D] and [V, D], V and D above 0")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_kd: the {model}'s bias is {list(bias.shape)}, give [{weight.shape[0]}]")
