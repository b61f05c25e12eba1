"""linear_kd's Triton path: the launches of each chunk of rows, and the tiles of its kernels.

Products take V up to a multiple of ALIGNED as if it were the vocabulary: with 30,522, no multiple of 8, cuBLAS 13 takes kernels of
an older GPU on an H100, which need 787 µs for the dx and 410 µs for the dW of 4,096 rows, 192 GFLOP each. There W has rows of
zeros, and dW rows that are not read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.kernels import tiling
from fastkd.kernels.linear_kd import launch_difference, logits
from fastkd.kernels.linear_kd.head import LOG2E, Gradients, Head, Sums, Terms, check_labels
from fastkd.kernels.linear_kd.logits import Logits, power_of_two, round_up
from fastkd.kernels.linear_kd.triton import _gradient_kernel, _labels_kernel, _offsets_kernel, _values_kernel
from fastkd.kernels.tiling import Rule, Tile

ALIGNED = 64  # divides the vocabulary of a product

TILES: dict[str, tiling.Rules] = {
    "linear_kd.logits": {
        80: (Rule(Tile(128, 128, 64, 8, 3)),),
        # Up to 512 wide two blocks fit: one's epilogue runs beside the other's products. With 768 (measured: a call of "ce 768"
        # takes 33 µs less) the products are longer, and a wider tile reads a quarter less from L2.
        90: (Rule(Tile(128, 128, 64, 8, 3), 512), Rule(Tile(128, 256, 64, 8, 4))),
        100: (Rule(Tile(128, 256, 64, 8, 3)),),
        120: (Rule(Tile(128, 128, 64, 8, 2)),),  # workstation Blackwell has an older chip's 99 KiB of shared memory
        "gfx942": (Rule(Tile(128, 128, 64, 8, 2)),),
    },
    # a width that block_k does not divide: masks in the inner loop take the registers of the wider tile
    "linear_kd.logits_ragged": {
        "any": (Rule(Tile(128, 128, 64, 8, 3)),),
        "gfx942": (Rule(Tile(128, 128, 64, 8, 2)),),
    },
    "linear_kd.logits_float32": {"any": (Rule(Tile(64, 64, 32, 4, 2)),)},
    # both models' products, one after the other: two accumulators, so no tile of 256 columns
    "linear_kd.difference": {
        80: (Rule(Tile(128, 128, 32, 8, 3)),),  # with a depth of 64 it spills
        90: (Rule(Tile(128, 128, 64, 8, 3)),),
        120: (Rule(Tile(128, 128, 64, 8, 2)),),
        "gfx942": (Rule(Tile(128, 128, 32, 8, 3)),),
    },
    "linear_kd.difference_float32": {"any": (Rule(Tile(64, 64, 32, 4, 2)),)},
    "linear_kd.expected": {"any": (Rule(Tile(0, 2048, 0, 8, 1)),)},  # a row a program, block_n logits a step
    "linear_kd.sums": {"any": (Rule(Tile(0, 4096, 0, 8, 1)),)},  # one program, block_n numbers at a time
    "linear_kd.offsets": {"any": (Rule(Tile(0, 0, 0, 4, 1)),)},  # a row a program
    # block_m rows a program, block_n logits a step: of as many rows as fit, each a whole tile of columns
    # (measured on sm_90: a call of "kl 384/768" takes 16 µs less with 128 rows, half as many partial sums of the bias)
    "linear_kd.gradient": {"any": (Rule(Tile(64, 2048, 0, 8, 1)),), 90: (Rule(Tile(128, 2048, 0, 8, 1)),)},
    "linear_kd.gradient_float32": {"any": (Rule(Tile(64, 1024, 0, 4, 1)),)},
}
tiling.register(TILES)


class _Partial(NamedTuple):
    """What each block of rows adds up over the chunks, in the same order in every run."""

    kl: Tensor  # [row blocks, tiles]
    db: Tensor | None  # [row blocks, stride]

    @classmethod
    def zeros(cls, logits: Logits, rows: int, launch: Tile, with_db: bool) -> _Partial:
        blocks = -(-rows // launch.block_m)
        db = logits.maximum.new_zeros((blocks, logits.centred.shape[1])) if with_db else None
        return cls(logits.maximum.new_zeros((blocks, logits.maximum.shape[1])), db)


def _offsets(
    head: Head, student: Logits, teacher: Logits | None, labels: Tensor | None, ce: Tensor, terms: Terms
) -> None:
    """Step 2: replace both models' sums by offsets; fill ``ce`` [R] if there is a cross-entropy."""
    rows, width = head.hidden.shape
    tiles = student.maximum.shape[1]
    launch = tiling.tile("linear_kd.offsets", width=width, arch=tiling.architecture(ce.device))
    _offsets_kernel[(rows,)](
        student.maximum,
        student.total,
        student.total_ce,
        None if teacher is None else teacher.maximum,
        None if teacher is None else teacher.total,
        labels,
        head.hidden,
        head.weight,
        head.bias,
        ce,
        LOG2E / terms.temperature,
        WIDTH=width,
        WIDTH_UP=power_of_two(width),
        TILES=tiles,
        TILES_UP=power_of_two(tiles),
        HAS_TEACHER=teacher is not None,
        HAS_LABELS=labels is not None,
        HAS_CE=terms.ce_weight != 0,
        HAS_SUM_CE=student.total_ce is not None,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def _gradient(
    rows: int,
    student: Logits,
    teacher: Logits | None,
    labels: Tensor | None,
    expected: Tensor | None,
    share: Tensor,
    partial: _Partial,
    terms: Terms,
    vocabulary: int,
    launch: Tile,
    write: bool,
) -> None:
    """Step 3: add to ``partial``, and leave dz in the student's logits if they are to be written."""
    tiles, stride = student.maximum.shape[1], student.centred.stride(0)
    tile = stride // tiles
    block_m = min(launch.block_m, max(launch.block_n // tile, power_of_two(rows)))  # no empty steps where rows are few
    _gradient_kernel[(tiles, -(-rows // block_m))](
        student.centred,
        student.total,
        student.total_ce if write else None,
        None if teacher is None else teacher.centred,
        None if teacher is None else teacher.total,
        labels,
        expected,
        share,
        partial.kl,
        partial.db,
        rows,
        stride,
        LOG2E / terms.temperature,
        terms.gradient_factor(vocabulary),
        terms.ce_weight,
        TILE=tile,
        DIVERGENCE=terms.divergence,
        HAS_TEACHER=teacher is not None,
        HAS_LABELS=labels is not None,
        HAS_CE=write and terms.ce_weight != 0,
        HAS_SUM_CE=write and student.total_ce is not None,
        HAS_DB=partial.db is not None,
        WRITE=write,
        BLOCK_M=block_m,
        BLOCK_N=launch.block_n,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def _statistics(
    student: Head,
    teacher: Head | None,
    labels: Tensor | None,
    logits_s: Logits,
    logits_t: Logits | None,
    ce: Tensor,
    terms: Terms,
    tile: Tile,
    write: bool,
) -> Tensor | None:
    """Steps 1 and 2, and what else the divergence's gradient needs of a row: E_p[log₂ p − log₂ q] [R] of reverse_kl.

    Of mse ``logits_t`` gets the differences of both models' logits.
    """
    if teacher is None or logits_t is None:
        logits.fill(student, labels, logits_s, terms.temperature, tile)
        _offsets(student, logits_s, None, labels, ce, terms)
    elif terms.divergence == "mse":
        launch_difference.fill(student, teacher, labels, logits_s if terms.ce_weight else None, logits_t, tile)
        if terms.ce_weight:
            _offsets(student, logits_s, None, labels, ce, terms)
    else:
        logits.fill(student, labels, logits_s, terms.temperature, tile)
        logits.fill(teacher, labels, logits_t, terms.temperature, tile)
        _offsets(student, logits_s, logits_t, labels, ce, terms)
        if write and terms.divergence == "reverse_kl":
            return launch_difference.expected(len(student.hidden), logits_s, logits_t, labels, terms.temperature)
    return None


def value_and_gradients(
    student: Head,
    teacher: Head | None,
    labels: Tensor | None,
    terms: Terms,
    chunk_rows: int,
    dtype: torch.dtype,
    share: Tensor,
    out: Gradients,
) -> Sums:
    """The four steps for each chunk of rows."""
    vocabulary, x = len(student.weight), student.hidden
    tile, launch = _logits_tile(dtype, student, teacher, terms), _gradient_tile(dtype, x.device)
    columns, aligned = round_up(vocabulary, tile.block_n), round_up(vocabulary, ALIGNED)
    student = student.centred(dtype).cast(dtype, columns, aligned)
    teacher = None if teacher is None else teacher.centred(dtype).cast(dtype, columns, vocabulary)
    rows = min(chunk_rows, len(x))
    logits_s = Logits.empty(student, rows, tile, terms.two_softmaxes)
    logits_t = None if teacher is None else Logits.empty(student, rows, tile, False)
    ce, partial = x.new_zeros(len(x), dtype=torch.float32), _Partial.zeros(logits_s, rows, launch, out.bias is not None)
    write = bool(out.wanted)
    final = out.weight  # a bfloat16 dW of several chunks is added up in float32, and rounded once
    if final is not None and final.dtype != torch.float32 and len(x) > rows:
        out = out._replace(weight=torch.empty_like(final, dtype=torch.float32))
    for start in range(0, len(x), chunk_rows):
        part = slice(start, start + chunk_rows)
        y, head = None if labels is None else labels[part], student.rows(part)
        r = len(head.hidden)
        with torch.cuda.device_of(x):
            expected = _statistics(
                head,
                None if teacher is None else teacher.rows(part),
                y,
                logits_s,
                logits_t,
                ce[part],
                terms,
                tile,
                write,
            )
            if write or logits_t is not None:
                _gradient(r, logits_s, logits_t, y, expected, share, partial, terms, vocabulary, launch, write)
        _products(logits_s.centred[:r, :aligned], head, start, out)
    if final is not None and out.weight is not None and out.weight is not final:
        final.copy_(out.weight)
    if out.bias is not None and partial.db is not None:
        torch.sum(partial.db[:, :vocabulary], 0, out=out.bias)
    return Sums(partial.kl, ce)


def share_of(labels: Tensor, vocabulary: int) -> Tensor:
    """1/N in float64, on the device; labels are checked as in ``check_labels``."""
    launch = tiling.tile("linear_kd.sums", width=0, arch=tiling.architecture(labels.device))
    share, right = labels.new_empty((), dtype=torch.float64), labels.new_empty((), dtype=torch.int32)
    with torch.cuda.device_of(labels):
        _labels_kernel[(1,)](labels, share, right, len(labels), vocabulary, BLOCK_N=launch.block_n, **launch.options)
    if labels.device.type != "cpu":
        torch._assert_async(right)
    elif not right:
        check_labels(labels, vocabulary)
    return share


def values(
    sums: Sums, share: Tensor, terms: Terms, with_teacher: bool, vocabulary: int, out: tuple[Tensor, ...]
) -> None:
    """Fill the loss, KL and CE from their parts."""
    launch = tiling.tile("linear_kd.sums", width=0, arch=tiling.architecture(share.device))
    with torch.cuda.device_of(share):
        _values_kernel[(1,)](
            sums.kl,
            sums.ce,
            share,
            *out,
            sums.kl.numel(),
            sums.ce.numel(),
            terms.value_factor(vocabulary),
            float(terms.kl_weight),
            float(terms.ce_weight),
            HAS_TEACHER=with_teacher,
            HAS_CE=terms.ce_weight != 0,
            BLOCK_N=launch.block_n,
            **launch.options,
        )


def _logits_tile(dtype: torch.dtype, student: Head, teacher: Head | None, terms: Terms) -> Tile:
    """One tile for both models, since their blocks of columns share dz."""
    widths = [head.hidden.shape[1] for head in (student, teacher) if head is not None]
    arch = tiling.architecture(student.hidden.device)
    differ = teacher is not None and terms.divergence == "mse"
    name = difference_tile_name(dtype) if differ else logits_tile_name(dtype, *widths)
    tile = tiling.tile(name, width=max(widths), arch=arch)
    assert tile.block_n % ALIGNED == 0, f"{tile}: whole tiles hold the vocabulary of the products"
    return tile


def logits_tile_name(dtype: torch.dtype, *widths: int) -> str:
    if dtype == torch.float32:
        return "linear_kd.logits_float32"
    return "linear_kd.logits_ragged" if any(width % 64 for width in widths) else "linear_kd.logits"


def difference_tile_name(dtype: torch.dtype) -> str:
    return "linear_kd.difference_float32" if dtype == torch.float32 else "linear_kd.difference"


def _gradient_tile(dtype: torch.dtype, device: torch.device) -> Tile:
    return tiling.tile(gradient_tile_name(dtype), width=0, arch=tiling.architecture(device))


def gradient_tile_name(dtype: torch.dtype) -> str:
    return "linear_kd.gradient_float32" if dtype == torch.float32 else "linear_kd.gradient"


def _products(dz: Tensor, student: Head, start: int, out: Gradients) -> None:
    """Step 4 for one chunk: dx of its rows, and its share of dW, which the first chunk writes and later ones add to.

    A row of dz starts at a multiple of its tile's columns, so at 16 bytes; cuBLAS wants its leading dimension aligned.
    """
    if out.hidden is not None:
        _product(dz, student.weight, out.hidden[start : start + len(dz)])
    if out.weight is not None:
        _product(dz.t(), student.hidden, out.weight, add=start > 0)


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a b, or out += a b, in float32, rounded once, to the dtype of ``out``."""
    if not a.is_cuda:  # no out_dtype there
        product = a.float() @ b.float()
        out.copy_(out + product if add else product)
        return
    options: dict[str, Any] = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, a, b, out=out, **options)
    else:
        torch.mm(a, b, out=out, **options)
