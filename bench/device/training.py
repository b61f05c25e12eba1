"""Real train steps of every method: tokens/s, MFU, phases, host time, memory, energy, and the teacher's tax over scratch.

Each row is a process of its own (``timed_step``, for peers ``bench.variants``), cut off at its share of the time, so that
one that runs out of memory or hangs costs no other. Rows come in the order of their worth; none is started that would
hardly end in time. Teachers have random weights, which changes no time.
"""

from __future__ import annotations

import dataclasses
import json
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from bench.device import material, part, train_step, worker
from bench.device.part import Context, Row, Rows
from bench.throughput import SIZES
from bench.variants import Spec

SECONDS = 230  # every method has graphs of its own to compile
PROFILED = ("mlm", "minilmv2")
SEQUENCES, WARMUP, STEPS = 1024, 8, 20  # a step: 131,072 tokens
PEER_SEQUENCES = 256  # what the paper's way holds on an 80 GB GPU
# Seconds: of a size's first row, of another one at least, and of a peer, which compiles nothing.
COLD_S, WARM_S, PEER_S = 60.0, 25.0, 25.0
MARGIN = 1.1  # on what the last row of a size took: time that no row is given tells nothing either


@dataclass(frozen=True)
class Entry:
    """A row to measure."""

    size: str
    method: str
    variant: str = "fastkd"

    @property
    def names(self) -> Row:
        """The fields that say which row it is."""
        what = {"what": "method"} if self.variant == "fastkd" else {"what": "peer", "peer": self.variant}
        return {**what, "method": self.method, "size": self.size}


def entries(tiny: bool) -> list[Entry]:
    """All rows, the worthiest first."""
    if tiny:
        return [Entry("tiny", "mlm"), Entry("tiny", "minilmv2"), Entry("tiny", "mlm", "paper")]
    first, others, sizes = ("mlm", "minilmv2"), ("logit_kd", "tinybert", "minilm"), ("quickstart", "paper-12l")
    return [
        *(Entry("paper-6l", method) for method in first + others),
        *(Entry(size, method) for size in sizes for method in first),
        *(Entry("paper-6l", method, "paper") for method in first),
        *(Entry(size, method) for size in sizes for method in others),
    ]


def run(context: Context, rows: Rows) -> None:
    """Measure what the time allows."""
    Training(context, rows).run()


class Training:
    """The rows of one run, and what each of them took."""

    def __init__(self, context: Context, rows: Rows) -> None:
        self.context, self.rows = context, rows
        self.methods: dict[Entry, Row] = {}
        self.took: dict[str, float] = {}  # seconds of the last row of a size

    def run(self) -> None:
        """Every entry, or the reason why not."""
        for entry in entries(self.context.tiny):
            needed = 0.0 if self.context.tiny else self.needed(entry)
            if needed > self.rows.left:
                reason = f"takes about {needed:.0f} s, {self.rows.left:.0f} s were left"
                self.rows.add(**entry.names, skipped=reason)
                continue
            start = time.monotonic()
            try:
                self.measure(entry)
            except Exception as error:
                traceback.print_exc()
                self.rows.add(**entry.names, error=part.in_one_line(error))
            if entry.variant == "fastkd":
                self.took[entry.size] = time.monotonic() - start

    def needed(self, entry: Entry) -> float:
        """Seconds that a row may take."""
        if entry.variant != "fastkd":
            return PEER_S
        return max(WARM_S, MARGIN * self.took[entry.size]) if entry.size in self.took else COLD_S

    def measure(self, entry: Entry) -> None:
        """One row, and what is derived from it."""
        size = SIZES[entry.size]
        teacher, corpus = train_step.files(self.context, size.teacher)
        about = {"teacher": "random", "text": material.text(self.context), "sequences": self.sequences(entry)}
        cuda, tiny = self.context.device == "cuda", self.context.tiny
        spec = Spec(
            entry.variant, entry.method, size.student, teacher, corpus, self.context.device,
            "bfloat16" if cuda else "float32", self.sequences(entry), size.seq_length,
            warmup=1 if tiny else WARMUP, steps=2 if tiny else STEPS,
        )  # fmt: skip
        argv = ["bench.variants", json.dumps(dataclasses.asdict(spec))]
        if entry.variant == "fastkd":
            path = Path(self.context.out).absolute() / f"training-{entry.method}-kernels.txt"
            argv = ["bench.device.timed_step", argv[1], str(path) if self.profiled(entry) else ""]
        error = worker.run(argv, self.limit(), lambda row: self.take(entry, row, about))
        if error:
            self.rows.add(**entry.names, error=error)

    def take(self, entry: Entry, row: Row, about: Row) -> None:
        """Write a row that arrived, and the tax it tells."""
        self.rows.add(**entry.names | row, **about)
        if row.get("what") != "method":
            return
        self.methods[entry] = row
        scratch = self.methods.get(Entry(entry.size, "mlm"))
        if entry.method != "mlm" and scratch is not None:
            tax = scratch["tokens_per_s"] / row["tokens_per_s"]
            bound = row["flops_a_token"] / scratch["flops_a_token"]
            self.rows.add(what="tax", method=entry.method, size=entry.size, tax=tax, bound=bound, over=tax / bound)

    def sequences(self, entry: Entry) -> int:
        """Of a step."""
        if self.context.tiny:
            return 16
        return SEQUENCES if entry.variant == "fastkd" else PEER_SEQUENCES

    def profiled(self, entry: Entry) -> bool:
        """Whether the kernels of a step are listed."""
        return entry.method in PROFILED and entry.size in ("paper-6l", "tiny")

    def limit(self) -> float:
        """Seconds after which a row is cut off: the first may compile for long, but leaves room for others."""
        if not self.took:
            return max(0.6 * self.rows.left, min(self.rows.left - 2, 90.0))
        return min(self.rows.left - 2, max(90.0, 2 * max(self.took.values())))


