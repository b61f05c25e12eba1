"""Every fused loss of the folder: value and gradients, FLOPs, launches and audit, found by listing it."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import check, in_tiles, value_and_gradients
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import losses, roofline
from bench.contenders import scalar
from fastkd.kernels import tiling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("blocked", "triton")
each_loss = pytest.mark.parametrize("name", losses.available())
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def function(name: str, which: str = "") -> Callable[..., Tensor]:
    """A loss, or another function of its folder with the same result, as a scalar."""
    call = getattr(losses.definition(name), which or name)
    return lambda **inputs: scalar(call(**inputs))


def listed() -> list[Any]:
    """(loss, case) of all of them; linear_kd's own tests take its cases, for each of its three values."""
    names = [name for name in losses.available() if name != "linear_kd"]
    return [pytest.param(name, case, id=f"{name}: {case.name}") for name in names for case in losses.load(name).CASES]


@each_backend
@pytest.mark.parametrize(("name", "case"), listed())
def test_value_and_gradients(name: str, case: Any, backend: str) -> None:
    check(function(name), function(name, "reference"), in_tiles(case, backend, DEVICE), backend, DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "case"), [pytest.param(name, case, id=f"{name}: {case.name}") for name, case in losses.cases()]
)
def test_bench_shapes_on_a_gpu(name: str, case: Any) -> None:
    check(function(name), function(name, "reference"), case, "triton", "cuda")


@each_backend
@each_loss
def test_two_runs_give_the_same_bits(name: str, backend: str) -> None:
    """Of one block, and of the several that a GPU adds up."""
    cases = losses.load(name).CASES
    for case in (cases[1], *(case for case in cases if case.name in ("long", "long cross", "many blocks"))):
        inputs = in_tiles(case, backend, DEVICE, longest=40).inputs(DEVICE)
        first, second = (value_and_gradients(function(name), inputs, backend=backend) for _ in range(2))
        assert torch.equal(first[0], second[0]) and all(map(torch.equal, first[1], second[1]))


@each_loss
def test_a_second_derivative_is_refused(name: str) -> None:
    inputs = losses.load(name).CASES[0].inputs(DEVICE)
    student = next(x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(function(name)(**inputs), student, create_graph=True)


@each_loss
def test_closed_form_flops_are_those_of_the_definition(name: str) -> None:
    """Forward and backward, as torch counts matrix products."""
    module = losses.load(name)
    with FlopCounterMode(display=False) as counter:
        function(name, "reference")(**module.COUNTED.inputs()).backward()
    assert module.flops(module.COUNTED) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.skipif(tiling.triton is None, reason="needs the package triton")
@each_loss
def test_launches_name_kernels_and_every_kernel_is_audited(name: str) -> None:
    from bench.audited import builds

    folder = losses.definition(name)
    modules = [
        importlib.import_module(f"{folder.__name__}.{each.name}") for each in pkgutil.iter_modules(folder.__path__)
    ]
    kernels = {word for module in modules for word in vars(module) if word.endswith("_kernel")}
    assert {build.kernel.fn.__name__ for build in builds(name)} == kernels != set()
    for case in losses.load(name).BENCHES:
        steps = roofline.steps(name, case)
        assert all(any(step.kernel in kernel for kernel in kernels) for step in steps)
        assert all(roofline.floor(name, case, device) > 0 for device in roofline.DEVICES)
