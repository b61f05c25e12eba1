"""What the kernel benches measured, as JSON and as Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.results import RESULTS, device_folder, in_words, measured_on
from fastkd import files

COLUMNS = (
    "case",
    "contender",
    "ms",
    "IQR",
    "speed-up",
    "gradient error",
    "peak MB",
    "of reference's",
    "of the roofline",
)


class KernelResults:
    """One row a bench: a measurement, or why there is none."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, kernel: str, case: Any, contender: str, stats: Any, **measured: float | None) -> None:
        """A measurement; ``stats`` is pytest-benchmark's."""
        times = stats.stats
        seconds = {"median_s": times.median, "iqr_s": times.iqr, "min_s": times.min, "max_s": times.max}
        counts = {"rounds": times.rounds, "iterations": stats.iterations}
        self.rows.append(self._name(kernel, case, contender) | seconds | counts | measured)

    def skip(self, kernel: str, case: Any, contender: str, reason: str) -> None:
        self.rows.append(self._name(kernel, case, contender) | {"skipped": reason})

    @staticmethod
    def _name(kernel: str, case: Any, contender: str) -> dict[str, Any]:
        return {"kernel": kernel, "case": case.name, "dtype": str(case.dtype)[6:], "contender": contender}

    def markdown(self, kernel: str) -> str:
        """The rows of a kernel; ratios are to ``reference`` in the same run."""
        cells = [self._cells(row) for row in self.rows if row["kernel"] == kernel]
        lines = [COLUMNS, ("---", "---", *["---:"] * (len(COLUMNS) - 2)), *cells]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def _cells(self, row: dict[str, Any]) -> tuple[str, ...]:
        case = row["case"] if row["dtype"] in row["case"] else f"{row['case']} {row['dtype']}"
        name = (case, row["contender"])
        if "skipped" in row:
            return (*name, f"not run: {row['skipped']}", *[""] * (len(COLUMNS) - 3))
        same = [other for other in self.rows if (other["kernel"], other["case"]) == (row["kernel"], row["case"])]
        reference = next((other for other in same if other["contender"] == "reference"), {})
        speed_up = f"{reference['median_s'] / row['median_s']:.2f}" if reference else ""
        peak, whole = row["peak_bytes"], reference.get("peak_bytes")
        return (
            *name,
            f"{row['median_s'] * 1e3:.4g}",
            f"{row['iqr_s'] * 1e3:.2g}",
            speed_up,
            f"{row['gradient_error']:.1e}",
            f"{peak / 1e6:.0f}" if peak is not None else "",
            f"{peak / whole:.1%}" if peak is not None and whole else "",
            f"{row['floor_s'] / row['device_s']:.0%}" if "floor_s" in row else "",
        )

    def write(self, kernel: str) -> Path:
        """``results/<device>/<kernel>.json`` and ``.md``; the path of the latter."""
        facts = measured_on()
        rows = [row for row in self.rows if row["kernel"] == kernel]
        path = RESULTS / device_folder() / f"{kernel}.json"
        files.write(path, json.dumps({"environment": facts, "rows": rows}, indent=1) + "\n")
        head = (
            f"# {kernel}: value and gradient together\n\n"
            f"{in_words(facts)}. Made by `pytest bench -k {kernel}`.\n\n"
            "Times are medians, with the interquartile range. Speed-up and share of memory are to `reference` in the same run; "
            "memory is what a call needs beyond its inputs, gradients included. Gradient error is the worst "
            "‖g − g₆₄‖/‖g₆₄‖ against float64 autograd of the definition, on the case's first rows.\n\n"
        )
        return files.write(path.with_suffix(".md"), head + self.markdown(kernel) + "\n")
