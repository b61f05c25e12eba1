"""The first micro-batch of a run: as large as was asked for, or as memory takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fastkd.data.sizes import pack_size
from fastkd.device import memory
from fastkd.distributed import World, smallest

if TYPE_CHECKING:
    from fastkd.methods import Method
    from fastkd.models.encoder import EncoderConfig
    from fastkd.run_config import RunConfig


def activation_bytes(
    config: RunConfig,
    student: EncoderConfig,
    found: Sequence[Method],
    dtype: torch.dtype,
    device: torch.device,
    tokens: int,
) -> int:
    """What a forward of ``tokens`` keeps for its backward, by the method that keeps most."""
    keeps_attention_weights = device.type == "cpu" and (dtype == torch.bfloat16 or config.dropout > 0)
    shape = {
        "tokens": tokens,
        "predicted": round(config.mask_rate * tokens),
        "itemsize": dtype.itemsize,
        "residual_itemsize": getattr(torch, config.residual).itemsize,
        "weight_pairs": tokens * config.seq_length if keeps_attention_weights else 0,
    }

    def kept(method: Method) -> int:
        encoders = [(student, method.student_needs), *method.beside()]
        return sum(memory.activation_bytes(encoder, needs, **shape) for encoder, needs in encoders)

    return max(map(kept, found))


def first(config: RunConfig, student: EncoderConfig, found: Sequence[Method], dtype: torch.dtype, world: World) -> int:
    """Tokens of the micro-batch that was asked for, or of the largest that fits the device."""
    if config.micro_batch != "auto":
        return int(config.micro_batch)
    pack_tokens = pack_size(config.seq_length)
    a_token = activation_bytes(config, student, found, dtype, world.device, pack_tokens) / pack_tokens
    rank_tokens = config.batch_tokens // world.size
    return int(smallest(world, memory.largest_micro_batch(a_token, rank_tokens, pack_tokens, world.device)))
