"""score_mse's kernels."""

from __future__ import annotations

import torch

from bench.audited import packed_build
from fastkd.kernels.score_mse import triton

_WIDTHS = ((64, 64), (16, 16), (24, 64))
AUDIT = (
    *(
        packed_build(triton._short_kernel, "score_mse.short", widths=widths, length=n)
        for widths in _WIDTHS
        for n in (128, 64, 32)
    ),
    *(packed_build(triton._rows_kernel, "score_mse.rows", widths=widths) for widths in (*_WIDTHS, (128, 128))),
    packed_build(triton._short_kernel, "score_mse.short_float32", widths=(64, 64), length=32, dtype=torch.float32),
    *(
        packed_build(triton._rows_kernel, "score_mse.rows_float32", widths=(d, d), dtype=torch.float32)
        for d in (64, 128)
    ),
)
