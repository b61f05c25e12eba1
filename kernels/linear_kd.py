"""Output head, teacher softmax, KL divergence and cross-entropy in one loss that never holds [M, V].

With z = x Wᵀ + b for student and teacher, p = softmax(z_s/τ), q = softmax(z_t/τ) and N rows not ignored,

    KL   = τ²/N · Σ_rows Σ_v q (log q − log p)           (Hinton, Vinyals, Dean 2015, arXiv 1503.02531)
    CE   = 1/N · Σ_rows −log softmax(z_s)[y]
    loss = kl_weight·KL + ce_weight·CE
    dz_s = [kl_weight·τ·(p − q) + ce_weight·(softmax(z_s) − onehot(y))] / N,  dx = dz W,  dW = dzᵀ x,  db = Σ dz.

The loss is a scalar, so its gradient is made in the forward pass, a chunk of rows at a time, and the backward
only scales it. Shapes: M rows, V vocabulary, D_s and D_t widths, R rows of a chunk, C columns of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
_BLOCK_COLUMNS = 1024
_CHUNK_BYTES = 128 << 20  # the blocked path's buffers: exponentials of both models for a chunk of rows


class LinearKD(NamedTuple):
    """The loss (differentiable) and its two terms before weighting (detached; 0 where the weight is 0)."""

    loss: Tensor
    kl: Tensor
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
) -> LinearKD:
    """The definition in plain PyTorch: holds every logit. Arguments as in ``linear_kd``."""
    student = _at_least_float32(F.linear(student_hidden, student_weight, student_bias))
    valid = torch.ones_like(student[:, 0], dtype=torch.bool) if labels is None else labels != IGNORED
    rows = valid.sum().clamp(min=1)
    kl = ce = student.new_zeros(())
    if teacher_hidden is not None and teacher_weight is not None and kl_weight:
        teacher = _at_least_float32(F.linear(teacher_hidden, teacher_weight, teacher_bias))
        log_p = F.log_softmax(student / temperature, dim=-1)
        log_q = F.log_softmax(teacher / temperature, dim=-1)
        divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
        kl = temperature**2 * divergence.masked_fill(~valid, 0.0).sum() / rows
    if labels is not None and ce_weight:
        ce = F.cross_entropy(student, labels, ignore_index=IGNORED, reduction="sum") / rows
    return LinearKD(kl_weight * kl + ce_weight * ce, kl.detach(), ce.detach())


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- both paths -----------------------------------------------------------------------------------------------


class _Head(NamedTuple):
    """One model's side of the loss: rows [M, D], output embedding [V, D] and bias [V]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def rows(self, rows: slice | Tensor) -> _Head:
        return self._replace(hidden=self.hidden[rows])


class _Terms(NamedTuple):
    kl_weight: float
    ce_weight: float
    temperature: float


class _Result(NamedTuple):
    """Sums over rows, and gradients not divided by N yet; a gradient nobody asked for is None."""

    kl: Tensor
    ce: Tensor
    total: Tensor  # rows not ignored
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


# ---- blocked PyTorch ------------------------------------------------------------------------------------------


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b. In float32 on a CPU through oneDNN, which is 2.3 times as fast as MKL on AMD and equal on Intel."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)
    return F.linear(x, weight, bias)


class _Softmax:
    """Exponentials [R, V] of a chunk's logits, each block of columns relative to its own row maximum."""

    def __init__(self, like: Tensor, vocabulary: int) -> None:
        self.exponentials = like.new_empty((like.shape[0], vocabulary))
        self._maxima: list[Tensor] = []
        self._sums: list[Tensor] = []

    def add(self, columns: slice, centred: Tensor, maximum: Tensor) -> Tensor:
        """Take one block of logits, given as its difference from its row maxima; return its exponentials."""
        block = torch.exp(centred, out=self.exponentials[:, columns])
        self._maxima.append(maximum)
        self._sums.append(block.sum(1))
        return block

    def close(self) -> None:
        """Turn the blocks' statistics [blocks, R] into each block's factor to a probability."""
        self.maxima = torch.stack(self._maxima).double()
        self.sums = torch.stack(self._sums).double()
        self.maximum = self.maxima.amax(0)
        factor = torch.exp(self.maxima - self.maximum)
        self.total = (factor * self.sums).sum(0)
        self.factor = factor / self.total

    def probabilities(self, block: int, columns: slice, weight: Tensor) -> Tensor:
        """weight · softmax of one block, in place of its exponentials."""
        factor = (weight * self.factor[block]).to(self.exponentials.dtype)
        return self.exponentials[:, columns].mul_(factor[:, None])


