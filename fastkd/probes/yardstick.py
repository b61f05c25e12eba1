"""The items of all probes for one tokenizer, and the scores of any encoder on them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastkd.data.assembly import SpecialIds
from fastkd.files import Record, json_sha256
from fastkd.probes import blimp, pos
from fastkd.probes.readout import read_out
from fastkd.probes.tokens import masked_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastkd.data.shards import Shards
    from fastkd.probes.items import Items
    from fastkd.probes.labelled import Labelled
    from fastkd.probes.subject import Subject

log = logging.getLogger(__name__)
NO_HEAD = "no MLM head: it gives no token a probability"
WHAT = {"tokens": "identity of masked tokens", "pos": "part of speech of words"}


class ReadOut(NamedTuple):
    """The items of a probe that is a linear read-out: ``tokens`` or ``pos``."""

    fit: Items
    test: Items


@dataclass(frozen=True)
class Yardstick:
    """What encoders with one tokenizer are scored on. They may be of any shape."""

    tokenizer: PreTrainedTokenizerBase
    read_outs: Mapping[str, ReadOut]  # by probe
    paradigms: blimp.Paradigms | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, shards: Shards | None, labelled: Labelled) -> Yardstick:
        """From a corpus (None: no ``tokens``) and labelled data.

        Raises:
            ValueError: any of them is too small.
        """
        found = {}
        if shards is not None:
            found["tokens"] = ReadOut(*masked_text(shards, SpecialIds.of(tokenizer)))
        if labelled.treebank is not None:
            found["pos"] = ReadOut(*pos.tagged_text(labelled.treebank, tokenizer))
        return cls(tokenizer, found, labelled.paradigms)

    def record(self) -> dict[str, Record]:
        """What is told of each probe's items. Scores with equal ``items_sha256`` can be compared item by item."""
        found = {name: _about(name, items) for name, items in self.read_outs.items()}
        return found | ({"blimp": _about_pairs(self.paradigms)} if self.paradigms is not None else {})

    def score(self, subject: Subject) -> dict[str, Record]:
        """The scores of an encoder by probe.

        Raises:
            ValueError: a sentence of a minimal pair is longer than it reads.
        """
        found, special = {}, SpecialIds.of(self.tokenizer)
        for name, (fit, test) in self.read_outs.items():
            start = time.perf_counter()
            found[name] = read_out(subject.encoder, special, fit, test, subject.longest)
            log.info("%s of %s: %.1f s", name, subject.label, time.perf_counter() - start)
        if self.paradigms is not None:
            start = time.perf_counter()
            found["blimp"] = self._pairs(subject, self.paradigms, special)
            log.info("blimp of %s: %.1f s", subject.label, time.perf_counter() - start)
        return found

    def _pairs(self, subject: Subject, paradigms: blimp.Paradigms, special: SpecialIds) -> Record:
        if subject.encoder.head is None:
            return {"absent": NO_HEAD}
        return blimp.score(subject.encoder, self.tokenizer, special, paradigms, subject.longest)


def _about(name: str, items: ReadOut) -> Record:
    labels, counts = np.unique(items.fit.labels, return_counts=True)
    return {
        "what": WHAT[name],
        "fitted": len(items.fit),
        "items": len(items.test),
        "items_sha256": json_sha256([items.fit.sha256, items.test.sha256]),
        "groups": items.test.sizes,
        "majority": float((items.test.labels == labels[counts.argmax()]).mean()),
    }


def _about_pairs(paradigms: blimp.Paradigms) -> Record:
    sizes = [len(pairs) for pairs in paradigms.values()]
    return {
        "what": "minimal pairs by pseudo-log-likelihood",
        "items": sum(sizes),
        "items_sha256": blimp.digest(paradigms),
        "groups": sizes,
    }
