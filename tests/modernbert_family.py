"""A third family, as its author would add it: ModernBERT (Warner et al. 2024, arXiv 2412.13663) with global attention only.

Rotary positions, pre-norm, GeGLU, no biases, another head. ``test_families.py`` puts this file into a folder of families.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ModernBertConfig, ModernBertForMaskedLM, ModernBertModel

from fastkd.models.attention import Sequences, varlen_attention
from fastkd.models.encoder import EncoderConfig
from fastkd.models.families import Classes, Family, Names
from fastkd.models.layer import linear
from fastkd.models.needs import Extent

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

EMBEDDING_NAMES = {
    "word_embeddings.weight": ("embeddings.tok_embeddings.weight",),
    "embedding_norm.weight": ("embeddings.norm.weight",),
}
LAYER_NAMES = {
    "attention_norm": "attn_norm",
    "qkv": "attn.Wqkv",
    "attention_output": "attn.Wo",
    "feed_forward_norm": "mlp_norm",
    "up": "mlp.Wi",
    "down": "mlp.Wo",
}


@dataclass(frozen=True)
class Shape(EncoderConfig):
    """With the base of the rotary positions."""

    rope_theta: float = 160_000.0


class Layer(nn.Module):
    """Pre-norm: the first layer has no LayerNorm before its attention, the last one has another after its feed-forward."""

    def __init__(self, config: Shape, number: int) -> None:
        super().__init__()
        D, I, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps  # noqa: E741
        self.num_heads, self.theta = config.num_heads, config.rope_theta
        if number > 1:
            self.attention_norm = nn.LayerNorm(D, eps=eps, bias=False)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.attention_output = nn.Linear(D, D, bias=False)
        self.feed_forward_norm = nn.LayerNorm(D, eps=eps, bias=False)
        self.up = nn.Linear(D, 2 * I, bias=False)
        self.down = nn.Linear(I, D, bias=False)
        if number == config.num_layers:
            self.final_norm = nn.LayerNorm(D, eps=eps, bias=False)

    def forward(
        self,
        x: Tensor,
        sequences: Sequences,
        dropout: float,
        backend: str | None,
        rows: Tensor | None = None,
        return_qkv: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        qkv = self.project(x, sequences)
        q, k, v = qkv.chunk(3, dim=-1)
        cu_q = cu_k = sequences.cu_seqlens
        if rows is not None:
            x, q = x.index_select(0, rows), q.index_select(0, rows)
            cu_q = torch.searchsorted(rows, cu_k.long()).int()
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in (q, k, v))
        longest = sequences.max_seqlen
        context = varlen_attention(q, k, v, cu_q, cu_k, longest, longest, dropout=dropout, backend=backend)
        x = x + F.dropout(self.attention_output(context.flatten(1)), dropout, training=dropout > 0)
        up, gate = linear(self.feed_forward_norm(x), self.up.weight, None).chunk(2, dim=-1)
        x = x + F.dropout(self.down(F.gelu(up) * gate), dropout, training=dropout > 0)
        return self.final_norm(x) if hasattr(self, "final_norm") else x, qkv if return_qkv else None

    def project(self, x: Tensor, sequences: Sequences) -> Tensor:
        """Queries and keys are turned by their positions (Su et al. 2021, arXiv 2104.09864, equation 34)."""
        if hasattr(self, "attention_norm"):
            x = self.attention_norm(x)
        q, k, v = linear(x, self.qkv.weight, None).chunk(3, dim=-1)
        width = q.shape[-1] // self.num_heads
        frequency = 1.0 / (self.theta ** (torch.arange(0, width, 2, device=x.device).float() / width))
        angle = (sequences.position_ids[:, None].float() * frequency).repeat(1, 2)[:, None]  # [T, 1, d]
        return torch.cat([self._turned(q, angle), self._turned(k, angle), v], dim=-1)

    def _turned(self, x: Tensor, angle: Tensor) -> Tensor:
        heads = x.unflatten(-1, (self.num_heads, -1))
        first, second = heads.chunk(2, dim=-1)
        turned = heads * angle.cos().to(x.dtype) + torch.cat([-second, first], dim=-1) * angle.sin().to(x.dtype)
        return turned.flatten(1)


class Head(nn.Module):
    """Dense, gelu, LayerNorm, without biases but the decoder's."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder = None if config.tied else nn.Parameter(torch.zeros(config.vocab_size, config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(linear(x, self.dense.weight, None)).to(self.norm.weight.dtype))


