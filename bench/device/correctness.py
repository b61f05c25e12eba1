"""Whether what is fast is right: the tests of kernels and attention, and one step of every method, on this device.

Tests run side by side in processes of a kernel or a share of its tests, since most of their time is Triton's compiler; the
shapes of the benches come last and one at a time, since their float64 definitions take some 15 GB each. Beside them, steps
are those of training: loss and gradient of all parameters in bfloat16 and float32 against the same step in float64 on the
CPU, with weights and text of the same numbers. What a CPU makes of the same step in the same dtype is what rounding costs
(its path is tested without a GPU); a device may be twice as far off.
"""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from bench import losses
from bench.contenders import relative_error
from bench.device import part, train_step
from bench.device.part import Context, Recorder, Row
from fastkd import methods
from fastkd.data.batches import Batch
from fastkd.device.clock import PhaseClock
from fastkd.models import hf
from fastkd.models.teacher import Teacher
from fastkd.reports import plots
from fastkd.reports.tables import Table, numeric
from fastkd.setup import Setup
from fastkd.train import Objective

SECONDS = 100
ROOT = Path(__file__).parents[2]
# Files of tests by what they test, and in how many processes: each of these takes seconds of a compiler for every case.
# A loss that is not named here has its tests in "every loss", and a process for a file of its own, if there is one.
FILES = {
    "linear_kd": (("linear_kd", "linear_kd_divergences", "linear_kd_operator"), 3),
    "relation_kl": (("relation_kl",), 2),
    "score_mse": (("score_mse",), 1),
    "attention": (("attention", "packed_attention"), 2),
    "hidden_mse and packing": (("hidden_mse", "scaling", "packed", "tiling"), 1),
    "every loss": (("fused_losses",), 1),
    "clock, peaks and power": (("clock", "peaks", "power"), 1),
}
WORKERS = 8
BENCH_BYTES = 30 << 30  # of a GPU's memory that must be free for the shapes of the benches
FAILURES = 40  # that become rows
DTYPES = (torch.float32, torch.bfloat16)
FACTOR = 2.0  # over the error that a CPU makes in the same dtype
# Errors of a loss and of a gradient below which a CPU's luck does not count.
LOSSES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
FLOORS = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
FULL: dict[str, Any] = {"teacher": "2L-384H-12A", "student": "2L-192H-12A", "seq_length": 128, "batch_tokens": 2048}
TINY: dict[str, Any] = {"teacher": "2L-48H-4A", "student": "1L-24H-4A", "seq_length": 16, "batch_tokens": 256}


@dataclass(frozen=True)
class Selection:
    """Tests that run together in a process."""

    name: str
    files: tuple[str, ...]
    expression: str = ""  # of pytest's -k
    share: str = "1/1"


def run(context: Context, rows: Recorder) -> None:
    """Tests in as many processes as there are cores for; the steps beside them, in this one."""
    with ThreadPoolExecutor(_workers()) as pool:
        running = [pool.submit(_test, selection, context, rows) for selection in _selections(context)]
        _steps(context, rows)
        for each in running:
            each.result()


