"""A teacher's matrix products in float8, if that changes the loss hardly more than bfloat16 does.

Weights and activations are float8_e4m3 with a scale for each row; each product computes its activations' scales (torchao).
GPUs of compute capability 8.9 and above multiply float8 twice as fast as bfloat16.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import nn

from fastkd.distributed import World, on_main

ALONE = World()  # one process
LEAST_CAPABILITY = (8, 9)
MOST_EXCESS = 0.01  # of the loss


def require(device: torch.device) -> None:
    """Raises ValueError where the device has no float8 products or torchao is not installed."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        raise ValueError(
            "--teacher-dtype float8 needs a GPU of compute capability 8.9 or above, such as an H100: leave it out"
        )
    if importlib.util.find_spec("torchao") is None:
        raise ValueError("--teacher-dtype float8 needs torchao: pip install torchao")


def quantise(layers: nn.Module) -> None:
    """Replace the weights of all linear layers by float8 ones, in place."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    quantize_(layers, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


def check(loss: Callable[[str], float], world: World = ALONE) -> None:
    """Refuse float8 if its error in the loss exceeds bfloat16's by more than ``MOST_EXCESS`` of the loss.

    ``loss`` gives a batch's loss with the teacher in ``float32``, ``bfloat16`` or ``float8``. Rank 0 decides for all: ranks
    read different batches, and would wait for each other if they disagreed. Raises ValueError, on every rank.
    """
    half, quarter = on_main(world, lambda: _errors(loss))
    if not quarter - half <= MOST_EXCESS:
        raise ValueError(
            f"a float8 teacher moves the loss by {quarter:.1%}, a bfloat16 one by {half:.1%}: leave --teacher-dtype out"
        )


def _errors(loss: Callable[[str], float]) -> tuple[float, float]:
    """The errors of bfloat16 and float8, as shares of the loss."""
    exact = loss("float32")
    half, quarter = (abs(loss(name) - exact) / abs(exact) for name in ("bfloat16", "float8"))
    return half, quarter
