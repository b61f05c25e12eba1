"""What the tests of linear_kd share: backends, a small case, a call with its gradients, and the error of each."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.losses.linear_kd import HeadCase
from fastkd.kernels import tiling
from fastkd.kernels.linear_kd import LinearKD

INTERPRETER = pytest.mark.skipif(not tiling.INTERPRETED, reason="Triton is compiled here: see the cuda parameters")
BACKENDS = [
    pytest.param("cpu", "blocked", id="blocked"),
    pytest.param("cpu", "triton", id="triton-interpreted", marks=INTERPRETER),
    pytest.param("cuda", "triton", id="triton-cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "blocked", id="blocked-cuda", marks=pytest.mark.gpu),
]
on_every_backend = pytest.mark.parametrize(("device", "backend"), BACKENDS)
NAMES = ("student_hidden", "student_weight", "student_bias")
SMALL = HeadCase("small", 40, 300, 24, 32, kl_weight=0.6, ce_weight=0.4, ignored=5)


def evaluate(function: Any, inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """The three values and the student's gradients of a fresh copy of ``inputs``."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items() if name in NAMES}
    out: LinearKD = function(**{**inputs, **leaves}, **options)
    out.loss.backward()
    return {**{name: x.detach() for name, x in out._asdict().items()}, **{n: x.grad for n, x in leaves.items()}}


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: x.detach().double().cpu() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    } | ({"labels": inputs["labels"].cpu()} if "labels" in inputs else {})


def error(out: Tensor, reference: Tensor) -> float:
    """‖out − ref‖ / ‖ref‖, and 0 where both are 0."""
    out = out.double().cpu()
    if not reference.any():
        return out.norm().item()
    return ((out - reference).norm() / reference.norm()).item()


def in_tiles(case: HeadCase, device: str, backend: str, most: int = 700) -> HeadCase:
    """The case, in Triton's interpreter with a vocabulary of a few tiles instead of hundreds, and the same part of one."""
    if backend != "triton" or device != "cpu" or case.vocabulary <= most:
        return case
    return replace(case, vocabulary=most // 128 * 128 + case.vocabulary % 128)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)
