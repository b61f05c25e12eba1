"""What the backward of every fused loss does: gradients that were made in the forward, times the gradient of the loss.

    out = x · factor, in float32, rounded once

PyTorch multiplies by a tensor of one number in a kernel that takes one entry at a time, at half of a GPU's bandwidth. Here accesses
are 16 bytes wide; and where nobody else will read x, it is scaled in its own memory. Then a factor of 1, the usual one, costs only
the launch. The factor is read on the device: the host does not wait for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.kernels import tiling
from fastkd.kernels.tiling import Rule, Tile, jit

try:
    import triton.language as tl
except ImportError:
    tl = None

TILES: dict[str, tiling.Rules] = {"scaling": {"any": (Rule(Tile(0, 8192, 0, 8, 1)),)}}
tiling.register(TILES)


def early_and_late(factor: float, dtype: torch.dtype) -> tuple[float, float]:
    """Split a constant factor of a gradient into what the forward and what the backward multiply by.

    All of it in the forward, where it costs nothing; for float16 all of it in the backward, since a gradient that is divided by
    a count would be below the smallest number.
    """
    return (1.0, factor) if dtype == torch.float16 else (factor, 1.0)


def scaled(
    x: Tensor, factor: Tensor, dtype: torch.dtype | None = None, *, late: float = 1.0, backend: str | None = None
) -> Tensor:
    """x · factor · late in ``dtype`` (default: x's), for the backward of an operator that saved ``x``: nothing else may read it.

    ``x`` is contiguous, ``factor`` a scalar, ``late`` as in ``early_and_late``. In a backward that frees its graph, the Triton
    backend returns x itself, scaled in place; with ``retain_graph=True``, outside of a backward, in another dtype or on another
    backend the result is new.
    """
    dtype = x.dtype if dtype is None else dtype
    factor = factor if late == 1 else factor * late
    # Tensors that are traced for a compiler are of another type: it makes one pass of the product itself.
    if type(x) is Tensor and x.numel() and _backend(x, backend) == "triton":
        return _triton(x, factor, dtype)
    # A vector of one number, since PyTorch would round a scalar to x's dtype before the product.
    return torch.mul(x, factor.view(1), out=torch.empty_like(x, dtype=dtype))


def _backend(x: Tensor, name: str | None) -> str:
    return "blocked" if x.dtype == torch.float64 else tiling.backend(name, x)


@jit
def _scale_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [size]
    factor_ptr,  # []
    out_ptr,  # [size]: x_ptr if it is in place
    size,
    IN_PLACE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (block): its entries."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if IN_PLACE:  # noqa: SIM102 (a constant, and a branch)
        if factor == 1.0:
            return
    entry = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + entry, mask=entry < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + entry, (x * factor).to(out_ptr.dtype.element_ty), mask=entry < size)


def _triton(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    in_place = dtype == x.dtype and not torch._C._autograd._get_current_graph_task_keep_graph()
    out = x if in_place else torch.empty_like(x, dtype=dtype)
    tile = tiling.tile("scaling", width=0, arch=tiling.architecture(x.device))
    with torch.cuda.device_of(x):
        _scale_kernel[(-(-x.numel() // tile.block_n),)](
            x, factor, out, x.numel(), IN_PLACE=in_place, BLOCK_N=tile.block_n, **tile.options
        )
    return out
