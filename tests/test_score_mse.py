"""score_mse where a case needs more than its value and gradients, which test_fused_losses checks."""

import pytest
import torch
from oracle import check_directional_derivative, error, exact, in_tiles, value_and_gradients

from bench.losses.score_mse import CASES
from fastkd.kernels.score_mse import reference, score_mse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("blocked", "triton")


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient(backend: str) -> None:
    case = next(c for c in CASES if c.name == "peaked near")
    inputs = in_tiles(case, backend, DEVICE).inputs(DEVICE)
    inputs["teacher_query"] = inputs["student_query"].detach().clone()
    inputs["teacher_key"] = inputs["student_key"].detach().clone()
    loss, gradients = value_and_gradients(score_mse, inputs, backend=backend)
    assert abs(float(loss)) <= 1e-7
    assert all(float(g.abs().max()) <= 1e-7 for g in gradients)


def test_the_linear_time_form_has_the_same_value_and_gradients() -> None:
    inputs = next(c for c in CASES if c.name == "ragged").inputs(DEVICE)
    loss, gradients = value_and_gradients(score_mse, inputs, backend="gram")
    expected, expected_gradients = value_and_gradients(reference, exact(inputs))
    assert error(loss, expected) <= 1e-5
    assert all(error(g, e) <= 1e-5 for g, e in zip(gradients, expected_gradients, strict=True))


def test_directional_derivative_in_float64() -> None:
    check_directional_derivative(score_mse, next(c for c in CASES if c.name == "ragged").inputs())


def test_an_upstream_factor_scales_the_gradient() -> None:
    inputs = next(c for c in CASES if c.name == "ragged").inputs(DEVICE)
    loss = score_mse(**inputs)
    (once,) = torch.autograd.grad(loss, inputs["student_query"], retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, inputs["student_query"])
    assert torch.allclose(thrice, 3 * once, rtol=1e-6)


def test_compiles_without_a_break() -> None:
    inputs = next(c for c in CASES if c.name == "ragged").inputs(DEVICE)
    compiled = torch.compile(lambda **options: 2 * score_mse(**options), fullgraph=True, backend="aot_eager")
    expected = 2 * score_mse(**inputs).detach()
    assert float(compiled(**inputs).detach()) == pytest.approx(float(expected), rel=1e-6)


def test_heads_that_do_not_divide_a_width_are_refused() -> None:
    inputs = next(c for c in CASES if c.name == "ragged").inputs(DEVICE)
    with pytest.raises(ValueError, match="5"):
        score_mse(**(inputs | {"num_heads": 5}))
