"""Two ranks do what one does with twice the micro-batch; a late one is waited for, a lost one ends the job."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import made_model
import processes
import pytest
from safetensors.torch import load_file

from fastkd import checkpoint, recipe, run
from fastkd.files import read_jsonl
from fastkd.ledger import surviving_steps

NO_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


# Each rank's graphs are what this is about, not the code that Inductor makes of them.
TRACED = """
import sys
from fastkd import run
from fastkd.models import encoder

encoder.GRAPH["backend"] = "aot_eager"
sys.exit(run.main())
"""


@pytest.mark.parametrize(
    ("method", "compile"),
    [
        ("mlm", "false"),
        ("minilmv2:0.5>mlm", "false"),
        pytest.param("tinybert", "false", marks=pytest.mark.exhaustive),
        pytest.param("rtd:0.5>mlm", "false", marks=pytest.mark.exhaustive),
        pytest.param("rtd", "true", marks=[NO_COMPILER, pytest.mark.exhaustive]),
        pytest.param("mlm", "true", marks=NO_COMPILER),
    ],
)
def test_two_ranks_equal_one_with_twice_the_micro_batch(
    method: str, compile: str, light: list[str], from_scratch: list[str], tmp_path: Path
) -> None:
    """And where each rank compiles its layers, which a single rank would compile as one graph; on a text of which some
    packs have less to predict than others."""
    (tmp_path / "scarce.txt").write_text(made_model.scarce(made_model.texts(100)))
    options = [*(light if recipe.uses_teacher(method) else from_scratch), "--method", method, "--budget-tokens", "8500"]
    options += ["--corpus", str(tmp_path / "scarce.txt"), "--mask-rate", "0.6"]
    alone = ["--micro-batch", "1024", "--compile", "false", "--output-dir", str(tmp_path / "one")]
    assert run.main([*options, *alone]) == 0
    script = tmp_path / "traced.py"
    script.write_text(TRACED)
    together = ["--micro-batch", "512", "--compile", compile, "--output-dir", str(tmp_path / "two")]
    result = processes.ranks("fastkd.run" if compile == "false" else str(script), *options, *together)
    assert result.returncode == 0, result.stderr
    one, two = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "two"))
    assert max(float((one[key] - two[key]).abs().max()) for key in one) <= 1e-5
    steps, theirs = (surviving_steps(tmp_path / name / "ledger.jsonl") for name in ("one", "two"))
    assert len(steps) == len(theirs)
    for a, b in zip(steps, theirs, strict=True):
        assert a["flops"] == b["flops"] and a["tokens"] == b["tokens"] and a["progress"] == b["progress"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    seconds = sum(sum(line["phase_s"].values()) for line in theirs)
    events = sum(
        x["seconds"]
        for x in read_jsonl(tmp_path / "two" / "ledger.jsonl")
        if x.get("charged") and x["step"] < len(theirs)
    )
    assert theirs[-1]["charged_s"] == pytest.approx(2 * (seconds + events), rel=1e-6)


def test_accumulated_micro_batches_equal_one(light: list[str], tmp_path: Path) -> None:
    options = [*light, "--method", "tinybert", "--budget-tokens", "8500"]
    for micro in ("1024", "512"):
        assert run.main([*options, "--micro-batch", micro, "--output-dir", str(tmp_path / micro)]) == 0
    one, two = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("1024", "512"))
    assert max(float((one[key] - two[key]).abs().max()) for key in one) <= 1e-5


UNEQUAL = """
import sys, time
from fastkd import run
from fastkd.train import Trainer

first = "RANK" in __import__("os").environ and __import__("os").environ["RANK"] == "0"
if not first:  # another rank's machine is slower, and its clock is a day ahead
    import torch

    step, now = Trainer.step, time.time

    def slow(self, batches, lr):
        torch.linalg.svdvals(torch.randn(200, 200))
        return step(self, batches, lr)

    Trainer.step, time.time = slow, lambda: now() + 86400
sys.exit(run.main())
"""


def test_unequal_speeds_and_clocks_change_nothing(light: list[str], tmp_path: Path) -> None:
    script = tmp_path / "unequal.py"
    script.write_text(UNEQUAL)
    found = []
    for name, command in (("equal", "fastkd.run"), ("unequal", str(script))):
        folder = tmp_path / name
        options = [*light, "--method", "minilmv2", "--budget-tokens", "8500", "--output-dir", str(folder)]
        result = processes.ranks(command, *options)
        assert result.returncode == 0, result.stderr
        found.append((load_file(folder / "final" / "model.safetensors"), surviving_steps(folder / "ledger.jsonl")))
    (one, alike), (other, apart) = found
    assert all(float((one[key] - other[key]).abs().max()) <= 1e-6 for key in one)
    assert [(x["progress"], x["lr"], x["tokens"]) for x in alike] == [
        (x["progress"], x["lr"], x["tokens"]) for x in apart
    ]


TORCHRUN = ["--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def workers(launcher: int) -> list[int]:
    """Process ids of the ranks, the lowest first."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return sorted(int(child) for child in children)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_job_with_a_checkpoint(victim: int, from_scratch: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = [*from_scratch, "--method", "mlm", "--budget-tokens", "50000000", "--output-dir", str(folder)]
    launcher = processes.Command("torch.distributed.run", *TORCHRUN, "-m", "fastkd.run", *options, OMP_NUM_THREADS="1")
    while len(surviving_steps(folder / "ledger.jsonl")) < 5:
        assert launcher.poll() is None
        time.sleep(0.05)  # between two looks at the file
    os.kill(workers(launcher.pid)[victim], signal.SIGKILL)
    killed = time.monotonic()
    assert launcher.finish().returncode != 0
    assert time.monotonic() - killed < 60
    found = checkpoint.newest(folder / "checkpoints")
    assert found is not None and found.state["step"] >= 5


