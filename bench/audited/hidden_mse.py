"""hidden_mse's kernel."""

from __future__ import annotations

from bench.audited import Build
from fastkd.kernels.hidden_mse import triton

_DTYPES = ("fp32", "bf16")
AUDIT = tuple(
    Build(
        name=f"hidden_mse {student}/{teacher}",
        kernel=triton._difference_kernel,
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
