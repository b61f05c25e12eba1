"""The one encoder, of teachers and students: post-LN BERT or RoBERTa on packed rows, run as far as needed.

Shapes: T packed tokens, M predicted rows, B sequences, D width, H heads, d = D/H, V vocabulary.
Equations: Devlin et al. 2019 (arXiv 1810.04805) and Liu et al. 2019 (arXiv 1907.11692), with the parameters
of transformers' ``BertForMaskedLM`` and ``RobertaForMaskedLM``. XLM-R and CamemBERT are RoBERTa's arithmetic under
names of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.models.attention import choose_backend
from fastkd.models.layer import Head, Layer
from fastkd.models.lookup import lookup
from fastkd.models.needs import Needs, Outputs

FAMILIES = {"bert": "bert", "roberta": "roberta", "xlm-roberta": "roberta", "camembert": "roberta"}  # → architecture
GRAPH: dict[str, Any] = {"fullgraph": True, "dynamic": False}  # of torch.compile: shapes are the same in every step


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder; fields as in transformers' BertConfig and RobertaConfig."""

    family: str  # one of FAMILIES: transformers' model_type
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0  # its embedding starts at zero and gets no gradient
    initializer_range: float = 0.02
    tied: bool = True  # whether the decoder's weight is the word embeddings'; every student's is

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"model family {self.family!r} is not supported; use one of {', '.join(FAMILIES)}")
        if self.pad_token_id is None and self.architecture == "roberta":
            raise ValueError(f"{self.family} counts positions from its pad_token_id, which is null; set it (often 1)")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"width {self.hidden_size} is not divisible by {self.num_heads} heads; change either")

    @property
    def architecture(self) -> str:
        """``bert`` or ``roberta``: which of the two this family computes as."""
        return FAMILIES[self.family]

    @property
    def position_offset(self) -> int:
        """Row of the position table of position 0: RoBERTa leaves the first pad_token_id + 1 unused."""
        if self.architecture == "bert":
            return 0
        assert self.pad_token_id is not None
        return self.pad_token_id + 1

    @property
    def head_width(self) -> int:
        """d, of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def max_length(self) -> int:
        """The longest sequence in tokens that the position table can hold."""
        return self.max_positions - self.position_offset


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


class Encoder(nn.Module):
    """Embeddings, layers and, with ``mlm_head``, the masked-language-model head.

    ``attention`` names a backend of ``attention.py`` (None: the fastest), ``residual`` the dtype of what the embeddings
    and layers hand on (None: that of the LayerNorms). Initialised as BERT is, from ``seed``: weights normal with
    standard deviation ``initializer_range``, biases 0, LayerNorms 1, the padding token's embedding, if there is one, 0.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        mlm_head: bool,
        attention: str | None = None,
        residual: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.attention, self.residual = config, attention, residual
        # Functions of the class, so that a copy of this encoder runs its own weights.
        self._graph: Callable[..., Outputs] = Encoder._run
        self._embedding: Callable[..., Tensor] = Encoder.embed
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
        if self.config.pad_token_id is not None:
            self.word_embeddings.weight[self.config.pad_token_id].zero_()

    @property
    def decoder_weight(self) -> Tensor:
        """[V, D]: the word embeddings, or what an untied checkpoint holds in their place."""
        if self.head is None or self.head.decoder is None:
            return self.word_embeddings.weight
        return self.head.decoder

    @property
    def decoder_bias(self) -> Tensor:
        """[V]."""
        if self.head is None:
            raise ValueError("this encoder has no MLM head; use a method without logits, such as minilmv2")
        return self.head.bias

    def compile_graphs(self, *, layerwise: bool = False) -> None:
        """Compile the forward, embeddings and head included, as one graph, or as one of each layer.

        One graph fuses across layers, but its backward hands over all gradients at once, at its end. ``layerwise``
        hands over each layer's when it has them, so that ranks can exchange them meanwhile.
        """
        if not layerwise:
            self._graph = torch.compile(Encoder._run, **GRAPH)
            return
        self._embedding = torch.compile(Encoder.embed, **GRAPH)
        for module in (*self.layers, *([] if self.head is None else [self.head])):
            module.compile(**GRAPH)

    def embed(self, ids: Tensor, position_ids: Tensor, dropout: float) -> Tensor:
        """[T] ids → [T, D]: words, positions and type 0 summed, then LayerNorm."""
        offset = self.config.position_offset
        places = self.position_embeddings.weight[offset:] + self.type_embeddings.weight[0]
        padding = -1 if self.config.pad_token_id is None else self.config.pad_token_id
        words = lookup(self.word_embeddings.weight, ids, padding)
        x = self.embedding_norm(words + lookup(places, position_ids))
        return F.dropout(x, dropout, training=dropout > 0).to(self.residual or x.dtype)

    def forward(self, ids: Tensor, batch: Packed, needs: Needs, *, dropout: float = 0.0) -> Outputs:
        """Run what ``needs`` reads and nothing more, exactly.

        ids: [T] int64 (the batch's plain or masked text); dropout: probability on embeddings, sub-layer
        outputs and attention weights. The last layer needed stops at its QKV projection if only that is read,
        and computes queries, attention and feed-forward for predicted rows only if only those are.
        """
        if needs.logits and self.head is None:
            raise ValueError("this encoder has no MLM head; use a method without logits, such as minilmv2")
        # A graph sees the batch's tensors alone: what else differs from step to step, such as the lengths, would be
        # compiled into it.
        tensors = (ids, batch.position_ids, batch.cu_seqlens, batch.predicted)
        backend = self._backend(ids.device, dropout, batch.max_seqlen)
        return self._graph(self, *tensors, batch.max_seqlen, needs, dropout, backend)

    def _run(
        self,
        ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        predicted: Tensor,
        max_seqlen: int,
        needs: Needs,
        dropout: float,
        backend: str,
    ) -> Outputs:
        out, depth = Outputs(), needs.depth(self.config.num_layers)
        sequences = (cu_seqlens, max_seqlen, dropout, backend)
        x = self._embedding(self, ids, position_ids, dropout)
        for number in range(1, depth + 1):
            layer, qkv = cast(Layer, self.layers[number - 1]), None
            if number - 1 in needs.hidden:
                out.hidden[number - 1] = x
            extent = needs.extent(number, self.config.num_layers)
            if extent == "predicted":
                rows, _ = layer(x, *sequences, rows=predicted)
                return self._finish(out, rows, needs)
            if extent == "projection":
                qkv = layer.project(x)
            else:
                x, qkv = layer(x, *sequences, return_qkv=number in needs.qkv)
            if qkv is not None:
                q, k, v = qkv.chunk(3, dim=-1)
                out.qkv[number] = q, k, v
        if depth in needs.hidden:
            out.hidden[depth] = x
        return self._finish(out, x.index_select(0, predicted) if needs.rows else None, needs)

    def _finish(self, out: Outputs, rows: Tensor | None, needs: Needs) -> Outputs:
        if needs.last_rows:
            out.last_rows = rows
        if needs.logits:
            assert self.head is not None
            out.head_rows = self.head(rows)
        return out

    def _backend(self, device: torch.device, dropout: float, longest: int) -> str:
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.word_embeddings.weight.dtype
        return choose_backend(device, dtype, self.config.head_width, dropout, longest, self.attention)
