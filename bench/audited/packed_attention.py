"""packed_attention's kernels."""

from __future__ import annotations

from typing import Any

import triton.language as tl

from bench.audited import Build
from fastkd.kernels import packed_attention


def _build(kernel: Any, name: str, width: int, shortest: int, length: int) -> Build:
    """A variant in bfloat16, of heads whose rows are multiples of 16 bytes."""
    types = {"lse_ptr": "*fp32", "cu_q_ptr": "*i32", "cu_k_ptr": "*i32", "scale": "fp32", "alpha": "fp32"}
    arguments = [argument for argument in kernel.arg_names if not argument.isupper()]
    signature = {x: types.get(x, "*bf16" if x.endswith("_ptr") else "i32") for x in arguments}
    constants = {"WIDTH": width, "PAD": width, "HEADS": packed_attention.HEADS, "SHORTEST": shortest}
    return Build(
        name=f"packed_attention.{name} {width}, n ≤ {length}",
        kernel=kernel,
        signature=signature,
        constants={**constants, "DOT": tl.bfloat16},
        tile=f"packed_attention.{name}",
        width=width,
        length=length,
        blocks=("BLOCK_M",) if name == "forward" else ("BLOCK_M", "BLOCK_N"),
        divisible=tuple(x for x in arguments if x.endswith("_stride")),
        wide=True,
        resident=((90, 2),),  # one program loads, another computes
    )


AUDIT = tuple(
    _build(kernel, name, width, shortest, length)
    for kernel, name in ((packed_attention._forward_kernel, "forward"), (packed_attention._backward_kernel, "backward"))
    for width in (16, 32, 64)
    for shortest, length in zip((1, 65), packed_attention.LENGTHS, strict=True)
)
