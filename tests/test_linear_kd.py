"""linear_kd: values and gradients against float64 autograd of its definition, on every backend and case."""

import math
from dataclasses import replace

import pytest
import torch
from head_loss import INTERPRETER, NAMES, SMALL, error, evaluate, in_float64, in_tiles, on_every_backend, same
from torch import Tensor

from bench.losses.linear_kd import CASES, HeadCase
from fastkd.kernels import linear_kd as kernel
from fastkd.kernels import tiling
from fastkd.kernels.linear_kd import IGNORED, linear_kd


@on_every_backend
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_float64_autograd_of_the_definition(case: HeadCase, device: str, backend: str) -> None:
    inputs = in_tiles(case, device, backend).inputs(device)
    expected = evaluate(kernel.reference, in_float64(inputs))
    result = evaluate(linear_kd, inputs, backend=backend)
    plain = evaluate(kernel.reference, inputs)
    for name, reference in expected.items():
        limit = case.tolerance
        if case.dtype == torch.float32 and case.gap is not None:
            # A float32 logit of 24 is known to 1e-6, a hundred-thousandth of a gap of 0.1: plain float32 pays too.
            limit = max(limit, 2 * error(plain[name], reference))
        assert error(result[name], reference) <= limit, name


@on_every_backend
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_tiny_divergence_is_more_exact_than_the_definitions_in_float32(
    offset: float, device: str, backend: str
) -> None:
    """For a student that is 1e-3 from its teacher, over several draws: one draw may be right by chance."""
    fused, plain = [], []
    for seed in range(3):
        inputs = HeadCase("", 16, 300, 32, 32, spread=1.0, gap=1e-3, offset=offset).inputs(device, seed)
        inputs = {name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.items()}
        expected = kernel.reference(**in_float64(inputs)).kl
        assert 0 < expected < 2e-6
        fused.append(error(linear_kd(**inputs, backend=backend).kl, expected))
        plain.append(error(kernel.reference(**inputs).kl, expected))
    assert math.hypot(*fused) <= math.hypot(*plain) / 2


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(
    dtype: torch.dtype, temperature: float, device: str, backend: str
) -> None:
    inputs = HeadCase("", 50, 700, 32, 32, dtype, spread=4.0, temperature=temperature).inputs(device)
    inputs |= {name.replace("student", "teacher"): inputs[name].detach() for name in NAMES}
    result = evaluate(linear_kd, inputs, backend=backend)
    assert abs(result["loss"].item()) <= 1e-7
    for name in NAMES:
        assert not result[name].any(), name


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_give_identical_bits(dtype: torch.dtype, device: str, backend: str) -> None:
    case = HeadCase("", 50, 1100, 40, 56, dtype, ce_weight=0.5, temperature=2.0, ignored=9)
    inputs = in_tiles(case, device, backend, most=300).inputs(device)
    first, second = (evaluate(linear_kd, inputs, backend=backend, chunk_rows=32) for _ in range(2))
    assert same(first, second)


@on_every_backend
def test_the_chunk_does_not_matter(device: str, backend: str) -> None:
    inputs = replace(SMALL, rows=19, vocabulary=150).inputs(device)
    expected = evaluate(linear_kd, inputs, backend=backend)
    for rows in (1, 7, 16, 18, 1000):
        result = evaluate(linear_kd, inputs, backend=backend, chunk_rows=rows)
        for name in expected:
            assert error(result[name], expected[name].double().cpu()) <= 1e-6, (rows, name)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_add_up_over_chunks(dtype: torch.dtype, device: str, backend: str) -> None:
    """Chunks of more rows than a program has, and a last one of fewer; on a GPU later ones add to the first one's dW."""
    inputs = HeadCase("", 150, 300, 40, 56, dtype, ce_weight=0.5, temperature=2.0, ignored=9).inputs(device)
    expected = evaluate(kernel.reference, in_float64(inputs))
    result = evaluate(linear_kd, inputs, backend=backend, chunk_rows=70)
    for name in expected:
        assert error(result[name], expected[name]) <= (1e-5 if dtype == torch.float32 else 1e-2), name