def ranks(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Two ranks that run a script, given a folder."""
    path = folder / "script.py"
    path.write_text(script)
    return processes.ranks(str(path), folder)


LATE = """
import os, sys, threading, time
from datetime import timedelta
from pathlib import Path
from fastkd.distributed import Decision, agree, finish, start

waiting, seconds = Path(sys.argv[1]) / "waiting", 2
if os.environ["RANK"] == "0":
    waiting.touch()
else:  # this rank's imports take longer than a rank that is gone would be waited for
    while not waiting.exists() or time.time() < waiting.stat().st_mtime + 2 * seconds:
        threading.Event().wait(0.1)
world = start(timedelta(seconds=seconds))
print("progress", agree(world, Decision(0.5, validate=True)).progress)
finish(world)
"""


def test_a_rank_that_joins_late_is_waited_for(tmp_path: Path) -> None:
    result = ranks(LATE, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["progress 0.5"] * 2


MISSING = """
import sys
from datetime import timedelta
from fastkd.distributed import Decision, agree, any_rank, start

world = start(timedelta(seconds=2))
if world.is_main:
    try:
        agree(world, Decision(0.5))
    except RuntimeError:
        sys.exit("gave up")
any_rank(world, False)  # waits for as long as it takes
"""


def test_a_rank_that_does_not_come_ends_the_job(tmp_path: Path) -> None:
    """Not only its death: that it is alive and stuck. The start's patience does not hold on."""
    result = ranks(MISSING, tmp_path)
    assert result.returncode != 0
    assert "gave up" in result.stderr


LATE_IN_A_STEP = """
import os, sys
from datetime import timedelta
from fastkd import cli
from fastkd.distributed import Decision, agree, joined, phase

def work():
    try:
        with joined(timedelta(seconds=0.5)) as world, phase("a step"):
            if world.is_main:
                if sys.argv[2] == "fails":
                    raise OSError("a disk is gone")
                sys.stdin.read()  # stuck, while its pulse beats on
            agree(world, Decision(0.5))
    finally:
        if os.environ["RANK"] == "0":  # until the other one has ended
            sys.stdin.read()

sys.exit(cli.answer(work))
"""


@pytest.mark.parametrize(
    ("how", "said"),
    [("hangs", "a rank took more than 0.5 s for a step: "), ("fails", "rank 0 has ended, during a step: ")],
)
def test_a_rank_that_is_late_or_fails_in_a_step_is_one_line_on_the_others(how: str, said: str, tmp_path: Path) -> None:
    script, pipe = tmp_path / "script.py", tmp_path / "pipe"
    script.write_text(LATE_IN_A_STEP)
    os.mkfifo(pipe)
    held = os.open(pipe, os.O_RDWR)
    try:
        result = processes.ranks(str(script), tmp_path, how, STDIN=str(pipe))
    finally:
        os.close(held)
    assert result.returncode == 75, result.stderr
    assert f"error: {said}" in result.stderr and "Traceback" not in result.stderr


STOPPED = """
import importlib, os, signal, sys
from datetime import timedelta
from fastkd import distributed, pulse, run

phase, module, owner, name, rank, *options = sys.argv[1:]
pulse.BEAT, pulse.PATIENCE, joined = 0.25, 5.0, distributed.joined
distributed.joined = lambda: joined(timedelta(seconds=8))
if os.environ["RANK"] == rank:
    place = importlib.import_module(module)
    place = getattr(place, owner) if owner else place
    whole, calls = getattr(place, name), []

    def stopped(*args, **kwargs):
        calls.append(args)
        done = whole(*args, **kwargs)
        if phase in args or phase == "set-up" or (phase == "a step" and len(calls) == 2):
            os.kill(os.getpid(), signal.SIGSTOP)
        return done

    setattr(place, name, stopped)
sys.exit(run.main(options))
"""
PLACES = {
    "set-up": ("fastkd.train", "Trainer", "_rehearse", 1),
    "validation": ("fastkd.pulse", "Pulse", "enter", 1),
    "a checkpoint": ("fastkd.pulse", "Pulse", "enter", 0),
    "a step": ("fastkd.monitor", "Monitor", "step", 0),  # at a metrics line
}


@pytest.mark.parametrize("phase", PLACES)
def test_a_rank_that_hangs_ends_the_job_with_a_line_that_names_it(
    phase: str, from_scratch: list[str], tmp_path: Path
) -> None:
    """It was waited for a day. The others save what they hold."""
    *place, rank = PLACES[phase]
    folder, script = tmp_path / "run", tmp_path / "stopped.py"
    script.write_text(STOPPED)
    options = [*from_scratch, "--method", "mlm", "--budget-tokens", "30000"]
    often = ["--checkpoint-minutes", "0.0001", "--output-dir", str(folder)]
    result = processes.ranks(
        str(script), phase, *place, rank, *options, *(often if phase == "a checkpoint" else often[2:])
    )
    assert result.returncode == 75, result.stderr
    assert f"error: rank {rank} hangs in {phase}: it said nothing for 5 s: " in result.stderr
    if phase in ("a checkpoint", "a step"):
        found = checkpoint.newest(folder / "checkpoints")
        assert found is not None and found.state["step"] == surviving_steps(folder / "ledger.jsonl")[-1]["step"] > 0


RESUMED = """
import os, sys, threading
from datetime import timedelta

from fastkd import distributed, run
from fastkd.data import packing
from fastkd.data.epochs import Epochs

seconds, joined = 2, distributed.joined


class Slow(Epochs):  # of a large corpus, on rank 0: every epoch but the first
    def __init__(self, make):
        def slow(number):
            if number:
                threading.Event().wait(2 * seconds)
            return make(number)

        super().__init__(slow)


if os.environ["RANK"] == "0":
    packing.Epochs = Slow
distributed.joined = lambda: joined(timedelta(seconds=seconds))
sys.exit(run.main())
"""


def test_ranks_that_resume_wait_for_each_others_shuffle(mlm_run: Path, small: list[str], tmp_path: Path) -> None:
    """Of the epoch in which a run goes on, however long that takes."""
    folder, script = tmp_path / "run", tmp_path / "resumed.py"
    shutil.copytree(mlm_run, folder, ignore=shutil.ignore_patterns("final"))
    script.write_text(RESUMED)
    options = [*small, "--method", "mlm", "--budget-tokens", "40000", "--output-dir", str(folder)]
    result = processes.ranks(str(script), *options)
    assert result.returncode == 0, result.stderr
    assert surviving_steps(folder / "ledger.jsonl")[-1]["epoch"] > 1 and (folder / "final").is_dir()


MEAN = """
import torch
from torch.nn.parallel import DistributedDataParallel
from fastkd import exchange
from fastkd.distributed import finish, start

world, gradients = start(), []
for parallel in (
    lambda model: exchange.parallel(model, exchange.Buckets()),
    lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True),
):
    torch.manual_seed(0)
    model = parallel(torch.nn.Linear(50, 50))
    torch.manual_seed(world.rank)
    for _ in range(2):  # DDP orders its buckets anew after the first
        model.zero_grad()
        model(torch.randn(8, 50)).square().mean().backward()
    gradients.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()]))
print(torch.equal(*gradients))
finish(world)
"""


def test_the_mean_over_ranks_has_the_bits_of_ddps_own(tmp_path: Path) -> None:
    """Of three ranks: a third of a gradient is not what it is times a third."""
    script = tmp_path / "mean.py"
    script.write_text(MEAN)
    result = processes.ranks(str(script), count=3)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["True"] * 3


FLOAT8 = """
import sys
from fastkd.distributed import finish, start
from fastkd.models import float8

world = start()
for moved in (0, 1):  # the rank whose text would have float8 refused
    losses = {"float32": 1.0, "bfloat16": 1.001, "float8": 0.98 if world.rank == moved else 1.0}
    try:
        float8.check(losses.__getitem__, world)
        print(f"rank {moved} moved: taken")
    except ValueError as error:
        print(f"rank {moved} moved: {error}")
finish(world)
"""


def test_ranks_agree_on_float8(tmp_path: Path) -> None:
    result = ranks(FLOAT8, tmp_path)
    assert result.returncode == 0, result.stderr
    refused = "rank 0 moved: a float8 teacher moves the loss by 2.0%, a bfloat16 one by 0.1%: leave --teacher-dtype out"
    assert sorted(result.stdout.splitlines()) == [refused] * 2 + ["rank 1 moved: taken"] * 2


def test_a_batch_that_ranks_cannot_share_is_refused(small: list[str], tmp_path: Path) -> None:
    options = ["--method", "mlm", "--budget-tokens", "8500", "--batch-tokens", "512"]
    result = processes.ranks("fastkd.run", *small, *options, "--output-dir", tmp_path / "run")
    assert result.returncode != 0
    assert "--batch-tokens is 512" in result.stderr
    assert not (tmp_path / "run").exists()