class _Chunk:
    """Pass one over the columns makes exponentials and statistics, pass two dz; both models, R rows."""

    def __init__(self, student: _Head, teacher: _Head | None, labels: Tensor | None, terms: _Terms) -> None:
        self.terms, self.student, self.teacher = terms, student, teacher
        self.vocabulary = student.weight.shape[0]
        self.blocks = [
            slice(start, min(start + _BLOCK_COLUMNS, self.vocabulary))
            for start in range(0, self.vocabulary, _BLOCK_COLUMNS)
        ]
        hidden = _at_least_float32(student.hidden)
        self.valid = torch.ones_like(hidden[:, 0]) if labels is None else (labels != IGNORED).to(hidden.dtype)
        self.valid = self.valid.double()
        self.student_kl = _Softmax(hidden, self.vocabulary) if teacher is not None else None
        self.teacher_kl = _Softmax(hidden, self.vocabulary) if teacher is not None else None
        self.shared = teacher is not None and terms.temperature == 1.0
        self.student_ce = self.student_kl if self.shared else None
        if terms.ce_weight and not self.shared:
            self.student_ce = _Softmax(hidden, self.vocabulary)
        self.cross: list[Tensor] = []

    def read_logits(self) -> None:
        """Pass one."""
        for columns in self.blocks:
            z_s, m_s = _centred_logits(self.student, columns)
            if self.student_ce is not None and not self.shared:
                self.student_ce.add(columns, z_s, m_s)
            if self.teacher is None or self.student_kl is None or self.teacher_kl is None:
                continue
            z_t, m_t = _centred_logits(self.teacher, columns)
            if self.terms.temperature != 1.0:
                z_s /= self.terms.temperature
                z_t /= self.terms.temperature
                m_s, m_t = m_s / self.terms.temperature, m_t / self.terms.temperature
            self.student_kl.add(columns, z_s, m_s)
            q = self.teacher_kl.add(columns, z_t, m_t)
            self.cross.append(torch.linalg.vecdot(q, z_t.sub_(z_s)))
        for softmax in {self.student_kl, self.teacher_kl, self.student_ce}:
            if softmax is not None:
                softmax.close()

    def kl(self) -> Tensor:
        """τ² Σ_rows KL(q‖p). Differences of maxima and of totals, not of log-sum-exps, so that it is 0 when p = q."""
        p, q = self.student_kl, self.teacher_kl
        if p is None or q is None:
            return self.valid.new_zeros(())
        offsets = (q.maxima - p.maxima) - (q.maximum - p.maximum)
        cross = (q.factor * (torch.stack(self.cross).double() + q.sums * offsets)).sum(0)
        rows = (cross - torch.log(q.total / p.total)).mul(self.valid)
        return self.terms.temperature**2 * rows.sum()

    def ce(self, labels: Tensor | None) -> Tensor:
        """Σ_rows −log softmax(z_s)[y]."""
        if labels is None or self.student_ce is None or not self.terms.ce_weight:
            return self.valid.new_zeros(())
        target = self.student.weight[labels.clamp(min=0)].to(self.student_ce.exponentials.dtype)
        logit = torch.linalg.vecdot(_at_least_float32(self.student.hidden), target).double()
        if self.student.bias is not None:
            logit += self.student.bias[labels.clamp(min=0)]
        rows = (self.student_ce.maximum - logit + torch.log(self.student_ce.total)).mul(self.valid)
        return rows.sum()

    def gradients(self) -> Iterator[tuple[slice, Tensor]]:
        """Pass two: N·dz of each block of columns, the one-hot apart. Overwrites the exponentials."""
        kl = self.terms.kl_weight * self.terms.temperature * self.valid
        ce = self.terms.ce_weight * self.valid
        for i, columns in enumerate(self.blocks):
            if self.student_kl is None or self.teacher_kl is None:
                assert self.student_ce is not None
                yield columns, self.student_ce.probabilities(i, columns, ce)
                continue
            dz = self.student_kl.probabilities(i, columns, kl + ce if self.shared else kl)
            dz -= self.teacher_kl.probabilities(i, columns, kl)
            if self.student_ce is not None and not self.shared:
                dz += self.student_ce.probabilities(i, columns, ce)
            yield columns, dz


