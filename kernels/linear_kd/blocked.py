"""linear_kd in PyTorch, block by block: on a CPU, in float64, or where there is no Triton.

A chunk of R rows in two passes over blocks of C columns, so that a block stays in cache through its operations.
  1. x Wᵀ + b of both models → exp((z − m)/τ) with the block's row maxima m, kept for the chunk; block statistics
  2. exponentials and statistics → dz of a block → its share of dx, dW, db
One exponential a logit, and no logit is kept: the divergence's cross term is summed in the first pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.kernels.linear_kd.head import IGNORED, LOG2E, Gradients, Head, Sums, Terms

_COLUMNS = 1024  # of a block


class _Softmax:
    """exp(z/τ) of a chunk's rows, each block of columns relative to its own row maxima."""

    def __init__(self, exponentials: Tensor, temperature: float, exact: bool) -> None:
        self.exponentials = exponentials  # [R, V]
        self.exponent = LOG2E / temperature
        self.row_sums = _exact_sums if exact else _sums
        self.blocks: list[tuple[Tensor, Tensor]] = []

    def add(self, columns: slice, centred: Tensor, maximum: Tensor) -> Tensor:
        """Take a block of logits, given as its difference from its row maxima; return its exponentials."""
        block = torch.mul(centred, self.exponent, out=self.exponentials[:, columns]).exp2_()  # a quarter of exp's time
        self.blocks.append((maximum, self.row_sums(block)))
        return block

    def close(self) -> None:
        """Make each block's factor of the statistics: exponential · factor = probability. In float64: R × blocks numbers."""
        maxima, sums = zip(*self.blocks, strict=True)
        self.maxima, self.sums = torch.stack(maxima).double() * (self.exponent / LOG2E), torch.stack(sums).double()
        self.maximum = self.maxima.amax(0)
        factor = torch.exp(self.maxima - self.maximum)
        self.total = (factor * self.sums).sum(0)
        self.factor = factor / self.total

    def weighted(self, block: int, columns: slice, weight: Tensor) -> Tensor:
        """weight · softmax of one block [R, C], weight [R]."""
        factor = (weight * self.factor[block]).to(self.exponentials.dtype)
        return self.exponentials[:, columns] * factor[:, None]


class _Chunk:
    """Both models' softmaxes for R rows: p and q at temperature τ, p_ce the student's at 1."""

    def __init__(
        self,
        student: Head,
        teacher: Head | None,
        labels: Tensor | None,
        terms: Terms,
        share: Tensor,
        buffers: Tensor,
    ):
        self.terms, self.labels, self.student, self.teacher = terms, labels, student, teacher
        self.valid = torch.ones_like(student.hidden[:, 0]).double() if labels is None else (labels != IGNORED).double()
        self.share = share * self.valid  # [R]
        temperatures = (terms.temperature, terms.temperature, 1.0)  # of p, q and p_ce
        exact = student.centre is not None
        softmaxes = [_Softmax(b[: len(student.hidden)], t, exact) for b, t in zip(buffers, temperatures, strict=False)]
        self.p = self.p_ce = softmaxes[0]
        self.q = softmaxes[1] if teacher is not None else None
        if terms.two_softmaxes:
            self.p_ce = softmaxes[2]
        self.cross: list[Tensor] = []

    def read_logits(self) -> None:
        """Pass one."""
        for columns in _blocks(self.student):
            z_s, m_s = _centred_logits(self.student, columns)
            if self.p_ce is not self.p:
                self.p_ce.add(columns, z_s, m_s)
            self.p.add(columns, z_s, m_s)
            if self.teacher is not None and self.q is not None:
                z_t, m_t = _centred_logits(self.teacher, columns)
                q = self.q.add(columns, z_t, m_t)
                self.cross.append(torch.linalg.vecdot(q, z_t.sub_(z_s)))
        for softmax in {self.p, self.p_ce, self.q}:
            if softmax is not None:
                softmax.close()

    def kl(self) -> Tensor:
        """τ² Σ_rows KL(q‖p), from differences of logits, of maxima and a ratio of totals.

        A log-sum-exp is ten times the gap between a good student's logits and its teacher's: its float32 rounding would show in KL.
        """
        if self.q is None:
            return self.valid.new_zeros(())
        offsets = (self.q.maxima - self.p.maxima) - (self.q.maximum - self.p.maximum)
        cross = self.q.factor * (torch.stack(self.cross).double() / self.terms.temperature + self.q.sums * offsets)
        rows = cross.sum(0) - torch.log(self.q.total / self.p.total)
        return self.terms.temperature**2 * (rows * self.valid).sum()

    def ce(self) -> Tensor:
        """Σ_rows −log softmax(z_s)[y]."""
        if self.labels is None or not self.terms.ce_weight:
            return self.valid.new_zeros(())
        y = self.labels.clamp(min=0)
        logit = torch.linalg.vecdot(self.student.hidden, self.student.columns(y, self.student.hidden.dtype)).double()
        if self.student.bias is not None:
            logit += self.student.bias[y]
        rows = self.p_ce.maximum - logit + torch.log(self.p_ce.total)
        return (rows * self.valid).sum()

    def dz(self) -> Iterator[tuple[slice, Tensor]]:
        """Pass two: dz of each block of columns, without the one-hot."""
        kl = self.terms.kl_weight * self.terms.temperature * self.share if self.q is not None else 0 * self.share
        ce = self.terms.ce_weight * self.share
        for i, columns in enumerate(_blocks(self.student)):
            dz = self.p.weighted(i, columns, kl + ce if self.p_ce is self.p else kl)
            if self.q is not None:
                dz -= self.q.weighted(i, columns, kl)
            if self.p_ce is not self.p:
                dz += self.p_ce.weighted(i, columns, ce)
            yield columns, dz


