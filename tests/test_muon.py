"""Muon beside AdamW: updates are torch's own, a skipped step leaves no trace; runs with it are saved, resumed and counted."""

from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
import torch
from packed_text import bert
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastkd import checkpoint, optim, run
from fastkd.health import Diverged
from fastkd.ledger import surviving_steps
from fastkd.loop import Loop
from fastkd.models.hf import from_hf_model
from fastkd.muon import MOMENTUM, Muon, muon, newton_schulz_flops, step_flops
from fastkd.run_folder import read_run
from fastkd.schedule import learning_rate

HIDDEN = {"0.weight": 3, "1.weight": 1}  # three matrices of 8 × 8 one above the other, and one of 6 × 24
ADAMW = {"betas": (0.9, 0.98), "eps": 1e-6}
OPTIONS = ["--method", "mlm", "--optimizer", "muon", "--schedule", "wsd", "--budget-tokens", "12500"]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), nn.Linear(24, 6), nn.LayerNorm(6), nn.Linear(6, 4))


def new(net: nn.Module, weight_decay: float = 0.01) -> Muon:
    return muon(net.named_parameters(), HIDDEN, **ADAMW, weight_decay=weight_decay)


def losses(net: nn.Module, count: int = 4) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield net(torch.randn(5, 8, generator=generator)).square().sum()


def step(net: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, poison: float = 1.0) -> bool:
    """One step of a loss times ``poison``; whether it was skipped."""
    (loss * poison).backward()
    norm = optim.clip(list(net.parameters()), 1.0)
    skipped = optim.step_if_finite(optimizer, loss.detach(), norm, lr=0.01)
    optimizer.zero_grad(set_to_none=True)
    return bool(skipped)


