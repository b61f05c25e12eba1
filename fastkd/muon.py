"""Muon: the updates of hidden matrices are orthogonalised; all other parameters have AdamW. One optimiser to its callers.

An update is the momentum's gradient with all singular values brought near 1 by five Newton–Schulz iterations, in bfloat16
(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; torch.optim.Muon computes it). Times 0.2·√max(rows, columns)
it is as large as one of AdamW's, so that both share a learning rate and a decay (Liu et al. 2025, arXiv 2502.16982).
Embeddings, head, biases and LayerNorms are AdamW's, as there; queries, keys and values are three matrices, though the encoder
holds them as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import optim

MOMENTUM, ITERATIONS = 0.95, 5


def require() -> None:
    """Refuse a PyTorch that has no Muon.

    Raises:
        ValueError: it is older than 2.9.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(
            f"--optimizer muon needs torch 2.9 or newer, this is {torch.__version__}: upgrade torch, or leave --optimizer out"
        )


def muon(
    parameters: Iterable[tuple[str, nn.Parameter]],
    hidden: Mapping[str, int],
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Muon:
    """Muon over the trained parameters that ``hidden`` names, AdamW over the others.

    Args:
        hidden: of how many equal matrices, one above the other, a parameter is made.
        betas, eps: AdamW's.
        weight_decay: of all matrices.

    Raises:
        ValueError: none of the hidden matrices is trained.
    """
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    weights = [(p, hidden[name]) for name, p in trained if name in hidden]
    if not weights:
        raise ValueError("--optimizer muon finds no hidden matrix that this method trains: leave --optimizer out")
    others = ((name, p) for name, p in trained if name not in hidden)
    adamw = optim.adamw(others, betas=betas, eps=eps, weight_decay=weight_decay)
    return Muon(weights, adamw, weight_decay)


class Muon(torch.optim.Optimizer):
    """torch's Muon and AdamW as one: they share this optimiser's groups and state, so it is saved and restored as any other."""

    found_inf: Tensor  # set by `optim.step_if_finite`: 1 where the step is to change nothing

    def __init__(self, weights: list[tuple[nn.Parameter, int]], adamw: torch.optim.AdamW, weight_decay: float) -> None:
        """``weights``: each with the number of equal matrices, one above the other, that it is made of."""
        self._weights, self._adamw = weights, adamw
        self._blocks = [block for weight, count in weights for block in weight.detach().chunk(count)]  # views
        self._muon = torch.optim.Muon(
            self._blocks, lr=0.0, weight_decay=weight_decay, momentum=MOMENTUM, ns_steps=ITERATIONS,
            adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
        super().__init__([*adamw.param_groups, *self._muon.param_groups], {})
        for block in self._blocks:
            self.state[block]["momentum_buffer"] = torch.zeros_like(block)
        self._share()

    def _share(self) -> None:
        """Let both work on this optimiser's groups, of which the last one is Muon's, and on its state."""
        self._adamw.state = self._muon.state = self.state
        self._adamw.param_groups, self._muon.param_groups = self.param_groups[:-1], self.param_groups[-1:]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take groups and state as ``load_state_dict`` made them anew."""
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both, or of none where ``found_inf`` is 1; the host does not learn which."""
        self._adamw.found_inf, self._adamw.grad_scale = self.found_inf, None  # type: ignore[attr-defined]
        self._adamw.step()
        skipped, before = self.found_inf > 0, [block.clone() for block in self._blocks]
        grads = (grad for weight, count in self._weights for grad in _grad(weight).chunk(count))
        for block, grad in zip(self._blocks, grads, strict=True):
            # In the place of a gradient that is not finite, the momentum: their mean is the momentum again.
            block.grad = torch.where(skipped, self.state[block]["momentum_buffer"], grad, out=grad)
        self._muon.step()
        for block, kept in zip(self._blocks, before, strict=True):
            torch.where(skipped, kept, block, out=block)
            block.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, those of the whole weights too."""
        super().zero_grad(set_to_none)
        for weight, _ in self._weights:
            weight.grad = None


def _grad(weight: nn.Parameter) -> Tensor:
    assert weight.grad is not None, "what gets no gradient is not trained"
    return weight.grad


def step_flops(weights: Iterable[tuple[Tensor, int]]) -> int:
    """FLOPs of the iterations of one step, each weight with the number of equal matrices that it is made of."""
    return sum(count * newton_schulz_flops(len(weight) // count, weight.shape[1]) for weight, count in weights)


def newton_schulz_flops(rows: int, columns: int) -> int:
    """FLOPs of the iterations for one matrix of m ≤ n: X Xᵀ (2·m²·n), its square (2·m³) and their product with X (2·m²·n)."""
    m, n = sorted((rows, columns))
    return ITERATIONS * (4 * m * m * n + 2 * m**3)
