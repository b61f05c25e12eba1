"""TinyBERT hidden states: the mean squared difference of two matrices, value and gradient in one pass.

    loss = 1/(T·D) Σ_{i, j} (s_ij − t_ij)²,   ds = 2 (s − t)/(T·D)

Written as ``(s.float() − t.float()).square().mean()`` it keeps a float32 difference for the backward, which reads and writes
such matrices again. Here both inputs are read once and the gradient is written once, in the student's dtype; the
backward only scales it.

Source: TinyBERT (Jiao et al. 2020, arXiv 1909.10351, eq. 8); where the widths differ, its W is applied before.

Shapes: T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd.kernels import scaling, tiling
from fastkd.kernels.tiling import Build, jit

try:
    import triton.language as tl
except ImportError:
    tl = None


def reference(student: Tensor, teacher: Tensor) -> Tensor:
    """The definition."""
    dtype = _accumulator(student, teacher)
    return (student.to(dtype) - teacher.to(dtype)).square().mean()


# ---- Triton ---------------------------------------------------------------------------------------------------


@jit
def _difference_kernel(  # type: ignore[no-untyped-def]
    s_ptr, t_ptr,  # [T·D]
    ds_ptr,  # [T·D]: (s − t) · scale
    loss_ptr,  # [programs]: Σ (s − t)² of a block
    scale, size, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (block): its entries, wherever rows begin."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = entry < size
    student = tl.load(s_ptr + entry, mask=inside, other=0.0).to(tl.float32)
    d = student - tl.load(t_ptr + entry, mask=inside, other=0.0).to(tl.float32)
    tl.store(ds_ptr + entry, (d * scale).to(ds_ptr.dtype.element_ty), mask=inside)
    tl.store(loss_ptr + tl.program_id(0), tl.sum(d * d))


def _triton(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Σ (s − t)², and s − t times the first of ``_factors``."""
    student, teacher = student.contiguous(), teacher.contiguous()
    gradient = torch.empty_like(student)
    size, (scale, _) = student.numel(), _factors(student)
    tile = tiling.tile("hidden_mse", width=student.shape[1], arch=tiling.architecture(student.device))
    programs = -(-size // tile.block_n)
    loss = student.new_empty(programs, dtype=torch.float32)
    if programs:
        with torch.cuda.device_of(student):
            _difference_kernel[(programs,)](
                student, teacher, gradient, loss, scale, size, BLOCK_N=tile.block_n, **tile.options
            )
    return loss.sum(), gradient


# ---- blocked PyTorch ------------------------------------------------------------------------------------------


def _blocked(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The same, without a float32 copy of either."""
    dtype = _accumulator(student, teacher)
    difference = torch.sub(student, teacher) if student.dtype == dtype else student.to(dtype).sub_(teacher)
    total = torch.linalg.vector_norm(difference, dim=1).double().square().sum()
    return total, difference.mul_(_factors(student)[0]).to(student.dtype).contiguous()


def _accumulator(student: Tensor, teacher: Tensor) -> torch.dtype:
    """float32, or float64 where an input is."""
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def _factors(student: Tensor) -> tuple[float, float]:
    """What the forward and the backward multiply s − t with: together 2/(T·D)."""
    return scaling.early_and_late(2 / max(student.numel(), 1), student.dtype)


# ---- the operator ---------------------------------------------------------------------------------------------


@torch.library.custom_op("fastkd::hidden_mse", mutates_args=())
def _hidden_mse(student: Tensor, teacher: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The loss; s − t times the first of ``_factors``."""
    total, gradient = (_triton if backend == "triton" else _blocked)(student, teacher)
    return (total / max(student.numel(), 1)).to(_accumulator(student, teacher)), gradient


@_hidden_mse.register_fake
def _(student: Tensor, teacher: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return student.new_empty((), dtype=_accumulator(student, teacher)), student.new_empty(student.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.backend = inputs[-1]


def _backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled():
        raise RuntimeError("hidden_mse has no second derivative: call backward without create_graph=True")
    if grad_loss is None:
        return (None,) * 3
    (gradient,) = ctx.saved_tensors
    return scaling.scaled(gradient, grad_loss, late=_factors(gradient)[1], backend=ctx.backend), None, None


_hidden_mse.register_autograd(_backward, setup_context=_setup_context)


# ---- public ---------------------------------------------------------------------------------------------------


def hidden_mse(
    student: Tensor,  # [T, D]
    teacher: Tensor,  # [T, D]
    *,
    backend: str | None = None,
) -> Tensor:
    """Mean squared difference of two models' hidden states: a float32 scalar.

    The dtypes may differ; the teacher may be an inference tensor. ``backend``: None takes "triton" on CUDA, else "blocked".
    Differentiable once, in the student, whose gradient has its dtype. Everything is summed in float32, or in float64 where an
    input is float64. Raises ValueError for shapes, dtypes or a backend that do not fit.
    """
    for who, x in (("student", student), ("teacher", teacher)):
        if x.dtype not in tiling.FLOATS:
            raise ValueError(f"hidden_mse: {who} is {x.dtype}: give float16, bfloat16, float32 or float64")
    if student.ndim != 2 or student.shape != teacher.shape:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"hidden_mse: student and teacher are {shapes}: give [T, D] both, projected to one width")
    backend = tiling.backend(backend, student)
    if teacher.dtype == torch.float64 and backend == "triton":
        backend = "blocked"
    if backend == "reference":
        return reference(student, teacher.detach())
    return _hidden_mse(student, teacher.detach(), backend)[0]


# ---- for tests, benches and the audit -------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Shape, dtypes and values of one call; ``gap`` is the standard deviation of the student's difference."""

    name: str
    rows: int
    width: int
    dtype: torch.dtype = torch.float32
    teacher_dtype: torch.dtype = torch.float32
    gap: float = 1.0

    @property
    def tolerance(self) -> float:
        """‖out − ref‖/‖ref‖ against float64, of the value and of the gradient."""
        return 1e-5 if self.dtype == torch.float32 else 1e-2

    def inputs(self, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of ``hidden_mse``; the student asks for a gradient."""
        generator = torch.Generator().manual_seed(seed)
        teacher = torch.randn(self.rows, self.width, generator=generator)
        student = teacher + self.gap * torch.randn(self.rows, self.width, generator=generator)
        moved = student.to(device, self.dtype), teacher.to(device, self.teacher_dtype)
        return {"student": moved[0].requires_grad_(), "teacher": moved[1]}


_BF16 = torch.bfloat16
CASES = (
    Case("one number", 1, 1),
    Case("odd width", 7, 33),
    Case("many blocks", 40, 312),
    Case("near", 30, 64, gap=0.01),
    Case("bfloat16 teacher", 40, 312, teacher_dtype=_BF16),
    Case("bfloat16 student", 40, 312, _BF16),
    Case("bfloat16", 40, 312, _BF16, _BF16),
    Case("float16", 40, 312, torch.float16, torch.float16),
)
BENCHES = (
    Case("4096×384", 4096, 384, teacher_dtype=_BF16),
    Case("32768×768", 32768, 768, teacher_dtype=_BF16),
    Case("131072×768", 131072, 768, teacher_dtype=_BF16),
)
_DTYPES = ("fp32", "bf16")
AUDIT = tuple(
    Build(
        name=f"hidden_mse {student}/{teacher}",
        kernel=_difference_kernel,
        signature={
            "s_ptr": f"*{student}", "t_ptr": f"*{teacher}", "ds_ptr": f"*{student}", "loss_ptr": "*fp32", "scale": "fp32",
            "size": "i32",
        },
        constants={},
        tile="hidden_mse",
        width=768,
        blocks=("BLOCK_N",),
        divisible=("size",),
        matrix=False,
        wide=True,
        resident=((90, 4),),
    )
    for student in _DTYPES
    for teacher in _DTYPES
)  # fmt: skip
