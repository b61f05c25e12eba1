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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Set before Triton is imported: it warns that the default will change, and rounding should not depend on one.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
try:
    import triton
except ImportError:  # macOS and Windows: every backend but "triton" works
    triton = None

BACKENDS = ("triton", "blocked", "reference")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what losses take
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """``triton.jit``, or the function itself where there is no Triton, so that kernel files import everywhere."""
    return function if triton is None else triton.jit(function, **options)


def constant(value: float) -> Any:
    """A number that kernels may read as a global variable."""
    return value if triton is None else triton.language.constexpr(value)


class Tile(NamedTuple):
    """Blocks, warps and pipeline stages of one kernel launch; a block the kernel does not have is 0."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    registers: int | None = None  # the most a thread may have (None: as many as the compiler likes)

    @property
    def options(self) -> dict[str, int]:
        """What a launch is given beside its blocks."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


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
    blocks: tuple[str, ...] = ("BLOCK_M", "BLOCK_N", "BLOCK_K")  # which of the tile's blocks are arguments
    divisible: tuple[str, ...] = ()  # integer arguments that are multiples of 16; pointers always are
    matrix: bool = True  # must hold matrix instructions (False: element-wise, or float32 on purpose)
    wide: bool = False  # must load and store 16 bytes at a time somewhere
    resident: tuple[tuple[int | str, int], ...] = ()  # (architecture, least programs a multiprocessor must hold)


Table = Mapping[str, Mapping[int | str, tuple[Row, ...]]]  # kernel → architecture, or "any" → rows

# ---- linear_kd ------------------------------------------------------------------------------------------------
LINEAR_KD: Table = {
    "linear_kd.logits": {
        80: (Row(Tile(128, 128, 64, 8, 3)),),
        # Up to 512 wide two blocks fit: one's epilogue runs beside the other's products. With 768 (measured: a call of "ce 768"
        # takes 33 µs less) the products are longer, and a wider tile reads a quarter less from L2.
        90: (Row(Tile(128, 128, 64, 8, 3), 512), Row(Tile(128, 256, 64, 8, 4))),
        100: (Row(Tile(128, 256, 64, 8, 3)),),
        120: (Row(Tile(128, 128, 64, 8, 2)),),  # workstation Blackwell has an older chip's 99 KiB of shared memory
        "gfx942": (Row(Tile(128, 128, 64, 8, 2)),),
    },
    # a width that block_k does not divide: masks in the inner loop take the registers of the wider tile
    "linear_kd.logits_ragged": {
        "any": (Row(Tile(128, 128, 64, 8, 3)),),
        "gfx942": (Row(Tile(128, 128, 64, 8, 2)),),
    },
    "linear_kd.logits_float32": {"any": (Row(Tile(64, 64, 32, 4, 2)),)},
    "linear_kd.sums": {"any": (Row(Tile(0, 4096, 0, 8, 1)),)},  # one program, block_n numbers at a time
    "linear_kd.offsets": {"any": (Row(Tile(0, 0, 0, 4, 1)),)},  # a row a program
    # block_m rows a program, block_n logits a step: of as many rows as fit, each a whole tile of columns
    # (measured on sm_90: a call of "kl 384/768" takes 16 µs less with 128 rows, half as many partial sums of the bias)
    "linear_kd.gradient": {"any": (Row(Tile(64, 2048, 0, 8, 1)),), 90: (Row(Tile(128, 2048, 0, 8, 1)),)},
    "linear_kd.gradient_float32": {"any": (Row(Tile(64, 1024, 0, 4, 1)),)},
}

