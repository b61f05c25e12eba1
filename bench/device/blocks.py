"""Block sizes of the Triton kernels: candidates compiled side by side, timed in turns, and rules for the tables of kernels/.

What the table holds was chosen by a compiler's report; here a GPU has its say. A candidate whose result differs from that
of today's tile by more than the case's tolerance is not proposed.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.device import part, worker
from bench.device.part import Context, Recorder, Row

if TYPE_CHECKING:
    from bench.device.tile_search import Search

SECONDS = 50
COMPILERS = 14
COMPILING = 0.6  # of the time at most
SEARCH_S = 2.5  # of timing one search


def run(context: Context, rows: Recorder) -> None:
    """Compile all, then time search after search."""
    if context.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, as the imports below do
    from bench.device import tile_search

    searches = tile_search.searches(context.tiny)
    inputs = _prepared(context, rows, searches)
    for search in searches:
        names = {"what": "tile", "kernel": search.kernel, "case": search.case.name}
        if rows.left < SEARCH_S and not context.tiny:
            rows.add(**names, skipped=f"takes about {SEARCH_S:.0f} s, {rows.left:.0f} s were left")
            continue
        try:
            timed = list(tile_search.timed(search, inputs[search.loss, search.case.name], context.device))
            for row in timed:
                rows.add(**row)
            if proposed := tile_search.proposal(search, timed, timed[0]["arch"]):
                rows.add(**proposed)
        except Exception as error:
            rows.add(**names, error=part.in_one_line(error))
    if rows.left > SEARCH_S or context.tiny:
        for row in tile_search.chunks(context.device, context.tiny):
            rows.add(**row)


def _prepared(context: Context, rows: Recorder, searches: list[Search]) -> dict[tuple[str, str], Any]:
    """Every case's inputs; meanwhile, on a GPU, several processes fill Triton's cache.

    What is not compiled by then is compiled when it is timed.
    """
    pairs = [(number, place) for number, search in enumerate(searches) for place in range(len(search.candidates) + 1)]
    several = max(1, min(COMPILERS, (os.cpu_count() or 2) - 2, len(pairs)))
    seconds = COMPILING * rows.left

    def compiled(first: int) -> None:
        mine = pairs[first * len(pairs) // several : (first + 1) * len(pairs) // several]  # neighbours share inputs
        spec = json.dumps({"device": context.device, "tiny": context.tiny, "pairs": mine})
        error = worker.run(["bench.device.tile_search", spec], seconds, lambda row: rows.add(**row))
        if error:
            rows.add(what="compiled", error=error)

    with ThreadPoolExecutor(several) as pool:
        for first in range(several if context.device == "cuda" else 0):
            pool.submit(compiled, first)
        different = {(search.loss, search.case.name): search.case for search in searches}
        return {name: case.inputs(context.device) for name, case in different.items()}


# ---- what is shown --------------------------------------------------------------------------------------------

HEAD = "| kernel | case | tile | µs | × | difference |\n| --- | --- | --- | ---: | ---: | ---: |"
NOTE = (
    "A tile is (block_m, block_n, block_k, warps, stages[, registers]); the first of a case is today's. Times are of a whole call, "
    "value and gradient; × is today's time over the row's. Difference: the worst ‖x − y‖/‖y‖ of value and gradients, y by "
    "today's tile."
)


def markdown(rows: list[Row]) -> str:
    """The tiles' table and the rows that they speak for."""
    tiles = [row for row in rows if row["what"] == "tile"]
    if not tiles:
        return "No tile was tried.\n"
    now = {(row["kernel"], row["case"]): row for row in tiles if row.get("now") and "device_s" in row}
    table = "\n".join(_line(row, now.get((row["kernel"], row["case"]))) for row in tiles)
    parts = [f"{HEAD}\n{table}\n\n{NOTE}\n"]
    proposed = [row for row in rows if row["what"] == "proposed"]
    if proposed:
        lines = "\n".join(
            f'    "{row["kernel"]}": {{{row["row"]}}},  # {row["case"]}: {_gain(row)}' for row in proposed
        )
        parts.append(f"Rules for the tables of kernels/:\n\n```\n{lines}\n```\n")
    parts += [
        f"{row['case']} by chunks of {row['chunk_rows'] or 'the default'}: {row['device_s'] * 1e6:,.1f} µs\n"
        for row in rows
        if row["what"] == "chunk"
    ]
    return "\n".join(parts)


def _gain(row: Row) -> str:
    """How much faster the best tile is than today's."""
    if row["speedup"] == 1:
        return "as now, the fastest"
    return f"{row['now_s'] * 1e6:,.1f} → {row['device_s'] * 1e6:,.1f} µs, {row['speedup']:.2f} times as fast"


def _line(row: Row, now: Row | None) -> str:
    tile = f"({', '.join(str(size) for size in row['tile'] if size is not None)})" if "tile" in row else ""
    head = f"| {row['kernel']} | {row['case']} | {tile}{' now' if row.get('now') else ''} |"
    if "device_s" not in row:
        return f"{head} {(row.get('error') or 'left out: ' + row.get('skipped', '')).replace('|', '/')} | | |"
    times = "" if now is None else f"{now['device_s'] / row['device_s']:.2f}"
    wrong = "" if row["ok"] else " (wrong)"
    return f"{head} {row['device_s'] * 1e6:,.1f} | {times} | {row['difference']:.1e}{wrong} |"


def draw(rows: list[Row], path: Path) -> None:
    """Every tile's time over that of today's, a line a search."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tiles = [row for row in rows if row["what"] == "tile" and "device_s" in row]
    now = {(row["kernel"], row["case"]): row["device_s"] for row in tiles if row["now"]}
    found = list(now)
    figure, axis = plt.subplots(figsize=(9, 1.5 + 0.5 * max(len(found), 2)))
    for number, key in enumerate(found):
        for row in (row for row in tiles if (row["kernel"], row["case"]) == key):
            ratio = row["device_s"] / now[key]
            axis.plot(ratio, number, "o" if row["ok"] else "x", color="black" if row["now"] else "tab:blue")
            text = ",".join(str(size) for size in row["tile"] if size)
            axis.annotate(text, (ratio, number), rotation=35, fontsize=6, xytext=(2, 4), textcoords="offset points")
    axis.axvline(1, color="grey", linewidth=0.8)
    axis.margins(x=0.12)
    axis.set_yticks(range(len(found)), [f"{kernel}: {case}" for kernel, case in found])
    axis.set(xlabel="time over that of today's tile", ylim=(len(found) - 0.3, -0.8))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
