"""Optimiser: AdamW with two parameter groups, gradient clipping, and checks that numbers are finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def adamw(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.AdamW:
    """AdamW, fused; vectors (biases, LayerNorm) are not decayed. The learning rate is set before each step."""
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    groups = [
        {"params": [p for _, p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=True)


def clip(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients to at most ``max_norm`` in the 2-norm, in place (0: do not clip).

    Returns the norm before, on the device.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(grads, foreach=True)
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm


def step_if_finite(optimizer: torch.optim.Optimizer, loss: Tensor, norm: Tensor, lr: float) -> Tensor:
    """Step at learning rate ``lr`` if the loss and the gradient's norm are finite; else change no parameter.

    The decision is taken on the device, through the ``found_inf`` flag of a fused AdamW or of ``fastkd.muon.Muon``: the host
    is never asked. Returns that flag: a float32 scalar, 1 where the step was skipped.
    """
    skipped = (~(torch.isfinite(loss) & torch.isfinite(norm))).to(torch.float32)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.step()
    return skipped


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors, all on one device, that hold NaN or infinity. Reads each number once; waits once for the device."""
    floats = {name: x.detach() for name, x in tensors.items() if x.is_floating_point() and x.numel()}
    if not floats:
        return []
    largest = torch.stack([torch.linalg.vector_norm(x, torch.inf).float() for x in floats.values()])
    return [name for name, finite in zip(floats, largest.isfinite().tolist(), strict=True) if not finite]
