"""The one encoder, of teachers and students: post-LN BERT or RoBERTa on packed rows, run as far as needed.

Shapes: T packed tokens, M predicted rows, B sequences, D width, H heads, d = D/H, V vocabulary.
Equations: Devlin et al. 2019 (arXiv 1810.04805) and Liu et al. 2019 (arXiv 1907.11692), with the parameters
of transformers' ``BertForMaskedLM`` and ``RobertaForMaskedLM``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.models.attention import choose_backend, varlen_attention


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder; fields as in transformers' BertConfig and RobertaConfig."""

    family: str  # "bert" or "roberta"
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    initializer_range: float = 0.02
    hidden_act: str = "gelu"

    def __post_init__(self) -> None:
        if self.family not in ("bert", "roberta"):
            raise ValueError(f"model family {self.family!r} is not supported; use bert or roberta")
        if self.hidden_act != "gelu":
            raise ValueError(f"activation {self.hidden_act!r} is not supported; use a checkpoint with 'gelu'")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"width {self.hidden_size} is not divisible by {self.num_heads} heads; change either")

    @property
    def position_offset(self) -> int:
        """Row of the position table of position 0: RoBERTa leaves the first pad_token_id + 1 unused."""
        return self.pad_token_id + 1 if self.family == "roberta" else 0

    @property
    def max_length(self) -> int:
        """The longest sequence in tokens that the position table can hold."""
        return self.max_positions - self.position_offset


@dataclass(frozen=True)
class Needs:
    """What a loss reads from a forward. Layers count from 1; hidden state 0 is the embeddings' output."""

    logits: bool = False  # the MLM head's input to the decoder, at predicted rows
    hidden: tuple[int, ...] = ()  # hidden states of all rows
    qkv: tuple[int, ...] = ()  # queries, keys and values of all rows
    last_rows: bool = False  # the last hidden state at predicted rows

    @property
    def rows(self) -> bool:
        """Whether predicted rows of the last layer are read."""
        return self.logits or self.last_rows

    def depth(self, num_layers: int) -> int:
        """The deepest layer of which anything must run (its QKV projection at least)."""
        return num_layers if self.rows else max((*self.hidden, *self.qkv, 0))

    def extent(self, layer: int, num_layers: int) -> Literal["all", "predicted", "projection"]:
        """How far a layer up to ``depth`` must run: all its rows, the predicted ones, or its QKV projection alone."""
        if layer < self.depth(num_layers) or layer in self.hidden:
            return "all"
        if not self.rows:
            return "projection"
        return "all" if layer in self.qkv else "predicted"


@dataclass
class Outputs:
    """What a forward was asked for; the rest is None or absent."""

    head_rows: Tensor | None = None  # [M, D] after the MLM head's dense, gelu and LayerNorm
    last_rows: Tensor | None = None  # [M, D]
    hidden: dict[int, Tensor] = field(default_factory=dict)  # layer: [T, D]
    qkv: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)  # layer: 3 of [T, D]


class Packed(Protocol):
    """The fields of a batch that the encoder reads (``fastkd.data.batches.Batch`` has them)."""

    @property
    def position_ids(self) -> Tensor: ...  # [T] int64, from 0 within each sequence
    @property
    def cu_seqlens(self) -> Tensor: ...  # [B+1] int32
    @property
    def max_seqlen(self) -> int: ...
    @property
    def predicted(self) -> Tensor: ...  # [M] int64, ascending


class Layer(nn.Module):
    """One post-LN transformer layer with a fused QKV projection.

    The residual stream and the LayerNorms are float32 whatever the products' dtype is: post-LN students lose
    accuracy when the stream is rounded at every layer, and on a CPU bfloat16 LayerNorms are no faster.
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
        cu_seqlens: Tensor,  # [B+1]
        max_seqlen: int,
        dropout: float,
        backend: str | None,
        rows: Tensor | None = None,  # [M], ascending
    ) -> tuple[Tensor, Tensor | None]:
        """Layer output [T, D] and QKV projection [T, 3D]; with ``rows``, those rows of the output alone: [M, D], None.

        Keys and values cover all of x either way.
        """
        sequences = (cu_seqlens, max_seqlen, dropout, backend)
        if rows is None:
            qkv = self.project(x)
            q, k, v = qkv.chunk(3, dim=-1)
            return self._feed_forward(x, self._attend(q, k, v, cu_seqlens, *sequences), dropout), qkv
        x_rows, D = x.index_select(0, rows), x.shape[-1]
        q = _linear(x_rows, self.qkv.weight[:D], self.qkv.bias[:D])
        k, v = _linear(x, self.qkv.weight[D:], self.qkv.bias[D:]).chunk(2, dim=-1)
        cu_rows = torch.searchsorted(rows, cu_seqlens.long()).int()
        return self._feed_forward(x_rows, self._attend(q, k, v, cu_rows, *sequences), dropout), None

    def project(self, x: Tensor) -> Tensor:
        """[T, D] → queries, keys and values side by side, [T, 3D]."""
        return _linear(x, self.qkv.weight, self.qkv.bias)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        longest: int,
        dropout: float,
        backend: str | None,
    ) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in (q, k, v))
        context = varlen_attention(q, k, v, cu_q, cu_k, longest, longest, dropout=dropout, backend=backend)
        return context.flatten(1)

    def _feed_forward(self, x: Tensor, context: Tensor, dropout: float) -> Tensor:
        """From the layer's input and its attention's context to the layer's output, row by row."""
        attended = self.attention_output(context)
        x = self.attention_norm(x + F.dropout(attended, dropout, training=dropout > 0))
        expanded = self.down(F.gelu(_linear(x, self.up.weight, self.up.bias)))
        return self.output_norm(x + F.dropout(expanded, dropout, training=dropout > 0))


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x Wᵀ + b with x in the weight's dtype: a teacher's is bfloat16; of a student's, autocast takes care."""
    return F.linear(x.to(weight.dtype), weight, bias)


