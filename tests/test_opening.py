"""A run folder before its next step: killed while it was opened, locked, damaged, with debris; the same command goes on."""

import errno
import logging
import os
import random
import shutil
import signal
from pathlib import Path

import processes
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from fastkd import files, opening, pipeline, run
from fastkd.begun import BEGUN, begun_with
from fastkd.config import Resolved, parse
from fastkd.files import read_jsonl
from fastkd.opening import alone_in, take_over, write_opening
from fastkd.run_folder import has_student, read_run

CONTENTS = {"environment.json": '{"command": ["x"], "corpus_version": "1"}\n', "plan.json": '{"dtype": "float32"}\n'}
KILLED = """
import os, signal, sys
from pathlib import Path
from fastkd import opening
folder, last = Path(sys.argv[1]), int(sys.argv[2])
contents = dict(zip(sys.argv[3::2], sys.argv[4::2]))
count = 0
def count_down(event, arguments):
    global count
    if event in ("open", "os.mkdir", "os.rename", "os.remove") and str(folder) in str(arguments[0]):
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count_down)
with opening.alone_in(folder):
    opening.write_opening(folder, contents)
"""


@pytest.fixture(scope="module")
def options(from_scratch: list[str]) -> list[str]:
    return [*from_scratch, "--method", "mlm", "--budget-tokens", "20000", "--checkpoint-minutes", "60"]


