"""The paper's experiment in miniature: methods at equal GPU-seconds and at equal FLOPs, scored on held-out text.

Runs lie in the scratch folder, so that a part that is cut off goes on where it was when it runs again there. With random
weights and generated text nothing can be learnt from a teacher: losses mean something with a bundle alone.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from bench.device import material, train_step, worker
from bench.device.part import Context, Row, Rows

SECONDS = 40
SHORTEST_S, LONGEST_S = 6.0, 60.0  # of a run's budget
RUNS = 18  # that the time is divided into
COMPILE_FROM_S = 120  # of the part: compiling pays from there on


def run(context: Context, rows: Rows) -> None:
    """Run what the time allows."""
    shared = options(context)
    digest = hashlib.sha256(json.dumps(shared).encode()).hexdigest()[:8]  # runs with other options are other runs
    spec = {
        "folder": str(Path(context.scratch or context.out).absolute() / f"comparison-{digest}"), "device": context.device,
        "tiny": context.tiny, "seconds": rows.left - 4,
        "budget_s": 1.0 if context.tiny else min(LONGEST_S, max(SHORTEST_S, round(rows.left / RUNS))),
        "options": shared,
    }  # fmt: skip
    about = {"teacher": "bundle" if context.bundle else "random", "text": material.text(context)}
    error = worker.run(
        ["bench.device.compared_runs", json.dumps(spec)], rows.left - 2, lambda row: rows.add(**row, **about)
    )
    if error:
        rows.add(what="run", label="the rest", method="", match="", share=0.0, seed=0, error=error, **about)


def options(context: Context) -> Row:
    """What all runs share. Small batches: a minute of a GPU then has the steps that leave the plateau of the start."""
    teacher, corpus = train_step.files(context, "2L-48H-4A" if context.tiny else "6L-384H-12A")
    if context.bundle:
        teacher = str(Path(context.bundle) / "teacher")
    return {
        "preset": "quickstart", "teacher": teacher, "student": "1L-48H-4A" if context.tiny else "3L-384H-12A",
        "corpus": corpus, "seq_length": 16 if context.tiny else 128, "batch_tokens": 256 if context.tiny else 32_768,
        "dtype": "bfloat16" if context.device == "cuda" else "float32",
        "compile": context.device == "cuda" and context.seconds >= COMPILE_FROM_S, "validations": 0,
    }  # fmt: skip


# ---- what is shown --------------------------------------------------------------------------------------------

HEAD = (
    "| row | matched by | budget | seed | GPU-s | FLOPs | tokens | steps (planned) | MLM loss | accuracy | own loss |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)
NOTE = (
    "Held-out text; MLM loss and accuracy where the method trains a head; own loss is the method's, before → after. Budgets are "
    "charged for steps alone. A row matched by FLOPs has those that the scratch row of the same share spent."
)


def markdown(rows: list[Row]) -> str:
    """A line a run."""
    if not rows:
        return "No run was made.\n"
    made = [row for row in rows if "charged_s" in row]
    table = f"{HEAD}\n" + "\n".join(map(_line, made)) + f"\n\n{NOTE}\n" if made else ""
    if made and made[0]["text"] == "generated":
        table += "\nThe text is generated and the teacher random: losses mean nothing here.\n"
    missing = "\n".join(
        f"* {row['label']}, {row['match']}, {row['share']:g} of the budget, seed {row['seed']}: "
        f"{row.get('error') or 'left out, ' + row['skipped']}"
        for row in rows
        if "error" in row or "skipped" in row
    )
    return "\n".join(filter(None, [table, missing])).rstrip() + "\n"


def _line(row: Row) -> str:
    budget = f"{row['budget']:.3g} {'s' if row['unit'] == 'gpu-seconds' else 'FLOPs'}"
    cells = (
        row["label"], row["match"], budget, str(row["seed"]), f"{row['charged_s']:.2f}", f"{row['flops']:.2e}",
        f"{row['tokens']:,}", f"{row['steps']:,} ({row['steps_planned']:,})",
        "" if row["mlm_loss"] is None else f"{row['mlm_loss']:.3f}",
        "" if row["accuracy"] is None else f"{row['accuracy']:.1%}", f"{row['loss_first']:.3f} → {row['loss_last']:.3f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def draw(rows: list[Row], path: Path) -> None:
    """Held-out MLM loss over GPU-seconds and over FLOPs, a mark a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scored = [row for row in rows if row.get("mlm_loss") is not None]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for number, label in enumerate(dict.fromkeys(row["label"] for row in scored)):
        own = [row for row in scored if row["label"] == label]
        for axis, field in zip(axes, ("charged_s", "flops"), strict=True):
            losses = [row["mlm_loss"] for row in own]
            axis.scatter([row[field] for row in own], losses, label=label, marker="osD^vP"[number % 6])
    axes[0].set(xlabel="GPU-seconds", ylabel="held-out MLM loss")
    axes[1].set(xlabel="FLOPs")
    if scored:
        axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
