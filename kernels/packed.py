"""Packed sequences: what ``relation_kl`` and ``score_mse`` share.

Rows of a [T, D] tensor are tokens, sequences lie end to end, and ``cu_seqlens`` says where; a head is a slice of D/A
columns. Here are the tiles of that layout in Triton, the blocks of it on a CPU, the checks of both losses' arguments
and the cases that tests and benches iterate over.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd.kernels import tiling
from fastkd.kernels.tiling import Build, jit

try:
    import triton.language as tl
except ImportError:
    tl = None

MASKED = -1e30  # score of a padded key: finite, so that the difference of two of them is 0 and not NaN
MAX_HEAD_WIDTH = 128  # of the Triton kernels, which hold a head's whole width
PROGRAMS = 8192  # of a launch over whole sequences: 20 times as many as an H100 holds at once
# Entries of a score tile. Fewer, and the calls of a block cost more than its arithmetic; more, and it leaves the cache.
_ENTRIES_PER_THREAD, _MAX_ENTRIES = 1 << 19, 1 << 23
# Lengths of groups are multiples of it and their sizes powers of two: oneDNN builds and keeps a kernel of about a
# megabyte for every shape of a bfloat16 product, and a stream of ever new shapes would pay for that in each step.
_LENGTH_STEP = 16


# ---- arguments ------------------------------------------------------------------------------------------------


def check_pair(op: str, who: str, query: Tensor, key: Tensor, like: Tensor, num_heads: int) -> None:
    """Raise ValueError unless query and key are floats [T, D] with D a multiple of ``num_heads`` and T that of ``like``."""
    if query.dtype not in tiling.FLOATS or key.dtype not in tiling.FLOATS:
        raise ValueError(f"{op}: {who} is {query.dtype}: give float16, bfloat16, float32 or float64")
    if query.ndim != 2 or query.shape != key.shape or query.shape[0] != like.shape[0]:
        shapes = f"{tuple(query.shape)} and {tuple(key.shape)}"
        raise ValueError(f"{op}: {who} has shapes {shapes}: give [{like.shape[0]}, D] both, one row a token")
    if num_heads < 1 or query.shape[1] < 1 or query.shape[1] % num_heads:
        raise ValueError(
            f"{op}: {who} width {query.shape[1]} is no positive multiple of num_heads={num_heads}: choose a divisor"
        )


def check_cu_seqlens(op: str, cu_seqlens: Tensor, like: Tensor) -> None:
    """Raise ValueError unless ``cu_seqlens`` is an integer [B+1] beside ``like``; its values are read on a CPU only."""
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        given = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        raise ValueError(f"{op}: cu_seqlens is {given}: give B+1 int32 row numbers, from 0 to {like.shape[0]}")
    if cu_seqlens.device != like.device:
        raise ValueError(f"{op}: cu_seqlens is on {cu_seqlens.device}, its rows on {like.device}: move it there")


def choose_backend(op: str, backend: str | None, like: Tensor, head_width: int) -> str:
    """``tiling.backend``, with a ValueError for a head too wide for the Triton kernels."""
    backend = tiling.backend(backend, like)
    if backend == "triton" and head_width > MAX_HEAD_WIDTH:
        raise ValueError(f"{op}: head width {head_width} exceeds {MAX_HEAD_WIDTH}: use more heads or backend='blocked'")
    return backend


def in_one_dtype(*tensors: Tensor | None) -> list[Any]:
    """The tensors in the widest of their dtypes, so that products of mixed ones are exact too."""
    widest = functools.reduce(torch.promote_types, (x.dtype for x in tensors if x is not None))
    return [None if x is None else x.to(widest) for x in tensors]


def table_key(kernel: str, dtype: torch.dtype) -> str:
    """A kernel's name in the table of tiles."""
    return f"{kernel}_float32" if dtype == torch.float32 else kernel


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def padded(cu_seqlens: Tensor, bound: int) -> Group:
    """All sequences as one group, padded to ``bound``, without reading ``cu_seqlens`` on the host."""
    return Group(*padded_rows(cu_seqlens, bound), padded=True)


