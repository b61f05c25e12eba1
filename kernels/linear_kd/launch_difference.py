"""The launches that reverse_kl and mse have beside, or in place of, those of KL."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.kernels import tiling
from fastkd.kernels.linear_kd.head import LOG2E, Head
from fastkd.kernels.linear_kd.logits import Logits, power_of_two
from fastkd.kernels.linear_kd.triton_difference import _difference_kernel, _expected_kernel, _means_kernel
from fastkd.kernels.tiling import Tile


def fill(
    student: Head, teacher: Head, labels: Tensor | None, logits: Logits | None, difference: Logits, tile: Tile
) -> None:
    """Fill ``difference`` with z_s − z_t, its tiles' means in place of maxima and their offsets in place of sums; with a
    cross-entropy ``logits`` with the student's own."""
    rows, vocabulary = len(student.hidden), len(teacher.weight)  # the student's has rows of zeros at its end
    own = (None, None, None) if logits is None else logits[:3]
    tiles, stride = difference.maximum.shape[1], difference.centred.stride(0)
    _difference_kernel[(-(-rows // tile.block_m), tiles)](
        *student[:3],
        *teacher[:3],
        labels,
        *own,
        *difference[:2],
        rows,
        vocabulary,
        stride,
        LOG2E,
        STUDENT_WIDTH=student.hidden.shape[1],
        TEACHER_WIDTH=teacher.hidden.shape[1],
        HAS_LABELS=labels is not None,
        HAS_CE=logits is not None,
        UPCAST=tiling.INTERPRETED,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    launch = tiling.tile("linear_kd.offsets", width=0, arch=tiling.architecture(student.hidden.device))
    _means_kernel[(rows,)](
        difference.maximum,
        difference.total,
        labels,
        vocabulary,
        TILE=stride // tiles,
        TILES=tiles,
        TILES_UP=power_of_two(tiles),
        HAS_LABELS=labels is not None,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def expected(rows: int, student: Logits, teacher: Logits, labels: Tensor | None, temperature: float) -> Tensor:
    """E_p[log₂ p − log₂ q] of each row [R]; nothing is written where the label is ignored."""
    tiles, tile = student.maximum.shape[1], student.centred.shape[1] // student.maximum.shape[1]
    launch = tiling.tile("linear_kd.expected", width=0, arch=tiling.architecture(student.centred.device))
    out = student.maximum.new_empty(rows, dtype=torch.float32)
    _expected_kernel[(rows,)](
        student.centred,
        student.total,
        teacher.centred,
        teacher.total,
        labels,
        out,
        LOG2E / temperature,
        TILE=tile,
        TILES=tiles,
        HAS_LABELS=labels is not None,
        BLOCK_N=launch.block_n,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return out
