"""Activation memory in closed form, and the micro-batch that fits a device."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastkd.quantities import memory

if TYPE_CHECKING:
    from fastkd.models.encoder import EncoderConfig
    from fastkd.models.needs import Needs

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
    """Bytes that a forward with gradients keeps for its backward: what each layer saves, from the shapes only.

    ``itemsize`` and ``residual_itemsize`` are bytes of a number in the compute dtype and in the residual stream.
    ``weight_pairs`` is Σ length² where the attention keeps its weights (on a CPU: bfloat16, or with dropout), and 0 where
    it computes them again.
    """
    family, L = config.family, config.num_layers
    layers = (
        family.layer_bytes(
            config,
            needs.extent(n, L),
            tokens=tokens,
            predicted=predicted,
            itemsize=itemsize,
            residual_itemsize=residual_itemsize,
            weight_pairs=weight_pairs,
        )
        for n in range(1, needs.depth(L) + 1)
    )
    head = family.head_bytes(config, predicted) if needs.logits else 0
    return family.embedding_bytes(config, tokens) + sum(layers) + head


def require_room(config: EncoderConfig, device: torch.device) -> None:
    """Refuse a student whose weights, gradients and moments (16 bytes a parameter) are more than the device holds.

    Raises:
        ValueError: naming --student.
    """
    needed = 16 * config.family.parameters(config)
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


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory the process had: of the device on CUDA, resident on a CPU; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def optimizer_room(trained: nn.Module, device: torch.device) -> Tensor:
    """A tensor as large as a module's gradients and two moments in float32: it keeps room for the optimiser.

    Of a hidden matrix, Muon has one moment, and a copy of the weights during its step.
    """
    count = sum(parameter.numel() for parameter in trained.parameters()) if device.type == "cuda" else 0
    return torch.empty(3 * count, dtype=torch.float32, device=device)


def keep_what_is_freed(device: torch.device) -> None:
    """On a CPU, let glibc keep freed blocks of any size, as the CUDA allocator does: each step asks for the same blocks.

    By default blocks above 32 MiB go back to the system, and every step pays for zeroed pages again (13% of an mlm step).
    """
    if device.type == "cpu" and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # musl has none
            # 32 MiB is the most that old versions take.
            libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
            libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