def bits(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    """Parameters and moments by name."""
    state = optimizer.state_dict()["state"].items()
    moments = {f"{index}.{name}": x for index, entry in state for name, x in entry.items()}
    return {name: x.numpy().tobytes() for name, x in (net.state_dict() | moments).items()}


def test_updates_are_those_of_torchs_muon_and_adamw_on_separate_matrices() -> None:
    net, twin = model(), model()
    optimizer = new(net)
    parts = [nn.Parameter(part.clone()) for part in (*twin[0].weight.detach().chunk(3), twin[1].weight.detach())]
    theirs = torch.optim.Muon(parts, lr=0.01, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    others = [(name, p) for name, p in twin.named_parameters() if name not in HIDDEN]
    adamw = optim.adamw(others, **ADAMW, weight_decay=0.01)
    for mine, loss in zip(losses(net), losses(twin), strict=True):
        assert not step(net, optimizer, mine)
        loss.backward()
        norm = optim.clip(list(twin.parameters()), 1.0)
        for part, grad in zip(parts, (*twin[0].weight.grad.chunk(3), twin[1].weight.grad), strict=True):
            part.grad = grad
        theirs.step()
        optim.step_if_finite(adamw, loss.detach(), norm, lr=0.01)
        twin.zero_grad(set_to_none=True)
        with torch.no_grad():
            twin[0].weight.copy_(torch.cat(parts[:3]))
            twin[1].weight.copy_(parts[3])
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    assert all(p.grad is None for p in net.parameters())


def test_an_update_is_as_large_as_one_of_adamws() -> None:
    """0.2 times the learning rate in the root mean square, whatever the matrix's shape: AdamW's is 0.2 to 0.4 of it."""
    net = model()
    before = [net[0].weight.detach().clone(), net[1].weight.detach().clone()]
    step(net, new(net, weight_decay=0.0), next(losses(net)))
    for weight, old in zip((net[0].weight, net[1].weight), before, strict=True):
        assert 0.1 < float((weight.detach() - old).square().mean().sqrt()) / 0.01 < 0.3


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_no_bit(poison: float) -> None:
    net, twin = model(), model()
    optimizer, undisturbed = new(net), new(twin)
    for number, loss in enumerate(losses(net)):
        if number in (0, 2):
            before = bits(net, optimizer)
            assert step(net, optimizer, loss, poison)
            after = bits(net, optimizer)
            assert after | before == after and not any(any(after[name]) for name in after.keys() - before.keys())
        else:
            assert not step(net, optimizer, loss)
    for number, loss in enumerate(losses(twin)):
        if number not in (0, 2):
            step(twin, undisturbed, loss)
    assert bits(net, optimizer) == bits(twin, undisturbed)


def test_only_hidden_matrices_are_orthogonalised_and_only_what_is_trained() -> None:
    encoder = from_hf_model(bert(), mlm_head=True)
    hidden = encoder.hidden_matrices
    of_a_layer = {"qkv": 3, "attention_output": 1, "up": 1, "down": 1}
    assert hidden == {f"layers.{i}.{name}.weight": count for i in range(3) for name, count in of_a_layer.items()}
    encoder.layers[2].up.weight.requires_grad_(False)
    groups = muon(encoder.named_parameters(), hidden, **ADAMW, weight_decay=0.01).param_groups
    assert len(groups[-1]["params"]) == 3 * 6 - 1 and groups[-1]["momentum"] == MOMENTUM
    with pytest.raises(ValueError, match="no hidden matrix"):
        muon(encoder.named_parameters(), {}, **ADAMW, weight_decay=0.01)


def test_flops_are_those_that_torch_counts() -> None:
    net = model()
    optimizer = new(net)
    next(losses(net)).backward()
    with FlopCounterMode(display=False) as counter:
        optim.step_if_finite(optimizer, torch.tensor(1.0), torch.tensor(1.0), lr=0.01)
    expected = 3 * newton_schulz_flops(8, 8) + newton_schulz_flops(6, 24)
    assert counter.get_total_flops() == expected == step_flops([(torch.empty(24, 8), 3), (torch.empty(24, 6), 1)])


def test_a_checkpoint_brings_every_moment_back(tmp_path: Path) -> None:
    net, other = model(), model()
    optimizer, restored = new(net), new(other)
    for loss in losses(net):
        step(net, optimizer, loss)
    checkpoint.save(tmp_path, net, optimizer, {"step": 4})
    found = checkpoint.newest(tmp_path)
    assert found is not None
    found.restore(other, restored)
    assert bits(other, restored) == bits(net, optimizer)
    for each, own in ((net, optimizer), (other, restored)):
        step(each, own, next(losses(each)))
    assert bits(other, restored) == bits(net, optimizer)


def test_a_momentum_that_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    net = model()
    optimizer = new(net)
    optimizer.state[optimizer.param_groups[-1]["params"][1]]["momentum_buffer"][0, 0] = torch.nan
    with pytest.raises(Diverged, match=r"momentum_buffer is not finite"):
        checkpoint.save(tmp_path, net, optimizer, {"step": 1})


# ---- runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(from_scratch: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from the command line, saved after each step."""
    folder = tmp_path_factory.mktemp("muon") / "run"
    assert run.main([*from_scratch, *OPTIONS, "--checkpoint-minutes", "0", "--output-dir", str(folder)]) == 0
    return folder


def test_a_run_says_what_it_was_trained_with(finished: Path) -> None:
    found, steps = read_run(finished), surviving_steps(finished / "ledger.jsonl")
    assert found.plan["optimizer"] == "muon" and found.plan["schedule"] == "wsd"
    assert [line["lr"] for line in steps] == [learning_rate(line["progress"], 1e-3, 0.06, "wsd") for line in steps]
    assert steps[-1]["loss"] < steps[0]["loss"]
    for name in ("report.html", "final/README.md"):
        assert "schedule wsd, optimizer muon" in (finished / name).read_text()


def test_its_books_hold_the_optimisers_products(finished: Path, from_scratch: list[str], tmp_path: Path) -> None:
    assert run.main([*from_scratch, "--method", "mlm", "--budget-tokens", "12500", "--output-dir", str(tmp_path)]) == 0
    mine, plain = (surviving_steps(folder / "ledger.jsonl") for folder in (finished, tmp_path))
    a_layer = 4 * newton_schulz_flops(48, 48) + 2 * newton_schulz_flops(48, 192)
    added = [one["flops"]["student"] - other["flops"]["student"] for one, other in zip(mine, plain, strict=True)]
    assert added == [2 * a_layer * line["step"] for line in mine]
    planned = read_run(finished).plan["optimizer_flops_per_token"]
    assert planned == pytest.approx(2 * a_layer / 1024, rel=0.05) and read_run(tmp_path).plan["optimizer"] == "adamw"


def test_stopped_and_resumed_it_is_the_same_to_the_bit(
    finished: Path, from_scratch: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [*from_scratch, *OPTIONS, "--checkpoint-minutes", "0", "--output-dir", str(tmp_path)]
    issue = Loop._issue

    def interrupted(self: Loop, *args: object) -> None:
        if self.number == 5:
            raise KeyboardInterrupt
        issue(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_issue", interrupted)
        assert run.main(argv) == run.EXIT_INTERRUPTED
    assert run.main(argv) == 0
    last = max((finished / "checkpoints").iterdir(), key=checkpoint.step_of).name
    for name in ("final/model.safetensors", f"checkpoints/{last}/optimizer.safetensors"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_a_run_does_not_go_on_with_another_optimiser_or_schedule(
    finished: Path, from_scratch: list[str], capsys
) -> None:
    argv = [*from_scratch, *OPTIONS, "--checkpoint-minutes", "0", "--output-dir", str(finished)]
    for option, value, words in (
        ("--optimizer", "adamw", "optimizer: muon → adamw"),
        ("--schedule", "linear", "schedule: wsd"),
    ):
        assert run.main([*argv, option, value]) == run.EXIT_CONFIGURATION
        assert words in capsys.readouterr().err


def test_a_torch_without_muon_is_refused(
    from_scratch: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    folder = tmp_path / "run"
    assert run.main([*from_scratch, *OPTIONS, "--output-dir", str(folder)]) == run.EXIT_CONFIGURATION
    error = capsys.readouterr().err
    assert error.startswith("error: --optimizer muon needs torch 2.9 or newer") and error.count("\n") == 1
    assert not folder.exists()


TOLD = """
import hashlib, sys
from fastkd import run
from fastkd.loop import Loop

whole = Loop.run

def told(self, *args):
    whole(self, *args)
    moments = [x for entry in self.trainer.optimizer.state_dict()["state"].values() for x in entry.values()]
    numbers = [x.numpy().tobytes() for x in (*self.trainer.objective.state_dict().values(), *moments)]
    print("digest", hashlib.sha256(b"".join(numbers)).hexdigest())

Loop.run = told
sys.exit(run.main())
"""


def test_ranks_end_with_the_same_numbers_and_count_what_each_of_them_computes(
    finished: Path, from_scratch: list[str], tmp_path: Path
) -> None:
    (tmp_path / "told.py").write_text(TOLD)
    folder = tmp_path / "run"
    done = processes.ranks(str(tmp_path / "told.py"), *from_scratch, *OPTIONS, "--output-dir", str(folder))
    assert done.returncode == 0, done.stderr
    digests = [line for line in done.stdout.splitlines() if line.startswith("digest")]
    assert len(digests) == 2 and len(set(digests)) == 1
    one, two = (surviving_steps(each / "ledger.jsonl") for each in (finished, folder))
    a_step = read_run(finished).plan["optimizer_flops_per_token"] * one[0]["tokens"]["real"]
    assert two[0]["flops"]["student"] - one[0]["flops"]["student"] == pytest.approx(a_step, rel=1e-6)
    for mine, theirs in zip(one, two, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)  # bfloat16 rounds the last bits of a sum apart
    weights = (load_file(each / "final" / "model.safetensors") for each in (finished, folder))
    assert all(float((a - b).abs().max()) < 5e-3 for a, b in zip(*(each.values() for each in weights), strict=True))
