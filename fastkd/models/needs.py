"""What a loss asks of a forward, and what it is given. Imports no torch, so that the methods can be listed without it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

# How far a layer runs: all its rows, the predicted ones, or its QKV projection only.
Extent = Literal["all", "predicted", "projection"]


@dataclass(frozen=True)
class Needs:
    """What a loss reads from a forward. Layers count from 1; hidden state 0 is the embeddings' output."""

    logits: bool = False  # the MLM head's input to the decoder, at predicted rows
    hidden: tuple[int, ...] = ()  # hidden states of all rows
    qkv: tuple[int, ...] = ()  # queries, keys and values of all rows
    last_rows: bool = False  # the last hidden state at predicted rows

    @property
    def rows(self) -> bool:
        """Whether predicted rows of the last layer are read."""
        return self.logits or self.last_rows

    def depth(self, num_layers: int) -> int:
        """The deepest layer of which anything must run (its QKV projection at least)."""
        return num_layers if self.rows else max((*self.hidden, *self.qkv, 0))

    def extent(self, layer: int, num_layers: int) -> Extent:
        """How far a layer up to ``depth`` must run."""
        if layer < self.depth(num_layers) or layer in self.hidden:
            return "all"
        if not self.rows:
            return "projection"
        return "all" if layer in self.qkv else "predicted"


@dataclass
class Outputs:
    """What a forward was asked for; the rest is None or absent."""

    head_rows: Tensor | None = None  # [M, D] after the MLM head's dense, gelu and LayerNorm
    last_rows: Tensor | None = None  # [M, D]
    decoder_weight: Tensor | None = None  # [V, D]: the model's own, which turns head_rows into logits
    decoder_bias: Tensor | None = None  # [V]
    hidden: dict[int, Tensor] = field(default_factory=dict)  # layer: [T, D]
    qkv: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)  # layer: 3 of [T, D]
    replaced: Tensor | None = None  # [T] bool: tokens that a method put into the text that was read
