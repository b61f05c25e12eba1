"""hidden_l1's kernel."""

from __future__ import annotations

from fastkd.kernels.hidden_l1 import triton

from bench.audited import Build

AUDIT = (
    Build(
        name="hidden_l1 fp32",
        kernel=triton._absolute_kernel,
        signature={**dict.fromkeys(("s_ptr", "t_ptr", "ds_ptr", "loss_ptr"), "*fp32"), "size": "i32"},
        constants={},
        tile="hidden_l1",
        width=0,
        blocks=("BLOCK_N",),
        divisible=("size",),
        matrix=False,
        wide=True,
    ),
)
