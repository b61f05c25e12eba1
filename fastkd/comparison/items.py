"""Scores item by item: right or wrong for each test item, or its loss; the same items in the same order for every row.

A row of results.json carries them as ``items``: an object {score: [a number for each item]}, or the name of a probes.json
within the comparison's folder, so that results.json stays readable. The mean over the items is the score of that name in
``scores``, or a hundredth of it.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastkd.probes.scores import deviations, unpacked

if TYPE_CHECKING:
    from fastkd.files import Record

log = logging.getLogger(__name__)
TITLES = {"tokens": "token probe", "pos": "POS probe", "blimp": "BLiMP"}  # the names of the probes' scores, in percent
CONTEXT = "over the embeddings"  # after a title: the best layer's score minus that of the embeddings
Items = NDArray[np.float64]  # [N]


def read_items(folder: Path, rows: Sequence[Record]) -> list[dict[str, Items]]:
    """The items of each row's scores, in the unit of the score. What cannot be read, does not fit, or is about other items than
    those of the rows before it, is left out, and said.

    Args:
        folder: the comparison's.
        rows: of results.json.
    """
    known: dict[str, str] = {}  # what the items of a score are
    return [_of_row(folder, row, known) for row in rows]


def _of_row(folder: Path, row: Record, known: dict[str, str]) -> dict[str, Items]:
    given: Any = row.get("items") or {}
    given, digests = _of_file(folder, given) if isinstance(given, str) else (given, {})
    found = {}
    for name, values in given.items():
        score = row["scores"].get(name)
        if score is None:
            continue
        items, digest = _fitting(values, score), digests.get(name, "")
        if items is None:
            log.warning("%s, seed %s: the mean of the items of %r is not its score: left out", *_place(row), name)
        elif known.setdefault(name, digest) != digest:
            log.warning("%s, seed %s: the items of %r are not those of other rows: left out", *_place(row), name)
        else:
            found[name] = items
    return found


def _of_file(folder: Path, name: str) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    path = folder / name
    try:
        if path.resolve().is_relative_to(folder.resolve()):
            record = json.loads(path.read_bytes())
            return items_of(record), digests_of(record)
        problem = "is not in this folder"
    except FileNotFoundError:
        problem = "is not there"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        problem = "is damaged"
    log.warning("%s %s: intervals are made without the items of its row", path, problem)
    return {}, {}


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


# ---- what a probes.json says of its model -------------------------------------------------------------------


def scores_of(record: Record) -> dict[str, float]:
    """The scores of a probes.json, in percent."""
    found = {}
    for name, about in record["probes"].items():
        scores = about["scores"]["model"]
        if "accuracy" in scores:
            found[TITLES[name]] = 100 * scores["accuracy"]
        if "context" in scores:
            found[f"{TITLES[name]} {CONTEXT}"] = 100 * scores["context"]
    return found


def items_of(record: Record) -> dict[str, Items]:
    """Each score of a probes.json by text, of BLiMP by paradigm: [G], whose mean is the score as a share; by the score's name."""
    found = {}
    for name, about in record["probes"].items():
        scores, sizes = about["scores"]["model"], about["groups"]
        if "layers" in scores:
            right = unpacked(scores["layers"][scores["best"]]["right"], about["items"])
            found[TITLES[name]] = by_text(right, sizes)
        elif len(scores.get("paradigms", ())) > 1:
            found[TITLES[name]] = np.array(list(scores["paradigms"].values()))
    return found


def by_text(right: NDArray[np.bool_], sizes: Sequence[int]) -> Items:
    """The parts [G] of texts with ``sizes`` items in the share p of n items that are right [n]: p + (right_g − p n_g) G/n.

    What is asked of one text is not independent, so the text is what is drawn, and p is a ratio of two sums over texts.
    Linearised as here, a long text differs from a short one only in how sure its share is, as in ``probes.scores.standard_error``.
    """
    parts: Items = right.mean() + deviations(right, sizes) * len(sizes) / len(right)
    return parts


def digests_of(record: Record) -> dict[str, str]:
    """What the items of each score of a probes.json are, by the score's name: only equal ones can be compared item by item."""
    return {TITLES[name]: str(about["items_sha256"]) for name, about in record["probes"].items()}
