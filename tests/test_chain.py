"""An altered or cut ledger is known: a run mends it and says so, or refuses it in one line; a replay refuses it."""

import random
import shutil
import tracemalloc
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest
from ledgers import Life, charge_step

from fastkd import chain, run
from fastkd.budget import Totals
from fastkd.checkpoint import Checkpoint
from fastkd.ledger import NAME, Ledger, has_ended, read, replayed_progress
from fastkd.resume import mend_ledger
from fastkd.run_folder import read_run


@pytest.fixture(scope="module", params=["stopped", "killed", "finished", "not saved"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of some steps that was stopped, was killed after its last checkpoint, came to its end, or was never saved."""
    folder = tmp_path_factory.mktemp("ledgers") / request.param.replace(" ", "-")
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "restore", lambda *_: None)
        life = Life(folder, "loop")
        life.ledger.event("setup", 2.0)
        for step in range(1, 13):
            charge_step(life.ledger, progress=step / 12)
            if step in (4, 9) and request.param != "not saved":
                life.save()
                life.ledger.event("checkpoint", 0.5)
        if request.param in ("stopped", "finished"):
            life.save()
        if request.param == "finished":
            life.ledger.end()
            (folder / "final").mkdir()
        life.log()
        life.ledger.close()
    return folder


def emptied(lines: list[bytes], chance: random.Random) -> list[bytes]:
    return []


def cut(lines: list[bytes], chance: random.Random) -> list[bytes]:
    return lines[: chance.randrange(len(lines))]


def torn(lines: list[bytes], chance: random.Random) -> list[bytes]:
    kept = chance.randrange(len(lines))
    return [*lines[:kept], lines[kept][: chance.randrange(1, len(lines[kept]))]]


def flipped(lines: list[bytes], chance: random.Random) -> list[bytes]:
    place = chance.randrange(len(lines))
    digits = [i for i, char in enumerate(lines[place]) if chr(char).isdigit()]
    i = chance.choice(digits)
    digit = chance.choice([each for each in b"0123456789" if each != lines[place][i]])
    return [*lines[:place], lines[place][:i] + bytes([digit]) + lines[place][i + 1 :], *lines[place + 1 :]]


def dropped(lines: list[bytes], chance: random.Random) -> list[bytes]:
    place = chance.randrange(len(lines))
    return lines[:place] + lines[place + 1 :]


def doubled(lines: list[bytes], chance: random.Random) -> list[bytes]:
    place = chance.randrange(len(lines))
    return lines[: place + 1] + lines[place:]


def swapped(lines: list[bytes], chance: random.Random) -> list[bytes]:
    one, other = sorted(chance.sample(range(len(lines)), 2))
    return [*lines[:one], lines[other], *lines[one + 1 : other], lines[one], *lines[other + 1 :]]


MUTATIONS: list[Callable[[list[bytes], random.Random], list[bytes]]] = [
    emptied, cut, torn, flipped, dropped, doubled, swapped,
]  # fmt: skip


@pytest.mark.parametrize("mutation", [*MUTATIONS, None], ids=lambda mutation: getattr(mutation, "__name__", "removed"))
def test_a_damaged_ledger_is_mended_and_said_or_refused(
    mutation: Callable[[list[bytes], random.Random], list[bytes]] | None, folder: Path, tmp_path: Path
) -> None:
    whole = (folder / NAME).read_bytes().splitlines(keepends=True)
    copies = [copy.read_bytes() for copy in folder.glob(f"checkpoints/*/{NAME}")]
    for seed in range(8 if mutation else 1):
        run = tmp_path / str(seed)
        shutil.copytree(folder, run)
        mutated = b"" if mutation is None else b"".join(mutation(whole, random.Random(seed)))
        (run / NAME).unlink() if mutation is None else (run / NAME).write_bytes(mutated)
        with pytest.raises(ValueError, match=r"give the ledger\.jsonl of a finished run$"):
            replayed_progress(run / NAME)
        try:
            said = mend_ledger(run)
        except ValueError as error:
            assert not copies and f"remove {run}" in str(error) and "\n" not in str(error)
            continue
        assert said is not None and str(run / NAME) in said and "\n" not in said
        mended = b"".join(chain.whole_lines(run / NAME))
        assert all(mended.startswith(copy) for copy in copies), "what a checkpoint knows is there"
        ended = [line for line in mended.splitlines() if b"restored" in line]
        assert {*mended.splitlines()} <= {*b"".join(whole).splitlines(), *ended}
        if folder.name == "finished":
            assert replayed_progress(run / NAME) == [step / 12 for step in range(1, 13)]
            assert read_run(run).charged_s == read_run(folder).charged_s


@pytest.mark.parametrize("folder", ["not saved"], indirect=True)
def test_metrics_that_are_later_than_a_ledger_without_a_copy_are_only_said(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    metrics, whole = run / "metrics.jsonl", (run / NAME).read_bytes()
    charged = read(run / NAME)[-1]["charged_s"]
    metrics.write_text(
        metrics.read_text().replace(str(charged), str(charged + 1))
    )  # a line of an older version: no sum
    said = mend_ledger(run)
    assert said is not None and "not in the bill" in said and (run / NAME).read_bytes() == whole
    (run / NAME).write_bytes(b"")  # the power was cut before the first checkpoint
    said = mend_ledger(run)
    assert said is not None and "ends at step 0 " in said


@pytest.mark.parametrize("folder", ["stopped", "finished"], indirect=True)
def test_one_that_was_only_cut_gets_back_what_the_checkpoint_knows(folder: Path, tmp_path: Path) -> None:
    copies = sorted(folder.glob(f"checkpoints/*/{NAME}"), key=lambda copy: copy.stat().st_size)
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    (run / NAME).write_bytes(b"".join(copies[-1].read_bytes().splitlines(keepends=True)[:3]) + b'{"torn')
    said = mend_ledger(run)
    assert said is not None and "lacked its last" in said
    assert (run / NAME).read_bytes().startswith(copies[-1].read_bytes())
    assert not list(run.glob("*.damaged"))


def test_lines_of_an_older_version_are_covered_once_lines_with_sums_follow(tmp_path: Path) -> None:
    path, totals = tmp_path / NAME, Totals()
    path.write_text('{"event": "setup", "seconds": 1.0, "step": 0}\n')
    chain.append(path, {"event": "glue"})
    assert b"sum" not in path.read_bytes() and has_ended(read(path))
    ledger = Ledger(path, "loop", totals)
    charge_step(ledger)
    ledger.close()
    chain.append(path, {"event": "glue"})
    assert [line.get("event") for line in read(path)] == ["setup", "glue", None, "glue"] and not has_ended(read(path))
    path.write_bytes(path.read_bytes().replace(b"1.0", b"2.0", 1))
    with pytest.raises(ValueError, match=r"ledger\.jsonl:3 was altered, or lines before it are missing"):
        read(path)


def test_lines_of_processes_that_append_at_the_same_time_are_one_chain(tmp_path: Path) -> None:
    path, context = tmp_path / NAME, get_context("fork")
    both = context.Barrier(2)

    def write(task: str) -> None:
        both.wait()
        for seed in range(150):
            chain.append(path, {"event": "glue", "task": task, "seed": seed})

    writers = [context.Process(target=write, args=(name,)) for name in ("cola", "sst2")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(read(path)) == 300


def test_the_copy_of_a_rank_that_outlived_rank_0_holds_what_that_did_not_write(tmp_path: Path) -> None:
    path = tmp_path / NAME
    first, other = (Ledger(path, "loop", Totals(), 2, write=write) for write in (True, False))
    for _ in range(5):
        charge_step(first)
        charge_step(other)
    first.close()
    whole = path.read_bytes()
    assert copied(other) == whole
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]) + b'{"step": 4, "torn')
    assert copied(other) == whole
    path.write_bytes(whole.replace(b"0.1", b"0.2", 1))
    assert copied(other) == path.read_bytes(), "a damaged ledger does not keep the parameters from being saved"


def copied(ledger: Ledger) -> bytes:
    """What a checkpoint would hold of a ledger."""
    ledger.copy().copy_to(ledger.path.with_name("copy"))
    return ledger.path.with_name("copy").read_bytes()


def test_a_copy_is_made_without_holding_the_ledger_in_memory(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / NAME, "loop", Totals())
    charge_step(ledger)
    ledger.close()
    ledger.path.write_bytes(ledger.path.read_bytes() * 40_000 + b'{"torn')  # 16 MB
    tracemalloc.start()
    ledger.copy().copy_to(tmp_path / "copy")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6
    assert (tmp_path / "copy").read_bytes() + b'{"torn' == ledger.path.read_bytes()


def test_the_same_command_restores_the_ledger_of_a_finished_run(mlm_run: Path, small: list[str], tmp_path: Path, capfd):
    folder = tmp_path / "run"
    shutil.copytree(mlm_run, folder)
    whole = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(whole.replace(b'"charged_s": 0', b'"charged_s": 1', 1))
    with pytest.raises(ValueError, match="issue the run's command again"):
        read_run(folder)
    options = [*small, "--method", "mlm", "--budget-tokens", "40000", "--output-dir", str(folder)]
    assert run.main(options) == 0
    assert "was damaged and is kept as ledger.jsonl.damaged" in "".join(capfd.readouterr())
    assert (folder / NAME).read_bytes() == whole
    assert replayed_progress(folder / NAME)[-1] == 1.0