@pytest.fixture(scope="module")
def finished(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run.main([*options, "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def resolved(options: list[str], tmp_path: Path) -> Resolved:
    return parse([*options, "--output-dir", str(tmp_path / "run")])


@pytest.fixture
def contents(resolved: Resolved) -> dict[str, str]:
    return CONTENTS | {"config.toml": resolved.to_toml()}


def copied(finished: Path, folder: Path, *without: str) -> Path:
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns(*without))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def same_student(one: Path, other: Path) -> bool:
    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- killed, or the disk full, while the folder is opened -----------------------------------------------------------


def test_killed_at_any_file_operation_of_the_opening(
    resolved: Resolved, contents: dict[str, str], tmp_path: Path
) -> None:
    script, folder = tmp_path / "killed.py", resolved.output_dir
    script.write_text(KILLED)
    given = [word for item in contents.items() for word in item]
    for last in range(1, 99):
        code = processes.run(str(script), folder, last, *given).returncode
        if code == 0:
            break
        assert code == -signal.SIGKILL
        with alone_in(folder):
            began = take_over(folder, resolved)
            assert began is None or began.plan == {"dtype": "float32"}
            write_opening(folder, contents)
        assert names(folder) == {*contents, BEGUN, opening.LOCK}
        assert {name: (folder / name).read_text() for name in contents} == contents
        shutil.rmtree(folder)
    assert last > 10, "each of four files is opened and renamed"


def test_a_full_disk_while_the_folder_is_opened(
    options: list[str], finished: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    argv, write = [*options, "--output-dir", str(tmp_path / "run")], files.write

    def full(path: Path, content: str | bytes) -> Path:
        if path.name == "config.toml":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", full)
        assert run.main(argv) == run.EXIT_INTERRUPTED
    assert "No space left" in capsys.readouterr().err
    assert run.main(argv) == 0
    assert same_student(tmp_path / "run", finished)


def test_what_a_process_was_killed_in_is_no_refusal_but_another_folder_is(
    resolved: Resolved, finished: Path, tmp_path: Path
) -> None:
    folder = resolved.output_dir
    folder.mkdir()
    for name in (opening.LOCK, f"{BEGUN}.99999999.partial", ".fastkd-4x_.99999999.partial"):
        (folder / name).touch()
    with alone_in(folder):
        assert take_over(folder, resolved) is None
    assert names(folder) == {opening.LOCK}
    (folder / opening.LOCK).unlink()
    for name in ("thesis.tex", "environment.json", "plan.json", "a.json.99999999.partial"):
        (folder / name).write_text("{}")
        with pytest.raises(ValueError, match="is not empty and holds no run"), alone_in(folder):
            take_over(folder, resolved)
        assert names(folder) == {name}
        (folder / name).unlink()


# ---- two processes -------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_before_it_looks_at_the_folder(
    options: list[str], finished: Path, tmp_path: Path, capsys
) -> None:
    folder = copied(finished, tmp_path / "run")
    with alone_in(folder):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        for more in ([], ["--seed", "7"]):
            assert run.main([*options, *more, "--output-dir", str(folder)]) == run.EXIT_CONFIGURATION
            error = capsys.readouterr().err
            assert error.startswith(f"error: another process trains in {folder}") and error.count("\n") == 1
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_of_two_processes_in_a_new_folder_one_is_refused(options: list[str], tmp_path: Path) -> None:
    argv = [[*options, "--seed", str(seed), "--output-dir", str(tmp_path / "run")] for seed in (1, 2)]
    both = [processes.Command("fastkd.run", *each) for each in argv]
    done = [each.finish() for each in both]
    assert sorted(each.returncode for each in done) == [0, 2], done
    winner = 1 + [each.returncode for each in done].index(0)
    assert read_run(tmp_path / "run").config["seed"] == winner
    assert any("another process trains in" in each.stderr for each in done)


def test_a_lock_is_given_back_while_its_error_is_kept(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as kept, alone_in(tmp_path):
        raise RuntimeError
    with FileLock(tmp_path / ".lock", timeout=0):
        assert kept.value


def test_every_rank_is_refused_in_one_line(options: list[str], tmp_path: Path) -> None:
    with alone_in(tmp_path / "run"):
        both = processes.ranks("fastkd.run", *options, "--output-dir", tmp_path / "run")
    assert both.returncode == run.EXIT_CONFIGURATION
    assert set(both.stderr.strip().splitlines()) == {
        f"error: another process trains in {tmp_path / 'run'}: wait for it, or give another --output-dir"
    }


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)), NotImplementedError("no flock")])
def test_a_disk_without_locks_is_refused_in_one_line(
    error: Exception, options: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    def acquire(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", acquire)
    assert run.main([*options, "--output-dir", str(tmp_path / "run")]) == run.EXIT_CONFIGURATION
    said = capsys.readouterr().err
    assert "cannot be locked" in said and said.count("\n") == 1


def test_a_refused_command_leaves_no_folder(options: list[str], tmp_path: Path) -> None:
    argv = [*options, "--tokenizer", str(tmp_path), "--output-dir", str(tmp_path / "new" / "run")]
    assert run.main(argv) == run.EXIT_CONFIGURATION
    assert not list(tmp_path.iterdir())


# ---- what is missing at the end --------------------------------------------------------------------------------------


def test_killed_between_export_and_report_the_same_command_makes_the_report(
    options: list[str], finished: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    folder, warnings = copied(finished, tmp_path / "run", "report.html"), []
    pushed: list[Path] = []
    monkeypatch.setattr(pipeline, "warning_of", lambda run: warnings.append(run) or "the loss rose")
    monkeypatch.setattr(pipeline, "pushed_to", lambda resolved, world: "someone/student")
    monkeypatch.setattr(pipeline, "push_folder", lambda final, repository: pushed.append(final))
    for damage in (None, "", "<html>older</html>"):
        if damage is not None:
            (folder / "report.html").write_text(damage)
        assert run.main([*options, "--output-dir", str(folder)]) == 0
        assert "<html" in (folder / "report.html").read_text() and "older" not in (folder / "report.html").read_text()
        assert "finished already" in (said := capsys.readouterr().out) and "the loss rose" in said
    written = (folder / "report.html").stat().st_mtime_ns
    assert run.main([*options, "--output-dir", str(folder)]) == 0
    assert (folder / "report.html").stat().st_mtime_ns == written and pushed == [folder / "final"] * 4


def test_a_student_without_all_of_its_weights_is_exported_again(
    options: list[str], finished: Path, tmp_path: Path, capsys
) -> None:
    for name in ("model.safetensors", "config.json"):
        assert not has_student(copied(finished, tmp_path / name, name))
    folder = copied(finished, tmp_path / "run")
    student = folder / "final" / "model.safetensors"
    os.truncate(student, student.stat().st_size - 1)
    assert not has_student(folder) and not read_run(folder).finished
    assert run.main([*options, "--output-dir", str(folder)]) == 0
    assert "kept as final.damaged" in capsys.readouterr().err and (folder / "final.damaged").is_dir()
    assert same_student(folder, finished)
    ends = [line for line in read_jsonl(folder / "metrics.jsonl") if line.get("progress") == 1.0 and "event" in line]
    assert len(ends) == 1, "the last validation is made again, and stands once"


def test_a_student_that_was_changed_is_exported_again_or_refused(
    options: list[str], finished: Path, tmp_path: Path, capsys
) -> None:
    folder = copied(finished, tmp_path / "run")
    student = folder / "final" / "model.safetensors"
    content = bytearray(student.read_bytes())
    content[-1] ^= 1
    student.write_bytes(content)
    bare = copied(folder, tmp_path / "bare", "checkpoints")
    assert run.main([*options, "--output-dir", str(folder)]) == 0
    assert "is exported again" in capsys.readouterr().err and (folder / "final.damaged").is_dir()
    assert same_student(folder, finished)
    assert run.main([*options, "--output-dir", str(bare)]) == 2  # nothing to export it from
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "model.safetensors was changed" in said and (bare / "final").is_dir()


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CONTENTS, "config.toml", BEGUN])
def test_any_flipped_bit_of_what_a_run_began_with_is_mended_and_said(
    name: str, resolved: Resolved, contents: dict[str, str], caplog
) -> None:
    folder, draw = resolved.output_dir, random.Random(name)
    write_opening(folder, contents)
    whole = (folder / name).read_bytes()
    for number in range(50):
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        (folder / name).write_bytes(flipped[: draw.randrange(len(whole))] if number % 5 == 0 else flipped)
        caplog.clear()
        with alone_in(folder):
            began = take_over(folder, resolved)
        assert began is not None and began.plan == {"dtype": "float32"} and began.environment["corpus_version"] == "1"
        assert {each: (folder / each).read_text() for each in contents} == contents
        assert begun_with(folder) == contents
        assert "is damaged" in caplog.text and f"{name}.damaged" in caplog.text


def test_damaged_files_without_a_copy_are_set_aside_and_the_run_goes_on(
    options: list[str], finished: Path, tmp_path: Path, capsys
) -> None:
    """Not even the copy of what the run began with is sound."""
    folder, damaged = copied(finished, tmp_path / "run", "final", "report.html"), {}
    for name in ("plan.json", "environment.json", BEGUN, "metrics.jsonl"):
        content = bytearray((folder / name).read_bytes())
        content[1] ^= 128
        (folder / name).write_bytes(content)
        damaged[name] = content
    assert run.main([*options, "--output-dir", str(folder)]) == 0
    assert same_student(folder, finished) and (folder / "report.html").exists()
    said = capsys.readouterr().err
    for name, content in damaged.items():
        assert f"{name} " in said and (folder / f"{name}.damaged").read_bytes() == content
    assert begun_with(folder).keys() == {*CONTENTS, "config.toml"}


def test_a_damaged_configuration_without_a_copy_is_written_again_once_it_is_removed(
    resolved: Resolved, contents: dict[str, str]
) -> None:
    folder = resolved.output_dir
    write_opening(folder, contents)
    (folder / BEGUN).unlink()
    (folder / "config.toml").write_text("method = 'mlm")
    with alone_in(folder), pytest.raises(ValueError, match=r"config\.toml is damaged .*: put a copy .* or remove it"):
        take_over(folder, resolved)
    (folder / "config.toml").unlink()
    with alone_in(folder):
        assert take_over(folder, resolved) is not None
        write_opening(folder, contents)
    assert begun_with(folder) == contents


def test_a_damaged_configuration_still_names_its_run(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path / "run")
    (folder / "config.toml").write_bytes(b"\xff")
    again = parse(["--config", str(folder / "config.toml")])
    assert (
        again.output_dir == folder and again.to_toml() == parse(["--config", str(finished / "config.toml")]).to_toml()
    )


def test_the_sound_lines_of_damaged_metrics_are_kept(finished: Path, resolved: Resolved, caplog) -> None:
    folder = copied(finished, resolved.output_dir)
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    whole = read_jsonl(path)
    changed = lines[1].replace(b'"loss": ', b'"loss": 1', 1)
    path.write_bytes(b"".join([lines[0], changed, b"\xff\n", lines[2], *lines[2:]]))
    with alone_in(folder):
        take_over(folder, resolved)
    assert read_jsonl(path) == [whole[0], *whole[2:]] == read_run(folder).metrics
    assert "3 damaged lines" in caplog.text and (folder / "metrics.jsonl.damaged").exists()


def test_a_damaged_run_is_read_without_what_is_damaged(finished: Path, tmp_path: Path, caplog) -> None:
    whole = read_run(finished)
    for name in ("plan.json", "environment.json", "metrics.jsonl", "config.toml"):
        folder = copied(finished, tmp_path / name)
        (folder / name).write_bytes(b"\xff\n\xff\n")
        found = read_run(folder)
        assert (found.plan, found.environment, found.config) == (whole.plan, whole.environment, whole.config)
        (folder / BEGUN).unlink()
        if name == "config.toml":
            with pytest.raises(ValueError, match=r"config\.toml is damaged .*remove it"):
                read_run(folder)
        else:
            read_run(folder)
            pipeline.build_report(folder)
            assert f"{name} " in caplog.text


# ---- debris and modes ------------------------------------------------------------------------------------------------


def test_what_killed_processes_left_half_written_goes_and_nothing_else(
    options: list[str], finished: Path, tmp_path: Path
) -> None:
    folder = copied(finished, tmp_path / "run")
    debris = [".final-1234/x", ".final-ab_c9-old/x", "checkpoints/.building-step-9/x", ".rescue-step-3/x"]
    debris += ["plan.json.99999999.partial", "final/README.md.99999999.partial", "glue/a.json.99999999.partial"]
    alive = ["glue.json.1.partial", "notes.partial", "final-1/x", "checkpoints/step-3.old/x"]
    for name in (*debris, *alive):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    assert run.main([*options, "--output-dir", str(folder)]) == 0
    assert not [name for name in debris if (folder / name).exists()]
    assert [name for name in alive if (folder / name).exists()] == alive
    assert not [path for path in folder.rglob(".*") if path.name not in (BEGUN, opening.LOCK)]


def test_modes_are_those_of_the_umask(options: list[str], tmp_path: Path) -> None:
    mask = 0o027
    before = os.umask(mask)
    try:
        assert run.main([*options, "--output-dir", str(tmp_path / "run")]) == 0
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in [tmp_path / "run", *(tmp_path / "run").rglob("*")]}
    assert {path for path, mode in modes.items() if mode != (0o777 if path.is_dir() else 0o666) & ~mask} == set()


def test_a_warning_names_each_file_once(finished: Path, resolved: Resolved, caplog) -> None:
    folder = copied(finished, resolved.output_dir)
    (folder / "plan.json").unlink()
    with alone_in(folder), caplog.at_level(logging.WARNING):
        take_over(folder, resolved)
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder / 'plan.json'} is written again: it was not there"
    ]
