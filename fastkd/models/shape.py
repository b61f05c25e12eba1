"""The sizes of an encoder, as ``--student`` and config.json name them. Imports no torch, which takes seconds to load."""

from __future__ import annotations

import re
from typing import NamedTuple

LARGEST = 2**31 - 1  # of a size of an encoder: no table of any model comes near it
MOST_LAYERS = 10_000  # in a config.json that comes from anywhere
# Sizes by their names in config.json, where these are others.
NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_positions": "max_position_embeddings",
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "intermediate_size",
    "max_positions",
    "type_vocab_size",
)


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


def require_size(name: str, value: object, *, least: int = 1, most: int = LARGEST) -> None:
    """Refuse a value of config.json, by its ``name`` there, that no model has for a size.

    Raises:
        ValueError: it is no whole number, or one far out of range.
    """
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}, not a whole number from {least} to {most:,}; take a sound config.json")
