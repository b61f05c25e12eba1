"""Each fused loss beside its definition, the definition compiled, and other packages: time, memory, error, roofline.

One process measures all (``timed_kernels``). Should the device fail under a kernel, the next one goes on after that case.
"""

from __future__ import annotations

import json
from pathlib import Path

from bench.device import worker
from bench.device.part import Context, Recorder, Row

SECONDS = 110
START_S = 15.0  # of a process that measures one case


def run(context: Context, rows: Recorder) -> None:
    """Measure what the time allows."""
    begun: list[Row] = []

    def take(row: Row) -> None:
        if row["what"] == "case":
            begun.append(row)
        else:
            rows.add(**row)

    while rows.left > START_S or not begun:
        before, seconds = len(begun), rows.left - 2
        spec = {
            "out": context.out,
            "device": context.device,
            "tiny": context.tiny,
            "seconds": seconds - 5,
            "skip": before,
        }
        error = worker.run(["bench.device.timed_kernels", json.dumps(spec)], seconds, take)
        if not error:
            return
        nobody = {"kernel": "", "case": "none was begun", "dtype": "", "contender": "fastkd"}
        rows.add(**{**(begun[-1] if len(begun) > before else nobody), "what": "kernel"}, error=error)
        if len(begun) == before:
            return


# ---- what is shown --------------------------------------------------------------------------------------------

HEAD = (
    "| kernel | case | contender | µs | spread | × | gradient error | peak, MB | roofline |\n"
    "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
)
NOTE = (
    "Value and gradient together, medians of rounds in which fastkd and its definition take turns, and later the others; spread "
    "is (max − min)/median. ×: the row's time over fastkd's. Error: the worst ‖g − g₆₄‖/‖g₆₄‖ of a gradient on the first rows. "
    "Memory beyond the inputs. Roofline: the least time that the {ceilings} peaks allow, over fastkd's. On a GPU times are the "
    "device's, replayed as a graph (* by events); on a CPU the wall clock's, in tiny sizes."
)


def markdown(rows: list[Row]) -> str:
    """The contenders' table, then the launches'."""
    timed = [row for row in rows if row["what"] == "kernel"]
    if not timed:
        return "No kernel was measured.\n"
    ceilings = next((row["roofline"] for row in timed if "roofline" in row), "device's")
    table = "\n".join(_line(row, timed) for row in timed)
    parts = [f"{HEAD}\n{table}\n\n{NOTE.format(ceilings=ceilings)}\n"]
    launches = [row for row in rows if row["what"] == "launch"]
    if launches:
        lines = "\n".join(_launch(row) for row in launches)
        parts.append(
            "Launches of one call of fastkd's:\n\n| kernel | case | launch | calls | µs | roofline |\n"
            f"| --- | --- | --- | ---: | ---: | ---: |\n{lines}\n"
        )
    return "\n".join(parts)


def _line(row: Row, rows: list[Row]) -> str:
    head = f"| {row['kernel']} | {row['case']} {row['dtype']} | {row['contender']} |"
    if "device_s" not in row:
        reason = row.get("error") or f"not run: {row.get('skipped', '')}"
        return f"{head} {reason.replace('|', '/')} | | | | | |"
    ours = _of(rows, row, "fastkd")
    star = "*" if row.get("timing") == "events" else ""
    peak, error = row.get("peak_bytes"), row.get("gradient_error")
    cells = (
        f"{row['device_s'] * 1e6:,.1f}{star}", f"{row['spread']:.0%}",
        "" if ours is None or ours is row else f"{row['device_s'] / ours['device_s']:.2f}",
        f"{error:.1e}" if error is not None else row.get("error", ""), "" if peak is None else f"{peak / 1e6:,.0f}",
        f"{row['of_roofline']:.0%}" if "of_roofline" in row and row["contender"] == "fastkd" else "",
    )  # fmt: skip
    return f"{head} {' | '.join(cells)} |"


def _of(rows: list[Row], like: Row, contender: str) -> Row | None:
    """The contender's measurement of the same case."""
    same = (like["kernel"], like["case"], contender)
    found = [row for row in rows if (row["kernel"], row["case"], row["contender"]) == same and "device_s" in row]
    return found[-1] if found else None


def _launch(row: Row) -> str:
    share = f"{row['of_roofline']:.0%}" if "of_roofline" in row else ""
    name = row["launch"].replace("|", "/")[:80]
    return f"| {row['kernel']} | {row['case']} | {name} | {row['calls']} | {row['device_s'] * 1e6:,.1f} | {share} |"


def draw(rows: list[Row], path: Path) -> None:
    """fastkd's share of the roofline, where it is known, and how many times longer the others take."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    timed = [row for row in rows if row["what"] == "kernel" and "device_s" in row]
    ours = [row for row in timed if row["contender"] == "fastkd"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 1.2 + 0.4 * max(len(ours), 3)), sharey=True)
    labels = [f"{row['kernel']}: {row['case']}" for row in ours]
    left.barh(labels, [row.get("of_roofline", 0.0) for row in ours], color="tab:blue")
    left.set(title="fastkd's share of the roofline", xlim=(0, 1))
    left.axvline(0.7, color="grey", linewidth=0.8, linestyle="--")
    for number, name in enumerate(dict.fromkeys(row["contender"] for row in timed if row["contender"] != "fastkd")):
        points = [
            (other["device_s"] / row["device_s"], label)
            for row, label in zip(ours, labels, strict=True)
            if (other := _of(timed, row, name)) is not None
        ]
        right.scatter(*zip(*points, strict=True), label=name, marker="osD^vP"[number % 6])
    right.axvline(1, color="grey", linewidth=0.8)
    right.set(title="times as long as fastkd takes", xscale="log")
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_major_formatter("{x:g}")
    right.xaxis.set_minor_formatter(NullFormatter())
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    left.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