class ModernBert(Family):
    """ModernBERT with global attention in every layer."""

    classes: ClassVar = {"modernbert": Classes(ModernBertConfig, ModernBertForMaskedLM, ModernBertModel)}

    def from_hf(self, config: Any) -> Shape:
        if set(config.layer_types) != {"full_attention"}:
            raise ValueError("local attention is not supported; use a checkpoint with global attention in all layers")
        return Shape(
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            max_positions=config.max_position_embeddings,
            type_vocab_size=0,
            layer_norm_eps=config.norm_eps,
            pad_token_id=config.pad_token_id,
            initializer_range=config.initializer_range,
            tied=config.tie_word_embeddings,
            rope_theta=config.rope_parameters["full_attention"]["rope_theta"],
        )

    def to_hf(self, config: Shape) -> PreTrainedConfig:  # type: ignore[override]
        return ModernBertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_positions,
            norm_eps=config.layer_norm_eps,
            pad_token_id=config.pad_token_id,
            initializer_range=config.initializer_range,
            tie_word_embeddings=config.tied,
            layer_types=["full_attention"] * config.num_layers,
            rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": config.rope_theta}},
        )

    def body_names(self, config: EncoderConfig) -> Names:
        names: Names = dict(EMBEDDING_NAMES)
        for i in range(config.num_layers):
            for ours, theirs in LAYER_NAMES.items():
                names[f"layers.{i}.{ours}.weight"] = (f"layers.{i}.{theirs}.weight",)
        names[f"layers.{config.num_layers - 1}.final_norm.weight"] = ("final_norm.weight",)
        del names["layers.0.attention_norm.weight"]
        return names

    def head_names(self, config: EncoderConfig) -> Names:
        names = {f"head.{name}.weight": (f"head.{name}.weight",) for name in ("dense", "norm")}
        return names | {"head.bias": ("decoder.bias",)} | ({} if config.tied else {"head.decoder": ("decoder.weight",)})

    def copies(self, config: EncoderConfig) -> dict[str, str]:
        return {"decoder.weight": "word_embeddings.weight"} if config.tied else {}

    def embeddings(self, config: EncoderConfig) -> dict[str, nn.Module]:
        return {"embedding_norm": nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)}

    def embed(self, encoder: Any, ids: Tensor, position_ids: Tensor) -> Tensor:
        return encoder.embedding_norm(encoder.words(ids).to(encoder.embedding_norm.weight.dtype))

    def layer(self, config: Shape, number: int) -> nn.Module:  # type: ignore[override]
        return Layer(config, number)

    def head(self, config: EncoderConfig) -> nn.Module:
        return Head(config)

    def parameters(self, config: EncoderConfig) -> int:
        D, I = config.hidden_size, config.intermediate_size  # noqa: E741
        return config.vocab_size * D + config.num_layers * (4 * D + 3 * I) * D

    def layer_flops(
        self, config: EncoderConfig, number: int, extent: Extent, *, tokens: int, pairs: int, predicted: int
    ) -> int:
        D, I = config.hidden_size, config.intermediate_size  # noqa: E741
        rows = {"all": tokens, "predicted": predicted, "projection": 0}[extent]
        return 6 * tokens * D * D + rows * (2 * D * D + 6 * D * I) + 4 * D * pairs * rows // tokens

    def head_flops(self, config: EncoderConfig, predicted: int) -> int:
        return 2 * predicted * config.hidden_size**2

    def embedding_bytes(self, config: EncoderConfig, tokens: int) -> int:
        return 4 * config.hidden_size * tokens

    def layer_bytes(
        self,
        config: EncoderConfig,
        extent: Extent,
        *,
        tokens: int,
        predicted: int,
        itemsize: int,
        residual_itemsize: int,
        weight_pairs: int,
    ) -> int:
        """All rows keep two LayerNorms' inputs and outputs, Q, K, V and the context, and four inner activations."""
        D, I = config.hidden_size, config.intermediate_size  # noqa: E741
        before = tokens * D * (4 * itemsize + residual_itemsize)  # the LayerNorm's input and output; Q, K, V
        rows = {"all": tokens, "predicted": predicted, "projection": 0}[extent]
        after = rows * ((2 * D + 4 * I) * itemsize + D * residual_itemsize)
        return before + after + config.num_heads * weight_pairs * rows // tokens * itemsize

    def head_bytes(self, config: EncoderConfig, predicted: int) -> int:
        return 3 * config.hidden_size * predicted * 4


FAMILY = ModernBert()
