"""What the machine is, and what it gives at best: the ceilings that every later share is a share of.

A ceiling is the median of repeats of one operation: a copy (bytes read and written), matrix products in bfloat16 at
the sizes of a 6L-768H step and at a square one, a float32 product, and base-2 exponentials held in registers.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bench.device import part
from bench.device.part import Context, Recorder, Row
from bench.results import in_words, measured_on
from bench.roofline import Device, device_named
from fastkd import quantities
from fastkd.kernels import tiling
from fastkd.reports import plots
from fastkd.reports.tables import Table, numeric

try:
    import triton.language as tl
except ImportError:  # macOS and Windows
    tl = None

SECONDS = 30
OPTIONAL = ("flash_attn", "datasets", "liger_kernel", "orda_kernel", "torchao", "bertdistiller", "triton", "xdist")
QUERY = (
    "name", "driver_version", "pstate", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit",
    "temperature.gpu", "clocks_event_reasons.active", "memory.used", "memory.total", "mig.mode.current",
)  # fmt: skip
PRODUCTS = ((8192, 8192, 8192), (131072, 768, 2304), (131072, 768, 3072), (131072, 3072, 768))  # [m, k] × [k, n]
TINY_PRODUCTS = ((512, 512, 512), (2048, 96, 288))
REPEATS = 20
EXPONENTIALS = 256  # of an element, so that its load and store do not count


def run(context: Context, rows: Recorder) -> None:
    """The facts, then each ceiling."""
    rows.add(what="facts", **_facts(context))
    for name, unit, rate in _ceilings(context):
        try:
            value = rate()
        except Exception as error:
            rows.add(what="ceiling", name=name, unit=unit, error=part.in_one_line(error))
            continue
        rows.add(what="ceiling", name=name, unit=unit, value=value, datasheet=_datasheet(name, context.device))
    if context.device == "cuda":
        rows.add(what="facts after", nvidia_smi=_nvidia_smi())


def measured(out: Path | str) -> Device | None:
    """The ceilings that were measured into a folder of results, as the roofline takes them; None where one is missing."""
    found: dict[str, float] = {}
    name = ""
    for row in part.read(Path(out) / "environment.jsonl"):
        name = row.get("device", name)
        if row["what"] == "ceiling" and "value" in row:
            kind = row["name"].split()[0]
            found[kind] = max(found.get(kind, 0.0), row["value"])
    if not {"bfloat16", "float32", "copy", "exp2"} <= found.keys():
        return None
    return Device("measured", name, found["bfloat16"], found["float32"], found["copy"], found["exp2"])


# ---- facts ----------------------------------------------------------------------------------------------------


def _facts(context: Context) -> Row:
    facts = measured_on()
    return facts | {
        "in_words": in_words(facts),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "c_compiler": next(filter(None, map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang"))), None),
        "missing": [name for name in OPTIONAL if not _installed(name)],
        "nvidia_smi": _nvidia_smi(),
        "cuda": torch.version.cuda,
        "bundle": context.bundle is not None,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def _installed(package: str) -> bool:
    with suppress(Exception):  # a package may be broken
        return importlib.util.find_spec(package) is not None
    return False


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return "unknown"


def _nvidia_smi() -> dict[str, str] | str:
    """Clocks, power and what holds them down, as the driver says it; or why it says nothing."""
    if shutil.which("nvidia-smi") is None:
        return "missing"
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return part.in_one_line(error)
    values = [value.strip() for value in done.stdout.partition("\n")[0].split(",")]
    return dict(zip(QUERY, values, strict=False))


# ---- ceilings -------------------------------------------------------------------------------------------------

Ceiling = tuple[str, str, Callable[[], float]]  # name, unit, what measures it


def _ceilings(context: Context) -> list[Ceiling]:
    device, tiny = torch.device(context.device), context.tiny
    products = TINY_PRODUCTS if tiny else PRODUCTS
    found: list[Ceiling] = [("copy", "B/s", lambda: _copy(device, 1 << (24 if tiny else 31)))]
    for shape in products:
        name = f"bfloat16 {'×'.join(map(str, shape))}"
        found.append((name, "FLOP/s", lambda shape=shape: _product(device, shape, torch.bfloat16)))  # type: ignore[misc]
    name = f"float32 {'×'.join(map(str, products[0]))}"
    found.append((name, "FLOP/s", lambda: _product(device, products[0], torch.float32)))
    found.append(("exp2", "exp/s", lambda: _exponentials(device, 1 << (18 if tiny else 24))))
    return found


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call on its device, after three that warm it up."""
    for _ in range(3):
        call()
    if device.type != "cuda":
        times = []
        for _ in range(5):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return max(statistics.median(times), 1e-9)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)) / 1e3


