"""hidden_l1's Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.kernels import tiling
from fastkd.kernels.tiling import Rule, Tile, jit

try:
    import triton.language as tl
except ImportError:
    tl = None

tiling.register({"hidden_l1": {"any": (Rule(Tile(0, 1024, 0, 4, 1)),)}})


@jit
def _absolute_kernel(s_ptr, t_ptr, ds_ptr, loss_ptr, size, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program (block): its entries."""
    entry = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = entry < size
    d = tl.load(s_ptr + entry, mask=inside, other=0.0) - tl.load(t_ptr + entry, mask=inside, other=0.0)
    sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
    tl.store(ds_ptr + entry, sign.to(ds_ptr.dtype.element_ty), mask=inside)
    tl.store(loss_ptr + tl.program_id(0), tl.sum(tl.abs(d)))


def value_and_gradient(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Σ |s − t|, and sign(s − t)."""
    gradient, size = torch.empty_like(student), student.numel()
    tile = tiling.tile("hidden_l1", width=0, arch=tiling.architecture(student.device))
    programs = -(-size // tile.block_n)
    loss = student.new_empty(programs, dtype=torch.float32)
    _absolute_kernel[(programs,)](student, teacher, gradient, loss, size, BLOCK_N=tile.block_n, **tile.options)
    return loss.sum(), gradient
