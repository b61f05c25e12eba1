"""The post-LN layer and the MLM head of BERT and RoBERTa, on packed rows.

Shapes: T packed tokens, M predicted rows, B sequences, D width, H heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.models.attention import varlen_attention

if TYPE_CHECKING:
    from fastkd.models.attention import Sequences
    from fastkd.models.encoder import EncoderConfig


class Layer(nn.Module):
    """One post-LN transformer layer with a fused QKV projection.

    LayerNorms compute in float32 whatever the products' dtype is, and what they return has the dtype of the layer's
    input: the residual stream is float32 or bfloat16 as the embeddings start it.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(D, 3 * D)
        self.attention_output = nn.Linear(D, D)
        self.attention_norm = nn.LayerNorm(D, eps=eps)
        self.up = nn.Linear(D, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, D)
        self.output_norm = nn.LayerNorm(D, eps=eps)

    def forward(
        self,
        x: Tensor,  # [T, D]
        sequences: Sequences,
        dropout: float,
        backend: str | None,
        rows: Tensor | None = None,  # [M], ascending
        return_qkv: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Layer output [T, D], and its QKV projection [T, 3D] if asked for: an output that is not read would get a
        gradient of zeros, which a compiled backward fills and adds. With ``rows``, only those rows of the output,
        [M, D]; keys and values cover all of x either way.
        """
        if rows is None:
            qkv = self.project(x, sequences)
            q, k, v = qkv.chunk(3, dim=-1)
            context = self._attend(q, k, v, sequences.cu_seqlens, sequences, dropout, backend)
            return self._feed_forward(x, context, dropout), qkv if return_qkv else None
        # The fused weight's first D rows make the queries, the others keys and values.
        x_rows, D = x.index_select(0, rows), x.shape[-1]
        q = linear(x_rows, self.qkv.weight[:D], self.qkv.bias[:D])
        k, v = linear(x, self.qkv.weight[D:], self.qkv.bias[D:]).chunk(2, dim=-1)
        # Boundaries of the sequences among the rows: how many of the rows come before each of them.
        cu_rows = torch.searchsorted(rows, sequences.cu_seqlens.long()).int()
        context = self._attend(q, k, v, cu_rows, sequences, dropout, backend)
        return self._feed_forward(x_rows, context, dropout), None

    def project(self, x: Tensor, sequences: Sequences) -> Tensor:
        """[T, D] → queries, keys and values side by side, [T, 3D]."""
        return linear(x, self.qkv.weight, self.qkv.bias)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        sequences: Sequences,
        dropout: float,
        backend: str | None,
    ) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in (q, k, v))
        cu_k, longest = sequences.cu_seqlens, sequences.max_seqlen
        context = varlen_attention(q, k, v, cu_q, cu_k, longest, longest, dropout=dropout, backend=backend)
        return context.flatten(1)

    def _feed_forward(self, x: Tensor, context: Tensor, dropout: float) -> Tensor:
        """From the layer's input and its attention's context to the layer's output, row by row."""
        stream, attended = x.dtype, self.attention_output(context)
        x = self.attention_norm(x + F.dropout(attended, dropout, training=dropout > 0)).to(stream)
        expanded = self.down(F.gelu(linear(x, self.up.weight, self.up.bias)))
        return self.output_norm(x + F.dropout(expanded, dropout, training=dropout > 0)).to(stream)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b with x in the weight's dtype, which is a teacher's bfloat16; a student's products are autocast's."""
    return F.linear(x.to(weight.dtype), weight, bias)


class Head(nn.Module):
    """The MLM head up to the decoder, whose weight is the word embeddings' unless a checkpoint brings another."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder = None if config.tied else nn.Parameter(torch.zeros(config.vocab_size, config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """[M, D] → [M, D] float32."""
        x = F.gelu(linear(x, self.dense.weight, self.dense.bias))
        return self.norm(x.to(self.norm.weight.dtype))
