"""relation_kl's kernels."""

from __future__ import annotations

import torch

from bench.audited import packed_build
from fastkd.kernels.relation_kl import triton_long, triton_short

_LONG_KERNELS = (
    (triton_long._stats_kernel, "relation_kl.stats"),
    (triton_long._self_kernel, "relation_kl.self"),
    (triton_long._cross_kernel, "relation_kl.cross"),
)
AUDIT = (
    *(
        packed_build(
            triton_short._short_kernel, "relation_kl.short", widths=widths, length=n, constants={"NEAR": False, "CROSS": cross},
        )
        for widths in ((64, 64), (16, 16), (24, 64))
        for n in (128, 64, 32)
        for cross in (False, True)
    ),
    *(
        packed_build(kernel, tile, widths=widths, constants={"NEAR": False}, wide=kernel is not triton_long._stats_kernel)
        for kernel, tile in _LONG_KERNELS
        for widths in ((64, 64), (16, 16), (128, 128))
    ),
    *(
        packed_build(kernel, f"{tile}_float32", widths=widths, dtype=torch.float32, constants={"NEAR": near})
        for kernel, tile in _LONG_KERNELS
        for widths, near in (((64, 64), True), ((32, 64), False), ((128, 128), True))
    ),
    *(
        packed_build(
            triton_short._short_kernel, "relation_kl.short_float32", widths=widths, length=32, dtype=torch.float32,
            constants={"NEAR": widths == (64, 64), "CROSS": cross},
        )
        for widths in ((64, 64), (32, 64))
        for cross in (False, True)
    ),
)  # fmt: skip
