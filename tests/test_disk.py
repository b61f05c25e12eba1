"""A full disk is one line and exit code 75, and the same command goes on once there is room."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest
from glue_case import save_student, write_sst2
from safetensors import SafetensorError

from fastkd import cli, compare, disk, files
from fastkd.opening import alone_in
from fastkd.run_folder import read_run

NO_ROOM = os.strerror(errno.ENOSPC)

# A command that finds the disk full from its call of MODULE:NAME on; its other arguments are its own. The largest file
# that the system allows stands for the disk: no file takes a byte any more.
FULL = """
import os, resource, sys
from importlib import import_module

os.dup2(1, 2)  # a pipe: where errors go is a file
command, place, *options = sys.argv[1:]
module, _, name = place.partition(":")
*owners, name = name.split(".")
owner = import_module(module)
for each in owners:
    owner = getattr(owner, each)
through = getattr(owner, name)

def full(*given, **named):
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return through(*given, **named)

setattr(owner, name, full)
sys.exit(import_module(command).main(options))
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("full") / "full.py"
    path.write_text(FULL)
    return str(path)


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The line that a command ended with for a full disk."""
    shown = done.stdout + done.stderr
    assert done.returncode == 75 and "Traceback" not in shown and "Exception ignored" not in shown, shown
    (line,) = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert line.endswith(": make room, then the same command goes on from what is saved")
    assert os.strerror(errno.EFBIG) in line
    return line


RUN = ["--method", "mlm", "--budget-tokens", "5000", "--checkpoint-minutes", "0.0001"]
IN_A_RUN = [
    "fastkd.loop:Loop.record_validation",  # ledger.jsonl and metrics.jsonl
    "fastkd.checkpoint:save",
    "fastkd.pipeline:export",
    "fastkd.pipeline:build_report",
]


def test_a_run_goes_on_after_a_full_disk_at_each_of_its_writes(
    script: str, from_scratch: list[str], tmp_path: Path
) -> None:
    folder, cache = tmp_path / "run", tmp_path / "cache"
    options = [*from_scratch, *RUN, "--output-dir", str(folder)]
    line = said(
        processes.run(script, "fastkd.run", "fastkd.data.builder:write_part", *options, XDG_CACHE_HOME=str(cache))
    )
    assert f"cannot write shards to '{cache}/fastkd'" in line
    for place in IN_A_RUN:
        assert str(folder) in said(processes.run(script, "fastkd.run", place, *options)), place
    done = processes.run("fastkd.run", *options)
    assert done.returncode == 0, done.stderr
    steps = [line["step"] for line in read_run(folder).steps]
    assert steps == list(range(1, len(steps) + 1)) and (folder / "final").is_dir()


IN_A_COMPARISON = [
    "fastkd.comparison.budgets:MatchedBudgets.keep",
    "fastkd.pipeline:export",  # of a search for the learning rate, within a row: it is no row that failed
    "fastkd.comparison.experiment:build_comparison",
]


def test_a_comparison_goes_on_after_a_full_disk_at_each_of_its_writes(
    script: str, from_scratch: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "c"
    options = ["--methods", "mlm", "--match", "flops", "--budget-flops", "5e9", "--tune", "2", "--epochs-cap", "9"]
    options = [*from_scratch, *options, "--validations", "0", "--seeds", "1", "--output-dir", str(folder)]
    for place in IN_A_COMPARISON:
        assert str(folder) in said(processes.run(script, "fastkd.compare", place, *options)), place
    assert compare.main(options) == 0
    assert [row["status"] for row in json.loads((folder / "results.json").read_text())["rows"]] == ["ok"]


IN_GLUE = [
    "fastkd.glue.finetune:FineTuning.run",
    "fastkd.glue.evaluation:_write_ledger",
    "fastkd.glue.evaluation:choose",
]


def test_glue_goes_on_after_a_full_disk_at_each_of_its_writes(
    script: str, quickstart_teacher: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    save_student(run / "final", quickstart_teacher)
    (run / "ledger.jsonl").write_text('{"event": "export", "seconds": 1.0, "step": 3, "charged": false}\n')
    command = [run, "--data", write_sst2(tmp_path / "data"), "--seeds", 1]
    for place in IN_GLUE:
        assert str(run) in said(processes.run(script, "fastkd.glue.__main__", place, *command)), place
    done = processes.run("fastkd.glue.__main__", *command)
    assert done.returncode == 0 and "1 of them finished before" in done.stdout, done.stderr
    assert "\n## GLUE\n" in (run / "final" / "README.md").read_text()


LOGGED = """
import resource, sys
from fastkd import cli, terminal

resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
sys.exit(cli.answer(lambda: terminal.say("what is done goes on") or 0))
"""


def test_a_log_on_a_full_disk_changes_no_exit_code(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run([sys.executable, "-c", LOGGED], stdout=log, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ---- errors -----------------------------------------------------------------------------------------------------


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


BROKEN = os.strerror(errno.EIO)
GOES_ON = "then the same command goes on from what is saved"
FULL_DISK, FAILED = f"there ({NO_ROOM}): make room, {GOES_ON}", f"the disk failed: mend it, {GOES_ON} "
OF_A_DISK = [
    (OSError(errno.ENOSPC, NO_ROOM), FULL_DISK),
    (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "there"), "no room to write there "),
    (SafetensorError(f"Error while serializing: IoError(I/O error: {NO_ROOM} (os error 28))"), FULL_DISK),
    (raised_from(RuntimeError("a worker failed"), OSError(errno.ENOSPC, NO_ROOM)), FULL_DISK),
    (
        raised_from(ValueError("cannot write shards to 'there'"), OSError(errno.ENOSPC, NO_ROOM)),
        "shards to 'there': make room,",
    ),
    (OSError(errno.EIO, BROKEN), f"the disk failed ({BROKEN}): mend the disk, {GOES_ON}"),
    (OSError(errno.EIO, BROKEN, "here"), f"the disk failed at here ({BROKEN}): mend the disk, {GOES_ON}"),
    (
        SafetensorError(f"Error while serializing: I/O error: {BROKEN} (os error 5)"),
        f"{FAILED}(Error while serializing",
    ),
    (
        raised_from(ValueError("cannot read 'it': remove it"), OSError(errno.EIO, BROKEN)),
        f"{FAILED}(cannot read 'it': remove it)",
    ),
]


@pytest.mark.parametrize("number", [errno.EFBIG, errno.EIO], ids=errno.errorcode.get)
def test_a_disk_is_known_to_be_at_fault_wherever_it_is_met(number: int, tmp_path: Path, monkeypatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    for place in ("tempfile.TemporaryFile", "filelock.FileLock.acquire"):
        with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
            patch.setattr(place, refuse)
            files.check_writable(tmp_path) if place.startswith("temp") else alone_in(tmp_path / "run").__enter__()
        assert disk.failure(caught.value) is caught.value


@pytest.mark.parametrize(("error", "words"), OF_A_DISK, ids=lambda error: type(error).__name__)
def test_any_librarys_error_is_known_and_names_its_place(
    error: Exception, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        with disk.written("there"):
            raise error

    assert cli.answer(work) == cli.EXIT_INTERRUPTED
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and words in shown


@pytest.mark.parametrize(
    "error", [OSError(errno.EACCES, "Permission denied"), RuntimeError("of ours"), RuntimeError(f"500: {BROKEN}")]
)
def test_other_errors_are_what_they_were(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, disk.written("there"):
        raise error
    assert caught.value is error and disk.failure(error) is None