def _sums(block: Tensor) -> Tensor:
    """Σ over the columns of [R, C]."""
    return block.sum(1)


def _exact_sums(block: Tensor) -> Tensor:
    """The same in float64, from sums of C/32 numbers in their own dtype, in twice the time.

    A float32 sum of 1,024 numbers has a rounding error of 1e-8, which a small divergence would show.
    """
    whole = block.shape[1] // 32 * 32
    lanes = block[:, :whole].unflatten(1, (-1, 32)).sum(1)
    return lanes.sum(1, dtype=torch.float64) + block[:, whole:].sum(1)


def _blocks(head: Head) -> list[slice]:
    vocabulary = head.weight.shape[0]
    return [slice(start, min(start + _COLUMNS, vocabulary)) for start in range(0, vocabulary, _COLUMNS)]


def _centred_logits(head: Head, columns: slice) -> tuple[Tensor, Tensor]:
    """Logits [R, C] minus their row maxima, and the maxima [R]."""
    dtype = head.hidden.dtype
    bias = None if head.bias is None else head.bias[columns].to(dtype)
    z = _linear(head.hidden, head.columns(columns, dtype), bias)
    maximum = z.amax(1)
    return z.sub_(maximum[:, None]), maximum


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b. In float32 on a CPU through oneDNN, 2.3 times as fast as MKL on AMD."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)
    return F.linear(x, weight, bias)


def value_and_gradients(
    student: Head,
    teacher: Head | None,
    labels: Tensor | None,
    terms: Terms,
    chunk_rows: int,
    dtype: torch.dtype,
    share: Tensor,
    out: Gradients,
) -> Sums:
    """Every chunk of rows. On a CPU ignored rows are left out; on a GPU the host would have to wait to find them.

    Logits are float32 whatever the operands, so that ``dtype`` rounds only those of the products for dx and dW.
    """
    x = student.hidden
    wide = torch.promote_types(dtype, torch.float32)
    student = student.centred(dtype)
    teacher = None if teacher is None else teacher.centred(dtype)
    kept = torch.arange(len(x), device=x.device)
    if labels is not None and x.device.type == "cpu":
        kept = (labels != IGNORED).nonzero()[:, 0]
    softmaxes = 1 + (teacher is not None) + terms.two_softmaxes
    buffers = x.new_empty((softmaxes, min(chunk_rows, len(kept)), len(student.weight)), dtype=wide)
    sums = x.new_zeros(2, dtype=torch.float64)
    for gradient in out.wanted:
        gradient.zero_()
    for rows in kept.split(chunk_rows) if len(kept) else ():
        y = None if labels is None else labels[rows]
        part_t = None if teacher is None else teacher.rows(rows, wide)
        chunk = _Chunk(student.rows(rows, wide), part_t, y, terms, share, buffers)
        chunk.read_logits()
        sums += torch.stack([chunk.kl(), chunk.ce()])
        if out.wanted:
            _accumulate(chunk, rows, _gradient_dtype(dtype, x.device), out)
    return Sums(*sums)


def _gradient_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """``dtype``, but on a CPU half precision only where the hardware multiplies it: elsewhere it is slower than float32."""
    fast = device.type != "cpu" or (dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported())
    return dtype if fast else torch.promote_types(dtype, torch.float32)


def _accumulate(chunk: _Chunk, rows: Tensor, dtype: torch.dtype, out: Gradients) -> None:
    """Add a chunk's share of dx, dW and db."""
    x, head = chunk.student.hidden.to(dtype), chunk.student
    dx = torch.zeros_like(chunk.student.hidden)
    for columns, dz in chunk.dz():
        if out.bias is not None:
            out.bias[columns] += dz.sum(0)
        dz = dz.to(dtype)
        if out.hidden is not None:
            dx += _linear(dz, head.columns(columns, dtype).t())
        if out.weight is not None:
            out.weight[columns] += _linear(dz.t(), x.t())
    if chunk.labels is not None and chunk.terms.ce_weight:
        _subtract_one_hot(chunk, dx, out)
    if out.hidden is not None:
        out.hidden[rows] = dx


def _subtract_one_hot(chunk: _Chunk, dx: Tensor, out: Gradients) -> None:
    """The label's part of dz, unrounded. Rows with the same label are added in a fixed order: index_add_ has none on a GPU."""
    assert chunk.labels is not None
    y, ce = chunk.labels.clamp(min=0), (chunk.terms.ce_weight * chunk.share).to(dx.dtype)
    dx -= ce[:, None] * chunk.student.columns(y, dx.dtype)
    if out.weight is not None:
        out.weight.index_put_((y,), -ce[:, None] * chunk.student.hidden, accumulate=True)
    if out.bias is not None:
        out.bias.index_put_((y,), -ce, accumulate=True)
