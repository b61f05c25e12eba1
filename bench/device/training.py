"""Real train steps of every method: tokens/s, MFU, phases, host time, memory, energy, and the teacher's tax over scratch.

Each row is a process of its own (``timed_step``, for peers ``bench.variants``), cut off at its share of the time, so that
one that runs out of memory or hangs costs no other. Two of them compile their graphs side by side, while the next two import
what they need; then each is timed by itself. The most important rows come first; a row that would hardly end in
time is not begun. Sequences are full unless a row says that they are the corpus's documents, most of which are short.
"""

from __future__ import annotations

import dataclasses
import json
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.device import material, part, train_step, worker
from bench.device.alone import alone, is_free
from bench.device.part import Context, Recorder, Row
from bench.throughput import SIZES
from bench.variants import Spec
from fastkd import methods

SECONDS = 200  # every method has graphs of its own to compile
PROFILED = ("mlm", "minilmv2")
SEQUENCES, WARMUP, STEPS = 1024, 6, 20  # a step: 131,072 tokens
PEER_SEQUENCES = 256  # what the paper's way holds on an 80 GB GPU
TOGETHER = 2  # that compile side by side, perhaps beside other runs: each takes up to 23 GB of a GPU
# What holds a step of a size beside two others of it. Chosen by what is free, it would change with the neighbours.
MICRO_TOKENS = {"paper-6l": 131_072, "quickstart": 131_072, "paper-12l": 32_768}
# Seconds: of the first rows together, of later ones, of timing one, and of a peer, which compiles nothing.
FIRST_S, LATER_S, TIMING_S, PEER_S = 60.0, 40.0, 6.0, 25.0
FULL, DOCUMENTS = "full-sentences", "documents"


@dataclass(frozen=True)
class Entry:
    """A row to measure."""

    size: str
    method: str
    variant: str = "fastkd"
    packing: str = FULL
    residual: str = "float32"

    @property
    def names(self) -> Row:
        """The fields that say which row it is; a stream in bfloat16 is of another kind, for goals are not about it."""
        kind = "method" if self.residual == "float32" else "residual"
        what = {"what": kind} if self.variant == "fastkd" else {"what": "peer", "peer": self.variant}
        return {**what, "method": self.method, "size": self.size, "packing": self.packing, "residual": self.residual}


def entries(tiny: bool) -> list[Entry]:
    """All rows, the worthiest first."""
    if tiny:
        return [Entry("tiny", "mlm"), Entry("tiny", "minilmv2"), Entry("tiny", "mlm", "paper", DOCUMENTS)]
    first, sizes = ("mlm", "minilmv2"), ("quickstart", "paper-12l")
    others: tuple[str, ...] = ("logit_kd", "tinybert", "minilm")
    others = (*others, *(name for name in methods.available() if name not in first + others))
    return [
        *(Entry("paper-6l", method) for method in first + others),
        *(Entry("paper-6l", method, packing=DOCUMENTS) for method in first),
        Entry("paper-6l", "mlm", residual="bfloat16"),
        *(Entry("paper-6l", method, "paper", DOCUMENTS) for method in first),
        *(Entry(size, method) for size in sizes for method in first + others),
    ]


def groups(rows: Sequence[Entry]) -> list[list[Entry]]:
    """Rows that are made ready together: neighbours of a size; a peer is on its own."""
    found: list[list[Entry]] = []
    for entry in rows:
        last = found[-1] if found else []
        alike = last and (last[0].size, last[0].variant) == (entry.size, entry.variant) and entry.variant == "fastkd"
        if alike and len(last) < TOGETHER:
            last.append(entry)
        else:
            found.append([entry])
    return found


def run(context: Context, rows: Recorder) -> None:
    """Measure what the time allows."""
    Training(context, rows).run()


