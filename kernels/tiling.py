"""Block sizes of the Triton kernels, and what a kernel file shows to the audit.

One table per fused loss: kernel → architecture → rows, of which the first that is wide and long enough serves.
The launch code and ``bench/audit.py`` read the same table, so what the audit compiles is what runs. A row is a
safe default (it compiles without spills) until a measurement on a real GPU replaces it; nothing is tuned at run
time.

Every file in ``kernels/`` exposes ``AUDIT: tuple[Build, ...]``: one entry per variant of a Triton kernel that
the launch code can choose. The audit compiles each with the blocks of ``tile(build.tile, …)`` for every
architecture and fails when a row of the table is compiled by no entry.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

# Set before Triton is imported: it warns that the default will change, and rounding should not depend on one.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
try:
    import triton
except ImportError:  # macOS and Windows: every backend but "triton" works
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
Function = TypeVar("Function", bound=Callable[..., Any])


def jit(function: Function) -> Function:
    """``triton.jit``, or the function itself where there is no Triton, so that kernel files import everywhere."""
    return function if triton is None else triton.jit(function)


class Tile(NamedTuple):
    """Blocks, warps and pipeline stages of one kernel launch; a block the kernel does not have is 0."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class Row(NamedTuple):
    """A table row: the tile for widths ≤ max_width and lengths ≤ max_length (None: any)."""

    tile: Tile
    max_width: int | None = None
    max_length: int | None = None

    def serves(self, width: int, length: int | None) -> bool:
        """Whether rows of ``width`` in sequences of ``length`` fit; an unknown length fits only "any"."""
        wide = self.max_width is None or width <= self.max_width
        return wide and (self.max_length is None or (length is not None and length <= self.max_length))


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
    blocks: tuple[str, ...] = ("BLOCK_M", "BLOCK_N", "BLOCK_K")  # the tile's blocks that are arguments, in order
    divisible: tuple[str, ...] = ()  # integer arguments that are multiples of 16; pointers always are
    matrix: bool = True  # must hold matrix instructions (False: element-wise, or float32 on purpose)


Table = Mapping[str, Mapping[int | str, tuple[Row, ...]]]  # kernel → architecture, or "any" → rows

# ---- linear_kd ------------------------------------------------------------------------------------------------
LINEAR_KD: Table = {
    "linear_kd.logits": {
        80: (Row(Tile(128, 128, 64, 8, 3)),),
        90: (Row(Tile(128, 256, 64, 8, 3)),),
        100: (Row(Tile(128, 256, 64, 8, 3)),),
        "gfx942": (Row(Tile(128, 128, 64, 8, 2)),),
    },
    "linear_kd.logits_float32": {"any": (Row(Tile(64, 64, 32, 8, 2)),)},
    "linear_kd.gradient": {"any": (Row(Tile(0, 4096, 0, 8, 1)),)},
}

# ---- relation_kl and score_mse --------------------------------------------------------------------------------
RELATION: Table = {}

TABLE: Table = {**LINEAR_KD, **RELATION}


def architecture(device: torch.device) -> int | str:
    """The key of a device's column: 80, 90, 100, … on NVIDIA (10·major + minor), "gfx942" and the like on AMD."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    if device.type != "cuda":
        return 80  # the interpreter: any column computes the same
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tile(kernel: str, *, width: int, length: int | None = None, arch: int | str) -> Tile:
    """The tile of ``kernel`` for rows of ``width`` in sequences of ``length`` on ``arch``.

    An NVIDIA architecture without a column takes the closest older one, an AMD one takes gfx942's.
    """
    columns = TABLE[kernel]
    if isinstance(arch, str):
        rows = columns.get(arch) or columns.get("gfx942")
    else:
        older = [column for column in columns if isinstance(column, int) and column <= arch]
        rows = columns[max(older)] if older else None
    rows = rows or columns["any"]
    return next(row.tile for row in rows if row.serves(width, length))
