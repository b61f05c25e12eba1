"""The backward that the fused losses share: products rounded once, in place only where nobody reads the gradient again."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import WithoutGradient, leaves
from torch import Tensor

from bench import losses
from fastkd.kernels import tiling
from fastkd.kernels.scaling import scaled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
each_backend = pytest.mark.parametrize("backend", ["blocked", "triton"])
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {  # a case, and what makes it small
    "linear_kd": ("tiny-vocabulary", {}),
    "relation_kl": ("ragged cross", {"lengths": (9, 4)}),
    "score_mse": ("ragged", {"lengths": (9, 4)}),
    "hidden_mse": ("odd width", {}),
}


def numbers(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size)).to(DEVICE, dtype)


@each_backend
@pytest.mark.parametrize("size", [1, 33, 8192, 20_000])
@pytest.mark.parametrize(
    ("dtype", "out"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_a_product_is_rounded_once(dtype: torch.dtype, out: torch.dtype, size: int, backend: str) -> None:
    x = numbers(size, dtype)
    kept, factor = x.clone(), torch.tensor(1 / 3, device=DEVICE)
    result = scaled(x, factor, out, backend=backend)
    # Triton's interpreter cuts off what bfloat16 has no bits for.
    unit = torch.finfo(out).eps if backend == "triton" and tiling.INTERPRETED and out == torch.bfloat16 else 0
    torch.testing.assert_close(result, (kept.float() * factor).to(out), rtol=unit, atol=0)
    assert torch.equal(x, kept)  # outside of a backward


def test_float64_stays_float64() -> None:
    x, factor = numbers(5).double(), torch.tensor(1 / 3, dtype=torch.float64, device=DEVICE)
    assert torch.equal(scaled(x, factor), x * factor)
    assert scaled(numbers(0), factor.float(), backend="triton").shape == (0,)


class Saved(torch.autograd.Function):
    """A loss whose gradient is given, and scaled in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return scaled(gradient, grad_loss, backend="triton"), None


@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("retained", [False, True])
def test_a_gradient_is_scaled_in_place_where_its_graph_is_freed(factor: float, retained: bool) -> None:
    x, gradient = numbers(9000).requires_grad_(), numbers(9000)
    expected, kept = gradient * torch.tensor(factor, device=DEVICE), gradient.clone()
    (result,) = torch.autograd.grad(factor * Saved.apply(x, gradient), x, retain_graph=retained)
    assert torch.equal(result, expected)
    assert (result.data_ptr() == gradient.data_ptr()) is not retained
    assert not retained or torch.equal(gradient, kept)


@each_backend
@pytest.mark.parametrize("name", LOSSES)
def test_a_retained_graph_gives_the_same_gradients_again(name: str, backend: str) -> None:
    """Of four backwards with factors that round nothing; the last one frees the graph."""
    module, (chosen, changes) = losses.definition(name), LOSSES[name]
    inputs = replace(next(case for case in losses.load(name).CASES if case.name == chosen), **changes).inputs(DEVICE)
    out = getattr(module, name)(**inputs, backend=backend)
    loss, students = out if isinstance(out, Tensor) else out.loss, list(leaves(inputs).values())
    first, *others = (
        (factor, torch.autograd.grad(factor * loss, students, retain_graph=number < 3))
        for number, factor in enumerate((1.0, 2.0, 0.5, 4.0))
    )
    assert all(x.any() for x in first[1])
    for factor, gradients in others:
        assert all(torch.equal(x, factor * y) for x, y in zip(gradients, first[1], strict=True))


@each_backend
@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_that_is_none_gives_none(name: str, backend: str) -> None:
    """What another operator's backward may say, of a loss that has no part in the result."""
    module, (chosen, changes) = losses.definition(name), LOSSES[name]
    inputs = replace(next(case for case in losses.load(name).CASES if case.name == chosen), **changes).inputs(DEVICE)
    out = getattr(module, name)(**inputs, backend=backend)
    first, *others = leaves(inputs).values()
    (WithoutGradient.apply(out if isinstance(out, Tensor) else out.loss) + first.sum()).backward()
    assert torch.equal(first.grad, torch.ones_like(first)) and all(x.grad is None for x in others)


@each_backend
def test_a_leaf_takes_the_gradient_without_a_copy_that_the_next_one_would_change(backend: str) -> None:
    """What .grad holds after one step does not change while another is made."""
    module = losses.definition("linear_kd")
    inputs = next(case for case in losses.load("linear_kd").CASES if case.name == "tiny-vocabulary").inputs(DEVICE)
    module.linear_kd(**inputs, backend=backend).loss.backward()
    kept = {name: x.grad.clone() for name, x in leaves(inputs).items()}
    module.linear_kd(**inputs, backend=backend).loss.backward()
    for name, x in leaves(inputs).items():
        assert x.grad.is_contiguous() and torch.equal(x.grad, 2 * kept[name])
