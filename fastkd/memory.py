"""Activation memory in closed form, and the micro-batch that fits a device."""

from __future__ import annotations

import torch

from fastkd.models.encoder import EncoderConfig, Needs

CPU_MICRO_TOKENS = 4096  # larger ones fall out of the caches without any gain
USABLE_SHARE = 0.8  # of the memory that is free before the first step


def activation_bytes(config: EncoderConfig, needs: Needs, *, tokens: int, predicted: int, itemsize: int) -> int:
    """Bytes that a forward with gradients keeps for its backward: what each layer saves, from the shapes alone.

    A layer saves its input, Q, K, V, the attention's output, two LayerNorm inputs and outputs (10·D a token) and the
    feed-forward's two inner activations (2·I); ``itemsize`` is the compute dtype's.
    """
    layers = needs.depth(config.num_layers)
    a_layer = (10 * config.hidden_size + 2 * config.intermediate_size) * tokens * itemsize
    head = 4 * config.hidden_size * predicted * itemsize if needs.rows else 0
    return layers * a_layer + 3 * config.hidden_size * tokens * itemsize + head


def largest_micro_batch(bytes_a_token: float, rank_tokens: int, pack_tokens: int, device: torch.device) -> int:
    """The most tokens of one forward: a divisor of the rank's share of a step, in whole packs, that fits the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        fits = free * USABLE_SHARE / bytes_a_token
    else:
        fits = CPU_MICRO_TOKENS
    packs = rank_tokens // pack_tokens
    divisors = [n for n in range(1, packs + 1) if packs % n == 0 and n * pack_tokens <= fits]
    return max(divisors, default=1) * pack_tokens


def smaller_micro_batch(micro_tokens: int, pack_tokens: int) -> int | None:
    """The next smaller micro-batch that divides this one, or None when it is one pack already."""
    packs = micro_tokens // pack_tokens
    divisor = next((n for n in range(2, packs + 1) if packs % n == 0), None)
    return None if divisor is None else micro_tokens // divisor
