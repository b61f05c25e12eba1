"""Which blocks a Triton kernel is launched with, and which backend computes a call.

TABLE: kernel → architecture, or "any" → rules. The first rule that is wide and long enough gives the tile. Each fused loss has the
rules of its kernels beside their launches and registers them here. ``bench/audit.py`` reads the same table, so what it compiles
is what runs. A tile is a safe default (it compiles without spills) until a measurement on a real GPU replaces it; nothing is
tuned at run time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
        """What a launch is given besides its blocks."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


class Rule(NamedTuple):
    """The tile for widths ≤ max_width and lengths ≤ max_length (None: any)."""

    tile: Tile
    max_width: int | None = None
    max_length: int | None = None

    def serves(self, width: int, length: int | None) -> bool:
        """Whether it covers rows of ``width`` in sequences of ``length``; an unknown length fits only "any"."""
        wide = self.max_width is None or width <= self.max_width
        return wide and (self.max_length is None or (length is not None and length <= self.max_length))


Rules = Mapping[int | str, tuple[Rule, ...]]  # of one kernel: architecture, or "any" → rules
TABLE: dict[str, Rules] = {}


def register(rules: Mapping[str, Rules]) -> None:
    """Add the rules of some kernels to the table."""
    TABLE.update(rules)


@contextmanager
def using(kernel: str, tile: Tile) -> Iterator[None]:
    """Inside the block every launch of ``kernel`` takes ``tile``, whatever its width, length and architecture."""
    assert kernel in TABLE, f"{kernel!r} is none of {', '.join(TABLE)}"
    kept, TABLE[kernel] = TABLE[kernel], {"any": (Rule(tile),)}
    try:
        yield
    finally:
        TABLE[kernel] = kept


def tile(kernel: str, *, width: int, length: int | None = None, arch: int | str) -> Tile:
    """The tile of ``kernel`` for rows of ``width`` in sequences of ``length`` on ``arch``."""
    return next(rule.tile for rule in rules(kernel, arch) if rule.serves(width, length))


def rules(kernel: str, arch: int | str) -> tuple[Rule, ...]:
    """Those of ``kernel`` for ``arch``, else for the closest older NVIDIA architecture, or for gfx942, else for any."""
    by_arch = TABLE[kernel]
    if isinstance(arch, str):
        found = by_arch.get(arch) or by_arch.get("gfx942")
    else:
        older = [known for known in by_arch if isinstance(known, int) and known <= arch]
        found = by_arch[max(older)] if older else None
    return found or by_arch["any"]


def architecture(device: torch.device) -> int | str:
    """A device's key in the table: 80, 90, 100, … on NVIDIA (10·major + minor), "gfx942" and the like on AMD."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    if device.type != "cuda":
        return 80  # the interpreter: the tiles of any architecture compute the same
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def backend(name: str | None, x: Tensor) -> str:
    """The backend for ``x``: by default "triton" on a GPU (not for float64), else "blocked".

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
