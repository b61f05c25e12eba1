"""The one encoder, of teachers and students: embeddings, layers and MLM head on packed rows, run as far as needed.

How a family of models embeds, what a layer and the head compute, is in ``fastkd/models/families/``. What is here holds for
all: which layers run, for which rows, and what is handed to the loss.

Shapes: T packed tokens, M predicted rows, B sequences, D width, H heads, d = D/H, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.models import families
from fastkd.models.attention import Sequences, choose_backend
from fastkd.models.lookup import lookup
from fastkd.models.needs import Needs, Outputs
from fastkd.models.shape import NAMES, SIZES, require_size

if TYPE_CHECKING:
    from fastkd.models.families import Family
    from fastkd.models.layer import Head, Layer

GRAPH: dict[str, Any] = {"fullgraph": True, "dynamic": False}  # of torch.compile: shapes are the same in every step


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder; fields as in transformers' BertConfig. A family with more fields has a subclass of it."""

    model_type: str  # as config.json names it; fastkd/models/families/ has the family of each
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
        self._check_numbers()
        self.family.check(self)
        if self.hidden_size % self.num_heads:
            raise ValueError(f"width {self.hidden_size} is not divisible by {self.num_heads} heads; change either")

    def _check_numbers(self) -> None:
        """Refuse numbers that no model has: a config.json may come from anywhere."""
        for field in SIZES:
            require_size(NAMES.get(field, field), getattr(self, field), least=int(field != "type_vocab_size"))
        for field in ("layer_norm_eps", "initializer_range"):
            value = getattr(self, field)
            if type(value) not in (int, float) or not 0 <= value < 1:
                raise ValueError(f"{field} is {value!r}, not a number from 0 to below 1; take a sound config.json")
        pad = self.pad_token_id
        if pad is not None and (type(pad) is not int or not 0 <= pad < self.vocab_size):
            raise ValueError(
                f"pad_token_id is {pad!r}, not a row of {self.vocab_size} tokens; take a sound config.json"
            )

    @property
    def family(self) -> Family:
        """How models of this type compute, what they cost and what Hugging Face calls their parts."""
        return families.of(self.model_type)

    @property
    def position_offset(self) -> int:
        """Row of the position table of position 0."""
        return self.family.position_offset(self)

    @property
    def head_width(self) -> int:
        """d, of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def max_length(self) -> int:
        """The longest sequence in tokens that the model has positions for."""
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
    """Embeddings, layers and, with ``mlm_head``, the masked-language-model head, as the configuration's family makes them.

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
        self.family = config.family  # looked up once: a graph cannot list a folder
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        for name, module in self.family.embeddings(config).items():
            self.add_module(name, module)
        self.layers = nn.ModuleList(self.family.layer(config, number) for number in range(1, config.num_layers + 1))
        self.head = cast("Head", self.family.head(config)) if mlm_head else None
        self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw all weights from ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding) and not module.weight.is_meta:
                module.weight.normal_(0.0, self.config.initializer_range, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        if self.config.pad_token_id is not None:
            self.word_embeddings.weight[self.config.pad_token_id].zero_()

    @property
    def hidden_matrices(self) -> dict[str, int]:
        """The names of the layers' weights [rows, columns]; of how many equal matrices, one above the other, each is made."""
        weights = (name for name, p in self.named_parameters() if name.startswith("layers.") and p.ndim == 2)
        return {name: self.family.matrices_in(self.config, name) for name in weights}

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
        """[T] ids → [T, D], the first layer's input."""
        x = self.family.embed(self, ids, position_ids)
        return F.dropout(x, dropout, training=dropout > 0).to(self.residual or x.dtype)

    def words(self, ids: Tensor) -> Tensor:
        """[T] ids → [T, D] rows of the word table; the padding token's gets no gradient."""
        padding = -1 if self.config.pad_token_id is None else self.config.pad_token_id
        return lookup(self.word_embeddings.weight, ids, padding)

    def forward(self, ids: Tensor, batch: Packed, needs: Needs, *, dropout: float = 0.0) -> Outputs:
        """Run what ``needs`` reads and nothing more, exactly.

        ids: [T] int64 (the batch's plain or masked text); dropout: probability on embeddings, sub-layer
        outputs and attention weights. The last layer needed stops at its QKV projection if only that is read,
        and computes queries, attention and feed-forward for predicted rows only if only those are.
        """
        if needs.logits and self.head is None:
            raise ValueError("this encoder has no MLM head; use a method without logits, such as minilmv2")
        # A graph sees the batch's tensors only: what else differs from step to step, such as the lengths, would be
        # compiled into it.
        tensors = (ids, batch.position_ids, batch.cu_seqlens, batch.predicted)
        backend = self.backend(ids.device, dropout, batch.max_seqlen)
        out = self._graph(self, *tensors, batch.max_seqlen, needs, dropout, backend)
        if needs.logits:  # parameters: as outputs of a graph they would be other tensors, without its gradients
            out.decoder_weight, out.decoder_bias = self.decoder_weight, self.decoder_bias
        return out

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
        """Layer by layer; ``needs.extent`` says how far each runs. A layer of predicted rows or of the projection is the
        last one."""
        out, depth = Outputs(), needs.depth(self.config.num_layers)
        sequences = Sequences(position_ids, cu_seqlens, max_seqlen)
        x = self._embedding(self, ids, position_ids, dropout)
        for number in range(1, depth + 1):
            layer, qkv = cast("Layer", self.layers[number - 1]), None
            if number - 1 in needs.hidden:
                out.hidden[number - 1] = x
            extent = needs.extent(number, self.config.num_layers)
            if extent == "predicted":
                rows, _ = layer(x, sequences, dropout, backend, rows=predicted)
                return self._finish(out, rows, needs)
            if extent == "projection":
                qkv = layer.project(x, sequences)
            else:
                x, qkv = layer(x, sequences, dropout, backend, return_qkv=number in needs.qkv)
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

    def backend(self, device: torch.device, dropout: float, longest: int) -> str:
        """The attention of a forward now: autocast, if on, decides the dtype. ``longest``: tokens of a sequence at most."""
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.word_embeddings.weight.dtype
        return choose_backend(device, dtype, self.config.head_width, dropout, longest, self.attention)
