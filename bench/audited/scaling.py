"""The kernel of the losses' backward."""

from __future__ import annotations

from bench.audited import Build
from fastkd.kernels import scaling


def _build(x: str, out: str, in_place: bool) -> Build:
    return Build(
        name=f"scaling {x} → {out}{', in place' if in_place else ''}",
        kernel=scaling._scale_kernel,
        signature={"x_ptr": f"*{x}", "factor_ptr": "*fp32", "out_ptr": f"*{out}", "size": "i32"},
        constants={"IN_PLACE": in_place},
        tile="scaling",
        width=0,
        blocks=("BLOCK_N",),
        divisible=("size",),
        matrix=False,
        wide=True,
        resident=((90, 4),),
    )


_SAME = ("fp32", "bf16", "fp16")
AUDIT = (
    *(_build(x, x, in_place) for x in _SAME for in_place in (True, False)),
    *(_build("fp32", out, False) for out in ("bf16", "fp16")),
)
