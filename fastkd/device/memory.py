"""Activation memory in closed form, and the micro-batch that fits a device."""

from __future__ import annotations

import ctypes
import os
import sys

import torch
from torch import Tensor, nn

from fastkd.models.encoder import EncoderConfig, Needs
from fastkd.quantities import memory

CPU_MICRO_TOKENS = 2048  # twice that is at most 3% faster, and holds twice the activations
USABLE_SHARE = 0.8  # of the memory that is free before the first step
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def activation_bytes(
    config: EncoderConfig,
    needs: Needs,
    *,
    tokens: int,
    predicted: int,
    itemsize: int,
    residual_itemsize: int = 4,
    weight_pairs: int = 0,
) -> int:
    """Bytes that a forward with gradients keeps for its backward: what each layer saves, from the shapes alone.

    Each row of a layer saves its input, Q, K, V, the attention's output and the feed-forward's input (6·D) and two inner
    activations (2·I) in the compute dtype of ``itemsize`` bytes, and the input of two LayerNorms (2·D) in the residual
    stream's; less where the last layer runs for ``predicted`` rows or to its projection alone. ``weight_pairs`` is
    Σ length² where the attention keeps its weights (on a CPU: bfloat16, or with dropout), H for each pair, and 0 where
    it makes them anew.
    """
    D, I, L = config.hidden_size, config.intermediate_size, config.num_layers  # noqa: E741
    total = 4 * D * tokens  # of the embeddings' LayerNorm
    for layer in range(1, needs.depth(L) + 1):
        extent = needs.extent(layer, L)
        if extent == "projection":
            total += 4 * D * tokens * itemsize
            continue
        rows = tokens if extent == "all" else predicted
        total += rows * ((6 * D + 2 * I) * itemsize + 2 * D * residual_itemsize)
        total += config.num_heads * weight_pairs * rows // tokens * itemsize
        total += 3 * D * (tokens - rows) * itemsize  # input, keys and values of the rows that ask nothing
    return total + (3 * D * predicted * 4 if needs.logits else 0)


def require_room(config: EncoderConfig, device: torch.device) -> None:
    """Refuse a student whose weights, gradients and moments alone, 16 bytes a parameter, are more than the device holds.

    Raises:
        ValueError: naming --student.
    """
    D, I = config.hidden_size, config.intermediate_size  # noqa: E741
    tables = config.vocab_size + config.max_positions + config.type_vocab_size
    needed = 16 * (tables * D + config.num_layers * (4 * D + 2 * I) * D)
    if device.type == "cuda":
        held = torch.cuda.get_device_properties(device).total_memory
    else:
        held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > held:
        raise ValueError(
            f"the student takes {memory(needed)} for weights, gradients and AdamW's moments, the device has {memory(held)}: "
            "give a smaller --student"
        )


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


def optimizer_room(trained: nn.Module, device: torch.device) -> Tensor:
    """Memory of the device as large as what a module's optimiser will hold: gradients and two moments, in float32."""
    count = sum(parameter.numel() for parameter in trained.parameters()) if device.type == "cuda" else 0
    return torch.empty(3 * count, dtype=torch.float32, device=device)


def keep_what_is_freed(device: torch.device) -> None:
    """On a CPU, let glibc keep freed blocks of any size, as the CUDA allocator does: each step asks for the same again.

    By default blocks above 32 MiB go back to the system, and every step pays for zeroed pages anew (13% of an mlm step).
    """
    if device.type == "cpu" and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # musl has none
            libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # old ones' largest
            libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