# ---- what is shown --------------------------------------------------------------------------------------------

HEAD = (
    "| size | method | tokens/s | step, ms (IQR) | MFU (whole) | host, ms | compile, s | peak, GB | µJ/token | tax (bound) |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)
NOTE = (
    "Tokens are text. MFU is of the datasheet's bf16 peak: by the FLOPs that ran, and counting a last layer that ran in part "
    "as whole. Host: to issue a step with an empty queue before it. Tax: seconds a token over mlm's, beside the ratio of FLOPs."
)


def markdown(rows: list[Row]) -> str:
    """The methods' table, the phases', and the peers'."""
    measured = _measured(rows)
    if not rows:
        return "No row was measured.\n"
    taxes = {(row["size"], row["method"]): row for row in rows if row["what"] == "tax"}
    table = "\n".join(_line(row, taxes.get((row["size"], row["method"]))) for row in measured)
    phases = "\n".join(
        f"| {row['size']} | {row['method']} | {' | '.join(f'{s * 1e3:.2f}' for s in row['phases'].values())} |"
        for row in measured
    )
    names = list(measured[0]["phases"]) if measured else []
    parts = [f"{HEAD}\n{table}\n\n{NOTE}\n"] if measured else []
    if measured:
        parts.append(
            f"Phases, ms a step (medians):\n\n| size | method | {' | '.join(names)} |\n"
            f"| --- | --- |{' ---: |' * len(names)}\n{phases}\n"
        )
    return "\n".join([*parts, _peers(rows, measured), _not_measured(rows)]).rstrip() + "\n"


def _measured(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["what"] == "method" and "tokens_per_s" in row]


def _line(row: Row, tax: Row | None) -> str:
    joules, mfu = row["joules_a_token"], row["mfu"]
    throttled = f" (clocks held: {', '.join(row['throttle'])})" if row["throttle"] else ""
    cells = (
        row["size"], row["method"] + throttled, f"{row['tokens_per_s']:,.0f}",
        f"{row['step_s'] * 1e3:.1f} ({row['step_iqr_s'] * 1e3:.1f})",
        "" if mfu is None else f"{mfu:.1%} ({row['mfu_whole']:.1%})", f"{row['host_s'] * 1e3:.1f}",
        f"{row['compile_s']:.0f}", f"{row['peak_memory_bytes'] / 1e9:.1f}", "" if joules is None else f"{joules * 1e6:.0f}",
        "" if tax is None else f"{tax['tax']:.2f} ({tax['bound']:.2f})",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _peers(rows: list[Row], measured: list[Row]) -> str:
    """Each peer beside fastkd's row of the same size and method."""
    ours = {(row["size"], row["method"]): row for row in measured}
    lines = []
    for row in rows:
        if row["what"] == "peer" and "tokens_per_s" in row:
            own = ours.get((row["size"], row["method"]))
            ratio = "" if own is None else f", fastkd {own['tokens_per_s'] / row['tokens_per_s']:.2f} times as fast"
            lines.append(
                f"* {row['size']}, {row['method']}, the {row['peer']}'s way: {row['tokens_per_s']:,.0f} tokens/s, "
                f"{row['sequences']} sequences a step{ratio}"
            )
    return "\n".join([*lines, ""])


def _not_measured(rows: list[Row]) -> str:
    """Why a row is missing, a line each."""
    lines = [
        f"* {row['size']}, {row['method']}{', ' + row['peer'] if 'peer' in row else ''}: "
        f"{row.get('error') or 'left out, ' + row['skipped']}"
        for row in rows
        if "error" in row or "skipped" in row
    ]
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """Each method's step as a bar of phases, ms; one panel a size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = _measured(rows)
    sizes = list(dict.fromkeys(row["size"] for row in measured)) or [""]
    order = list(measured[0]["phases"]) if measured else []
    phases = [phase for phase in order if any(row["phases"][phase] > 0 for row in measured)]
    figure, axes = plt.subplots(1, len(sizes), figsize=(1.5 + 4.5 * len(sizes), 3.6), squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        bars = [row for row in measured if row["size"] == size]
        left = [0.0] * len(bars)
        for phase in phases:
            widths = [row["phases"][phase] * 1e3 for row in bars]
            axis.barh([row["method"] for row in bars], widths, left=left, label=phase)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.invert_yaxis()
        axis.set(title=size, xlabel="ms a step")
    handles, labels = axes[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, ncols=len(labels), loc="outside lower center", frameon=False, fontsize=8)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=110)
    plt.close(figure)
