"""relation_kl against float64 autograd of its definition, in every case and backend."""

import pytest
import torch
from oracle import check, check_directional_derivative, in_tiles, value_and_gradients

from bench.losses.relation_kl import CASES
from fastkd.kernels.relation_kl import reference, relation_kl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("blocked", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_value_and_gradients(case, backend: str) -> None:
    check(relation_kl, reference, in_tiles(case, backend, DEVICE), backend, DEVICE)


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend: str) -> None:
    for name in ("ragged", "long cross"):
        case = in_tiles(next(c for c in CASES if c.name == name), backend, DEVICE, longest=40)
        first, second = (value_and_gradients(relation_kl, case.inputs(DEVICE), backend=backend) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("cross", [False, True])
def test_directional_derivative_in_float64(cross: bool) -> None:
    case = next(c for c in CASES if c.name == ("ragged cross" if cross else "ragged"))
    check_directional_derivative(relation_kl, case.inputs())


def test_an_upstream_factor_scales_the_gradient_and_a_second_derivative_is_refused() -> None:
    inputs = next(c for c in CASES if c.name == "ragged").inputs(DEVICE)
    loss = relation_kl(**inputs)
    (once,) = torch.autograd.grad(loss, inputs["student"], retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, inputs["student"])
    assert torch.allclose(thrice, 3 * once, rtol=1e-6)
    with pytest.raises(RuntimeError):
        (first,) = torch.autograd.grad(relation_kl(**inputs), inputs["student"], create_graph=True)
        first.sum().backward()


def test_compiles_without_a_break() -> None:
    inputs = next(c for c in CASES if c.name == "ragged").inputs(DEVICE)
    compiled = torch.compile(lambda **options: 2 * relation_kl(**options), fullgraph=True)
    expected = 2 * relation_kl(**inputs).detach()
    assert float(compiled(**inputs).detach()) == pytest.approx(float(expected), rel=1e-6)


def test_heads_that_do_not_divide_a_width_are_refused() -> None:
    inputs = next(c for c in CASES if c.name == "ragged").inputs(DEVICE)
    with pytest.raises(ValueError, match="5"):
        relation_kl(**(inputs | {"num_heads": 5}))