class Training:
    """The rows of one run."""

    def __init__(self, context: Context, rows: Recorder) -> None:
        self.context, self.rows = context, rows
        self.measured: dict[Entry, Row] = {}
        self.begun = False
        self.standing: dict[Entry, worker.Worker] = {}  # that have begun to import
        self.about: Row = {"teacher": "random", "text": material.text(context)}

    def run(self) -> None:
        """Every entry, or the reason why not."""
        following = groups(entries(self.context.tiny))
        while following:
            group = following.pop(0)
            needed = 0.0 if self.context.tiny else self.needed(group)
            if needed > self.rows.left:
                for entry in group:
                    reason = f"takes about {needed:.0f} s, {self.rows.left:.0f} s were left"
                    self.rows.add(**entry.names, skipped=reason)
                continue
            self.stand_by(group)  # all of it, before the first row's teacher is made
            ready = self.ready(group, following)
            while (
                following
                and not is_free()
                and self.needed(following[0]) < self.rows.left
                and self.is_ours(following[0])
            ):
                ready += self.ready(following.pop(0), following)  # what computes beside leaves time to compile more
            self.time(ready)
        for process in self.standing.values():
            process.wait(0)

    def needed(self, group: Sequence[Entry]) -> float:
        """Seconds that rows may take."""
        if not self.is_ours(group):
            return PEER_S
        return LATER_S if self.begun else FIRST_S

    def is_ours(self, group: Sequence[Entry]) -> bool:
        """Whether rows are fastkd's, which compile before they are timed."""
        return group[0].variant == "fastkd"

    def stand_by(self, group: Sequence[Entry]) -> None:
        """Start the processes of these rows, if they are not there: importing takes some ten seconds."""
        for entry in group:
            if entry.variant == "fastkd" and entry not in self.standing:
                self.standing[entry] = worker.Worker(["bench.device.timed_step"], self.taker(entry))

    def taker(self, entry: Entry) -> Any:
        """What takes a row's results."""
        return lambda row: self.take(entry, row)

    def ready(self, group: Sequence[Entry], following: Sequence[Sequence[Entry]]) -> list[Entry]:
        """Have these rows compile side by side, while those that follow import; those that are ready in time."""
        self.begun, begun = True, [entry for entry in group if self.begin(entry)]
        if following and self.is_ours(following[0]):
            self.stand_by(following[0])
        until = time.monotonic() + self.rows.left - 2 - TIMING_S * len(group)
        return [entry for entry in begun if entry.variant != "fastkd" or self.is_ready(entry, until)]

    def begin(self, entry: Entry) -> bool:
        """Tell a row's process what to make ready."""
        self.stand_by([entry])
        try:
            fields = dataclasses.asdict(self.spec(entry)) | {"profile": self.profile(entry)}
            if entry.variant == "fastkd":
                self.standing[entry].tell(json.dumps(fields))
            return True
        except Exception as error:
            traceback.print_exc()
            self.rows.add(**entry.names, error=part.in_one_line(error))
            if entry in self.standing:
                self.standing.pop(entry).wait(0)
            return False

    def is_ready(self, entry: Entry, until: float) -> bool:
        """Whether a row's process is ready; if not, it is ended: it would disturb the timing of others."""
        if self.standing[entry].is_ready(until - time.monotonic()):
            return True
        reason = self.standing.pop(entry).wait(0)
        self.rows.add(**entry.names, error="not ready in time" if reason.startswith("cut off") else reason)
        return False

    def time(self, ready: Sequence[Entry]) -> None:
        """One after the other, with nothing beside it."""
        with alone(self.rows.left - 2 - TIMING_S * len(ready)) as quiet:
            self.about["alone"] = quiet
            for entry in ready:
                try:
                    error = self.timed(entry)
                except Exception as reason:
                    traceback.print_exc()
                    error = part.in_one_line(reason)
                if error:
                    self.rows.add(**entry.names, error=error)

    def timed(self, entry: Entry) -> str:
        """Time a row; why that failed, or ""."""
        if entry.variant != "fastkd":
            argv = ["bench.variants", json.dumps(dataclasses.asdict(self.spec(entry)))]
            return worker.run(argv, self.rows.left - 2, self.taker(entry))
        process = self.standing.pop(entry)
        process.tell("go on")
        return process.wait(self.rows.left - 2)

    def spec(self, entry: Entry) -> Spec:
        """What its process measures. The first row of a size makes its teacher's folder."""
        size = SIZES[entry.size]
        teacher, corpus = train_step.files(self.context, size.teacher)
        cuda, tiny = self.context.device == "cuda", self.context.tiny
        options: dict[str, Any] = {"packing": entry.packing, "residual": entry.residual}
        if cuda and entry.size in MICRO_TOKENS:
            options["micro_batch"] = str(MICRO_TOKENS[entry.size])
        return Spec(
            entry.variant, entry.method, size.student, teacher, corpus, self.context.device,
            "bfloat16" if cuda else "float32", self.sequences(entry), size.seq_length,
            warmup=1 if tiny else WARMUP, steps=2 if tiny else STEPS, options=options,
        )  # fmt: skip

    def profile(self, entry: Entry) -> str:
        """Where the kernels of a step are listed, "" where they are not."""
        listed = entry.method in PROFILED and entry.size in ("paper-6l", "tiny") and entry.names["what"] == "method"
        if not listed or entry.packing != FULL:
            return ""
        return str(Path(self.context.out).absolute() / f"training-{entry.method}-kernels.txt")

    def take(self, entry: Entry, row: Row) -> None:
        """Write a row that arrived, and the tax it tells."""
        about = self.about | {"sequences": self.sequences(entry)}
        self.rows.add(
            **(entry.names | row | ({"what": entry.names["what"]} if row.get("what") == "method" else {})), **about
        )
        if row.get("what") != "method":
            return
        self.measured[entry] = row
        scratch = self.measured.get(dataclasses.replace(entry, method="mlm"))
        if entry.method != "mlm" and scratch is not None:
            tax = scratch["tokens_per_s"] / row["tokens_per_s"]
            bound = row["flops_a_token"] / scratch["flops_a_token"]
            names = {"what": "tax", "method": entry.method, "size": entry.size, "packing": entry.packing}
            self.rows.add(**names, tax=tax, bound=bound, over=tax / bound)

    def sequences(self, entry: Entry) -> int:
        """Of a step, if all are full."""
        if self.context.tiny:
            return 16
        return SEQUENCES if entry.variant == "fastkd" else PEER_SEQUENCES


