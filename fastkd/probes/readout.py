"""A linear read-out of each layer: how well a ridge regression finds the labels in its hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastkd.files import Record
from fastkd.probes.packs import Packs, hidden_states
from fastkd.probes.ridge import Fit, Sums
from fastkd.probes.scores import packed, standard_error

if TYPE_CHECKING:
    from fastkd.data.assembly import SpecialIds
    from fastkd.models.encoder import Encoder
    from fastkd.probes.items import Items

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # shares of trace(XᵀX)/D; below 1e-3 nothing changes
NO_CLASS = -1  # of a label that nothing was fitted to: no prediction is right


@dataclass(frozen=True)
class LayerScore:
    """What one layer gives."""

    penalty: float
    dev: float  # accuracy on the items that choose
    right: np.ndarray  # [n] bool of the test items


def read_out(encoder: Encoder, special: SpecialIds, fit: Items, test: Items, longest: int) -> Record:
    """Fit a read-out of every layer to ``fit``, choose penalty and layer by its development part, and score ``test``.

    The penalty of a layer, then the layer, are those with the highest accuracy on the development part of ``fit``; the
    regression is then fitted to all of ``fit``. Labels that ``fit`` lacks have score 0 and, since scores add up to 1, are
    never predicted: leaving them out changes nothing.

    Returns ``accuracy``, ``stderr``, ``best`` (the layer), ``layers`` (of each: penalty, dev, accuracy, stderr, right),
    ``context`` and ``context_stderr``: the best layer's accuracy minus the embeddings', item by item.
    """
    classes, known = np.unique(fit.labels, return_inverse=True)
    wanted = np.searchsorted(classes, test.labels).clip(max=len(classes) - 1)
    wanted = np.where(classes[wanted] == test.labels, wanted, NO_CLASS)
    states, states_test = (
        hidden_states(encoder, Packs.of(items.ids, items.lengths, special, longest), items.rows)
        for items in (fit, test)
    )
    labels, right, is_dev = (torch.from_numpy(each) for each in (known, wanted, fit.is_dev))
    scores = [
        _layer(x, x_test, labels, right, is_dev, len(classes)) for x, x_test in zip(states, states_test, strict=True)
    ]
    return _record(scores, test.sizes)


def _layer(x: Tensor, x_test: Tensor, labels: Tensor, wanted: Tensor, is_dev: Tensor, classes: int) -> LayerScore:
    rest, dev = (Sums.of(x[part], labels[part], classes) for part in (~is_dev, is_dev))
    fit = Fit(rest)
    accuracies = [float((fit.at(p).predict(x[is_dev]) == labels[is_dev]).double().mean()) for p in PENALTIES]
    best = int(np.argmax(accuracies))
    found = Fit(rest + dev).at(PENALTIES[best]).predict(x_test)
    return LayerScore(PENALTIES[best], accuracies[best], (found == wanted).numpy())


def _record(scores: list[LayerScore], sizes: list[int]) -> Record:
    best = int(np.argmax([score.dev for score in scores]))
    gain = scores[best].right.astype(float) - scores[0].right
    return {
        "accuracy": float(scores[best].right.mean()),
        "stderr": standard_error(scores[best].right.astype(float), sizes),
        "best": best,
        "context": float(gain.mean()),
        "context_stderr": standard_error(gain, sizes),
        "layers": [
            {
                "penalty": score.penalty,
                "dev": score.dev,
                "accuracy": float(score.right.mean()),
                "stderr": standard_error(score.right.astype(float), sizes),
                "right": packed(score.right),
            }
            for score in scores
        ],
    }