# ---- relation_kl and score_mse --------------------------------------------------------------------------------
# block_m is the longest sequence of a launch in the kernels of whole sequences, each tile taking those that are too long for
# the one before it; a block of rows in the others, which stream block_n columns. In a short tile a warp has 16 whole rows of
# scores, whose sums then need no exchange between warps; at 128 tokens that fits the registers of sm_90 and of gfx942.
# Where no tile is long enough, the others serve: sm_120 has no room for 128 × 128 scores beside 64 columns.
_UP_TO_32, _UP_TO_64 = Row(Tile(32, 0, 0, 2, 1), 64, 32), Row(Tile(64, 0, 0, 4, 1), 64, 64)
_SHORT = (_UP_TO_32, _UP_TO_64, Row(Tile(128, 0, 0, 8, 1), 64))
_SHORT_80 = (_UP_TO_32, Row(Tile(64, 0, 0, 4, 1), 32, 64), Row(Tile(64, 0, 0, 4, 1, 255), 64, 64), _SHORT[-1])
_SHORT_90 = (_UP_TO_32, _UP_TO_64, Row(Tile(128, 0, 0, 4, 1), 64))
# No tile of 128 tokens is free of spills for all pairs of heads up to 64 in Triton 3.9: the kernels for longer sequences serve.
_RELATION_90 = (_UP_TO_32, _UP_TO_64, Row(Tile(128, 0, 0, 4, 1), 32), Row(Tile(64, 0, 0, 4, 1), 64))
_SHORT_120 = (_UP_TO_32, _UP_TO_64, Row(Tile(128, 0, 0, 8, 1), 32), Row(Tile(64, 0, 0, 4, 1), 64))
_SHORT_FLOAT32 = (Row(Tile(32, 0, 0, 8, 1), 64),)
_ROWS = (Row(Tile(64, 32, 0, 4, 2), 64), Row(Tile(64, 16, 0, 4, 2)))
_ROWS_FLOAT32 = (Row(Tile(32, 16, 0, 8, 2), 64), Row(Tile(16, 16, 0, 8, 2)))
RELATION: Table = {
    "relation_kl.short": {
        "any": _SHORT,
        80: _SHORT_80,
        90: _RELATION_90,
        100: _SHORT,
        120: _SHORT_120,
        "gfx942": _SHORT_90,
    },
    "relation_kl.short_float32": {"any": _SHORT_FLOAT32},
    "relation_kl.stats": {"any": _ROWS},
    "relation_kl.stats_float32": {"any": _ROWS_FLOAT32},
    "relation_kl.self": {
        "any": _ROWS,
        # Heads of 16 on an H100, 8×1024: a call takes 920 µs, with two stages 1,149.
        90: (Row(Tile(64, 32, 0, 4, 1), 16), *_ROWS),
        100: _ROWS,
        120: (Row(Tile(64, 16, 0, 4, 2)),),
    },
    "relation_kl.self_float32": {"any": _ROWS_FLOAT32},
    "relation_kl.cross": {
        "any": _ROWS,
        100: (Row(Tile(64, 32, 0, 4, 1), 16), *_ROWS),  # two stages spill 16 bytes in Triton 3.9
        120: (_ROWS[0], Row(Tile(64, 16, 0, 4, 1))),
    },
    "relation_kl.cross_float32": {"any": _ROWS_FLOAT32},
    "score_mse.short": {
        "any": _SHORT,
        # 128 tokens spill with heads wider than 16: the kernels for longer sequences serve
        80: (
            _UP_TO_32,
            Row(Tile(64, 0, 0, 4, 1, 255), 64, 64),
            Row(Tile(128, 0, 0, 8, 1), 16),
            Row(Tile(64, 0, 0, 4, 1, 255), 64),
        ),
        90: _SHORT_90,
        100: _SHORT,
        120: _SHORT_120,
        "gfx942": _SHORT_90,
    },
    "score_mse.short_float32": {"any": (Row(Tile(32, 0, 0, 4, 1), 64),)},
    "score_mse.rows": {"any": _ROWS, 100: (Row(Tile(64, 64, 0, 4, 2), 64), *_ROWS[1:]), 120: _ROWS},
    "score_mse.rows_float32": {"any": _ROWS_FLOAT32},
}

# ---- hidden_mse -----------------------------------------------------------------------------------------------
HIDDEN_MSE: Table = {"hidden_mse": {"any": (Row(Tile(0, 4096, 0, 8, 1)),)}}

# ---- the backward of all of them ------------------------------------------------------------------------------
SCALING: Table = {"scaling": {"any": (Row(Tile(0, 8192, 0, 8, 1)),)}}