# ---- what is shown --------------------------------------------------------------------------------------------

HEAD = (
    "| size | method | length | tokens/s | step, ms (IQR) | MFU (whole) | host, ms | compile, s | peak, GB | µJ/token | "
    "tax (bound) |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)
NOTE = (
    "Tokens are text; length is a sequence's mean: full sequences, or documents as they are where a row says so. MFU is of the "
    "datasheet's bf16 peak: by the FLOPs that ran, and counting a last layer that ran in part as whole. Host: to issue a step "
    "with an empty queue before it. Compile: beside others. Tax: seconds a token over mlm's, beside the ratio of FLOPs."
)


def markdown(rows: list[Row]) -> str:
    """The methods' table, the phases', and the peers'."""
    measured = _measured(rows)
    if not rows:
        return "No row was measured.\n"
    taxes = {_key(row): row for row in rows if row["what"] == "tax"}
    table = "\n".join(_line(row, taxes.get(_key(row)) if row["what"] == "method" else None) for row in measured)
    phases = "\n".join(
        f"| {row['size']} | {_name(row)} | {' | '.join(f'{s * 1e3:.2f}' for s in row['phases'].values())} |"
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
    return [row for row in rows if row["what"] in ("method", "residual") and "tokens_per_s" in row]


def _key(row: Row) -> tuple[str, str, str]:
    return row["size"], row["method"], row["packing"]


def _name(row: Row) -> str:
    """The method, and what sets the row apart from training with full sequences and a float32 stream."""
    stream = ", bfloat16 stream" if row.get("residual") == "bfloat16" else ""
    return row["method"] + (", documents" if row["packing"] == DOCUMENTS else "") + stream


def _line(row: Row, tax: Row | None) -> str:
    joules, mfu = row["joules_a_token"], row["mfu"]
    throttled = f" (clocks held: {', '.join(row['throttle'])})" if row["throttle"] else ""
    beside = "" if row.get("alone", True) else " (not alone on the machine)"
    cells = (
        row["size"], _name(row) + throttled + beside, f"{row['mean_length']:.0f}", f"{row['tokens_per_s']:,.0f}",
        f"{row['step_s'] * 1e3:.1f} ({row['step_iqr_s'] * 1e3:.1f})",
        "" if mfu is None else f"{mfu:.1%} ({row['mfu_whole']:.1%})", f"{row['host_s'] * 1e3:.1f}",
        f"{row['compile_s']:.0f}", f"{row['peak_memory_bytes'] / 1e9:.1f}", "" if joules is None else f"{joules * 1e6:.0f}",
        "" if tax is None else f"{tax['tax']:.2f} ({tax['bound']:.2f})",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _peers(rows: list[Row], measured: list[Row]) -> str:
    """Each peer beside fastkd's row of the same size, method and text."""
    ours = {_key(row): row for row in measured if row["what"] == "method"}
    lines = []
    for row in rows:
        if row["what"] == "peer" and "tokens_per_s" in row:
            own = ours.get(_key(row))
            ratio = "" if own is None else f", fastkd {own['tokens_per_s'] / row['tokens_per_s']:.2f} times as fast"
            lines.append(
                f"* {row['size']}, {row['method']}, the {row['peer']}'s way: {row['tokens_per_s']:,.0f} tokens/s, "
                f"{row['sequences']} sequences a step{ratio}"
            )
    return "\n".join([*lines, ""])


def _not_measured(rows: list[Row]) -> str:
    """Why a row is missing, a line each."""
    lines = [
        f"* {row['size']}, {_name(row)}{', ' + row['peer'] if 'peer' in row else ''}: "
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
            axis.barh([_name(row) for row in bars], widths, left=left, label=phase)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.invert_yaxis()
        axis.set(title=size, xlabel="ms a step")
    handles, labels = axes[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, ncols=len(labels), loc="outside lower center", frameon=False, fontsize=8)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=110)
    plt.close(figure)
