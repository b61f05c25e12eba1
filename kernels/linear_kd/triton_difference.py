"""linear_kd's Triton kernels for the divergences that need more of both models' logits than their softmaxes.

reverse_kl takes a launch more between the offsets and the gradient:
  _expected_kernel: both models' centred logits and offsets → E_p[log₂ p − log₂ q] [R], which the gradient subtracts

mse takes one in place of the two of the logits, and one in place of the teacher's offsets. The difference is made in float32:
rounded logits would not do, since here the words far below the maximum count as much as those near it.
  _difference_kernel: x Wᵀ + b of both → z_s − z_t less its tile's mean [R, stride] in x's dtype, and the means [R, tiles]; with a
      cross-entropy also the student's centred logits and their statistics, as in _logits_kernel
  _means_kernel: the means of the tiles → what each tile's differences lack to those from the row's mean [R, tiles]
"""

from __future__ import annotations

from fastkd.kernels import tiling
from fastkd.kernels.linear_kd.head import IGNORED
from fastkd.kernels.linear_kd.triton import _log2_probabilities, _logits

try:
    import triton.language as tl
except ImportError:  # macOS and Windows: every backend but "triton" works
    tl = None

_IGNORED = tiling.constant(IGNORED)


@tiling.jit
def _difference_kernel(  # type: ignore[no-untyped-def]
    student_x_ptr,  # [R, STUDENT_WIDTH]
    student_weight_ptr,  # [V, STUDENT_WIDTH]
    student_bias_ptr,  # [stride] in float32
    teacher_x_ptr,  # [R, TEACHER_WIDTH]
    teacher_weight_ptr,  # [V, TEACHER_WIDTH]
    teacher_bias_ptr,  # [stride] in float32
    labels_ptr,  # [R]
    logits_ptr,  # [R, stride] and
    maximum_ptr,  # [R, tiles] and
    sum_ptr,  # [R, tiles], of the student as in _logits_kernel
    difference_ptr,  # [R, stride]: z_s − z_t less its tile's mean, −∞ from V on
    mean_ptr,  # [R, tiles]
    rows,
    vocabulary,
    stride,
    exponent,  # log₂e
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    HAS_LABELS: tl.constexpr,  # ignored rows may be skipped
    HAS_CE: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_M
    first_column = tl.program_id(1) * BLOCK_N
    rows_M, columns_N = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    if HAS_LABELS:
        labels = tl.load(labels_ptr + first_row + rows_M, mask=first_row + rows_M < rows, other=_IGNORED)
        if tl.max(labels, 0) == _IGNORED:
            return

    places = first_row.to(tl.int64) * stride + first_column + (rows_M[:, None] * stride + columns_N[None, :])
    statistics = (first_row + rows_M) * tl.num_programs(1) + tl.program_id(1)
    z = _logits(
        student_x_ptr, student_weight_ptr, student_bias_ptr, first_row, first_column, rows, vocabulary,
        STUDENT_WIDTH, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if HAS_CE:
        maximum = tl.max(z, 1)
        centred = z - maximum[:, None]
        tl.store(maximum_ptr + statistics, maximum)
        tl.store(sum_ptr + statistics, tl.sum(tl.exp2(centred * exponent), 1))
        tl.store(logits_ptr + places, centred.to(logits_ptr.dtype.element_ty))
    # Two sums and a subtraction, not one sum of both: a student that is its teacher then has a difference of exactly 0.
    exists = (first_column + columns_N < vocabulary)[None, :]
    z = tl.where(exists, z, 0.0) - _logits(
        teacher_x_ptr, teacher_weight_ptr, teacher_bias_ptr, first_row, first_column, rows, vocabulary,
        TEACHER_WIDTH, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    mean = tl.sum(tl.where(exists, z, 0.0), 1) / tl.minimum(BLOCK_N, vocabulary - first_column).to(tl.float32)
    z = tl.where(exists, z - mean[:, None], float("-inf"))
    tl.store(mean_ptr + statistics, mean)
    tl.store(difference_ptr + places, z.to(difference_ptr.dtype.element_ty))


@tiling.jit
def _means_kernel(  # type: ignore[no-untyped-def]
    mean_ptr,  # [R, TILES]
    offset_ptr,  # [R, TILES]: the tile's mean less the row's
    labels_ptr,  # [R]
    vocabulary,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    TILES_UP: tl.constexpr,  # the power of two from TILES on
    HAS_LABELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        if label == _IGNORED:
            return
    tiles = tl.arange(0, TILES_UP)
    means = tl.load(mean_ptr + row * TILES + tiles, mask=tiles < TILES, other=0.0)
    sizes = tl.maximum(tl.minimum(vocabulary - tiles * TILE, TILE), 0).to(tl.float32)
    mean = tl.sum(means * sizes, 0) / tl.sum(sizes, 0)
    tl.store(offset_ptr + row * TILES + tiles, means - mean, mask=tiles < TILES)


@tiling.jit
def _expected_kernel(  # type: ignore[no-untyped-def]
    student_ptr,  # [R, stride] centred logits
    student_offset_ptr,  # [R, TILES]
    teacher_ptr,  # [R, stride] centred logits
    teacher_offset_ptr,  # [R, TILES]
    labels_ptr,  # [R]
    expected_ptr,  # [R]: E_p[log₂ p − log₂ q]
    exponent,  # log₂e / τ
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    BLOCK_N: tl.constexpr,  # logits of a step: whole tiles of them
):
    # The mean under the p that the gradient will see, of rounded logits, divided by its sum: so Σ dz = 0.
    STEP: tl.constexpr = BLOCK_N // TILE
    row = tl.program_id(0).to(tl.int64)
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        if label == _IGNORED:
            return
    student_ptr += row * TILES * TILE
    teacher_ptr += row * TILES * TILE
    columns_C = tl.arange(0, TILE)
    cross_RC = tl.zeros((STEP, TILE), tl.float32)
    total_RC = tl.zeros((STEP, TILE), tl.float32)
    for start in range(0, TILES, STEP):
        tiles_R = start + tl.arange(0, STEP)
        exists, places = tiles_R < TILES, tiles_R[:, None] * TILE + columns_C[None, :]
        offsets = row * TILES + tiles_R
        _, log2_p = _log2_probabilities(student_ptr, student_offset_ptr, places, offsets, exists, exponent)
        _, log2_q = _log2_probabilities(teacher_ptr, teacher_offset_ptr, places, offsets, exists, exponent)
        p = tl.where(exists[:, None], tl.exp2(log2_p), 0.0)
        total_RC += p
        cross_RC += p * (log2_p - log2_q)
    expected = tl.sum(tl.sum(cross_RC, 1), 0) / tl.sum(tl.sum(total_RC, 1), 0)
    tl.store(expected_ptr + row, expected)
