"""Attention over sequences packed end to end, with one signature and several backends.

Shapes: Tq query rows, Tk key rows, B sequences, H heads, d head width. Sequence b owns the query rows
``cu_seqlens_q[b]:cu_seqlens_q[b + 1]`` and the key rows ``cu_seqlens_k[b]:cu_seqlens_k[b + 1]``; no row sees
another sequence. Query rows may be fewer than key rows: the last layer asks for its predicted rows alone.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.models.attention_cpu import cpu_attention

BACKENDS = ("flash_attn", "varlen_attn", "sdpa")  # fastest first


@lru_cache(maxsize=1)
def available_backends() -> tuple[str, ...]:
    """The backends that this installation can run on its devices, fastest first; ``sdpa`` is always one."""
    found = ["sdpa"]
    if torch.cuda.is_available():
        if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
            found.insert(0, "varlen_attn")
        if importlib.util.find_spec("flash_attn") is not None:
            found.insert(0, "flash_attn")
    return tuple(found)


def choose_backend(
    device: torch.device | str, dtype: torch.dtype, dropout: float = 0.0, override: str | None = None
) -> str:
    """The backend for tensors of ``dtype`` on ``device``: the fastest that can do it, or ``override``.

    Raises ValueError where ``override`` is unknown, not installed, or cannot do what is asked: only ``sdpa``
    takes float32 or runs off CUDA, and ``varlen_attn`` cannot drop attention weights.
    """
    refusals = {name: _refusal(name, torch.device(device), dtype, dropout) for name in BACKENDS}
    if override is None:
        return next(name for name, refusal in refusals.items() if refusal is None)
    if override not in refusals:
        raise ValueError(f"--attention {override!r} is unknown; take one of {', '.join(BACKENDS)}")
    if refusals[override] is not None:
        raise ValueError(f"--attention {override} {refusals[override]}")
    return override


def _refusal(name: str, device: torch.device, dtype: torch.dtype, dropout: float) -> str | None:
    """Why the backend cannot be taken, or None."""
    if name == "sdpa":
        return None
    if name not in available_backends():
        install = "pip install 'fastkd[flash]'" if name == "flash_attn" else "torch >= 2.11"
        return f"is not available here (it needs CUDA and {install}); use --attention sdpa"
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return f"needs 16-bit tensors on CUDA, not {dtype} on {device.type}; use --attention sdpa"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0; use --attention sdpa"
    if dropout and name == "varlen_attn":
        return f"cannot drop attention weights; use --dropout 0 (now {dropout}) or --attention sdpa"
    return None


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
        backend = choose_backend(q.device, q.dtype, dropout, backend)
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
    """Pads each sequence to the longest, masks the padded keys, and takes the real query rows back."""
    at_q, _ = _padding(cu_q, max_q, q.shape[0])
    at_k, real_k = _padding(cu_k, max_k, k.shape[0])
    # The first key counts as real in an empty sequence: a softmax over nothing would be NaN.
    real_k = real_k | (torch.arange(max_k, device=k.device) == 0)
    padded_q, padded_k, padded_v = (x[at].transpose(1, 2) for x, at in ((q, at_q), (k, at_k), (v, at_k)))
    out = F.scaled_dot_product_attention(
        padded_q, padded_k, padded_v, attn_mask=real_k[:, None, None, :], dropout_p=dropout
    )
    row = torch.arange(q.shape[0], device=q.device)
    sequence = torch.searchsorted(cu_q[1:].contiguous(), row, right=True)
    return out[sequence, :, row - cu_q[sequence]]


def _padding(cu_seqlens: Tensor, longest: int, rows: int) -> tuple[Tensor, Tensor]:
    """[B, longest] packed row of each padded place, and whether that place is real."""
    place = cu_seqlens[:-1, None] + torch.arange(longest, device=cu_seqlens.device)
    return place.clamp(max=rows - 1), place < cu_seqlens[1:, None]
