"""score_mse in PyTorch: block by block on a CPU, in float64 or without Triton; and in time linear in the sequences' lengths."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastkd.kernels import buckets


def value_and_gradients(
    query_s: Tensor,
    key_s: Tensor,
    query_t: Tensor,
    key_t: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of whole score rows in a reused buffer: Σ R², and dq, dk without their factor 2/(A·Σ n²)."""
    total = torch.zeros((), dtype=torch.float64, device=query_s.device)
    dq, dk = (torch.zeros(x.shape, dtype=stored(x.dtype), device=x.device) for x in (query_s, key_s))
    buffers = buckets.Buffers(query_s)
    alpha_s, alpha_t = (1 / math.sqrt(x.shape[1] / num_heads) for x in (query_s, query_t))
    with buckets.exact_products(query_s, key_s, query_t, key_t):
        for bucket in buckets.by_length(cu_seqlens, num_heads, len(query_s), max_seqlen):
            qs, ks, qt, kt = (bucket.heads(x, num_heads) for x in (query_s, key_s, query_t, key_t))
            grad_q, grad_k = torch.zeros_like(qs), torch.zeros_like(ks)
            for pair, row in buckets.blocks(len(qs), bucket.length):
                r = buffers.product(0, qs[pair, row], ks[pair], alpha_s)
                r.baddbmm_(qt[pair, row], kt[pair].transpose(1, 2), alpha=-alpha_t)
                total += torch.linalg.vector_norm(r, dim=-1).double().square().sum()
                grad_q[pair, row].baddbmm_(r, ks[pair], alpha=alpha_s)
                grad_k[pair].baddbmm_(r.transpose(1, 2), qs[pair, row], alpha=alpha_s)
            bucket.scatter(dq, grad_q)
            bucket.scatter(dk, grad_k)
    return total, dq, dk


def gram(
    query_s: Tensor,
    key_s: Tensor,
    query_t: Tensor,
    key_t: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The linear-time form, on any device: Σ R², and dq, dk without their factor 2/(A·Σ n²)."""
    dq, dk = (torch.zeros(x.shape, dtype=stored(x.dtype), device=x.device) for x in (query_s, key_s))
    on_host = cu_seqlens.device.type == "cpu"
    parts = buckets.by_length(cu_seqlens, num_heads, len(query_s), max_seqlen) if on_host else [
        buckets.padded(cu_seqlens, max_seqlen)
    ]  # fmt: skip
    alpha_s, alpha_t = (1 / math.sqrt(x.shape[1] / num_heads) for x in (query_s, query_t))
    total = torch.zeros((), dtype=torch.float64, device=query_s.device)
    with buckets.exact_products(query_s.float()):
        for bucket in parts:
            q, k, qt, kt = (bucket.heads(x, num_heads) for x in (query_s, key_s, query_t, key_t))
            qq, kk, qtq, ktk = q.mT @ q, k.mT @ k, qt.mT @ q, kt.mT @ k
            total += alpha_s**2 * (qq * kk).sum(dtype=torch.float64)
            total -= 2 * alpha_s * alpha_t * (qtq * ktk).sum(dtype=torch.float64)
            total += alpha_t**2 * ((qt.mT @ qt) * (kt.mT @ kt)).sum(dtype=torch.float64)
            bucket.scatter(dq, alpha_s * (alpha_s * (q @ kk) - alpha_t * (qt @ ktk)))
            bucket.scatter(dk, alpha_s * (alpha_s * (k @ qq) - alpha_t * (kt @ qtq)))
    return total, dq, dk


def stored(dtype: torch.dtype) -> torch.dtype:
    """Of gradients without their factor, which are beyond float16's largest number where scores differ by 100."""
    return torch.float32 if dtype == torch.float16 else dtype
