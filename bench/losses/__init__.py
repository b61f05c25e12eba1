"""What is checked, timed and counted of each fused loss: one file a loss, with the name of its folder in ``kernels/``.

    CASES, BENCHES      calls that tests check, and those that benches time
    COUNTED             a call without padding or ignored rows, whose FLOPs a test counts
    flops(case)         of a call, by the closed form in the loss's folder
    steps(case)         its launches, each with FLOPs, bytes and exponentials

A case is a frozen dataclass with ``name``, ``dtype``, ``tolerance`` (‖out − ref‖/‖ref‖ against float64), its size as ``rows`` or
``lengths``, and ``inputs(device, seed)``: keyword arguments of the loss, of which the student's tensors ask for gradients.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

import fastkd.kernels


def available() -> list[str]:
    """The fused losses: the folders in ``kernels/``."""
    return sorted(module.name for module in pkgutil.iter_modules(fastkd.kernels.__path__) if module.ispkg)


def load(name: str) -> ModuleType:
    """The file of a loss in this folder."""
    return importlib.import_module(f"bench.losses.{name}")


def definition(name: str) -> ModuleType:
    """The folder of a loss in ``kernels/``: ``reference``, ``flops`` and a function with the loss's name."""
    return importlib.import_module(f"fastkd.kernels.{name}")


def cases() -> list[tuple[str, Any]]:
    """(loss, case) of every bench."""
    return [(name, case) for name in available() for case in load(name).BENCHES]