@on_every_backend
def test_small_probabilities_of_many_rows_in_float16(device: str, backend: str) -> None:
    """dz of a good student with flat logits, divided by 240 rows, is mostly below float16's normal numbers."""
    inputs = HeadCase("", 260, 1500, 16, 24, torch.float16, spread=1.0, gap=0.15, ignored=20).inputs(device)
    expected = evaluate(kernel.reference, in_float64(inputs))
    result = evaluate(linear_kd, inputs, backend=backend)
    for name in expected:
        assert error(result[name], expected[name]) <= 1e-2, name


@on_every_backend
@pytest.mark.parametrize("temperature", [1.0, 50.0])
@pytest.mark.parametrize("vocabulary", [129, 250])
def test_columns_past_the_vocabulary_leave_no_trace(
    vocabulary: int, temperature: float, device: str, backend: str
) -> None:
    """They are the last word's again before the bias takes them out, and that word has most of the probability."""
    inputs = HeadCase("", 20, vocabulary, 16, 24, ce_weight=0.5, temperature=temperature, ignored=2).inputs(device)
    inputs["student_bias"] = inputs["student_bias"].detach().clone()
    inputs["student_bias"][-1] = temperature * (math.log(vocabulary) + 2)
    expected = evaluate(kernel.reference, in_float64(inputs))
    result = evaluate(linear_kd, inputs, backend=backend)
    for name in expected:
        assert error(result[name], expected[name]) <= 1e-5, name


@pytest.mark.parametrize("backend", ["blocked", pytest.param("triton", marks=INTERPRETER)])
@pytest.mark.parametrize("rows", ["none", "ignored", "some"])
def test_memory_that_nobody_wrote_is_not_read(rows: str, backend: str) -> None:
    """PyTorch's deterministic mode fills new tensors with NaN."""
    inputs = (HeadCase("", 0, 50, 8, 8, ce_weight=1.0) if rows == "none" else SMALL).inputs()
    if rows == "ignored":
        inputs["labels"] = torch.full_like(inputs["labels"], IGNORED)
    torch.use_deterministic_algorithms(True)
    try:
        result = evaluate(linear_kd, inputs, backend=backend, chunk_rows=16)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in result.values())
    assert rows == "some" or not any(x.any() for x in result.values())


@on_every_backend
def test_ignored_rows_count_nowhere(device: str, backend: str) -> None:
    inputs = SMALL.inputs(device)
    kept = inputs["labels"] != IGNORED
    result = evaluate(linear_kd, inputs, backend=backend)
    rows = {name: inputs[name][kept] for name in ("student_hidden", "teacher_hidden", "labels")}
    alone = evaluate(linear_kd, inputs | rows, backend=backend)
    assert not result["student_hidden"][~kept].any()
    result["student_hidden"] = result["student_hidden"][kept]
    for name in alone:
        assert error(result[name], alone[name].double().cpu()) <= 1e-6, name


@on_every_backend
def test_more_rows_than_are_counted_at_a_time(device: str, backend: str) -> None:
    """Labels and parts of the sums, here 16 at a time."""
    inputs = SMALL.inputs(device)
    expected = evaluate(kernel.reference, in_float64(inputs))
    with tiling.using("linear_kd.sums", tiling.Tile(0, 16, 0, 1, 1)):
        result = evaluate(linear_kd, inputs, backend=backend)
        wrong = inputs["labels"].clone()
        wrong[-1] = 300
        if device == "cpu":  # a GPU would stop there for good
            with pytest.raises(ValueError, match="label 300 is outside"):
                linear_kd(**{**inputs, "labels": wrong}, backend=backend)
    for name in expected:
        assert error(result[name], expected[name]) <= 1e-5, name


@on_every_backend
def test_labels_may_be_a_column_of_a_matrix(device: str, backend: str) -> None:
    inputs = SMALL.inputs(device)
    column = torch.stack([inputs["labels"], inputs["labels"] + 1_000_000], 1)[:, 0]
    expected, found = (
        evaluate(linear_kd, {**inputs, "labels": y}, backend=backend) for y in (inputs["labels"], column)
    )
    assert not column.is_contiguous() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_float64_beside_float32_is_float64_and_no_work_for_triton() -> None:
    inputs = SMALL.inputs()
    inputs["teacher_weight"] = inputs["teacher_weight"].double()
    assert linear_kd(**inputs).loss.dtype == torch.float64
    if tiling.triton is not None:
        with pytest.raises(ValueError, match=r"backend='triton' (has no float64|cannot run on device cpu)"):
            linear_kd(**inputs, backend="triton")


