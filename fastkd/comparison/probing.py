"""Head-free scores of a comparison's models: what the probes of ``fastkd.probes`` read out of each, kept in its probes.json."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastkd.probes.options import NONE, ProbeOptions
from fastkd.probes.scores import unpacked

if TYPE_CHECKING:
    from fastkd.files import Record

log = logging.getLogger(__name__)
FILE = "probes.json"  # of a run folder
TITLES = {"tokens": "token probe", "pos": "POS probe", "blimp": "BLiMP"}  # the names of the scores, in percent
CONTEXT = "over the embeddings"  # after a title: the best layer's score minus that of the embeddings


class Prober:
    """Probes models, all by the same probes on the same items."""

    def __init__(self, probes: str | None, data: Sequence[str], corpus: Sequence[str], text_field: str) -> None:
        """Options as ``CompareConfig`` describes them; ``corpus`` and ``text_field``: those of the rows.

        Raises:
            ValueError: an unknown probe, or data that is missing or damaged.
        """
        from fastkd.probes import labelled

        self.data, self.corpus, self.text_field = list(data), list(corpus), text_field
        self.asked = probes is not None
        self.wanted: Sequence[str] = ()
        if probes != NONE:
            self.wanted, _ = labelled.read(ProbeOptions(probes=probes).chosen(), self.data)

    def probe(self, model: Path | str, folder: Path) -> None:
        """Probe a model into ``folder/probes.json``, unless that is there.

        Raises:
            ValueError: the corpus is too small for a probe that was asked for. By default, no model is probed then.
        """
        if not self.wanted or set(_found(folder)) >= set(self.wanted):
            return
        from fastkd.probes.evaluation import probe

        try:
            probe(
                model, self.wanted, probe_data=self.data, corpus=self.corpus, text_field=self.text_field, references=False,
                output_dir=folder,
            )  # fmt: skip
        except ValueError as error:
            if self.asked:
                raise
            log.warning("no probes: %s", error)
            self.wanted = ()


def scores_of(folder: Path) -> dict[str, float]:
    """The scores of a folder's probes.json, in percent."""
    found = {}
    for name, about in _found(folder).items():
        scores = about["scores"]["model"]
        if "accuracy" in scores:
            found[TITLES[name]] = 100 * scores["accuracy"]
        if "context" in scores:
            found[f"{TITLES[name]} {CONTEXT}"] = 100 * scores["context"]
    return found


def items_of(record: Record) -> dict[str, NDArray[np.float64]]:
    """Each score of a probes.json by text: [G], whose mean is the score as a share; by the score's name.

    A text's items are not independent of each other, so the text is what is drawn: its number of right items, times texts over
    items.
    """
    found = {}
    for name, about in record["probes"].items():
        scores, sizes = about["scores"]["model"], about["groups"]
        best = scores["layers"][scores["best"]] if "layers" in scores else scores
        if "right" in best:
            right, number = unpacked(best["right"], about["items"]), np.repeat(np.arange(len(sizes)), sizes)
            found[TITLES[name]] = np.bincount(number, right, len(sizes)) * len(sizes) / about["items"]
    return found


def _found(folder: Path) -> Record:
    """What a probes.json holds by probe; empty where there is none, or a damaged one, which is said."""
    path = folder / FILE
    try:
        record = json.loads(path.read_bytes())
        items_of(record)  # raises where a probe lacks a part
        return dict(record["probes"])
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError):
        log.warning("%s is damaged, its scores are left out: `fastkd probe %s` makes it again", path, folder)
        return {}
