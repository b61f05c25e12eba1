"""Runs whose corpus has several parts: they read what is there, wait for the rest, and go on with the same bits."""

import json
import logging
import random
import shutil
import time
from pathlib import Path

import hub as test_hub
import processes
import pytest
import torch
from filelock import FileLock
from hub_contents import parquet
from made_model import texts
from safetensors.torch import load_file

from fastkd import planning, prepare, run, setup
from fastkd.config import parse
from fastkd.data.shards import Shards, build_shards, cache
from fastkd.distributed import World
from fastkd.models import hf
from fastkd.run_folder import read_run
from fastkd.train import Trainer

RUN_FIRST = 12_000  # tokens of part 0: more than a plan measures


@pytest.fixture(scope="module")
def options(made_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A scratch run that reads two parts of a corpus of four."""
    sentences = [sentence for text in texts() for sentence in text.split(". ")]
    path = tmp_path_factory.mktemp("runs") / "text.txt"
    draw = random.Random(0)
    path.write_text("\n\n".join(". ".join(draw.choices(sentences, k=12)) for _ in range(600)))
    return [
        *("--preset", "quickstart", "--method", "mlm", "--tokenizer", str(made_teacher), "--corpus", str(path)),
        *("--student", "1L-24H-2A", "--dtype", "float32", "--seq-length", "32", "--batch-tokens", "512"),
        *("--budget-tokens", "30000", "--validations", "0"),
    ]


@pytest.fixture
def unbudgeted(options: list[str]) -> list[str]:
    """The same run before its budget is named: what ``prepare`` takes."""
    return options[: options.index("--budget-tokens")]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs of this process begin a corpus with a small part, in a cache of the test's own."""
    monkeypatch.setattr(setup, "FIRST_TOKENS", RUN_FIRST)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def corpus_of(options: list[str]) -> Shards:
    return build_shards(
        options[options.index("--corpus") + 1], hf.shape(options[options.index("--tokenizer") + 1])[1], cache(),
        first_tokens=RUN_FIRST, tokens=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "FIRST_TOKENS", RUN_FIRST)
        assert run.main([*options, "--output-dir", str(folder)]) == 0
    return folder


def assert_same_student(one: Path, other: Path) -> None:
    a, b = (load_file(folder / "final" / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_reads_several_parts_and_builds_no_more(finished: Path, options: list[str]) -> None:
    there = sorted(path.name for path in corpus_of(options).folder.glob("part-*"))
    assert there == ["part-00000", "part-00001"]
    plan = json.loads((finished / "plan.json").read_text())["corpus"]
    assert not plan["is_complete"] and plan["held_out_tokens"] > 500
    assert 0.1 < read_run(finished).steps[-1]["epoch"] < 0.9


def test_a_plan_times_the_steps_whose_text_is_there(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the building of a part takes is in no step's seconds; part 0 is some steps here, of 20 that would be timed."""
    monkeypatch.setattr(setup, "FIRST_TOKENS", 5_000)
    monkeypatch.setattr(planning, "MEASURED_STEPS", 20)
    monkeypatch.setattr(planning, "MEASURED_SECONDS", 1e9)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    trainer, timed, timing = Trainer(setup.prepare(parse(options), World())), [], planning._timed_step

    def counted(*given: object) -> object:
        timed.append(given)
        return timing(*given)

    monkeypatch.setattr(planning, "_timed_step", counted)
    (measured,) = planning.measure(trainer)
    assert measured.phase_s["data"] < 0.1
    assert 5 < len(timed) < 20
    assert trainer.stream.is_there(len(timed) - 1) and not trainer.stream.is_there(len(timed))


@pytest.mark.usefixtures("small_parts")
def test_a_run_whose_text_cannot_be_written_is_saved_and_goes_on(
    finished: Path, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = corpus_of(options)
    obstacle = shards.folder / ".part-00001.building"  # stands for a full disk
    obstacle.touch()
    command = [*options, "--output-dir", str(tmp_path / "run")]
    assert run.main(command) == run.EXIT_INTERRUPTED
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: cannot write shards to") and "run the same command again; saved work is kept" in line
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    obstacle.unlink()
    assert run.main(command) == 0
    assert_same_student(tmp_path / "run", finished)


RUN = """
import sys
from fastkd import setup
setup.FIRST_TOKENS = int(sys.argv[1])
from fastkd.run import main
raise SystemExit(main(sys.argv[2:]))
"""


@pytest.mark.usefixtures("small_parts")
def test_a_run_that_is_killed_in_a_later_part_goes_on_with_the_same_bits(
    finished: Path, options: list[str], tmp_path: Path
) -> None:
    folder, script = tmp_path / "run", tmp_path / "run.py"
    script.write_text(RUN)
    more = ["--output-dir", folder, "--checkpoint-minutes", "0"]
    process = processes.Command(str(script), RUN_FIRST, *options, *more)
    ledger = folder / "ledger.jsonl"
    while not ledger.exists() or ledger.read_text().count('"lr"') < 30:
        assert process.poll() is None
        time.sleep(0.02)  # between two looks at the file
    process.kill()
    process.finish()
    assert run.main([*options, "--output-dir", str(folder)]) == 0
    assert_same_student(folder, finished)


@pytest.mark.usefixtures("small_parts")
def test_ranks_read_the_same_parts_as_one_process(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run tokenises its corpus itself; the ranks wait for a part together."""
    (tmp_path / "run.py").write_text(RUN)
    same = [*options, "--batch-tokens", "1024"]
    assert run.main([*same, "--output-dir", str(tmp_path / "1")]) == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-2"))
    job = processes.ranks(str(tmp_path / "run.py"), RUN_FIRST, *same, "--output-dir", tmp_path / "2")
    assert job.returncode == 0, job.stderr
    (corpus,) = (tmp_path / "cache-2").glob("fastkd/*/")
    assert [path.name for path in sorted(corpus.glob("part-*"))] == ["part-00000", "part-00001"]
    one, two = (load_file(tmp_path / name / "final" / "model.safetensors") for name in "12")
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-5
    assert read_run(tmp_path / "1").steps[-1]["epoch"] == read_run(tmp_path / "2").steps[-1]["epoch"]


@pytest.mark.usefixtures("small_parts")
def test_a_run_goes_on_at_its_commit_of_the_hub_and_another_one_offline(
    options: list[str], hub: test_hub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dataset's card is edited in the middle of a run: it ends as one that was left alone, in an untouched cache too."""
    text = Path(options[options.index("--corpus") + 1]).read_text().split("\n\n")
    hub.add("datasets", "parts/edited", {"train.parquet": parquet({"text": text})})
    given = ["parts/edited" if option.endswith("text.txt") else option for option in options]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "whole"))
    assert run.main([*given, "--output-dir", str(tmp_path / "alone")]) == 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run.main([*given, "--output-dir", str(tmp_path / "offline")]) == 0
    assert_same_student(tmp_path / "offline", tmp_path / "alone")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    argv = [*given, "--output-dir", str(tmp_path / "run")]
    assert prepare.main([*given[: given.index("--budget-tokens")], "--tokens", "1"]) == 0
    (corpus,) = (path for path in cache().iterdir() if path.is_dir())
    obstacle = corpus / ".part-00001.building"
    obstacle.touch()
    assert run.main(argv) == run.EXIT_INTERRUPTED
    obstacle.unlink()
    hub.add("datasets", "parts/edited", {"README.md": "a card", "train-2.parquet": parquet({"text": ["more", "text"]})})
    assert run.main(argv) == 0
    assert_same_student(tmp_path / "run", tmp_path / "alone")
    assert [path.name for path in cache().iterdir() if path.is_dir()] == [corpus.name]


@pytest.mark.usefixtures("small_parts")
def test_what_was_prepared_is_found_by_a_run(
    options: list[str], unbudgeted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare.main([*unbudgeted, "--tokens", "20000"]) == 0
    said = capsys.readouterr().out
    shards = corpus_of(options)
    assert str(shards.folder) in said and len(list(shards.folder.glob("part-*"))) == 2
    assert prepare.main([*unbudgeted, "--tokens", "0"]) == 2
    assert capsys.readouterr().err == "error: --tokens must be between 1 and 1e15, got 0\n"


@pytest.mark.usefixtures("small_parts")
def test_a_corpus_is_prepared_as_far_as_the_budget_of_a_file_reads(
    options: list[str], unbudgeted: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "run.toml"
    for budget, whole in (("budget_tokens = 20000", False), ("budget_gpu_hours = 1", True)):
        path.write_text(f"{budget}\n")
        assert prepare.main([*unbudgeted, "--config", str(path)]) == 0
        assert corpus_of(options).is_complete == whole


@pytest.mark.usefixtures("small_parts")
def test_who_waits_for_another_build_says_so(
    options: list[str], unbudgeted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = corpus_of(options).folder
    shutil.rmtree(corpus)
    other = FileLock(corpus.with_name(f"{corpus.name}.lock")).acquire().lock

    class Ends(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "waiting for another process" in record.getMessage():
                other.release()

    builder = logging.getLogger("fastkd.data.builder")
    builder.addHandler(ending := Ends())
    assert prepare.main([*unbudgeted, "--tokens", "1"]) == 0
    builder.removeHandler(ending)
    assert f"waiting for another process that tokenises this corpus into {corpus}" in capsys.readouterr().out


SPOILT = """
import os, shutil, sys
from fastkd import run
from fastkd.data.shards import cache
from fastkd.loop import Loop
from fastkd.train import Trainer

how, *options = sys.argv[1:]
step, loop = Trainer.step, Loop.run

def spoil(self, batches, lr):
    (part,) = cache().glob("*/part-00000")
    if how == "deleted":
        shutil.rmtree(part)
    else:
        for path in part.glob("*.bin"):
            os.truncate(path, 0)
    Trainer.step = step
    return step(self, batches, lr)

def looped(self, *args):  # the plan's steps are over
    Trainer.step = spoil
    return loop(self, *args)

Loop.run = looped
sys.exit(run.main(options))
"""


@pytest.mark.parametrize("how", ["cut", "deleted"])
def test_a_part_that_is_spoilt_while_it_is_read_does_not_end_the_run(
    how: str, unbudgeted: list[str], tmp_path: Path
) -> None:
    (tmp_path / "spoilt.py").write_text(SPOILT)
    command = [*unbudgeted, "--budget-tokens", "4000", "--output-dir", str(tmp_path / "run")]
    done = processes.run(str(tmp_path / "spoilt.py"), how, *command, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").exists()
