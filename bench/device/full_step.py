"""One compiled step at full size: mlm of a 6L-768H student on 131,072 tokens, what the compiler takes and what it gives.

It is the first time that Inductor compiles for this device, so whatever it cannot do is seen here, in one row. Its code
stays in the cache that the parts share, so `training` starts with it.
"""

from __future__ import annotations

import os
import statistics
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.device import part, train_step
from bench.device.part import Context, Recorder, Row
from fastkd import quantities
from fastkd.device.clock import PHASES, PhaseClock
from fastkd.device.memory import peak_memory_bytes
from fastkd.reports.tables import Cell, Table, numeric
from fastkd.setup import Setup
from fastkd.train import Trainer

SECONDS = 60
TEACHER = "2L-768H-12A"  # mlm reads its tokenizer only
WARM, TIMED = 3, 8  # steps after the first
FULL: dict[str, Any] = {"teacher": TEACHER, "student": "6L-768H-12A", "seq_length": 128, "batch_tokens": 131072}
TINY: dict[str, Any] = {"teacher": "2L-48H-4A", "student": "1L-48H-4A", "seq_length": 16, "batch_tokens": 256}


def run(context: Context, rows: Recorder) -> None:
    """Compiled; where that fails, also eager, which says whether the compiler is to blame.

    A rehearsal is eager: on a CPU the compiler takes longer than the part has.
    """
    if not context.tiny and (_measured(context, rows, compile=True) or rows.left < 10):
        return
    _measured(context, rows, compile=False)


def _measured(context: Context, rows: Recorder, compile: bool) -> bool:
    sizes = TINY if context.tiny else FULL
    row: Row = {"what": "step", "method": "mlm", "size": "tiny" if context.tiny else "paper-6l", "compile": compile,
                "batch_tokens": sizes["batch_tokens"], "code": "cached" if _has_code() else "new"}  # fmt: skip
    try:
        setup = train_step.setup(context, "mlm", **sizes, compile=compile, dtype="bfloat16")
        rows.add(**row, ok=True, **_steps(setup))
        return True
    except Exception as error:
        traceback.print_exc()
        rows.add(**row, ok=False, error=part.in_one_line(error))
        return False


def _has_code() -> bool:
    """Whether Inductor's cache holds anything before the first step."""
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
    return folder != Path() and folder.is_dir() and any(folder.iterdir())


def _steps(setup: Setup) -> Row:
    """The first step's seconds, those of a later one by phase, tokens a second and memory."""
    device = setup.world.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    trainer = Trainer(setup)  # rehearses a micro-step, forward and backward
    loss, *_ = trainer.step(trainer.stream.step(0), 1e-4)
    first_loss = float(loss)
    first = time.perf_counter() - started
    for number in range(1, WARM + 1):
        trainer.step(trainer.stream.step(number), 1e-4)
    batches = [trainer.stream.step(WARM + number) for number in range(1, TIMED + 1)]
    trainer.clock = PhaseClock(device)
    laps = []
    for batch in batches:
        loss, *_ = trainer.step(batch, 1e-4)
        laps.append(trainer.clock.lap())
    spent = [lap.seconds() for lap in laps]
    step_s = statistics.median(sum(phases.values()) for phases in spent)
    text = statistics.mean(trainer.stream.tokens_of(WARM + number).real for number in range(1, TIMED + 1))
    return {
        "compile_s": max(0.0, first - 2 * step_s),
        "step_s": step_s,
        "tokens_per_s": text / step_s,
        "phases": {name: statistics.median(phases[name] for phases in spent) for name in PHASES},
        "peak_memory_bytes": peak_memory_bytes(device),
        "micro_tokens": trainer.micro_tokens,
        "attention": setup.attention,
        "loss_first": first_loss,
        "loss": float(loss),
    }


def markdown(rows: Sequence[Row]) -> str:
    """A line a way to run it."""
    lines: list[tuple[Cell | str, ...]] = []
    for row in rows:
        name = f"{row['method']}, {row['size']}, {row['batch_tokens']:,} tokens, {'compiled' if row['compile'] else 'eager'}"
        if not row["ok"]:
            lines.append((name, *[""] * 4, f"**failed**: {row['error']}"))
            continue
        phases = ", ".join(f"{phase} {seconds * 1e3:.1f}" for phase, seconds in row["phases"].items() if seconds)
        lines.append((
            name,
            numeric("compile", row["compile_s"], f"{row['compile_s']:.1f} s"),
            numeric("step", row["step_s"], f"{row['step_s'] * 1e3:.1f} ms"),
            numeric("rate", row["tokens_per_s"], quantities.count(row["tokens_per_s"])),
            numeric("memory", row["peak_memory_bytes"], quantities.memory(row["peak_memory_bytes"])),
            f"{row['attention']}, micro-batch {row['micro_tokens']:,}; loss {row['loss_first']:.3f} → {row['loss']:.3f}; "
            f"ms by phase: {phases}; code {row['code']}",
        ))  # fmt: skip
    head = ("step", "first step beyond two others", "step", "tokens/s", "peak memory", "")
    return Table(head, lines).markdown() if lines else "No step was finished.\n"
