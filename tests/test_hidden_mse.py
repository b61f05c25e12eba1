"""hidden_mse where a case needs more than its value and gradient, which test_fused_losses checks; and shapes nobody listed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import check, count_graphs, error, exact, value_and_gradients

from bench import contenders, losses, roofline
from bench.losses.hidden_mse import BENCHES, CASES, HiddenCase
from fastkd.kernels.hidden_mse import hidden_mse, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("blocked", "triton")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@settings(max_examples=15)
@given(st.integers(1, 60), st.integers(1, 200), *[st.sampled_from([torch.float32, torch.bfloat16, torch.float16])] * 2)
def test_shapes_that_nobody_listed(rows: int, width: int, dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    for backend in BACKENDS:
        check(hidden_mse, reference, HiddenCase("", rows, width, dtype, teacher_dtype), backend, DEVICE)


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient(backend: str) -> None:
    inputs = CASES[2].inputs(DEVICE)
    inputs["teacher"] = inputs["student"].detach().clone()
    loss, (gradient,) = value_and_gradients(hidden_mse, inputs, backend=backend)
    assert float(loss) == 0 and float(gradient.abs().max()) == 0


@each_backend
def test_columns_of_a_wider_matrix_and_a_teacher_from_inference_mode(backend: str) -> None:
    wide = torch.randn(10, 96, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.inference_mode():
        teacher = wide[:, 32:64] + 1
    inputs = {"student": wide[:, :32].requires_grad_(), "teacher": teacher}
    loss, (gradient,) = value_and_gradients(hidden_mse, inputs, backend=backend)
    difference = (inputs["student"].detach() - teacher).double()
    assert error(loss, difference.square().mean()) <= 1e-6
    assert error(gradient, 2 * difference / difference.numel()) <= 1e-6


def test_float64_is_computed_in_float64() -> None:
    inputs = exact(CASES[2].inputs())
    (expected,) = value_and_gradients(reference, inputs)[1]
    (gradient,) = value_and_gradients(hidden_mse, inputs)[1]
    assert error(gradient, expected) <= 1e-14


@each_backend
def test_no_rows_at_all_is_a_loss_of_zero(backend: str) -> None:
    loss, (gradient,) = value_and_gradients(hidden_mse, HiddenCase("", 0, 8).inputs(DEVICE), backend=backend)
    assert float(loss) == 0 and gradient.shape == (0, 8)


def test_an_upstream_factor_scales_the_gradient() -> None:
    inputs = CASES[1].inputs(DEVICE)
    loss = hidden_mse(**inputs)
    (once,) = torch.autograd.grad(loss, inputs["student"], retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, inputs["student"])
    assert torch.allclose(thrice, 3 * once, rtol=1e-6)


def test_sizes_share_a_compiled_graph() -> None:
    assert count_graphs(hidden_mse, [HiddenCase("", rows, 32).inputs() for rows in (10, 20, 30)]) <= 2


def test_what_does_not_fit_is_refused() -> None:
    inputs = CASES[1].inputs()
    with pytest.raises(ValueError, match="projected to one width"):
        hidden_mse(inputs["student"], inputs["teacher"][:, :20])
    with pytest.raises(ValueError, match=r"teacher is torch.int64"):
        hidden_mse(inputs["student"], inputs["teacher"].long())
    with pytest.raises(ValueError, match="magic"):
        hidden_mse(**inputs, backend="magic")


def test_the_benches_know_it() -> None:
    assert [case for kernel, case in losses.cases() if kernel == "hidden_mse"] == list(BENCHES)
    (step,) = roofline.steps("hidden_mse", BENCHES[0])
    assert step.bytes == 4096 * 384 * (4 + 2 + 4)
    (fused, *_) = contenders.contenders("hidden_mse")
    assert contenders.gradient_error(fused, "hidden_mse", BENCHES[0], "cpu") <= 1e-5