class Head(nn.Module):
    """The MLM head up to the decoder, whose weight is the word embeddings'."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        """[M, D] → [M, D] float32."""
        x = F.gelu(_linear(x, self.dense.weight, self.dense.bias))
        return self.norm(x.to(self.norm.weight.dtype))


class Encoder(nn.Module):
    """Embeddings, layers and, with ``mlm_head``, the masked-language-model head.

    ``attention`` names a backend of ``attention.py`` (None: the fastest). Initialised as BERT is, from
    ``seed``: weights normal with standard deviation ``initializer_range``, biases 0, LayerNorms 1, the
    padding token's embedding 0.
    """

    def __init__(self, config: EncoderConfig, *, mlm_head: bool, attention: str | None = None, seed: int = 0) -> None:
        super().__init__()
        self.config, self.attention = config, attention
        D = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, D, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_positions, D)
        self.type_embeddings = nn.Embedding(config.type_vocab_size, D)
        self.embedding_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.head = Head(config) if mlm_head else None
        self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw all weights anew from ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding) and not module.weight.is_meta:
                module.weight.normal_(0.0, self.config.initializer_range, generator=generator)
            if isinstance(module, nn.Linear):
                module.bias.zero_()
        self.word_embeddings.weight[self.config.pad_token_id].zero_()

    @property
    def decoder_weight(self) -> Tensor:
        """[V, D], tied to the word embeddings."""
        return self.word_embeddings.weight

    @property
    def decoder_bias(self) -> Tensor:
        """[V]."""
        if self.head is None:
            raise ValueError("this encoder has no MLM head; use a method without logits, such as minilmv2")
        return self.head.bias

    def embed(self, ids: Tensor, position_ids: Tensor, dropout: float) -> Tensor:
        """[T] ids → [T, D]: words, positions and type 0 summed, then LayerNorm."""
        offset = self.config.position_offset
        places = self.position_embeddings.weight[offset:] + self.type_embeddings.weight[0]
        x = self.embedding_norm(self.word_embeddings(ids) + F.embedding(position_ids, places))
        return F.dropout(x, dropout, training=dropout > 0)

    def forward(self, ids: Tensor, batch: Packed, needs: Needs, *, dropout: float = 0.0) -> Outputs:
        """Run what ``needs`` reads and nothing more, exactly.

        ids: [T] int64 (the batch's plain or masked text); dropout: probability on embeddings, sub-layer
        outputs and attention weights. The last layer needed stops at its QKV projection if only that is read,
        and computes queries, attention and feed-forward for predicted rows only if only those are.
        """
        out, depth = Outputs(), needs.depth(self.config.num_layers)
        sequences = (batch.cu_seqlens, batch.max_seqlen, dropout, self._backend(ids.device, dropout))
        x, rows = self.embed(ids, batch.position_ids, dropout), None
        for number in range(1, depth + 1):
            layer = cast(Layer, self.layers[number - 1])
            if number - 1 in needs.hidden:
                out.hidden[number - 1] = x
            extent = needs.extent(number, self.config.num_layers)
            if extent == "predicted":
                rows, _ = layer(x, *sequences, rows=batch.predicted)
                return self._finish(out, rows, needs)
            if extent == "projection":
                qkv = layer.project(x)
            else:
                x, qkv = layer(x, *sequences)
            if number in needs.qkv:
                q, k, v = qkv.chunk(3, dim=-1)
                out.qkv[number] = q, k, v
        if depth in needs.hidden:
            out.hidden[depth] = x
        return self._finish(out, x.index_select(0, batch.predicted) if needs.rows else None, needs)

    def _finish(self, out: Outputs, rows: Tensor | None, needs: Needs) -> Outputs:
        if needs.last_rows:
            out.last_rows = rows
        if needs.logits:
            if self.head is None or rows is None:
                raise ValueError("this encoder has no MLM head; use a method without logits, such as minilmv2")
            out.head_rows = self.head(rows)
        return out

    def _backend(self, device: torch.device, dropout: float) -> str | None:
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        return choose_backend(device, dtype or self.word_embeddings.weight.dtype, dropout, self.attention)
