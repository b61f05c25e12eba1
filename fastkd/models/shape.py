"""The shape that ``--student`` names. Imports no torch: a command refuses a malformed one before that is loaded."""

from __future__ import annotations

import re
from typing import NamedTuple


class Shape(NamedTuple):
    """Layers, width, attention heads and intermediate width of an encoder."""

    layers: int
    width: int
    heads: int
    intermediate: int


def parse(spec: str) -> Shape:
    """``6L-768H-12A-3072I``: layers, width, heads and intermediate width, by default four widths.

    Raises:
        ValueError: it is malformed, or the heads do not divide the width.
    """
    match = re.fullmatch(r"([1-9]\d*)L-([1-9]\d*)H-([1-9]\d*)A(?:-([1-9]\d*)I)?", spec)
    if match is None:
        raise ValueError(f"student {spec!r} is malformed; write it as 3L-384H-12A or 3L-384H-12A-1536I")
    layers, width, heads = (int(group) for group in match.groups()[:3])
    if width % heads:
        raise ValueError(f"width {width} is not divisible by {heads} heads; change either")
    return Shape(layers, width, heads, int(match[4]) if match[4] else 4 * width)