def _copy(device: torch.device, size: int) -> float:
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def _product(device: torch.device, shape: Sequence[int], dtype: torch.dtype) -> float:
    """Of random operands: zeros draw less power and clock higher."""
    m, k, n = shape
    a, b = (torch.randn(size, device=device, dtype=dtype) for size in ((m, k), (k, n)))
    out = torch.empty(m, n, device=device, dtype=dtype)
    return 2 * m * k * n / _seconds(lambda: torch.mm(a, b, out=out), device)


@tiling.jit
def _exponential_kernel(x_ptr, out_ptr, COUNT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """x ← exp2(−x), COUNT times: each needs the one before, and nothing else touches memory."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    for _ in tl.static_range(COUNT):
        x = tl.exp2(-x)
    tl.store(out_ptr + at, x)


def _exponentials(device: torch.device, size: int) -> float:
    x = torch.rand(size, device=device)
    out = torch.empty_like(x)
    if device.type != "cuda":
        return size / _seconds(lambda: torch.exp2(x, out=out), device)
    block = 1024

    def call() -> None:
        _exponential_kernel[(size // block,)](x, out, COUNT=EXPONENTIALS, BLOCK=block, num_warps=4)

    return size * EXPONENTIALS / _seconds(call, device)


def _datasheet(name: str, device: str) -> float | None:
    """What the data sheet promises for it, of devices that the roofline knows."""
    sheet = device_named(torch.cuda.get_device_name()) if device == "cuda" else None
    if sheet is None:
        return None
    kinds = {"copy": sheet.bytes, "bfloat16": sheet.half, "float32": sheet.single, "exp2": sheet.exponentials}
    return kinds[name.split()[0]]


# ---- table and picture ----------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row]) -> str:
    """Facts as a list, ceilings as a table."""
    blocks = []
    for row in rows:
        if row["what"] == "facts":
            triton = [] if row["c_compiler"] else ["a C compiler, without which Triton launches nothing"]
            missing = ", ".join([*row["missing"], *triton]) or "nothing"
            blocks.append(f"{row['cpu']}, {row['cpus']} CPUs, load {row['load']}. Missing: {missing}.")
        if row["what"] in ("facts", "facts after"):
            when, state = ("before", "after")[row["what"] == "facts after"], row["nvidia_smi"]
            told = state if isinstance(state, str) else ", ".join(f"{name} {value}" for name, value in state.items())
            blocks.append(f"nvidia-smi {when}: {told}.")
    ceilings = [row for row in rows if row["what"] == "ceiling"]
    table = Table(
        ("ceiling", "measured", "of the data sheet", ""),
        [
            (
                row["name"],
                numeric("rate", row.get("value"), _rate(row)),
                numeric("share", _share(row), f"{_share(row) or 0:.0%}"),
                row.get("error", ""),
            )
            for row in ceilings
        ],
    )
    return "\n\n".join([*blocks, *([table.markdown()] if ceilings else [])]) + "\n"


def _rate(row: Row) -> str:
    return quantities.scaled(row["value"], row["unit"]) if "value" in row else "–"


def _share(row: Row) -> float | None:
    return row["value"] / row["datasheet"] if row.get("value") and row.get("datasheet") else None


def draw(rows: Sequence[Row], path: Path) -> None:
    """A bar a ceiling: its share of the data sheet, or of the fastest of its unit where there is none."""
    import matplotlib
    from matplotlib.figure import Figure

    found = [row for row in rows if row["what"] == "ceiling" and row.get("value")]
    if not found:
        return
    best = {row["unit"]: max(other["value"] for other in found if other["unit"] == row["unit"]) for row in found}
    shares = [_share(row) or row["value"] / best[row["unit"]] for row in found]
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(6.0, 0.5 + 0.32 * len(found)), layout="constrained")
        axes = figure.add_subplot()
        bars = axes.barh([row["name"] for row in found], shares, color=plots.BLUE, height=0.6)
        axes.bar_label(bars, [_rate(row) for row in found], padding=3)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.35 * max(1.0, *shares))
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
        sheet = all(_share(row) for row in found)
        axes.set_xlabel("of the data sheet" if sheet else "of the fastest of its unit")
        axes.grid(axis="y", visible=False)
        figure.savefig(path, dpi=150)
