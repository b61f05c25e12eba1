"""The paper's experiment in miniature: methods at equal FLOPs and at equal GPU-seconds, scored on held-out text.

Runs matched by FLOPs need not be timed, and a small student keeps a GPU busy for a part of the time that its host takes to
issue a step: so they go on side by side, a process a row with its seeds in turn. Then come the runs matched by GPU-seconds,
with nothing beside them. Runs are kept in the scratch folder: a part that is cut off continues there when it runs again.
With random weights and generated text nothing can be learnt from a teacher: losses mean something only with a bundle.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path

from bench.device import compared_runs, material, train_step, worker
from bench.device.alone import alone
from bench.device.compared_runs import FLOPS, GPU_SECONDS, Entry
from bench.device.part import Context, Recorder, Row

SECONDS = 110
TOKENS = 8e6  # of the scratch runs that the others have the FLOPs of
BUDGET_S = 8.0  # of the runs matched by GPU-seconds
SIDE_BY_SIDE = 0.7  # of the time at most


def run(context: Context, rows: Recorder) -> None:
    """Run what the time allows."""
    shared = options(context)
    digest = hashlib.sha256(json.dumps(shared).encode()).hexdigest()[:8]  # runs with other options are other runs
    spec = {
        "folder": str(Path(context.scratch or context.out).absolute() / f"comparison-{digest}"), "device": context.device,
        "tiny": context.tiny, "budget_s": 1.0 if context.tiny else BUDGET_S, "options": shared,
        "budget_flops": compared_runs.flops_of(shared, 2_000 if context.tiny else TOKENS),
    }  # fmt: skip
    about = {"teacher": "bundle" if context.bundle else "random", "text": material.text(context)}
    lanes = compared_runs.lanes(context.tiny)
    cores = max(1, (os.cpu_count() or 1) // len(lanes))
    env = {"OMP_NUM_THREADS": str(cores), "TORCHINDUCTOR_COMPILE_THREADS": str(cores)}
    until = SIDE_BY_SIDE * rows.left

    def worked(entries: Sequence[Entry], seconds: float, env: dict[str, str]) -> None:
        given = spec | {"seconds": seconds - 2, "runs": [astuple(entry) for entry in entries]}
        argv = ["bench.device.compared_runs", json.dumps(given)]
        if error := worker.run(argv, seconds, lambda row: rows.add(**row, **about), env):
            rows.add(
                what="run", label=f"{entries[0].row}: the rest", method="", match=entries[0].match, seed=0, error=error
            )

    with ThreadPoolExecutor(len(lanes)) as pool:
        for lane in lanes:
            pool.submit(worked, lane, until, env)
    entries = compared_runs.timed(context.tiny)
    with alone(rows.left / 2) as quiet:
        if quiet:
            worked(entries, rows.left - 2, {})
            return
    for entry in entries:  # run all the same, they would disturb what is timed beside them
        rows.add(what="run", label=entry.row, match=entry.match, seed=0, skipped="others computed on this machine")


def options(context: Context) -> Row:
    """What all runs share. Small batches: few tokens then are the steps that leave the plateau of the start."""
    teacher, corpus = train_step.files(context, "2L-48H-4A" if context.tiny else "6L-384H-12A")
    if context.bundle:
        teacher = str(Path(context.bundle) / "teacher")
    return {
        "preset": "quickstart", "teacher": teacher, "student": "1L-48H-4A" if context.tiny else "3L-384H-12A",
        "corpus": corpus, "seq_length": 16 if context.tiny else 128, "batch_tokens": 256 if context.tiny else 8_192,
        "dtype": "bfloat16" if context.device == "cuda" else "float32",
        "compile": context.device == "cuda", "validations": 0,
    }  # fmt: skip


# ---- what is shown --------------------------------------------------------------------------------------------

HEAD = (
    "| row | matched by | budget | seeds | GPU-s | FLOPs | tokens | steps | MLM loss | accuracy | own loss |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)
NOTE = (
    "Means over seeds, ± the sample standard deviation. Held-out text; MLM loss and accuracy where the method trains a head; own "
    "loss is the method's, before → after. Budgets are charged for steps alone. Runs matched by FLOPs went on side by side: "
    "their seconds mean nothing."
)


def markdown(rows: list[Row]) -> str:
    """A line for the seeds of a row, then why runs are missing."""
    if not rows:
        return "No run was made.\n"
    made = [row for row in rows if "charged_s" in row]
    alike: dict[tuple[str, str], list[Row]] = {}
    for row in made:
        alike.setdefault((row["match"], row["label"]), []).append(row)
    table = f"{HEAD}\n" + "\n".join(map(_line, alike.values())) + f"\n\n{NOTE}\n" if made else ""
    if made and made[0]["text"] == "generated":
        table += "\nThe text is generated and the teacher random: losses mean nothing here.\n"
    missing = "\n".join(
        f"* {row['label']}, {row['match']}, seed {row['seed']}: {row.get('error') or 'left out, ' + row['skipped']}"
        for row in rows
        if "error" in row or "skipped" in row
    )
    return "\n".join(filter(None, [table, missing])).rstrip() + "\n"


def _line(seeds: list[Row]) -> str:
    row = seeds[0]
    budget = f"{row['budget']:.3g} {'s' if row['unit'] == 'gpu-seconds' else 'FLOPs'}"
    mean = {name: statistics.mean(each[name] for each in seeds) for name in ("flops", "tokens", "steps", "charged_s")}
    first, last = (statistics.mean(each[name] for each in seeds) for name in ("loss_first", "loss_last"))
    cells = (
        row["label"], row["match"], budget, str(len(seeds)),
        f"{mean['charged_s']:.2f}" if row["match"] == GPU_SECONDS else "", f"{mean['flops']:.2e}", f"{mean['tokens']:,.0f}",
        f"{mean['steps']:,.0f}", _spread(seeds, "mlm_loss", ".3f"), _spread(seeds, "accuracy", ".1%"),
        f"{first:.3f} → {last:.3f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _spread(seeds: list[Row], name: str, form: str) -> str:
    """The mean, and of several seeds the sample standard deviation; "" where the method has no such score."""
    values = [row[name] for row in seeds if row[name] is not None]
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def draw(rows: list[Row], path: Path) -> None:
    """Held-out MLM loss of each row, a mark a seed; a panel for FLOPs and one for GPU-seconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scored = [row for row in rows if row.get("mlm_loss") is not None]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    labels = list(dict.fromkeys(row["label"] for row in scored))
    for axis, match in zip(axes, (FLOPS, GPU_SECONDS), strict=True):
        own = [row for row in scored if row["match"] == match]
        axis.scatter([labels.index(row["label"]) for row in own], [row["mlm_loss"] for row in own], marker="_", s=200)
        axis.set_xticks(range(len(labels)), labels, rotation=15)
        axis.set(title=f"matched by {match}", xlim=(-0.5, max(len(labels), 1) - 0.5))
    axes[0].set(ylabel="held-out MLM loss")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
