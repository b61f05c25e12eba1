"""What the fused losses of a method launch in one training step, gradients included: ``bench/losses/`` says it of each."""

from __future__ import annotations

from typing import Any

from bench import losses, roofline
from bench.roofline import Step
from bench.step_model import Work
from fastkd.methods import Method


def fused(kernel: str, case: Any) -> list[Step]:
    """The launches of one call, and those that scale its gradients."""
    return roofline.steps(kernel, case) + losses.scaling(kernel, case)


def undescribed(method: Method) -> list[str]:
    """What a method's step launches that no file describes: of fused losses, and encoders beside the student."""
    encoders = [f"an encoder of width {config.hidden_size} beside the student" for config, _ in method.beside()]
    return [kernel for kernel in _calls(method) if not losses.describes_a_step(kernel)] + encoders


def parts(method: Method, work: Work) -> dict[str, list[Step]]:
    """The launches of a method's fused losses, by the kernel's name.

    Raises:
        ValueError: a fused loss whose file does not describe them, or an encoder beside the student.
    """
    if method.beside():
        raise ValueError(f"no prediction of method {method.name!r}: {undescribed(method)[-1]} is not described")
    if missing := undescribed(method):
        raise ValueError(
            f"no prediction of the fused loss {missing[0]!r}: write in_step and host_operations in bench/losses/{missing[0]}.py"
        )
    return {
        kernel: [launch for options in calls for launch in losses.load(kernel).in_step(work, **options)]
        for kernel, calls in _calls(method).items()
    }


def host_operations(method: Method, work: Work) -> int:
    """What the host issues for a method's losses."""
    return sum(losses.load(kernel).host_operations(work, calls) for kernel, calls in _calls(method).items())


def _calls(method: Method) -> dict[str, list[dict[str, Any]]]:
    """The options of a method's calls, by the loss."""
    found: dict[str, list[dict[str, Any]]] = {}
    for kernel, options in method.fused_losses():
        found.setdefault(kernel, []).append(options)
    return found