def _centred_logits(head: _Head, columns: slice) -> tuple[Tensor, Tensor]:
    """Logits [R, C] minus their row maxima, and the maxima [R]."""
    bias = None if head.bias is None else _at_least_float32(head.bias[columns])
    z = _linear(_at_least_float32(head.hidden), _at_least_float32(head.weight[columns]), bias)
    maximum = z.amax(1)
    return z.sub_(maximum[:, None]), maximum


def _blocked(
    student: _Head,
    teacher: _Head | None,
    labels: Tensor | None,
    terms: _Terms,
    chunk_rows: int,
    needs: tuple[bool, bool, bool],
) -> _Result:
    """The loss a chunk of rows at a time, each chunk in two passes over cache-sized blocks of columns."""
    x, weight = student.hidden, student.weight
    float_type = torch.promote_types(x.dtype, torch.float32)
    dx = x.new_zeros(x.shape, dtype=float_type) if needs[0] else None
    dw = x.new_zeros(weight.shape, dtype=float_type) if needs[1] else None
    db = x.new_zeros(weight.shape[:1], dtype=float_type) if needs[2] else None
    everyone = torch.arange(len(x), device=x.device)
    kept = everyone
    if labels is not None and x.device.type == "cpu":  # elsewhere choosing rows would wait for the device
        kept = (labels != IGNORED).nonzero()[:, 0]
    count = x.new_zeros((), dtype=torch.float64)
    kl, ce = torch.zeros_like(count), torch.zeros_like(count)
    for rows in kept.split(chunk_rows):
        if not len(rows):
            continue
        y = None if labels is None else labels[rows]
        chunk = _Chunk(student.rows(rows), None if teacher is None else teacher.rows(rows), y, terms)
        chunk.read_logits()
        count += chunk.valid.sum()
        kl += chunk.kl()
        ce += chunk.ce(y)
        if any(needs):
            _accumulate(chunk, rows, y, dx, dw, db)
    return _Result(kl, ce, count, dx, dw, db)


def _accumulate(
    chunk: _Chunk, rows: Tensor, labels: Tensor | None, dx: Tensor | None, dw: Tensor | None, db: Tensor | None
) -> None:
    """Add one chunk's share of N·dx, N·dW and N·db."""
    x, weight = chunk.student.hidden, chunk.student.weight
    part = None if dx is None else dx.new_zeros((len(rows), dx.shape[1]))
    for columns, dz in chunk.gradients():
        low = dz.to(x.dtype)
        if part is not None:
            part += _linear(low, weight[columns].t())
        if dw is not None:
            dw[columns] += _linear(low.t(), x.t())
        if db is not None:
            db[columns] += dz.sum(0)
    if labels is not None and chunk.terms.ce_weight:
        hot, ce = labels.clamp(min=0), (chunk.terms.ce_weight * chunk.valid).to(_at_least_float32(x).dtype)
        if part is not None:
            part -= ce[:, None] * weight[hot]
        if dw is not None:
            dw.index_add_(0, hot, (ce[:, None] * x).to(dw.dtype), alpha=-1)
        if db is not None:
            db.index_add_(0, hot, ce.to(db.dtype), alpha=-1)
    if dx is not None and part is not None:
        dx[rows] = part


# ---- the operator ---------------------------------------------------------------------------------------------

_SCHEMA = (
    "(Tensor student_hidden, Tensor student_weight, Tensor? labels, Tensor? student_bias, Tensor? teacher_hidden, "
    "Tensor? teacher_weight, Tensor? teacher_bias, float kl_weight, float ce_weight, float temperature, "
    "int chunk_rows, str backend, ScalarType? autocast, bool need_hidden, bool need_weight, bool need_bias) "
    "-> (Tensor loss, Tensor kl, Tensor ce, Tensor scale, Tensor dx, Tensor dw, Tensor db)"
)


