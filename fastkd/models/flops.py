"""Closed-form FLOPs of an encoder: matrix products only, 2·m·n·k each, from real lengths.

What one layer takes, its family says (``families/``). A backward takes twice its forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastkd.models.encoder import EncoderConfig
    from fastkd.models.needs import Needs


def forward_flops(config: EncoderConfig, needs: Needs, *, tokens: int, pairs: int, predicted: int) -> int:
    """FLOPs of one `Encoder.forward` with these needs; the decoder to the vocabulary is the loss's.

    ``pairs`` is Σ length² over sequences. Predicted rows attend to their own sequence: their share of ``pairs`` is taken
    as predicted / tokens.
    """
    family, L = config.family, config.num_layers
    layers = (
        family.layer_flops(config, n, needs.extent(n, L), tokens=tokens, pairs=pairs, predicted=predicted)
        for n in range(1, needs.depth(L) + 1)
    )
    return sum(layers) + (family.head_flops(config, predicted) if needs.logits else 0)


def backward_flops(forward: int) -> int:
    """FLOPs of a backward through something that took ``forward`` FLOPs forward."""
    return 2 * forward
