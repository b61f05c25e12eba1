"""Shapes that nobody listed: on each, Triton = blocked = the definition in float64, in the loss and every gradient."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import error, exact, value_and_gradients

from bench.losses.linear_kd import HeadCase
from bench.losses.packed import PackedCase
from bench.losses.score_mse import ScoreCase
from fastkd.kernels import linear_kd, relation_kl, score_mse, tiling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("blocked", "triton") if tiling.INTERPRETED or DEVICE == "cuda" else ("blocked",)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
# Around the lengths at which a launch changes its tile or its kernel, and anything short.
LENGTHS = st.integers(0, 20) | st.sampled_from([31, 32, 33, 63, 64, 65, 127, 128, 129, 150])

some_examples = pytest.mark.parametrize("examples", [8, pytest.param(25, marks=pytest.mark.exhaustive)])


@st.composite
def packed_cases(draw: st.DrawFn, kind: type[PackedCase] = PackedCase, **options: Any) -> PackedCase:
    """Ragged sequences, empty ones among them, of one or two heads of any two widths."""
    lengths = draw(st.lists(LENGTHS, min_size=1, max_size=3).filter(any))
    heads, width_s, width_t = draw(st.integers(1, 2)), draw(st.integers(1, 70)), draw(st.integers(1, 70))
    return kind("", tuple(lengths), heads, heads * width_s, heads * width_t, draw(DTYPES), **options)


@st.composite
def head_cases(draw: st.DrawFn) -> HeadCase:
    """Any rows, vocabulary and widths, with either term or both; a gradient is of 24 numbers at least, for its norm."""
    rows, vocabulary = draw(st.integers(3, 20)), draw(st.integers(8, 400))  # a tile has 64 or 128 of a vocabulary
    kl_weight, ce_weight = draw(st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.3, 0.7)]))
    return HeadCase(
        "", rows, vocabulary, draw(st.integers(8, 70)), draw(st.integers(1, 70)), draw(DTYPES),
        kl_weight=kl_weight, ce_weight=ce_weight, temperature=draw(st.sampled_from([0.5, 1.0, 3.0])),
        bias=draw(st.booleans()), ignored=draw(st.none() | st.integers(0, rows - 1)),
    )  # fmt: skip


def check(function: Any, reference: Any, inputs: dict[str, Any], tolerance: float, **options: Any) -> None:
    """Every backend within ``tolerance`` of float64; a value that is 0 within a rounding of 1."""
    expected = value_and_gradients(reference, exact(inputs))
    for backend in BACKENDS:
        loss, gradients = value_and_gradients(function, inputs, backend=backend, **options)
        for out, ref in zip((loss, *gradients), (expected[0], *expected[1]), strict=True):
            assert out.isfinite().all(), backend
            assert error(out, ref) <= tolerance or (out - ref).norm() <= 1e-7, (backend, error(out, ref))


@some_examples
def test_linear_kd(examples: int) -> None:
    def loss(function: Any) -> Any:
        return lambda **options: function(**options).loss

    @settings(max_examples=examples)
    @given(head_cases(), st.sampled_from([None, 1, 7, 16]))
    def agrees(case: HeadCase, chunk_rows: int | None) -> None:
        inputs = case.inputs(DEVICE)
        # Below that, p − 1 and log p − log q cancel, and a rounding of a logit is a large error: listed cases go there.
        assume(linear_kd.reference(**exact(inputs)).loss >= 0.05 * max(1.0, case.temperature**2))
        check(loss(linear_kd.linear_kd), loss(linear_kd.reference), inputs, case.tolerance, chunk_rows=chunk_rows)

    agrees()


@some_examples
@pytest.mark.parametrize("cross", [False, True])
def test_relation_kl(cross: bool, examples: int) -> None:
    @settings(max_examples=examples)
    @given(packed_cases(cross=cross))
    def agrees(case: PackedCase) -> None:
        check(relation_kl.relation_kl, relation_kl.reference, case.inputs(DEVICE), case.tolerance)

    agrees()


@some_examples
def test_score_mse(examples: int) -> None:
    @settings(max_examples=examples)
    @given(packed_cases(kind=ScoreCase))
    def agrees(case: ScoreCase) -> None:
        check(score_mse.score_mse, score_mse.reference, case.inputs(DEVICE), case.tolerance)

    agrees()