@torch.library.custom_op("fastkd::linear_kd", mutates_args=(), schema=_SCHEMA)
def _linear_kd(
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
    chunk_rows: int,
    backend: str,
    autocast: torch.dtype | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    terms = _Terms(kl_weight, ce_weight, temperature)
    with torch.autocast(student_hidden.device.type, enabled=False):
        student = _head(student_hidden, student_weight, student_bias, autocast)
        teacher = None
        if teacher_hidden is not None and teacher_weight is not None and kl_weight:
            teacher = _head(teacher_hidden, teacher_weight, teacher_bias, autocast)
        result = _blocked(student, teacher, labels, terms, chunk_rows, (need_hidden, need_weight, need_bias))
        scale = 1 / result.total.clamp(min=1)
        float_type = torch.promote_types(student.hidden.dtype, torch.float32)
        kl, ce = result.kl * scale, result.ce * scale
        values = [x.to(float_type) for x in (kl_weight * kl + ce_weight * ce, kl, ce, scale)]
        absent = student_hidden.new_empty(0, dtype=float_type)
        return (*values, *(absent.clone() if x is None else x for x in result[3:]))


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None, autocast: torch.dtype | None) -> _Head:
    """Bring rows and weight to one dtype: autocast's, unless they are float64, else the wider of the two."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if autocast is not None and dtype != torch.float64:
        dtype = autocast
    return _Head(hidden.to(dtype), weight.to(dtype), bias)


@_linear_kd.register_fake
def _(
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
    chunk_rows: int,
    backend: str,
    autocast: torch.dtype | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(torch.promote_types(student_hidden.dtype, student_weight.dtype), torch.float32)
    vocabulary, width = student_weight.shape

    def empty(*shape: int) -> Tensor:
        return student_hidden.new_empty(shape, dtype=dtype)

    return (
        *(empty() for _ in range(4)),
        empty(len(student_hidden), width) if need_hidden else empty(0),
        empty(vocabulary, width) if need_weight else empty(0),
        empty(vocabulary) if need_bias else empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, _, bias = inputs[:4]
    _, kl, ce, scale, *gradients = output
    ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
    ctx.needs = inputs[-3:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(kl, ce, scale, *gradients)
    ctx.save_for_backward(scale, *gradients)


def _backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled():
        raise RuntimeError("linear_kd has no second derivative: call backward without create_graph=True")
    scale, *gradients = ctx.saved_tensors
    factor = grad * scale
    dx, dw, db = (
        (x * factor).to(dtype) if need else None
        for x, dtype, need in zip(gradients, ctx.dtypes, ctx.needs, strict=True)
    )
    return (dx, dw, None, db, *[None] * 12)


_linear_kd.register_autograd(_backward, setup_context=_setup_context)


# ---- public ---------------------------------------------------------------------------------------------------


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
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> LinearKD:
    """kl_weight·KL(teacher ‖ student) + ce_weight·CE through both output heads, without an [M, V] matrix.

    Args: ``student_hidden`` [M, D_s] rows at predicted positions, after the head's transform;
    ``student_weight`` [V, D_s] and ``student_bias`` [V]; ``labels`` [M] int64 with -100 where a row is ignored;
    ``teacher_hidden`` [M, D_t], ``teacher_weight`` [V, D_t], ``teacher_bias`` [V], or none of them for
    cross-entropy alone; ``chunk_rows`` rows whose logits are held at a time; ``backend`` "triton" (default on
    CUDA), "blocked" (default elsewhere) or "reference".
    """
    teacher_is_used = teacher_hidden is not None and kl_weight != 0
    if backend == "reference":
        return reference(
            student_hidden,
            student_weight,
            labels,
            student_bias=student_bias,
            teacher_hidden=teacher_hidden,
            teacher_weight=teacher_weight,
            teacher_bias=teacher_bias,
            kl_weight=kl_weight,
            ce_weight=ce_weight,
            temperature=temperature,
        )
    device = student_hidden.device.type
    grad = torch.is_grad_enabled()
    loss, kl, ce, *_ = _linear_kd(
        student_hidden,
        student_weight,
        labels,
        student_bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        kl_weight,
        ce_weight,
        temperature,
        chunk_rows or _default_rows(student_weight, teacher_is_used),
        "blocked",
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        grad and student_hidden.requires_grad,
        grad and student_weight.requires_grad,
        grad and student_bias is not None and student_bias.requires_grad,
    )
    return LinearKD(loss, kl.detach(), ce.detach())


def _default_rows(weight: Tensor, teacher_is_used: bool) -> int:
    return max(64, _CHUNK_BYTES // (weight.shape[0] * 4 * (2 if teacher_is_used else 1)))