def padded_rows(cu_seqlens: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """Row numbers [B, bound] of every sequence's tokens (0 where padded), and which are tokens."""
    position = torch.arange(bound, device=cu_seqlens.device)
    valid = position < cu_seqlens.diff()[:, None]
    return torch.where(valid, cu_seqlens[:-1, None] + position, 0), valid


# ---- Triton ---------------------------------------------------------------------------------------------------


@jit
def _tile(  # type: ignore[no-untyped-def]
    pointer, stride, first, count, head, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Pointers [ROWS, COLUMNS] to one head's slice of packed rows, and which are inside.

    One 64-bit base, and 32-bit distances inside the tile: half the registers of a 64-bit address for every row.
    """
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    base = pointer + first.to(tl.int64) * stride + head * WIDTH
    return base + (row * stride + column), (row < count) & (column < WIDTH)


@jit
def load_tile(  # type: ignore[no-untyped-def]
    source,  # (pointer, stride of a row)
    first, count, head, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``count`` rows from ``first`` on, zero past them and past the head's width."""
    pointers, inside = _tile(source[0], source[1], first, count, head, WIDTH, ROWS, COLUMNS)
    return tl.load(pointers, mask=inside, other=0.0).to(DTYPE)


@jit
def store_tile(  # type: ignore[no-untyped-def]
    pointer, stride, first, count, head, value, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The same rows, in the dtype of the pointer."""
    pointers, inside = _tile(pointer, stride, first, count, head, WIDTH, ROWS, COLUMNS)
    tl.store(pointers, value.to(pointer.dtype.element_ty), mask=inside)


@jit
def row_block(cu_ptr, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program (head, row block, sequence): first row and rows of its block, start and length of its sequence."""
    sequence, offset = tl.program_id(2), tl.program_id(1) * BLOCK_M
    start = tl.load(cu_ptr + sequence)
    count = tl.load(cu_ptr + sequence + 1) - start
    return start + offset, tl.minimum(count - offset, BLOCK_M), start, count


def unit_stride(x: Tensor) -> Tensor:
    """Column slices of a wider projection as they are: a kernel takes the stride of a row."""
    return x if x.stride(1) == 1 else x.contiguous()


def pad_width(width: int) -> int:
    """Columns of a head's tile: a power of two, at least the matrix unit's 16."""
    return max(16, 1 << (width - 1).bit_length())


def fits_one_tile(kernel: str, *, width: int, length: int, device: torch.device) -> bool:
    """Whether one program of ``kernel`` can hold the scores of a sequence, as the table of tiles has it."""
    if width > 64:
        return False
    return length <= tiling.tile(kernel, width=width, length=length, arch=tiling.architecture(device)).block_m


def tiles_by_length(kernel: str, *, width: int, length: int, device: torch.device) -> list[tuple[tiling.Tile, int]]:
    """Tiles of ``kernel`` that together hold sequences of up to ``length`` tokens, the shortest first.

    Beside each is the length of the tile before it: its launch takes the sequences that are longer. A short sequence then
    costs a small tile, and fewer registers and warps, whatever the longest is; nobody asks the device for lengths.
    """
    arch, found, shorter = tiling.architecture(device), list[tuple[tiling.Tile, int]](), 0
    while shorter < length:
        tile = tiling.tile(kernel, width=width, length=shorter + 1, arch=arch)
        found.append((tile, shorter))
        shorter = tile.block_m
    return found


def one_tile_grid(num_heads: int, sequences: int) -> tuple[int, int]:
    """Programs (head, i), of which i takes every so many-th sequence: passing one over costs less than a program."""
    return num_heads, min(sequences, -(-PROGRAMS // num_heads))


def dot_dtype(dtype: torch.dtype) -> Any:
    """The dtype of the kernels' matrix operands. The interpreter multiplies bfloat16 wrongly: float32 there."""
    if tiling.INTERPRETED or dtype == torch.float32:
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def build(
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

    ``wide`` as in ``tiling.Build``, of half-precision variants: a head is then a multiple of 8 entries, 16 bytes.
    """
    half, pads = dtype != torch.float32, [pad_width(width) for width in widths]
    pointers = {"cu_ptr": "*i32", "stats_ptr": "*fp32", "loss_ptr": "*fp32"}
    signature = {}
    for name in () if tl is None else kernel.arg_names:
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
            "DOT": None if tl is None else (tl.bfloat16 if half else tl.float32), **extra,
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


# ---- blocks on a CPU ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Sequences of one block, padded to one length: ``rows[g, i]`` is the packed row of token i of sequence g.

    Padded rows are zeros: they score zero against every row.
    """

    rows: Tensor  # [G, n] int64, 0 where padded
    valid: Tensor  # [G, n] bool
    padded: bool

    @property
    def length(self) -> int:
        return self.rows.shape[1]

    def heads(self, x: Tensor, num_heads: int, *, feature: str | None = None) -> Tensor:
        """[T, D] → [G·A, n, D/A] in float32 or float64, padded rows zero.

        In a padded group, ``feature="key"`` appends a column that is 0 for a token and ``MASKED`` for padding, and
        ``feature="query"`` one of ones: their product masks padded keys inside the matrix product, at no extra pass.
        """
        (size, length), width = self.rows.shape, x.shape[1] // num_heads
        extra = int(self.padded and feature is not None)
        out = torch.empty(size, num_heads, length, width + extra, dtype=accumulator(x.dtype), device=x.device)
        gathered = x.index_select(0, self.rows.flatten()).view(size, length, num_heads, width)
        if self.padded:
            gathered.mul_(self.valid[:, :, None, None])
        out[..., :width].copy_(gathered.transpose(1, 2))
        if extra:
            out[..., width] = torch.where(self.valid, 0.0, MASKED)[:, None] if feature == "key" else 1.0
        return out.flatten(0, 1)

    def scatter(self, out: Tensor, heads: Tensor) -> None:
        """Write [G·A, n, D/A] back to the rows of ``out`` [T, D], zero so far, in its dtype."""
        size, length = self.rows.shape
        tokens = heads.unflatten(0, (size, -1)).transpose(1, 2).reshape(size * length, -1).to(out.dtype)
        if self.padded:  # gradients of padding are zeros: added to row 0 they change nothing, and need no selection
            out.index_add_(0, self.rows.flatten(), tokens)
        else:
            out.index_copy_(0, self.rows.flatten(), tokens)


def groups(cu_seqlens: Tensor, num_heads: int, rows: int, max_seqlen: int) -> Iterator[Group]:
    """Every sequence that is not empty once, longest first.

    Sequences of similar length share a group as long as its score tile fits a block, so that a batch of short ones
    costs a few large matrix products of few shapes instead of thousands of tiny ones of many. A longer sequence is a
    group of its own.
    Raises ValueError where ``cu_seqlens`` does not cut ``rows`` rows into sequences of at most ``max_seqlen``.
    """
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != rows or starts != sorted(starts):
        raise ValueError(f"cu_seqlens runs from {starts[0]} to {starts[-1]}: let it rise from 0 to the {rows} rows")
    spans = [(b - a, a) for a, b in itertools.pairwise(starts) if b > a]
    spans.sort(key=lambda span: (-span[0], span[1]))
    if spans and spans[0][0] > max_seqlen:
        raise ValueError(
            f"a sequence has {spans[0][0]} tokens, max_seqlen is {max_seqlen}: give a bound of every length"
        )
    device, budget = cu_seqlens.device, _entries()
    for length, similar in itertools.groupby(spans, lambda span: -(-span[0] // _LENGTH_STEP) * _LENGTH_STEP):
        members, position = list(similar), torch.arange(length, device=device)
        room = max(1, budget // (num_heads * length * length))
        while members:
            size = 1 << min(room, len(members)).bit_length() - 1
            lengths, first = (torch.tensor(column, device=device) for column in zip(*members[:size], strict=True))
            members = members[size:]
            valid = position < lengths[:, None]
            yield Group(torch.where(valid, first[:, None] + position, 0), valid, padded=int(lengths[-1]) != length)


def blocks(pairs: int, length: int) -> Iterator[tuple[slice, slice]]:
    """Cut the scores [pairs, length, length] of a group into (pairs, query rows) with all key columns."""
    budget = _entries()
    rows = length if pairs * length * length <= budget else min(length, max(64, budget // (4 * length)))
    step = max(1, min(pairs, budget // (rows * length)))
    for pair in range(0, pairs, step):
        for row in range(0, length, rows):
            yield slice(pair, min(pair + step, pairs)), slice(row, min(row + rows, length))


class Buffers:
    """Score tiles that every block of a call reuses."""

    def __init__(self, like: Tensor) -> None:
        self._flat = [torch.empty(0, dtype=accumulator(like.dtype), device=like.device) for _ in range(3)]

    def take(self, index: int, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        if self._flat[index].numel() < size:
            self._flat[index] = self._flat[index].new_empty(size)
        return self._flat[index][:size].view(shape)

    def product(self, index: int, a: Tensor, b: Tensor, alpha: float) -> Tensor:
        """alpha · a bᵀ."""
        out = self.take(index, (*a.shape[:2], b.shape[1]))
        return torch.baddbmm(out, a, b.transpose(1, 2), beta=0, alpha=alpha, out=out)


@contextmanager
def exact_products(*inputs: Tensor) -> Iterator[None]:
    """Multiply float32 copies of bfloat16 inputs on the CPU's bfloat16 units, accumulating in float32.

    The scores lose nothing, since the operands hold bfloat16 values, and need not be rounded to a bfloat16 output.
    With any other input, products stay in full precision. Autocast is off inside: it would round the scores.
    """
    device = inputs[0].device.type
    half = device == "cpu" and all(x.dtype == torch.bfloat16 for x in inputs)
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    try:
        if half:
            matmul.fp32_precision = "bf16"
        with torch.autocast(device, enabled=False):
            yield
    finally:
        if half:
            matmul.fp32_precision = before


def _entries() -> int:
    return min(_ENTRIES_PER_THREAD * torch.get_num_threads(), _MAX_ENTRIES)


# ---- cases ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Shapes, dtype and values of one call, for tests and benches.

    ``spread`` is the standard deviation of the scores, 8 being a peaked softmax; ``gap`` that of the student's
    difference from the teacher (None: unrelated models), which needs equal widths. ``offset`` is added to every value.
    Values are multiples of ``grid``, if that is not 0: then large scores are exact, in whatever order a product is summed.
    """

    name: str
    lengths: tuple[int, ...]
    num_heads: int
    student_width: int
    teacher_width: int
    dtype: torch.dtype = torch.float32
    cross: bool = False
    spread: float = 1.0
    gap: float | None = None
    offset: float = 0.0
    grid: float = 0.0

    @property
    def tolerance(self) -> float:
        """‖out − ref‖/‖ref‖ against float64, of the value and of every gradient."""
        return 1e-5 if self.dtype == torch.float32 else 1e-2

    @property
    def scores(self) -> int:
        """Entries of one model's score matrices."""
        return self.num_heads * sum(n * n for n in self.lengths)

    def inputs(self, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of ``relation_kl``; the student's tensors ask for gradients."""
        q_s, k_s, q_t, k_t = self.tensors(device, seed)
        keys = {"student_key": k_s.requires_grad_(), "teacher_key": k_t} if self.cross else {}
        return {"student": q_s.requires_grad_(), "teacher": q_t, **keys, **self.layout(device)}

    def layout(self, device: torch.device | str) -> dict[str, Any]:
        cu_seqlens = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=device)
        return {"cu_seqlens": cu_seqlens, "num_heads": self.num_heads, "max_seqlen": max(self.lengths)}

    def tensors(self, device: torch.device | str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Student query and key [T, Ds], teacher query and key [T, Dt]: column slices of fused projections.

        Rows scatter around seven centres, so that a row of a peaked self-relation has rivals to its own diagonal.
        """
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.arange(sum(self.lengths))

        def noise(rows: int, width: int, deviation: float) -> Tensor:
            return torch.randn(rows, 3 * width, generator=generator) * deviation

        def model(width: int) -> Tensor:
            centres, own = noise(7, width, self.spread**0.5), noise(len(tokens), width, self.spread**0.5)
            return 0.9**0.5 * centres[tokens % 7] + 0.1**0.5 * own + self.offset

        teacher = model(self.teacher_width)
        if self.gap is None:
            student = model(self.student_width)
        else:  # the scores of s + δ differ by √2·|s|·|δ| in standard deviation
            student = teacher + noise(len(tokens), self.student_width, self.gap / (2 * self.spread) ** 0.5)
        if self.grid:
            student, teacher = ((x / self.grid).round() * self.grid for x in (student, teacher))
        q_s, k_s, _ = student.to(device, self.dtype).split(self.student_width, dim=1)
        q_t, k_t, _ = teacher.to(device, self.dtype).split(self.teacher_width, dim=1)
        return q_s.detach(), k_s.detach(), q_t, k_t
