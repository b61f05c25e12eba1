"""The scores of probes.json as a table of a run's report."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from fastkd.files import Record
from fastkd.reports.tables import Cell, Cells, Table, numeric

log = logging.getLogger(__name__)
NAMES = {"tokens": "masked tokens", "pos": "parts of speech", "blimp": "minimal pairs"}
MODELS = {"model": "student", "untrained": "random weights", "teacher": "teacher"}


def probe_table(folder: Path) -> Table:
    """Each probe's scores of a run's student and its references, in percent; empty if it was not probed."""
    head = ("probe", "model", "score", "± standard error", "layer", "over the embeddings", "items")
    try:
        probes = json.loads((folder / "probes.json").read_bytes())["probes"]
        rows = [row for name, found in probes.items() for row in _rows(name, found)]
    except FileNotFoundError:
        rows = []
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        log.warning(
            "%s is damaged, its scores are left out: python -m fastkd.probe %s makes it again",
            folder / "probes.json",
            folder,
        )
        rows = []
    return Table(head, rows)


def _rows(name: str, found: Record) -> Iterator[Cells]:
    for model, scores in found["scores"].items():
        what, key = NAMES.get(name, name), f"probe.{name}.{model}"
        yield (
            what,
            MODELS.get(model, model),
            _percent(key, scores.get("accuracy")),
            _percent(f"{key}.stderr", scores.get("stderr")),
            numeric(f"{key}.layer", scores.get("best")),
            _percent(f"{key}.context", scores.get("context"), sign="+"),
            numeric(f"{key}.items", found["items"]),
        )


def _percent(name: str, share: float | None, sign: str = "") -> Cell:
    return numeric(name, share, None if share is None else f"{100 * share:{sign}.1f}")
