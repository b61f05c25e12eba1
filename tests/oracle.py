"""Float64 autograd of a definition: the oracle of losses over packed sequences."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor


def value_and_gradients(function, inputs: dict, **options) -> tuple[Tensor, list[Tensor]]:
    """The loss and its gradients in the inputs that ask for one."""
    loss = function(**inputs, **options)
    return loss.detach(), list(torch.autograd.grad(loss, list(leaves(inputs).values())))


def leaves(inputs: dict) -> dict[str, Tensor]:
    """The inputs that ask for a gradient: the student's."""
    return {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}


def exact(inputs: dict) -> dict:
    """The same inputs in float64, asking for the same gradients."""
    return {
        name: x.detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for name, x in inputs.items()
    }


def error(out: Tensor, expected: Tensor) -> float:
    """‖out − ref‖ / ‖ref‖."""
    return float((out.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def assert_rounded_alike(ours: Tensor, theirs: Tensor) -> None:
    """Of two float32 computations of a few layers: equal to some ten roundings of what is compared, in norm and in each element.

    How large a rounding's effect is depends on the CPU's instructions: 4e-7 of the norm on one with AVX512.
    """
    ours, theirs = ours.detach(), theirs.detach()
    assert (ours - theirs).norm() <= 1.5e-6 * theirs.norm()
    torch.testing.assert_close(ours, theirs, atol=3e-6 * float(theirs.abs().max()), rtol=0)


def in_tiles(case, backend: str, device: str, longest: int | None = None):
    """The case, in Triton's interpreter with its first long sequence cut to more than a block of rows and of columns, and part
    of another; further ones are cut to a row more than 32.

    There, time goes by blocks: a block of float32 scores has 32 rows (in one launch: 32, too), one of half-precision ones 64
    (128).
    """
    if backend != "triton" or device != "cpu" or not hasattr(case, "lengths"):
        return case
    longest = longest or (70 if case.dtype == torch.float32 else 150)
    cut = itertools.chain([longest], itertools.repeat(33))
    return replace(case, lengths=tuple(length if length <= longest else next(cut) for length in case.lengths))


def check(function, reference, case, backend: str, device: str) -> None:
    """Value and gradients of a case within its tolerance of float64 autograd; where the plain definition in float32 is further
    off than that, as a small loss between large scores may be, at least as near as that definition."""
    inputs = case.inputs(device)
    loss, gradients = value_and_gradients(function, inputs, backend=backend)
    expected, expected_gradients = value_and_gradients(reference, exact(inputs))
    plain, plain_gradients = (
        (loss, gradients) if case.dtype != torch.float32 else value_and_gradients(reference, inputs)
    )
    found = zip((loss, *gradients), (expected, *expected_gradients), (plain, *plain_gradients), strict=True)
    for out, ref, rounded in found:
        if ref.norm() > 1e-12:
            rounding = error(rounded, ref) if case.dtype == torch.float32 else 0.0
            assert error(out, ref) <= max(case.tolerance, rounding)


def check_directional_derivative(function, inputs: dict) -> None:
    """The gradient along a random direction against central differences, through the blocked path in float64."""
    inputs = exact(inputs)
    _, gradients = value_and_gradients(function, inputs, backend="blocked")
    torch.manual_seed(0)
    directions = {name: torch.randn_like(x) for name, x in leaves(inputs).items()}
    step = 1e-6

    def moved(sign: float) -> float:
        shifted = {name: inputs[name].detach() + sign * step * d for name, d in directions.items()}
        return float(function(**(inputs | shifted), backend="blocked"))

    numeric = (moved(1) - moved(-1)) / (2 * step)
    analytic = sum(float((g * d).sum()) for g, d in zip(gradients, directions.values(), strict=True))
    assert abs(analytic - numeric) <= 1e-6 * abs(numeric)


def count_graphs(function: Callable[..., Any], calls: list[dict[str, Any]]) -> int:
    """Graphs that torch.compile makes of the calls, each forward and backward and without a break; losses or their first field."""
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=count)
    for inputs in calls:
        out = compiled(**inputs)
        (out if isinstance(out, Tensor) else out[0]).backward()
    return graphs


class WithoutGradient(torch.autograd.Function):
    """The identity, whose backward gives None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        return None
