"""Killed or interrupted anywhere, the same command again gives the parameters of a run that was not interrupted."""

import os
import shutil
import signal
import time
from pathlib import Path

import processes
import pytest
import torch
from safetensors.torch import load_file

from fastkd import opening, pipeline, run
from fastkd.budget import Meter
from fastkd.config import parse
from fastkd.files import read_jsonl
from fastkd.ledger import surviving_steps
from fastkd.loop import Loop
from fastkd.run_folder import read_run


@pytest.fixture(scope="module")
def options(from_scratch: list[str]) -> list[str]:
    """A run of eighty steps of a few milliseconds, saved every tenth or so."""
    small = ["--student", "1L-24H-12A", "--batch-tokens", "512"]
    budget = ["--method", "mlm", "--budget-tokens", "41000", "--checkpoint-minutes", "0.001", "--warmup", "0.3"]
    return [*from_scratch, *small, *budget]


@pytest.fixture(scope="module")
def uninterrupted(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert run.main([*options, "--output-dir", str(folder)]) == 0
    return load_file(folder / "final" / "model.safetensors")


def stop_at(step: int, how: signal.Signals, options: list[str], folder: Path) -> int:
    """Start the run as a process, send it a signal once its ledger holds the step; the exit code."""
    process = processes.Command("fastkd.run", *options)
    while process.poll() is None:
        steps = [line for line in read_jsonl(folder / "ledger.jsonl") if "event" not in line]
        if steps and steps[-1]["step"] >= step:
            process.send_signal(how)
            break
        time.sleep(0.005)  # between two looks at the file
    return process.finish().returncode


@pytest.mark.parametrize("step", [1, 17, 35])
def test_kill_9_then_the_same_command(
    step: int, options: list[str], uninterrupted: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    argv = [*options, "--output-dir", str(folder)]
    assert stop_at(step, signal.SIGKILL, argv, folder) == -signal.SIGKILL
    assert step < 35 or list((folder / "checkpoints").glob("step-*"))
    assert processes.run("fastkd.run", *argv).returncode == 0
    student = load_file(folder / "final" / "model.safetensors")
    assert all(torch.equal(student[key], uninterrupted[key]) for key in uninterrupted)
    steps = surviving_steps(folder / "ledger.jsonl")
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    crashes = [line for line in read_jsonl(folder / "ledger.jsonl") if line.get("event") == "crash"]
    assert all(crash["seconds"] > 0 and crash["charged"] for crash in crashes)
    charged = [line["charged_s"] for line in read_jsonl(folder / "ledger.jsonl")]
    assert charged == sorted(charged)


def test_stopped_and_killed_in_turn_it_is_charged_for_the_steps_that_count(
    options: list[str], uninterrupted: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    argv = [*options, "--charge", "compute", "--checkpoint-minutes", "60", "--output-dir", str(folder)]
    assert stop_at(10, signal.SIGTERM, argv, folder) == run.EXIT_INTERRUPTED
    assert stop_at(45, signal.SIGKILL, argv, folder) == -signal.SIGKILL
    with (folder / "ledger.jsonl").open("a") as ledger:
        ledger.write('{"step": 99, "torn')
    assert processes.run("fastkd.run", *argv).returncode == 0
    student = load_file(folder / "final" / "model.safetensors")
    assert all(torch.equal(student[key], uninterrupted[key]) for key in uninterrupted)
    lines = read_jsonl(folder / "ledger.jsonl")
    assert sum(line.get("event") == "crash" and line["lost_steps"] >= 20 for line in lines) == 1
    steps = surviving_steps(folder / "ledger.jsonl")
    spent = sum(sum(line["phase_s"].values()) for line in steps)
    assert lines[-1]["charged_s"] == pytest.approx(spent) == read_run(folder).charged_s


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_saved_and_resumed(
    how: signal.Signals, options: list[str], uninterrupted: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    argv = [*options, "--checkpoint-minutes", "60", "--output-dir", str(folder)]
    assert stop_at(5, how, argv, folder) == 75
    assert any((folder / "checkpoints").iterdir())
    assert not (folder / "final").exists()
    result = processes.run("fastkd.run", *argv)
    assert result.returncode == 0, result.stderr
    student = load_file(folder / "final" / "model.safetensors")
    assert all(torch.equal(student[key], uninterrupted[key]) for key in uninterrupted)
    events = [line for line in read_jsonl(folder / "ledger.jsonl") if "event" in line]
    assert "crash" not in [event["event"] for event in events]
    known, seconds, charged_s = 0, 0.0, 0.0
    for line in read_jsonl(folder / "ledger.jsonl"):
        if line.get("event") == "validation" and line["charged"]:
            known += 1
            assert seconds * known <= 0.02 * charged_s, "a resumed run still knows what a validation costs"
        if line.get("event") == "validation":
            seconds = line["seconds"]
        charged_s = line.get("charged_s", charged_s)


def test_a_resumed_run_keeps_the_dtype_that_was_measured(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    resolved = {name: parse(["--budget-tokens", "60000", "--dtype", name]) for name in ("auto", "float32")}
    assert pipeline.with_measured_dtype(resolved["auto"], None) == resolved["auto"]
    (folder / "config.toml").write_text(resolved["auto"].to_toml())
    (folder / "plan.json").write_text('{"dtype": "bfloat16"}')
    assert pipeline.with_measured_dtype(resolved["auto"], read_run(folder)).run.dtype == "bfloat16"
    assert pipeline.with_measured_dtype(resolved["float32"], read_run(folder)) == resolved["float32"]


def test_a_lost_folder_of_checkpoints_starts_over(
    options: list[str], uninterrupted: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    argv = [*options, "--checkpoint-minutes", "60", "--output-dir", str(folder)]
    assert stop_at(8, signal.SIGKILL, argv, folder) == -signal.SIGKILL
    assert not os.path.exists(folder / "checkpoints")
    assert processes.run("fastkd.run", *argv).returncode == 0
    student = load_file(folder / "final" / "model.safetensors")
    assert all(torch.equal(student[key], uninterrupted[key]) for key in uninterrupted)


def test_an_interrupt_in_the_last_validation_loses_nothing(
    options: list[str], uninterrupted: dict[str, torch.Tensor], tmp_path: Path, monkeypatch, capsys
) -> None:
    folder = tmp_path / "run"
    argv = [*options, "--checkpoint-minutes", "10", "--output-dir", str(folder)]
    validate = Loop.record_validation

    def interrupted(self: Loop, progress: float, *, in_loop: bool) -> None:
        if progress == 1.0:
            raise KeyboardInterrupt
        validate(self, progress, in_loop=in_loop)

    monkeypatch.setattr(Loop, "record_validation", interrupted)
    assert run.main(argv) == run.EXIT_INTERRUPTED
    steps = surviving_steps(folder / "ledger.jsonl")
    monkeypatch.undo()
    with opening.alone_in(folder):
        assert run.main(argv) == run.EXIT_CONFIGURATION
        assert "another process trains in" in capsys.readouterr().err
    assert run.main(argv) == 0
    assert surviving_steps(folder / "ledger.jsonl") == steps
    student = load_file(folder / "final" / "model.safetensors")
    assert all(torch.equal(student[key], uninterrupted[key]) for key in uninterrupted)


def test_a_finished_run_takes_no_step_more_and_is_charged_no_more(
    from_scratch: list[str], tmp_path: Path, monkeypatch
) -> None:
    folder, before = tmp_path / "run", tmp_path / "before"
    argv = [
        *from_scratch,
        "--method",
        "mlm",
        "--budget-tokens",
        "20000",
        "--charge",
        "all",
        "--output-dir",
        str(folder),
    ]
    assert run.main(argv) == 0
    folder.rename(before)
    shutil.copytree(before, folder, ignore=shutil.ignore_patterns("final"))
    monkeypatch.setattr(Meter, "next_progress", lambda *_, **__: 1.0)  # steps cost less than in the process before
    monkeypatch.setattr(Loop, "_issue", lambda *_: pytest.fail("a step after the end"))
    assert run.main(argv) == 0
    mine, theirs = (load_file(each / "final" / "model.safetensors") for each in (folder, before))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    found, known = read_run(folder), read_run(before)
    assert found.steps == known.steps
    assert (found.charged_s, found.accounted_s) == (known.charged_s, known.accounted_s)
    assert [event["event"] for event in found.events[len(known.events) :]] == ["setup", "validation", "end"]


def test_another_corpus_than_the_run_began_with_is_refused(
    options: list[str], made_corpus: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    corpus, folder = tmp_path / "corpus.txt", tmp_path / "run"
    corpus.write_text(made_corpus.read_text())
    argv = [*options, "--corpus", str(corpus), "--output-dir", str(folder)]
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "save_the_end", interrupted)
        assert run.main(argv) == run.EXIT_INTERRUPTED
    corpus.write_text(corpus.read_text() + "\n\nOne more document.\n")
    assert run.main(argv) == run.EXIT_CONFIGURATION
    assert "the corpus changed since the run in" in capsys.readouterr().err
    corpus.write_text(made_corpus.read_text())
    assert run.main(argv) == 0


def interrupted(*args: object, **options: object) -> None:
    """What Ctrl-C does to the call that it replaces."""
    raise KeyboardInterrupt
