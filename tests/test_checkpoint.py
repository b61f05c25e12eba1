"""Checkpoints come back exactly, survive damage, and never appear half-written."""

import errno
import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import processes
import pytest
import torch
from torch import nn

from fastkd import checkpoint, files
from fastkd.budget import Totals
from fastkd.files import Beginning, file_sha256
from fastkd.health import Diverged


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


def damage(folder: Path, how: str) -> None:
    """What disks, people and archives do to a checkpoint; `how` is also a word of what is said of it."""
    victim = folder / ("manifest.json" if how in ("manifest", "list", "names", "JSON") else "model.safetensors")
    content = victim.read_bytes()
    match how:
        case "No such file":
            victim.unlink()
        case "written":
            victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "list":
            files = json.loads(content)
            victim.write_text(json.dumps({name: files[name] for name in ("model.safetensors", "state.json")}))
        case "names":
            (folder.parent / "outside").write_text("x")
            files = json.loads(content) | {"../outside": file_sha256(folder.parent / "outside")}
            victim.write_text(json.dumps(files))
        case "another step":
            folder.rename(folder.with_name("step-7"))
        case _:
            victim.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("how", ["written", "No such file", "cut", "manifest", "list", "names", "another step"])
def test_a_damaged_checkpoint_is_set_aside_for_an_older_one_and_said(how: str, tmp_path: Path) -> None:
    net, optimizer = trained()
    for step in (1, 2):
        checkpoint.save(tmp_path, net, optimizer, {"step": step})
    damage(tmp_path / "step-2", how)
    said: list[str] = []
    for _ in range(2):
        found = checkpoint.newest(tmp_path, said.append)
        assert found is not None and found.state["step"] == 1
    (line,) = said
    assert "step-1 is taken instead" in line and ".damaged" in line and (how if how != "cut" else "written") in line
    assert [p.name for p in tmp_path.glob("*.damaged")] == [
        "step-7.damaged" if how == "another step" else "step-2.damaged"
    ]


def test_where_all_are_damaged_the_run_does_not_begin_again_by_itself(tmp_path: Path) -> None:
    net, optimizer = trained()
    for step in (1, 2):
        checkpoint.save(tmp_path, net, optimizer, {"step": step})
    for step in (1, 2):
        damage(tmp_path / f"step-{step}", "written")
    with pytest.raises(
        ValueError, match=r"every checkpoint in .* is damaged .*step-2: model.*step-1: .*remove .* step 0"
    ):
        checkpoint.newest(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-2"], "a copy can be put back"


def test_the_newest_two_that_are_sound_are_kept(tmp_path: Path) -> None:
    net, optimizer = trained()
    for step in (1, 2):
        checkpoint.save(tmp_path, net, optimizer, {"step": step})
    damage(tmp_path / "step-2", "written")
    said: list[str] = []
    checkpoint.save(tmp_path, net, optimizer, {"step": 3}, say=said.append)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-1", "step-2.damaged", "step-3"]
    assert len(said) == 1 and "step-2" in said[0]


def test_what_is_saved_now_is_the_newest_whatever_its_number(tmp_path: Path) -> None:
    net, optimizer = trained()
    for step in (100, 200):
        checkpoint.save(tmp_path, net, optimizer, {"step": step})
    for step in (10, 20, 30):  # from an earlier step on
        saved = checkpoint.save(tmp_path, net, optimizer, {"step": step})
        found = checkpoint.newest(tmp_path)
        assert found is not None and found.folder == saved
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-100.given-up",
        "step-20",
        "step-200.given-up",
        "step-30",
    ]


def test_the_save_of_a_rank_that_came_less_far_leaves_that_of_another_the_newest(tmp_path: Path) -> None:
    net, optimizer = trained()
    said: list[str] = []
    for step in (98, 99):
        checkpoint.save(tmp_path, net, optimizer, {"step": step})
    for step in (101, 100):
        checkpoint.save(tmp_path, net, optimizer, {"step": step}, goes_on=False, say=said.append)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-100", "step-101"] and not said
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.state["step"] == 101


def test_a_step_that_is_saved_again_stays_until_the_new_one_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, optimizer = trained()
    root, seen = tmp_path / "checkpoints", []
    checkpoint.save(root, net, optimizer, {"step": 5, "save": 0})

    def before(change: Callable[..., object]) -> Callable[..., object]:
        def watched(path: Path, *options: object, **more: object) -> object:
            if path.parent == root:
                found = checkpoint.newest(shutil.copytree(root, tmp_path / f"at-{len(seen)}"))
                assert found is not None
                seen.append(found.state["save"])
            return change(path, *options, **more)

        return watched

    with monkeypatch.context() as patch:
        for owner, name in ((Path, "rename"), (shutil, "rmtree")):
            patch.setattr(owner, name, before(getattr(owner, name)))
        for save in (1, 2, 3):
            checkpoint.save(root, net, optimizer, {"step": 5, "save": save})
    assert sorted(seen) == seen and set(seen) == {0, 1, 2, 3}
    assert len(list(root.iterdir())) == 2


def test_a_copy_of_a_file_is_part_of_the_checkpoint(tmp_path: Path) -> None:
    net, optimizer = trained()
    (tmp_path / "ledger").write_text("a line, and more")
    copy = Beginning(tmp_path / "ledger", 6, b"\n")
    for step in (1, 2):
        checkpoint.save(tmp_path / "c", net, optimizer, {"step": step}, copies={"ledger.jsonl": copy})
    older, newer = (tmp_path / "c" / f"step-{step}" / "ledger.jsonl" for step in (1, 2))
    assert newer.read_text() == "a line\n"
    (newer.parent / "model.safetensors").unlink()
    assert checkpoint.sound_files(tmp_path / "c", "ledger.jsonl") == [newer, older]
    older.write_text("another line\n")
    assert checkpoint.sound_files(tmp_path / "c", "ledger.jsonl") == [newer]
    assert checkpoint.sound_files(tmp_path / "c", "none.jsonl") == []
    with pytest.raises(ValueError, match=r"ledger\.jsonl is not what was written"):
        checkpoint.newest(tmp_path / "c")


