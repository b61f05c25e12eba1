"""hidden_mse's Triton kernel, and its launch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.kernels import tiling
from fastkd.kernels.tiling import Rule, Tile, jit

try:
    import triton.language as tl
except ImportError:
    tl = None

TILES: dict[str, tiling.Rules] = {"hidden_mse": {"any": (Rule(Tile(0, 4096, 0, 8, 1)),)}}
tiling.register(TILES)


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


def value_and_gradient(student: Tensor, teacher: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Σ (s − t)², and (s − t) · scale."""
    student, teacher = student.contiguous(), teacher.contiguous()
    gradient = torch.empty_like(student)
    size = student.numel()
    tile = tiling.tile("hidden_mse", width=student.shape[1], arch=tiling.architecture(student.device))
    programs = -(-size // tile.block_n)
    loss = student.new_empty(programs, dtype=torch.float32)
    if programs:
        with torch.cuda.device_of(student):
            _difference_kernel[(programs,)](
                student, teacher, gradient, loss, scale, size, BLOCK_N=tile.block_n, **tile.options
            )
    return loss.sum(), gradient