def _workers() -> int:
    return max(1, min(WORKERS, (os.cpu_count() or 1) // 2))


def _steps(context: Context, rows: Recorder) -> None:
    for method in methods.available():
        if rows.left < 2:
            rows.add(what="gradient", method=method, skipped="no time was left")
            continue
        try:
            for row in gradients(context, method):
                rows.add(**row)
        except Exception as error:
            traceback.print_exc()
            rows.add(what="gradient", method=method, ok=False, error=part.in_one_line(error))


# ---- tests ----------------------------------------------------------------------------------------------------


def files() -> dict[str, tuple[tuple[str, ...], int]]:
    """FILES, and the file of tests of each loss that is not named there."""
    named = {stem for stems, _ in FILES.values() for stem in stems}
    others = [loss for loss in losses.available() if (ROOT / "tests" / f"test_{loss}.py").exists()]
    return FILES | {loss: ((loss,), 1) for loss in others if loss not in named}


def _selections(context: Context) -> tuple[Selection, ...]:
    if context.tiny:
        return (Selection("packing", ("tests/test_packed.py",)),)
    found = []
    for name, (stems, processes) in files().items():
        paths = tuple(f"tests/test_{stem}.py" for stem in stems)
        for number in range(1, processes + 1):
            share = f"{number}/{processes}"
            found.append(Selection(name, paths, "not interpreted and not bench_shapes", share))
    return (*found, Selection("shapes of the benches", ("tests/test_fused_losses.py",), "bench_shapes"))


def _test(selection: Selection, context: Context, rows: Recorder) -> None:
    """Run a selection; a row that sums it up, then one for each failure. What is cut off has told of the tests before."""
    number, of = selection.share.split("/")
    names: Row = {"what": "tests", "selection": selection.name + (f", part {number} of {of}" if of != "1" else "")}
    outcomes = Path(context.scratch or context.out) / f"outcomes-{selection.name.replace(' ', '-')}-{number}.jsonl"
    outcomes.unlink(missing_ok=True)
    started, seconds, status = time.monotonic(), rows.left - 1, None
    if reason := _refusal(selection, seconds):
        rows.add(**names, skipped=reason)
        return
    try:
        status = subprocess.run(
            _command(selection, outcomes), cwd=ROOT, env={**os.environ, **ENVIRONMENT}, timeout=seconds, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        print(f"{names['selection']}: cut off after {seconds:.0f} s", flush=True)
    found = part.read(outcomes)
    count = {kind: sum(row["outcome"] == kind for row in found) for kind in ("passed", "failed", "error", "skipped")}
    row: Row = {
        **names, "passed": count["passed"], "failed": count["failed"], "errors": count["error"],
        "skipped_tests": count["skipped"], "seconds": time.monotonic() - started, "complete": status in (0, 1),
    }  # fmt: skip
    if not found:
        row["error"] = "pytest told of no test" if status is None else f"pytest ended with status {status}"
    rows.add(**row)
    for failure in [row for row in found if row["outcome"] in ("failed", "error")][:FAILURES]:
        rows.add(what="failure", test=failure["test"], message=failure["message"])


def _refusal(selection: Selection, seconds: float) -> str:
    """Why a selection is not begun, or ""."""
    if seconds < 5:
        return "no time was left"
    if selection.expression == "bench_shapes" and torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        if free < BENCH_BYTES:
            return f"{free / 2**30:.0f} GiB of the GPU's memory are free, {BENCH_BYTES >> 30} are needed"
    return ""


# Plugins that are installed for others take seconds to load; a thread each, for many run side by side.
ENVIRONMENT = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}


def _command(selection: Selection, outcomes: Path) -> list[str]:
    """Warnings are no errors here: Inductor's advice about TF32 is one on this device."""
    return [
        sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "-o", "filterwarnings=", "-W", "default",
        "-p", "no:cacheprovider", "-p", "bench.device.outcomes", "--outcomes", str(outcomes), "--share", selection.share,
        *(["-k", selection.expression] if selection.expression else []), *selection.files,
    ]  # fmt: skip


# ---- steps ----------------------------------------------------------------------------------------------------


def gradients(context: Context, method: str) -> list[Row]:
    """A method's step in each dtype on the device, against float64 on the CPU."""
    sizes = TINY if context.tiny else FULL
    setup = train_step.setup(replace(context, device="cpu"), method, **sizes, micro_batch=str(sizes["batch_tokens"]),
                             compile=False, dtype="float32")  # fmt: skip
    model = hf.load(train_step.files(context, sizes["teacher"])[0])
    batch = setup.stream().step(0)[0]
    evaluate = functools.partial(_step, setup, model, batch)
    exact = evaluate(torch.device("cpu"), torch.float64)
    return [
        _compared(
            method, dtype, exact, evaluate(torch.device("cpu"), dtype), evaluate(torch.device(context.device), dtype)
        )
        for dtype in DTYPES
    ]


Step = tuple[Tensor, list[Tensor]]  # loss and gradients, in float64 on the CPU


def _step(setup: Setup, model: hf.Loaded, batch: Batch, device: torch.device, dtype: torch.dtype) -> Step:
    """Loss and gradients of a copy of the student, with a teacher, in this dtype on this device."""
    wide = torch.promote_types(dtype, torch.float32)
    student, method = copy.deepcopy(setup.student), copy.deepcopy(setup.method)
    student.attention, student.residual, teacher = None, wide, None  # the fastest attention that takes this dtype
    if method.teacher_needs is not None:
        teacher = Teacher(model, method.teacher_needs, device=device, dtype=dtype, longest=batch.max_seqlen)
        if dtype == torch.float64:
            teacher.encoder.double()
    objective, batch = Objective(student, method, 0.0).to(device, wide), batch.to(device)
    taught = None if teacher is None else teacher(method.text(batch), batch)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = objective(batch, taught, PhaseClock(device)).loss
    loss.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in objective.parameters()]
    return loss.detach().double().cpu(), [gradient.double().cpu() for gradient in found]


def _compared(method: str, dtype: torch.dtype, exact: Step, on_cpu: Step, step: Step) -> Row:
    plain, error = _errors(on_cpu, exact), _errors(step, exact)
    loss_bound, bound = (
        max(FACTOR * found, floor[dtype]) for found, floor in zip(plain, (LOSSES, FLOORS), strict=True)
    )
    return {
        "what": "gradient", "method": method, "dtype": str(dtype)[6:], "loss": float(step[0]), "loss_error": error[0],
        "gradient_error": error[1], "cpu_gradient_error": plain[1], "loss_bound": loss_bound, "bound": bound,
        "ok": error[1] <= bound and error[0] <= loss_bound,
    }  # fmt: skip


def _errors(step: Step, exact: Step) -> tuple[float, float]:
    """The relative errors of the loss, and of the gradient of all parameters together."""
    whole, expected = (torch.cat([gradient.flatten() for gradient in found]) for found in (step[1], exact[1]))
    return relative_error(step[0], exact[0]), relative_error(whole, expected)


# ---- table and picture ----------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row]) -> str:
    """Counts of the tests, the failures, and the steps' errors."""
    tests = [row for row in rows if row["what"] == "tests"]
    failures = [row for row in rows if row["what"] == "failure"]
    steps = [row for row in rows if row["what"] == "gradient"]
    blocks = []
    if tests:
        head = ("tests", "passed", "failed", "errors", "skipped", "s", "")
        blocks.append(Table(head, [_test_cells(row) for row in tests]).markdown())
    if failures:
        cells = [(row["test"], row["message"]) for row in failures]
        blocks.append(Table(("failed", "why"), list(cells)).markdown())
    if steps:
        head = ("step of", "in", "loss's error", "gradient's error", "a CPU's", "allowed", "")
        blocks.append(Table(head, [_step_cells(row) for row in steps]).markdown())
    return "\n".join(blocks) or "Nothing was tested.\n"


def _test_cells(row: Row) -> tuple[Any, ...]:
    if "skipped" in row:
        return (row["selection"], *[""] * 5, row["skipped"])
    counts = [numeric(name, row[name], str(row[name])) for name in ("passed", "failed", "errors", "skipped_tests")]
    remark = row.get("error") or ("" if row["complete"] else "cut off before the end")
    return (row["selection"], *counts, numeric("seconds", row["seconds"], f"{row['seconds']:.0f}"), remark)


def _step_cells(row: Row) -> tuple[Any, ...]:
    names = ("loss_error", "gradient_error", "cpu_gradient_error", "bound")
    cells = [numeric(name, row.get(name), f"{row[name]:.1e}" if row.get(name) is not None else "") for name in names]
    verdict = row.get("skipped") or row.get("error") or ("passed" if row["ok"] else Markup("**failed**"))
    return (row["method"], row.get("dtype", ""), *cells, verdict)


def draw(rows: Sequence[Row], path: Path) -> None:
    """A bar a step: its gradient's error, with what is allowed as a mark."""
    import matplotlib
    from matplotlib.figure import Figure

    steps = [row for row in rows if row["what"] == "gradient" and row.get("gradient_error")]
    if not steps:
        return
    colours = {"float32": plots.BLUE, "bfloat16": plots.VERMILLION}
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(6.0, 0.8 + 0.26 * len(steps)), layout="constrained")
        axes, places = figure.add_subplot(), range(len(steps))
        errors = [row["gradient_error"] for row in steps]
        axes.barh(places, errors, color=[colours[row["dtype"]] for row in steps], height=0.6)
        axes.plot([row["bound"] for row in steps], places, "|", color=plots.INK, markersize=11, label="allowed")
        axes.set_yticks(places, [f"{row['method']}, {row['dtype']}" for row in steps])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlim(min(errors) / 3)
        axes.set_xlabel("relative error of the step's gradient against float64")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axes.grid(axis="y", visible=False)
        figure.savefig(path, dpi=150)
