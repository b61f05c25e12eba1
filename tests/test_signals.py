"""A signal ends every phase of every command with one line and exit code 75, and the same command goes on."""

import contextlib
import signal
import socket
import subprocess
import sys
from multiprocessing import connection
from pathlib import Path

import processes
import pytest

from fastkd import checkpoint, signals

LINE = signals.INTERRUPTED + "\n"
ASKING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]

# Work within ``signals.HOW``: in a library, which does not look for signals, or as one that swallows exceptions.
WORK = """
import hashlib, signal, sys, threading
from fastkd import signals

for number in signals.ASKING:  # what a shell starts in the background ignores some
    signal.signal(number, signal.SIG_DFL)

class Finalised:
    def __del__(self):
        print("ready", flush=True)
        threading.Event().wait()

def library():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

def swallows():
    try:
        print("ready", flush=True)
        threading.Event().wait()
    except BaseException:
        library()

def finaliser():
    Finalised()
    library()

signals.TIDY_S = 0.1
with getattr(signals, sys.argv[1])():
    globals()[sys.argv[2]]()
print("went on")
"""


def start(how: str, work: str) -> subprocess.Popen[str]:
    """A process in the midst of its work."""
    argv = [sys.executable, "-c", WORK, how, work]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code, and what it said at the end."""
    _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.parametrize("number", ASKING)
def test_a_signal_ends_the_process_at_once_even_within_a_library(number: signal.Signals) -> None:
    process = start("watched", "library")
    process.send_signal(number)
    assert ended(process) == (75, LINE)


@pytest.mark.parametrize("work", ["swallows", "finaliser"])
def test_a_request_that_is_swallowed_is_kept(work: str) -> None:
    process = start("raised", work)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (75, LINE)


@pytest.mark.parametrize(
    "first",
    [
        [signal.SIGTERM, signal.SIGTERM],
        [signal.SIGINT, signal.SIGTERM],
        [signal.SIGHUP, signal.SIGINT],
        [signal.SIGINT] * 2,
    ],
)
def test_only_a_second_ctrl_c_ends_work_that_saves_first(first: list[signal.Signals]) -> None:
    """Not its echo: ``timeout`` and launchers signal a process, and then its group. Nor what a scheduler sends later."""
    process = start("deferred", "library")
    for number in first:
        process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.5 * signals.ECHO_S)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
    for _ in range(1 if signal.SIGINT in first else 2):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.5 * signals.ECHO_S)
    assert ended(process) == (75, LINE)


def test_what_nohup_ignores_stays_ignored() -> None:
    before, other = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)
    try:
        with signals.watched():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not other
        assert signal.getsignal(signal.SIGTERM) is other
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- commands ---------------------------------------------------------------------------------------------------

# A command that stops where it calls MODULE:NAME, says so, and stays there; its other arguments are its own.
STOPPED = """
import sys, threading
from importlib import import_module

command, place, *options = sys.argv[1:]
module, _, name = place.partition(":")
*owners, name = name.split(".")
owner = import_module(module)
for each in owners:
    owner = getattr(owner, each)
through = getattr(owner, name)

def reached(*given, **named):
    print("reached", flush=True)
    threading.Event().wait()

setattr(owner, name, reached)
sys.exit(import_module(command).main(options))
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stopped") / "stopped.py"
    path.write_text(STOPPED)
    return path


def reached(process: processes.Command) -> processes.Command:
    """The command, once it is at its place."""
    assert "reached\n" in iter(process.stdout.readline, ""), process.finish().stderr
    return process


def last_line(text: str) -> str:
    """What was said at the end, by which no traceback stands."""
    assert "Traceback" not in text and "Exception ignored" not in text, text
    return text.splitlines()[-1] + "\n"


RUN = ["--method", "mlm", "--budget-tokens", "2500"]
# A command, and where it is when the signal comes.
PHASES = [
    ("fastkd.run", "fastkd.models.hf:shape"),
    ("fastkd.run", "fastkd.data.builder:write_part"),
    ("fastkd.plan", "fastkd.planning:measure"),
    ("fastkd.prepare", "fastkd.data.builder:write_part"),
    ("fastkd.compare", "fastkd.comparison.experiment:Comparison.run_row"),
]


@pytest.mark.parametrize(("command", "place"), PHASES)
def test_a_signal_in_set_up(command: str, place: str, script: Path, from_scratch: list[str], tmp_path: Path) -> None:
    options = RUN
    if command == "fastkd.compare":
        options = ["--methods", "mlm", "--match", "flops", "--budget-flops", "1e9", "--output-dir", str(tmp_path / "c")]
    elif command == "fastkd.run":
        options = [*RUN, "--output-dir", str(tmp_path / "run")]
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    process = reached(processes.Command(str(script), command, place, *from_scratch, *options, **environment))
    process.send_signal(signal.SIGTERM)
    done = process.finish(60)
    assert (done.returncode, last_line(done.stderr)) == (75, LINE)


LATER = ["fastkd.loop:Loop.record_validation", "fastkd.pipeline:export", "fastkd.pipeline:build_report"]


def test_a_signal_in_each_later_phase_of_a_run_and_the_same_command_goes_on(
    script: Path, from_scratch: list[str], tmp_path: Path
) -> None:
    options = [*from_scratch, *RUN, "--output-dir", str(tmp_path / "run")]
    for place in LATER:
        process = reached(processes.Command(str(script), "fastkd.run", place, *options))
        process.send_signal(signal.SIGTERM)
        done = process.finish(60)
        assert (done.returncode, last_line(done.stderr)) == (75, LINE), place
    assert processes.run("fastkd.run", *options).returncode == 0
    assert (tmp_path / "run" / "final").is_dir()


def test_a_second_signal_ends_a_slow_checkpoint_and_nothing_is_torn(
    script: Path, from_scratch: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    options = [*from_scratch, *RUN, "--checkpoint-minutes", "0.0001", "--output-dir", str(folder)]
    place = "fastkd.checkpoint:save_file"
    process = reached(processes.Command(str(script), "fastkd.run", place, *options))
    while not connection.wait([process.sentinel], timeout=0.1):
        process.send_signal(signal.SIGINT)
    done = process.finish(60)
    assert (done.returncode, last_line(done.stderr)) == (75, LINE)
    assert checkpoint.newest(folder / "checkpoints") is None
    assert processes.run("fastkd.run", *options).returncode == 0


@pytest.mark.parametrize("place", ["fastkd.micro_batch:first", "fastkd.pipeline:export"])
def test_a_signal_to_one_rank_ends_the_other_too(
    place: str, script: Path, from_scratch: list[str], tmp_path: Path
) -> None:
    """One rank waits for the other in a collective when that ends."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    options = [*from_scratch, *RUN, "--output-dir", str(tmp_path / "run")]
    first = processes.Command(str(script), "fastkd.run", place, *options, **job, RANK="0", LOCAL_RANK="0")
    other = processes.Command("fastkd.run", *options, **job, RANK="1", LOCAL_RANK="1")
    reached(first).send_signal(signal.SIGTERM)
    done, left = first.finish(60), other.finish(60)
    assert (done.returncode, last_line(done.stderr)) == (75, LINE)
    assert left.returncode != 0, left.stderr
