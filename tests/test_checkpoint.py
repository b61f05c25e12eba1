"""Checkpoints come back exactly, survive damage, and never appear half-written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from fastkd import checkpoint


def trained(steps: int = 2) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    net = nn.Linear(6, 6)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, fused=True)
    for _ in range(steps):
        net(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer


def test_restores_parameters_and_optimiser_exactly(tmp_path: Path) -> None:
    net, optimizer = trained()
    checkpoint.save(tmp_path, net, optimizer, {"step": 2, "note": "x"})
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.state == {"step": 2, "note": "x"}
    other, other_optimizer = trained(0)
    found.restore(other, other_optimizer)
    for model, opt in ((net, optimizer), (other, other_optimizer)):
        model(torch.full((2, 6), 0.5)).sum().backward()
        opt.step()
    assert torch.equal(net.weight, other.weight) and torch.equal(net.bias, other.bias)


def test_keeps_the_newest_two(tmp_path: Path) -> None:
    net, optimizer = trained()
    for step in (9, 10, 11):
        checkpoint.save(tmp_path, net, optimizer, {"step": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-10", "step-11"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(damage: str, tmp_path: Path) -> None:
    net, optimizer = trained()
    for step in (1, 2):
        checkpoint.save(tmp_path, net, optimizer, {"step": step})
    victim = tmp_path / "step-2" / ("manifest.json" if damage == "manifest" else "model.safetensors")
    content = victim.read_bytes()
    if damage == "remove":
        victim.unlink()
    elif damage == "flip":
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        victim.write_bytes(content[: len(content) // 2])
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.state["step"] == 1


def test_none_where_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "missing") is None


LOOP = """
import sys, torch
from pathlib import Path
from torch import nn
from fastkd import checkpoint
net = nn.Linear(300, 300)
optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, fused=True)
step = 0
while True:
    step += 1
    net(torch.ones(2, 300)).sum().backward()
    optimizer.step()
    checkpoint.save(Path(sys.argv[1]), net, optimizer, {"step": step})
    print(step, flush=True)
"""


def test_a_manifest_of_another_kind_does_not_verify(tmp_path: Path) -> None:
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / "manifest.json").write_text("[]")
    assert checkpoint.newest(tmp_path) is None


def test_kill_9_while_saving_leaves_a_checkpoint_that_verifies(tmp_path: Path) -> None:
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", LOOP, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if int(line) >= 5:
                    break
            time.sleep(0.011)
            os.kill(process.pid, signal.SIGKILL)
        found = checkpoint.newest(tmp_path)
        assert found is not None and found.state["step"] >= 5
