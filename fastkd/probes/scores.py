"""Scores of a probe: accuracy with a standard error over texts, bits of the right items, and lines to print."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np


def standard_error(values: np.ndarray, sizes: Sequence[int]) -> float:
    """Of the mean of values [n] in groups of these sizes: items of one text are not independent.

    √(G/(G−1) · Σ_g (Σ_{i in g} (x_i − x̄))²) / n over G groups (Cameron and Miller 2015, section II.B); nan for one group.
    """
    if len(sizes) < 2:
        return math.nan
    sums = deviations(values, sizes)
    return float(np.sqrt(len(sizes) / (len(sizes) - 1) * (sums**2).sum()) / len(values))


def deviations(values: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Of values [n] in G groups of these sizes, each group's sum of x_i − x̄: [G]."""
    return np.bincount(np.repeat(np.arange(len(sizes)), sizes), values - values.mean(), len(sizes))


def packed(right: np.ndarray) -> str:
    """Bits of [n] bool, the first item's first, in base64."""
    return base64.b64encode(np.packbits(right).tobytes()).decode("ascii")


def unpacked(text: str, count: int) -> np.ndarray:
    """The [n] bool that ``packed`` packed.

    Raises:
        ValueError: the text holds another number of items.
    """
    bits = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(bits) != -(-count // 8):
        raise ValueError(f"{len(bits)} bytes do not hold {count} items: make probes.json again")
    return np.unpackbits(bits, count=count).astype(bool)


def lines(record: Mapping[str, Any]) -> Iterator[str]:
    """What to print of a record: for each probe its items, then each model."""
    for name, found in record["probes"].items():
        yield f"{name}: {found['what']}, {found['items']:,} items in {len(found['groups']):,} {_groups(found)}"
        for model, scores in found["scores"].items():
            yield f"  {model:<11}{_line(scores)}"


def _groups(found: Mapping[str, Any]) -> str:
    """What the items are in, and what can be told without reading them."""
    if "majority" not in found:
        return "paradigms; chance is 50 %"
    return f"texts; the most frequent answer is right for {100 * found['majority']:.1f} %"


def _line(scores: Mapping[str, Any]) -> str:
    if "absent" in scores:
        return str(scores["absent"])
    score = f"{100 * scores['accuracy']:.1f} ± {100 * scores['stderr']:.1f} %"
    if "layers" not in scores:
        return score
    each = " ".join(f"{100 * layer['accuracy']:.1f}" for layer in scores["layers"])
    gain = f"{100 * scores['context']:+.1f} ± {100 * scores['context_stderr']:.1f}"
    return f"{score} (layer {scores['best']}; {gain} over the embeddings; layers from 0: {each})"
