"""Attention over sequences packed end to end, with one signature and several backends.

Shapes: Tq query rows, Tk key rows, B sequences, H heads, d head width. Sequence b owns the query rows
``cu_seqlens_q[b]:cu_seqlens_q[b + 1]`` and the key rows ``cu_seqlens_k[b]:cu_seqlens_k[b + 1]``; no row sees
another sequence. Query rows may be fewer than key rows: the last layer asks for its predicted rows only.

The code of a backend is imported where it is called, since not all are installed.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.models.attention_cpu import cpu_attention

BACKENDS = ("triton", "flash_attn", "varlen_attn", "sdpa")  # fastest first
FUNCTIONS = {
    "triton": ("triton", "jit"),
    "flash_attn": ("flash_attn", "flash_attn_varlen_func"),
    "varlen_attn": ("torch.nn.attention.varlen", "varlen_attn"),
}
REMEDIES = {
    "triton": "pip install triton",
    "flash_attn": "pip install 'fastkd[flash]'",
    "varlen_attn": "it came with torch 2.11",
}
LEAST_CAPABILITY = (8, 0)  # of a GPU, for FlashAttention and for products in bfloat16
HEAD_STEP, WIDEST_HEAD = 8, 256  # FlashAttention's head widths: "head_size must be a multiple of 8", at most 256


class Sequences(NamedTuple):
    """Sequences packed end to end, as a layer reads them."""

    position_ids: Tensor  # [T] int64, from 0 within each sequence
    cu_seqlens: Tensor  # [B+1] int32
    max_seqlen: int  # bounds their lengths


def has_function(module: str, function: str) -> bool:
    """Whether a module can be imported and has the function: a package may have another API, or fail to load."""
    try:
        return hasattr(importlib.import_module(module), function)
    except Exception:  # a library built for another torch raises anything
        return False


@lru_cache(maxsize=1)
def available_backends() -> tuple[str, ...]:
    """The backends that this installation can run on its devices, fastest first; ``sdpa`` is always one."""
    if not torch.cuda.is_available():
        return ("sdpa",)
    return tuple(name for name in BACKENDS if name not in FUNCTIONS or has_function(*FUNCTIONS[name]))


@dataclass(frozen=True)
class Setting:
    """What decides which backends can be taken."""

    device: str  # its type
    capability: tuple[int, int] | None  # of a GPU
    dtype: torch.dtype
    head_width: int
    dropout: float
    longest: int  # tokens of a sequence, at most
    available: tuple[str, ...] = BACKENDS

    @classmethod
    def on(
        cls, device: torch.device | str, dtype: torch.dtype, head_width: int, dropout: float, longest: int
    ) -> Setting:
        """On a device of this machine."""
        device = torch.device(device)
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        return cls(device.type, capability, dtype, head_width, dropout, longest, available_backends())

    def refusal(self, name: str) -> str | None:
        """Why the backend cannot be taken, or None: only ``sdpa`` can do everything everywhere."""
        if name == "sdpa":
            return None
        if self.device != "cuda":
            return f"it needs a CUDA device, not a {self.device}"
        if name not in self.available:
            return f"{'.'.join(FUNCTIONS[name])} cannot be imported: {REMEDIES[name]}"
        kernel = "the kernel" if name == "triton" else "FlashAttention"
        if self.capability is not None and self.capability < LEAST_CAPABILITY:
            return f"{kernel} needs compute capability 8.0"
        if self.dtype not in (torch.float16, torch.bfloat16):
            return f"{str(self.dtype).removeprefix('torch.')}: {kernel} takes 16 bits"
        if self.dropout and name != "flash_attn":
            return f"dropout {self.dropout:g}: {name} cannot drop attention weights"
        return self._too_wide_or_long(name)

    def _too_wide_or_long(self, name: str) -> str | None:
        from fastkd.kernels.packed_attention import MAX_LENGTH, MAX_WIDTH

        if name != "triton" and (self.head_width % HEAD_STEP or self.head_width > WIDEST_HEAD):
            return f"head width {self.head_width}: FlashAttention takes multiples of {HEAD_STEP} up to {WIDEST_HEAD}"
        if name == "triton" and self.head_width > MAX_WIDTH:
            return f"head width {self.head_width}: the kernel takes up to {MAX_WIDTH}"
        if name == "triton" and self.longest > MAX_LENGTH:
            return f"sequences of {self.longest} tokens: the kernel takes up to {MAX_LENGTH}"
        return None

    def choose(self, override: str | None = None) -> str:
        """The fastest backend that can be taken, or ``override``.

        Raises:
            ValueError: ``override`` is unknown, or cannot be taken.
        """
        if override is None:
            return next(name for name in BACKENDS if self.refusal(name) is None)
        if override not in BACKENDS:
            raise ValueError(f"--attention {override!r} is unknown; take one of {', '.join(BACKENDS)}")
        refusal = self.refusal(override)
        if refusal is not None:
            raise ValueError(
                f"--attention {override} cannot be taken ({refusal}); use --attention sdpa, or leave it out"
            )
        return override

    def remark(self, name: str) -> str | None:
        """Why a GPU takes ``sdpa``, and what that costs; None for the other backends and on a CPU."""
        if name != "sdpa" or self.device != "cuda":
            return None
        return f"{self.refusal('varlen_attn') or 'as asked'}; sequences are padded, up to 3 times the rows"


def choose_backend(
    device: torch.device | str,
    dtype: torch.dtype,
    head_width: int,
    dropout: float,
    longest: int,
    override: str | None = None,
) -> str:
    """The backend for heads of ``head_width`` in ``dtype`` on ``device``: the fastest that can do it, or ``override``.

    ``longest`` bounds the tokens of a sequence. Raises ValueError if ``override`` is unknown, not installed, or cannot do it:
    only ``sdpa`` takes float32, heads of any width, or runs off CUDA, ``triton`` takes sequences of at most 128
    tokens, and neither that nor ``varlen_attn`` can drop attention weights.
    """
    return Setting.on(device, dtype, head_width, dropout, longest).choose(override)


def varlen_attention(
    q: Tensor,  # [Tq, H, d]
    k: Tensor,  # [Tk, H, d]
    v: Tensor,  # [Tk, H, d]
    cu_seqlens_q: Tensor,  # [B+1] int32
    cu_seqlens_k: Tensor,  # [B+1] int32
    max_q: int,
    max_k: int,
    *,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:  # [Tq, H, d]
    """softmax(q kᵀ / √d) v within each sequence; zero-length sequences are allowed.

    ``max_q`` and ``max_k`` bound the lengths (host integers: nothing here waits for a GPU); ``dropout`` is the
    probability of dropping an attention weight; ``backend`` as in `choose_backend`, which refuses with ValueError.
    """
    if backend is None or not torch.compiler.is_compiling():  # the encoder has chosen before a graph is traced
        backend = choose_backend(q.device, q.dtype, q.shape[-1], dropout, max(max_q, max_k), backend)
    if backend == "triton":
        from fastkd.kernels.packed_attention import packed_attention

        return packed_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max(max_q, max_k))
    if backend == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, dropout_p=dropout)
    if backend == "varlen_attn":
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k)
        assert isinstance(out, Tensor)  # a tuple only where auxiliary outputs are asked for
        return out
    if q.device.type == "cpu" and not dropout and not torch.compiler.is_compiling():
        return cpu_attention(q, k, v, cu_seqlens_q, cu_seqlens_k)
    return _padded_sdpa(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, dropout)


def _padded_sdpa(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, dropout: float
) -> Tensor:
    """Pads each sequence to the longest, masks the padded keys, and takes back the real query rows."""
    at_q, _ = _padding(cu_q, max_q, q.shape[0])
    at_k, real_k = _padding(cu_k, max_k, k.shape[0])
    # The first key counts as real in an empty sequence: a softmax over nothing would be NaN.
    real_k = real_k | (torch.arange(max_k, device=k.device) == 0)
    padded_q, padded_k, padded_v = (x[at].transpose(1, 2) for x, at in ((q, at_q), (k, at_k), (v, at_k)))
    out = F.scaled_dot_product_attention(
        padded_q, padded_k, padded_v, attn_mask=real_k[:, None, None, :], dropout_p=dropout
    )
    # Back to packed rows: the number of sequences that end at or before row r is the number of its own.
    row = torch.arange(q.shape[0], device=q.device)
    sequence = torch.searchsorted(cu_q[1:].contiguous(), row, right=True)
    return out[sequence, :, row - cu_q[sequence]]


def _padding(cu_seqlens: Tensor, longest: int, rows: int) -> tuple[Tensor, Tensor]:
    """[B, longest] packed row of each padded place, and whether that place is real."""
    place = cu_seqlens[:-1, None] + torch.arange(longest, device=cu_seqlens.device)
    return place.clamp(max=rows - 1), place < cu_seqlens[1:, None]
