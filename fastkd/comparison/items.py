"""Scores item by item: right or wrong for each test item, or its loss; the same items in the same order for every row.

A row of results.json carries them as ``items``: an object {score: [a number for each item]}, or the name of a probes.json
within the comparison's folder, so that results.json stays readable. The mean over the items is the score of that name in
``scores``, or a hundredth of it.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastkd.comparison.probing import FILE, items_of

if TYPE_CHECKING:
    from fastkd.files import Record

log = logging.getLogger(__name__)
Items = NDArray[np.float64]  # [N]


def file_of(run_folder: Path, comparison: Path) -> str | None:
    """The name of a run's file of items as results.json has it; None if there is none."""
    path = run_folder / FILE
    return path.relative_to(comparison).as_posix() if path.is_file() else None


def read_items(folder: Path, row: Record) -> dict[str, Items]:
    """The items of a row's scores, in the unit of the score; what cannot be read or does not fit is left out, and said.

    Args:
        folder: the comparison's.
        row: of results.json.
    """
    given = row.get("items") or {}
    if isinstance(given, str):
        given = _of_file(folder, given)
    found = {}
    for name, values in given.items():
        score = row["scores"].get(name)
        items = None if score is None else _fitting(values, score)
        if items is not None:
            found[name] = items
        elif score is not None:
            log.warning("%s, seed %s: the mean of the items of %r is not its score: left out", *_place(row), name)
    return found


def _of_file(folder: Path, name: str) -> Mapping[str, Any]:
    path = folder / name
    try:
        if path.resolve().is_relative_to(folder.resolve()):
            return items_of(json.loads(path.read_bytes()))
        problem = "is not in this folder"
    except FileNotFoundError:
        problem = "is not there"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        problem = "is damaged"
    log.warning("%s %s: intervals are made without the items of its row", path, problem)
    return {}


def _fitting(values: Any, score: float) -> Items | None:
    """The items in the unit of the score; None if they are no numbers, or if their mean is neither it nor its hundredth."""
    try:
        items = np.asarray(values, dtype=np.float64)
    except (ValueError, TypeError):
        return None
    if items.ndim != 1 or len(items) < 2 or not np.isfinite(items).all():
        return None
    close = (scale for scale in (1.0, 100.0) if math.isclose(scale * items.mean(), score, rel_tol=1e-6, abs_tol=1e-9))
    scale = next(close, None)
    return None if scale is None else scale * items


def _place(row: Record) -> tuple[str, int]:
    return row["label"], row["seed"]
