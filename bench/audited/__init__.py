"""The variants of every Triton kernel that its launch code can choose: one file a loss or a shared kernel, each with ``AUDIT``.

``bench.audit`` compiles each with the blocks of ``tiling.tile(build.tile, …)`` for every architecture, and fails when a rule of the
table of tiles is compiled by no variant.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bench import losses
from fastkd.kernels import packed


@dataclass(frozen=True)
class Build:
    """One variant of a Triton kernel for the audit to compile, blocks apart."""

    name: str  # what the audit's table calls it
    kernel: Any  # the @jit function
    signature: Mapping[str, str]  # argument → Triton type ("*bf16", "*fp32", "i32", "fp32"); constexprs left out
    constants: Mapping[str, Any]  # constexprs, except the blocks
    tile: str  # key of the table
    width: int  # what the launch code looks the tile up with
    length: int | None = None
    blocks: tuple[str, ...] = ("BLOCK_M", "BLOCK_N", "BLOCK_K")  # which of the tile's blocks are arguments
    divisible: tuple[str, ...] = ()  # integer arguments that are multiples of 16; pointers always are
    matrix: bool = True  # must hold matrix instructions (False: element-wise, or float32 on purpose)
    wide: bool = False  # must load and store 16 bytes at a time somewhere
    resident: tuple[tuple[int | str, int], ...] = ()  # (architecture, least programs a multiprocessor must hold)


def builds(kernel: str | None = None) -> list[Build]:
    """The variants of every file in this folder, or of one."""
    for loss in losses.available():
        losses.definition(loss)  # registers its tiles, also where no file here has it
    names = sorted(module.name for module in pkgutil.iter_modules(__path__)) if kernel is None else [kernel]
    return [build for name in names for build in importlib.import_module(f"bench.audited.{name}").AUDIT]


def packed_build(
    kernel: Any,
    tile: str,
    *,
    widths: tuple[int, int],
    length: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    constants: dict[str, Any] | None = None,
    wide: bool = True,
) -> Build:
    """A variant of a kernel for the audit. Argument types follow from the names that both losses' kernels share.

    ``wide`` as in ``Build``, of half-precision variants: a head is then a multiple of 8 entries, 16 bytes.
    """
    import triton.language as tl  # here: bench.audit says in a sentence that it needs Triton

    half, pads = dtype != torch.float32, [packed.pad_width(width) for width in widths]
    pointers = {"cu_ptr": "*i32", "stats_ptr": "*fp32", "loss_ptr": "*fp32"}
    signature = {}
    for name in kernel.arg_names:
        if name.endswith("_ptr"):
            signature[name] = pointers.get(name, "*bf16" if half else "*fp32")
        elif name.endswith("_stride") or name in ("total", "width", "sequences", "shorter"):
            signature[name] = "i32"
        elif name.startswith(("alpha", "scale")):
            signature[name] = "fp32"
    extra = constants or {}
    label = ", ".join([f"{widths[0]}/{widths[1]}", *(k.lower() for k, v in extra.items() if v)])
    return Build(
        name=f"{tile} {label}" + (f", n ≤ {length}" if length else ""),
        kernel=kernel,
        signature=signature,
        constants={
            "WIDTH_S": widths[0], "WIDTH_T": widths[1], "PAD_S": pads[0], "PAD_T": pads[1],
            "DOT": tl.bfloat16 if half else tl.float32, **extra,
        },
        tile=tile,
        width=max(pads),
        length=length,
        blocks=("BLOCK_M",) if length else ("BLOCK_M", "BLOCK_N"),
        divisible=tuple(name for name in signature if name.endswith("_stride") or name == "width"),
        matrix=half,
        wide=wide and half,
        resident=((90, 2),) if half and length else (),  # where a sequence is one tile: one program loads, another computes
    )  # fmt: skip
