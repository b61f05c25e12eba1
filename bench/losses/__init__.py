"""What is checked, timed and counted of each fused loss: one file a loss, with the name of its folder in ``kernels/``.

    CASES, BENCHES      calls that tests check, and those that benches time
    COUNTED             a call without padding or ignored rows, whose FLOPs a test counts
    flops(case)         of a call, by the closed form in the loss's folder
    steps(case)         its launches, each with FLOPs, bytes and exponentials

What ``bench.predictions`` needs of a loss that a method calls; without, it says "not described" of the method:

    in_step(work, **options)        launches of a call in a training step, gradients included; options: of Method.fused_losses
    host_operations(work, calls)    how many operations the host issues for a step's calls, of which it is given the options

And ``scaling(case)``, where a gradient of 1 does not spare all passes over the gradients: those that remain, beside ``steps``.

A case is a frozen dataclass with ``name``, ``dtype``, ``tolerance`` (‖out − ref‖/‖ref‖ against float64), its size as ``rows`` or
``lengths``, and ``inputs(device, seed)``: keyword arguments of the loss, of which the student's tensors ask for gradients.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import TYPE_CHECKING, Any

import fastkd.kernels

if TYPE_CHECKING:
    from bench.roofline import Step


def available() -> list[str]:
    """The fused losses: the folders in ``kernels/``."""
    return sorted(module.name for module in pkgutil.iter_modules(fastkd.kernels.__path__) if module.ispkg)


def load(name: str) -> ModuleType:
    """The file of a loss in this folder."""
    return importlib.import_module(f"bench.losses.{name}")


def describes_a_step(name: str) -> bool:
    """Whether the file of a loss says what a training step launches for it."""
    return all(hasattr(load(name), needed) for needed in ("in_step", "host_operations"))


def scaling(name: str, case: Any) -> list[Step]:
    """The passes over the gradients of a call that are left where the loss's own gradient is 1: a floor takes them for free."""
    launches: list[Step] = load(name).scaling(case) if hasattr(load(name), "scaling") else []
    return launches


def definition(name: str) -> ModuleType:
    """The folder of a loss in ``kernels/``: ``reference``, ``flops`` and a function with the loss's name."""
    return importlib.import_module(f"fastkd.kernels.{name}")


def cases() -> list[tuple[str, Any]]:
    """(loss, case) of every bench."""
    return [(name, case) for name in available() for case in load(name).BENCHES]
