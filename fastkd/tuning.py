"""A learning-rate search for a row: equal mini-budgets, charged separately, decided on held-out text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from fastkd.run_folder import read_run

BUDGET_SHARE = 0.1  # of the row's budget, for each rate tried


def candidates(default: float, count: int) -> list[float]:
    """``count`` rates around the default, each twice the one before; with an even count one more above than below."""
    return [default * 2.0 ** (k - (count - 1) // 2) for k in range(count)]


def tune(default: float, count: int, try_rate: Callable[[float, Path], None], folder: Path) -> tuple[float, float]:
    """The rate with the lowest held-out loss, and the GPU-seconds that finding it took.

    Args:
        try_rate: runs one rate's mini-budget into a folder, or finds it done.
        folder: holds the tries and ``tuning.json``; with that there, nothing is run.
    """
    record = folder / "tuning.json"
    if not record.exists():
        tried = []
        for rate in candidates(default, count):
            where = folder / f"lr-{rate:g}"
            try_rate(rate, where)
            result = read_run(where)
            tried.append({"lr": rate, "loss": result.validations[-1]["loss"], "charged_s": result.charged_s})
        record.write_text(json.dumps(tried, indent=1))
    tried = json.loads(record.read_text())
    finite = [entry for entry in tried if entry["loss"] is not None]
    if not finite:
        raise ValueError(
            f"no learning rate of {[entry['lr'] for entry in tried]} gave a finite loss: give a smaller --lr"
        )
    best = min(finite, key=lambda entry: entry["loss"])
    return best["lr"], sum(entry["charged_s"] for entry in tried)
