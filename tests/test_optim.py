"""The optimiser: only matrices decay, and steps that are not finite leave no trace."""

import pytest
import torch
from torch import nn

from fastkd import optim


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))


def new(net: nn.Module) -> torch.optim.AdamW:
    return optim.adamw(net.named_parameters(), betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)


def test_vectors_are_not_decayed() -> None:
    groups = new(model()).param_groups
    assert {(p.ndim, group["weight_decay"]) for group in groups for p in group["params"]} == {(2, 0.01), (1, 0.0)}


def test_parameters_that_are_not_trained_are_left_out() -> None:
    net = model()
    net[0].weight.requires_grad_(False)
    assert all(p.ndim == 1 for group in new(net).param_groups for p in group["params"])


def test_clip_scales_to_the_largest_norm_and_returns_the_norm_before() -> None:
    net = model()
    net(torch.randn(4, 8)).square().sum().backward()
    parameters = list(net.parameters())
    before = torch.cat([p.grad.flatten() for p in parameters]).norm()
    assert optim.clip(parameters, 0.5) == pytest.approx(float(before), rel=1e-5)
    after = torch.cat([p.grad.flatten() for p in parameters]).norm()
    assert float(after) == pytest.approx(0.5, rel=1e-4)


def test_clip_of_zero_leaves_gradients_alone() -> None:
    net = model()
    net(torch.randn(4, 8)).square().sum().backward()
    before = [p.grad.clone() for p in net.parameters()]
    optim.clip(list(net.parameters()), 0.0)
    assert all(torch.equal(p.grad, b) for p, b in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(poison: float) -> None:
    net = model()
    optimizer = new(net)
    for value in (1.0, poison, 1.0):
        loss = net(torch.randn(4, 8)).square().sum().mul(value)
        loss.backward()
        before = [p.detach().clone() for p in net.parameters()]
        norm = optim.clip(list(net.parameters()), 1.0)
        skipped = optim.step_if_finite(optimizer, loss.detach(), norm, lr=0.1)
        optimizer.zero_grad(set_to_none=True)
        unchanged = all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
        assert unchanged == bool(skipped) == (value != 1.0)
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_a_loss_that_is_not_finite_changes_nothing_though_its_gradient_is() -> None:
    net = model()
    optimizer = new(net)
    net(torch.randn(4, 8)).square().sum().backward()
    before = [p.detach().clone() for p in net.parameters()]
    norm = optim.clip(list(net.parameters()), 1.0)
    assert torch.isfinite(norm) and optim.step_if_finite(optimizer, torch.tensor(torch.nan), norm, lr=0.1)
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_tensors_that_are_not_finite_are_named() -> None:
    tensors = {name: torch.ones(3, 4) for name in ("a", "b", "c", "whole")}
    tensors["a"][1, 2], tensors["b"][0, 0], tensors["c"][2, 3] = torch.nan, torch.inf, -torch.inf
    tensors |= {"ids": torch.arange(3), "none": torch.ones(0), "large": torch.full((9,), 3e38)}
    assert optim.not_finite(tensors) == ["a", "b", "c"]
    assert optim.not_finite({"ids": torch.arange(3)}) == []