@on_every_backend
def test_all_rows_ignored_is_a_loss_of_zero(device: str, backend: str) -> None:
    inputs = SMALL.inputs(device)
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORED)
    result = evaluate(linear_kd, inputs, backend=backend)
    assert all(not x.any() for x in result.values())


@on_every_backend
def test_no_rows_at_all_is_a_loss_of_zero(device: str, backend: str) -> None:
    inputs = HeadCase("", 0, 50, 8, 8, ce_weight=1.0).inputs(device)
    result = evaluate(linear_kd, inputs, backend=backend)
    assert all(not x.any() for x in result.values())
    assert result["student_weight"].shape == (50, 8)


@on_every_backend
def test_a_vocabulary_index_past_the_last_full_block_is_a_label(device: str, backend: str) -> None:
    inputs = HeadCase("", 6, 1025, 16, None, kl_weight=0.0, ce_weight=1.0).inputs(device)
    inputs["labels"] = torch.tensor([1024, 1024, 0, 1023, 1024, 512], device=device)
    expected = evaluate(kernel.reference, in_float64(inputs))
    result = evaluate(linear_kd, inputs, backend=backend)
    for name in expected:
        assert error(result[name], expected[name]) <= 1e-5, name


@on_every_backend
@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_under_autocast_gradients_arrive_in_the_parameters_dtype(
    hidden_dtype: torch.dtype, device: str, backend: str
) -> None:
    inputs = HeadCase("", 150, 900, 64, 96, spread=4.0, gap=0.3, ce_weight=0.2, ignored=3).inputs(device)
    inputs["student_hidden"] = inputs["student_hidden"].detach().to(hidden_dtype)
    for name in ("teacher_hidden", "teacher_weight", "teacher_bias"):
        inputs[name] = inputs[name].bfloat16()
    expected = evaluate(kernel.reference, in_float64(inputs))
    with torch.autocast(device, torch.bfloat16):
        result = evaluate(linear_kd, inputs, backend=backend)
    assert result["student_hidden"].dtype == hidden_dtype
    assert result["student_weight"].dtype == result["student_bias"].dtype == result["loss"].dtype == torch.float32
    # Rounding the float32 weights to bfloat16 moves the student itself by more than the gradient's rounding.
    for name in expected:
        assert error(result[name], expected[name]) <= 3e-2, name


@on_every_backend
def test_only_what_is_learnt_gets_a_gradient(device: str, backend: str) -> None:
    inputs = SMALL.inputs(device)
    expected = evaluate(linear_kd, inputs, backend=backend)
    for name in NAMES:
        frozen = {other: inputs[other].detach() for other in NAMES}
        frozen[name].requires_grad_()
        loss = linear_kd(**{**inputs, **frozen}, backend=backend).loss
        loss.backward()
        assert torch.equal(frozen[name].grad, expected[name])
    with torch.no_grad():
        out = linear_kd(**inputs, backend=backend)
    assert not any(x.requires_grad for x in out)
    assert error(out.loss, expected["loss"].double().cpu()) <= 1e-6


@on_every_backend
def test_the_gradient_scales_and_accumulates(device: str, backend: str) -> None:
    inputs = SMALL.inputs(device)
    expected = evaluate(linear_kd, inputs, backend=backend)
    out = linear_kd(**inputs, backend=backend)
    assert not (out.kl.requires_grad or out.ce.requires_grad)
    (3 * out.loss).backward(retain_graph=True)
    (2 * out.loss).backward()
    for name in NAMES:
        assert error(inputs[name].grad, 5 * expected[name].double().cpu()) <= 1e-6


@on_every_backend
def test_a_second_derivative_raises(device: str, backend: str) -> None:
    inputs = SMALL.inputs(device)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(linear_kd(**inputs, backend=backend).loss, inputs["student_weight"], create_graph=True)