# ---- packed_attention -----------------------------------------------------------------------------------------
# block_m rows hold a whole sequence; the backward takes block_n of its keys at a time.
# On sm_90 four warps, or 128 registers with eight, let two programs of 128 tokens share a multiprocessor; on others that limit
# spills, and with heads of 64 in Triton 3.9 here, too.
_ATTENTION = (Row(Tile(64, 0, 0, 4, 1), 64, 64), Row(Tile(128, 0, 0, 8, 1), 64))
_ATTENTION_BACKWARD = (Row(Tile(64, 64, 0, 4, 1), 64, 64), Row(Tile(128, 64, 0, 8, 1), 64))
PACKED_ATTENTION: Table = {
    "packed_attention.forward": {
        "any": _ATTENTION,
        90: (
            Row(Tile(64, 0, 0, 4, 2, 128), 64, 64),
            Row(Tile(128, 0, 0, 8, 1, 128), 32),
            Row(Tile(128, 0, 0, 4, 1), 64),
        ),
        100: _ATTENTION,
    },
    "packed_attention.backward": {
        "any": _ATTENTION_BACKWARD,
        90: (_ATTENTION_BACKWARD[0], Row(Tile(128, 32, 0, 8, 1, 128), 32), Row(Tile(128, 32, 0, 4, 1), 64)),
        100: _ATTENTION_BACKWARD,
        120: (Row(Tile(64, 32, 0, 4, 1), 64, 64), Row(Tile(128, 64, 0, 8, 1), 32), Row(Tile(128, 32, 0, 8, 1), 64)),
        "gfx942": (_ATTENTION_BACKWARD[0], Row(Tile(128, 64, 0, 4, 1), 64)),
    },
}

TABLE: Table = {**LINEAR_KD, **RELATION, **HIDDEN_MSE, **SCALING, **PACKED_ATTENTION}


@contextmanager
def using(kernel: str, tile: Tile) -> Iterator[None]:
    """Inside the block every launch of ``kernel`` takes ``tile``, whatever its width, length and architecture."""
    global TABLE
    assert kernel in TABLE, f"{kernel!r} is none of {', '.join(TABLE)}"
    kept, TABLE = TABLE, {**TABLE, kernel: {"any": (Row(tile),)}}
    try:
        yield
    finally:
        TABLE = kept


def backend(name: str | None, x: Tensor) -> str:
    """The backend for ``x``: by default "triton" on a GPU (float64 apart), else "blocked".

    Raises ValueError for an unknown name, and for "triton" where it cannot run.
    """
    if name not in (None, *BACKENDS):
        raise ValueError(f"backend={name!r} is unknown: choose one of {', '.join(BACKENDS)}, or None")
    if name is None:
        on_gpu = x.is_cuda and triton is not None and x.dtype != torch.float64
        return "triton" if on_gpu else "blocked"
    if name == "triton":
        if triton is None:
            raise ValueError("backend='triton' needs the package triton (Linux): install it or use backend='blocked'")
        if not (x.is_cuda or INTERPRETED):
            raise ValueError(f"backend='triton' cannot run on device {x.device}: use backend='blocked'")
        if x.dtype == torch.float64:
            raise ValueError("backend='triton' has no float64: use backend='blocked' or 'reference'")
    return name


def architecture(device: torch.device) -> int | str:
    """The key of a device's column: 80, 90, 100, … on NVIDIA (10·major + minor), "gfx942" and the like on AMD."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    if device.type != "cuda":
        return 80  # the interpreter: any column computes the same
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tile(kernel: str, *, width: int, length: int | None = None, arch: int | str) -> Tile:
    """The tile of ``kernel`` for rows of ``width`` in sequences of ``length`` on ``arch``."""
    return next(row.tile for row in rows(kernel, arch) if row.serves(width, length))


def rows(kernel: str, arch: int | str) -> tuple[Row, ...]:
    """The column of ``kernel`` for ``arch``: of the closest older NVIDIA architecture, or gfx942, where it has none."""
    columns = TABLE[kernel]
    if isinstance(arch, str):
        found = columns.get(arch) or columns.get("gfx942")
    else:
        older = [column for column in columns if isinstance(column, int) and column <= arch]
        found = columns[max(older)] if older else None
    return found or columns["any"]
