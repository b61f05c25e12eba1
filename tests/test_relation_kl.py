"""relation_kl where a case needs more than its value and gradients, which test_fused_losses checks."""

import pytest
import torch
from oracle import check_directional_derivative, in_tiles, value_and_gradients

from bench.losses.relation_kl import CASES
from fastkd.kernels.relation_kl import relation_kl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("blocked", "triton")


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
@pytest.mark.parametrize("cross", [False, True])
def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient(backend: str, cross: bool) -> None:
    case = next(c for c in CASES if c.name == ("peaked near cross" if cross else "peaked near"))
    inputs = in_tiles(case, backend, DEVICE).inputs(DEVICE)
    inputs["teacher"] = inputs["student"].detach().clone()
    if cross:
        inputs["teacher_key"] = inputs["student_key"].detach().clone()
    loss, gradients = value_and_gradients(relation_kl, inputs, backend=backend)
    assert abs(float(loss)) <= 1e-7
    assert all(float(g.abs().max()) <= 1e-7 for g in gradients)


@pytest.mark.parametrize("cross", [False, True])
def test_directional_derivative_in_float64(cross: bool) -> None:
    case = next(c for c in CASES if c.name == ("ragged cross" if cross else "ragged"))
    check_directional_derivative(relation_kl, case.inputs())


def test_an_upstream_factor_scales_the_gradient() -> None:
    inputs = next(c for c in CASES if c.name == "ragged").inputs(DEVICE)
    loss = relation_kl(**inputs)
    (once,) = torch.autograd.grad(loss, inputs["student"], retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, inputs["student"])
    assert torch.allclose(thrice, 3 * once, rtol=1e-6)


def test_compiles_without_a_break() -> None:
    inputs = next(c for c in CASES if c.name == "ragged").inputs(DEVICE)
    compiled = torch.compile(lambda **options: 2 * relation_kl(**options), fullgraph=True, backend="aot_eager")
    expected = 2 * relation_kl(**inputs).detach()
    assert float(compiled(**inputs).detach()) == pytest.approx(float(expected), rel=1e-6)


def test_heads_that_do_not_divide_a_width_are_refused() -> None:
    inputs = next(c for c in CASES if c.name == "ragged").inputs(DEVICE)
    with pytest.raises(ValueError, match="5"):
        relation_kl(**(inputs | {"num_heads": 5}))
