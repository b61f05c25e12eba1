"""The search for a row's learning rate: equal small budgets, charged separately, decided by the held-out loss."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd import files
from fastkd.distributed import World, on_main
from fastkd.files import Record, finite, sum_holds, with_sum
from fastkd.health import Diverged
from fastkd.run_folder import read_run

log = logging.getLogger(__name__)
BUDGET_SHARE = 0.1  # of the row's budget, for each rate tried


@dataclass(frozen=True)
class Search:
    """The rate with the lowest held-out loss, and the GPU-seconds that the search took."""

    lr: float
    charged_s: float


def candidates(default: float, count: int) -> list[float]:
    """``count`` rates around the default, each twice the one before; an even count has one more above than below."""
    return [default * 2.0 ** (k - (count - 1) // 2) for k in range(count)]


def tune(default: float, count: int, try_rate: Callable[[float, Path], None], folder: Path, world: World) -> Search:
    """Search, or read what a search found before. Every rank trains; rank 0 decides and writes.

    Args:
        try_rate: trains with one rate into a folder, or finds that done.
        folder: holds a folder for each rate, and ``tuning.json``; if that exists, nothing is run.

    Raises:
        ValueError: no rate gave a finite loss.
        Diverged: by teacher or text, whatever the rate.
    """
    known = on_main(world, lambda: _tried(folder))
    if not known:
        places = {rate: folder / f"lr-{rate:g}" for rate in candidates(default, count)}
        diverged = {rate for rate, place in places.items() if _diverges(try_rate, rate, place)}
        on_main(world, lambda: _write(folder, places, diverged))
    search = on_main(world, lambda: searched(folder))
    if search is None:
        tried = candidates(default, count)
        raise ValueError(f"no learning rate of {tried} gave a finite loss: give a smaller --lr")
    return search


def searched(folder: Path) -> Search | None:
    """What the search in a folder found; None if there was none, or if no rate gave a finite loss."""
    tried = _tried(folder)
    best = min((entry for entry in tried if entry["loss"] is not None), key=lambda entry: entry["loss"], default=None)
    return None if best is None else Search(best["lr"], sum(entry["charged_s"] for entry in tried))


def _tried(folder: Path) -> list[Record]:
    """The rates of tuning.json; none if it is not there. A damaged one is set aside: it is made again from their runs."""
    path = folder / "tuning.json"
    try:
        tried = list(json.loads(path.read_bytes()))
        if all(
            isinstance(entry, dict) and {"lr", "loss", "charged_s"} <= entry.keys() and sum_holds(entry)
            for entry in tried
        ):
            return tried
    except FileNotFoundError:
        return []
    except (ValueError, TypeError):
        pass
    log.warning("%s is damaged, and made again: kept as %s", path, files.set_aside(path).name)
    return []


def _diverges(try_rate: Callable[[float, Path], None], rate: float, place: Path) -> bool:
    try:
        try_rate(rate, place)
    except Diverged as error:
        if error.cause != "rate":  # every rate would meet the same teacher and text
            raise
        return True
    return False


def _write(folder: Path, places: dict[float, Path], diverged: set[float]) -> None:
    tried: list[dict[str, Any]] = []
    for rate, place in places.items():
        run = read_run(place)
        loss = None if rate in diverged or not run.validations else run.validations[-1]["loss"]
        tried.append(with_sum(finite({"lr": rate, "loss": loss, "charged_s": run.charged_s})))
    files.write(folder / "tuning.json", json.dumps(tried, indent=1) + "\n")