def test_what_kills_left_half_built_goes_when_a_run_goes_on(tmp_path: Path) -> None:
    net, optimizer = trained()
    for name in (".building-step-9-123", ".building-step-1", ".dropped-step-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    checkpoint.save(tmp_path, net, optimizer, {"step": 1})
    checkpoint.newest(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


@pytest.mark.parametrize(
    ("damaged", "left"), [(None, ["step-2", "step-3"]), ("step-2", ["step-1", "step-2.damaged", "step-3"])]
)
def test_what_a_killed_save_had_to_drop_goes_when_a_run_goes_on(
    damaged: str | None, left: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, optimizer = trained()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_rotate", lambda *_: None)
        for step in (1, 2, 3):
            checkpoint.save(tmp_path, net, optimizer, {"step": step})
    if damaged:
        (tmp_path / damaged / "state.json").write_text("{}")
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.folder.name == "step-3"
    assert sorted(p.name for p in tmp_path.iterdir()) == left


def test_two_ranks_that_save_the_same_step_at_once_leave_a_sound_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One takes the other for dead, and writes while that one does."""
    net, optimizer = trained()
    sync, mine = files.sync, os.getpid()

    def other_rank(path: Path) -> None:
        monkeypatch.setattr(files, "sync", sync)
        monkeypatch.setattr(os, "getpid", lambda: mine + 1)
        checkpoint.save(tmp_path, net, optimizer, {"step": 1})
        sync(path)

    monkeypatch.setattr(files, "sync", other_rank)
    with pytest.raises(OSError, match="not empty"):
        checkpoint.save(tmp_path, net, optimizer, {"step": 1})
    found = checkpoint.newest(tmp_path)
    assert found is not None and [p.name for p in tmp_path.iterdir()] == ["step-1"]


@pytest.mark.parametrize("place", ["weight", "moment"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_never_saved(place: str, value: float, tmp_path: Path) -> None:
    net, optimizer = trained()
    checkpoint.save(tmp_path, net, optimizer, {"step": 1})
    with torch.no_grad():
        tensor = net.weight if place == "weight" else optimizer.state[net.weight]["exp_avg_sq"]
        tensor[2, 3] = value
    with pytest.raises(Diverged, match="is not finite"):
        checkpoint.save(tmp_path, net, optimizer, {"step": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


@pytest.mark.parametrize("room", [100, 5_000])
def test_a_disk_that_is_full_leaves_older_checkpoints_alone(room: int, tmp_path: Path) -> None:
    """No file may pass the limit: safetensors writes none at 5,000 bytes, JSON none at 100."""
    torch.manual_seed(0)
    net = nn.Linear(*((60, 60) if room == 5_000 else (1, 1)), bias=False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, fused=True)
    checkpoint.save(tmp_path, net, optimizer, {"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            checkpoint.save(tmp_path, net, optimizer, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.state["step"] == 1


@pytest.mark.parametrize(
    "state",
    [
        {"totals": []},
        {"totals": {"step": 2, "more": 1}},
        {"totals": {"step": "2"}},
        {"totals": {"step": 2, "flops": {"student": 1}}},
        {"recent": [{"stop": 2}]},
        {"recent": 1},
    ],
    ids=str,
)
def test_a_checkpoint_with_the_state_of_another_version_is_set_aside(state: dict, tmp_path: Path) -> None:
    net, optimizer = trained()
    checkpoint.save(tmp_path, net, optimizer, {"step": 1, "totals": asdict(Totals(1))})
    checkpoint.save(tmp_path, net, optimizer, {"step": 2, **state})
    said: list[str] = []
    found = checkpoint.newest(tmp_path, said.append)
    assert found is not None and found.state["step"] == 1
    assert "step-2 is passed over (state.json is of another version" in said[0]


def test_a_checkpoint_of_another_model_is_refused_in_one_line(tmp_path: Path) -> None:
    net, optimizer = trained()
    checkpoint.save(tmp_path, net, optimizer, {"step": 1})
    found, other = checkpoint.newest(tmp_path), nn.Linear(3, 3)
    assert found is not None
    with pytest.raises(ValueError, match=r"step-1 is no checkpoint of this model: remove it"):
        found.restore(other, torch.optim.AdamW(other.parameters()))


def test_all_files_may_be_read_by_whom_their_folder_lets_in(tmp_path: Path) -> None:
    net, optimizer = trained()
    before = os.umask(0o027)
    try:
        saved = checkpoint.save(tmp_path, net, optimizer, {"step": 1})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir()} == {0o640}


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
    for content in ("[]", "[" * 100_000):
        (tmp_path / "step-1" / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match=r"every checkpoint in .*manifest\.json"):
            checkpoint.newest(tmp_path)


def test_kill_9_while_saving_leaves_a_checkpoint_that_verifies(tmp_path: Path) -> None:
    script, root = tmp_path / "loop.py", tmp_path / "checkpoints"
    script.write_text(LOOP)
    for _ in range(3):
        process = processes.Command(str(script), root)
        for line in process.stdout:
            if int(line) >= 5:
                break
        time.sleep(0.011)
        process.kill()
        process.finish()
        found = checkpoint.newest(root)
        assert found is not None and found.state["step"] >= 5
