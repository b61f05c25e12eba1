"""relation_kl in PyTorch, block by block: on a CPU, in float64, or where there is no Triton."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastkd.kernels import buckets, scaling

LN2 = math.log(2)


def value_and_gradients(
    query_s: Tensor,
    key_s: Tensor | None,
    query_t: Tensor,
    key_t: Tensor | None,
    cu_seqlens: Tensor,
    num_heads: int,
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of whole score rows in reused buffers: Σ KL, and dq, dk times the first of ``factors``."""
    cross = key_s is not None
    key_s, key_t = centred(key_s), centred(key_t)
    key_s, key_t = query_s if key_s is None else key_s, query_t if key_t is None else key_t
    total = torch.zeros((), dtype=torch.float64, device=query_s.device)
    dq = torch.zeros(query_s.shape, dtype=query_s.dtype, device=query_s.device)
    dk = torch.zeros(key_s.shape if cross else 0, dtype=key_s.dtype, device=key_s.device)
    buffers = buckets.Buffers(query_s)
    alpha_s, alpha_t = (1 / math.sqrt(x.shape[1] / num_heads) for x in (query_s, query_t))
    alpha = alpha_s * factors(query_s, num_heads)[0]  # of the gradients
    width = query_s.shape[1] // num_heads
    # Not in bfloat16: a CPU multiplies in it (``exact_products``), which would round the differences q_s − q_t and k_s − k_t.
    near = query_s.dtype != torch.bfloat16 and query_s.shape == query_t.shape
    with buckets.exact_products(query_s, key_s, query_t, key_t):
        for bucket in buckets.by_length(cu_seqlens, num_heads, len(query_s), max_seqlen):
            # In a self-relation without padding the queries are the keys; padding adds the mask's column, which differs in the two.
            qs, qt = ks, kt = [bucket.heads(x, num_heads, feature="query") for x in (query_s, query_t)]
            if cross or bucket.padded:
                ks, kt = (bucket.heads(x, num_heads, feature="key") for x in (key_s, key_t))
            # [q_s − q_t, q_t]·[k_s, k_s − k_t] = q_s·k_s − q_t·k_t: with one width, so one α, α times it is Z − Y.
            q_d, k_d = (torch.cat((qs - qt, qt), -1), torch.cat((ks, ks - kt), -1)) if near else (qs, ks)
            # Up to ``width``: the mask's column gets no gradient.
            grad_q = torch.zeros_like(qs[..., :width], memory_format=torch.contiguous_format)
            grad_k = torch.zeros_like(grad_q) if cross else grad_q
            for pair, row in buckets.blocks(len(qs), bucket.length):
                y = buffers.product(0, qt[pair, row], kt[pair], alpha_t / LN2)
                d = buffers.product(1, q_d[pair, row], k_d[pair], alpha_s / LN2)
                if not near:
                    d -= y
                z = buffers.take(2, y.shape)
                total += _kl_and_difference(y, d, z)
                grad_q[pair, row].baddbmm_(z, ks[pair][..., :width], alpha=alpha)
                grad_k[pair].baddbmm_(z.transpose(1, 2), qs[pair, row][..., :width], alpha=alpha)
            bucket.scatter(dq, grad_q)
            if cross:
                bucket.scatter(dk, grad_k)
    return total, dq, dk


def _kl_and_difference(y: Tensor, d: Tensor, g: Tensor) -> Tensor:
    """Σ KL(P ‖ Q) of a block of base-2 scores Y and differences D = Z − Y, both overwritten; G = Q − P into ``g``.

    KL_i = L_s − L_t − Σ_j P_ij D_ij with log-sums L counted from the row's maximum of Y, as Z is: a good student's small
    divergence and gradient are not the difference of two large numbers. Powers of two cost a quarter of exp.
    """
    y.sub_(y.amax(-1, keepdim=True))
    torch.add(y, d, out=g)
    max_s = g.amax(-1, keepdim=True)
    sum_s = g.sub_(max_s).exp2_().sum(-1, keepdim=True)
    sum_t = y.exp2_().sum(-1, keepdim=True)
    rows = max_s + torch.log2(sum_s / sum_t) - d.mul_(y).sum(-1, keepdim=True).div_(sum_t)
    g.div_(sum_s).addcmul_(y, sum_t.reciprocal_(), value=-1)
    return LN2 * rows.sum(dtype=torch.float64)


def centred(key: Tensor | None) -> Tensor | None:
    """Keys less their mean, where half precision does not round them anyway.

    It adds one number to all scores of a query, which the softmax does not see; what keys have in common would make large
    scores, whose rounding errors are large against the differences between them, and large parts of Σ G k would cancel.
    """
    return key if key is None or key.dtype.itemsize < 4 else key - key.mean(0)


def factors(query: Tensor, num_heads: int) -> tuple[float, float]:
    """What the forward and the backward multiply the gradients with: together 1/(A·T)."""
    return scaling.early_and_late(1 / (num_heads * max(len(query), 1)), query.dtype)
