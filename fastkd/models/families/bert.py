"""BERT (Devlin et al. 2019, arXiv 1810.04805): post-LN layers, a table of positions, a head with a dense layer.

The parameters are those of transformers' ``BertForMaskedLM``. RoBERTa differs in names and positions only and builds on
this file. Shapes: T packed tokens, M predicted rows, D width, I intermediate width.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from fastkd.models.encoder import EncoderConfig
from fastkd.models.families import Axes, Classes, Family, Names
from fastkd.models.layer import Head, Layer
from fastkd.models.lookup import lookup

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fastkd.models.needs import Extent

GELU = ("gelu", "gelu_python")  # one function, x·Φ(x); others of that name approximate it
KINDS = ("weight", "bias")
QKV = ("query", "key", "value")  # transformers has a product for each, the encoder one for the three
EMBEDDING_NAMES = {
    "word_embeddings.weight": "embeddings.word_embeddings.weight",
    "position_embeddings.weight": "embeddings.position_embeddings.weight",
    "type_embeddings.weight": "embeddings.token_type_embeddings.weight",
    "embedding_norm.weight": "embeddings.LayerNorm.weight",
    "embedding_norm.bias": "embeddings.LayerNorm.bias",
}
LAYER_NAMES = {  # of modules, each with a weight and a bias
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "output_norm": "output.LayerNorm",
}
AXES = {  # of a module's weight (``Family.axes``); a bias has the first one, and so has all of a LayerNorm
    "word_embeddings": ("rows", "width"),
    "position_embeddings": ("rows", "width"),
    "type_embeddings": ("rows", "width"),
    "qkv": ("qkv", "width"),
    "attention_output": ("width", "context"),
    "up": ("intermediate", "width"),
    "down": ("width", "intermediate"),
    "dense": ("width", "width"),
    "head": ("rows", "width"),  # the decoder
    "norm": ("decoded",),  # the head's; its bias has the same
}
NORM = ("width",)


class Bert(Family):
    """BERT, and what RoBERTa shares with it."""

    classes: ClassVar = {"bert": Classes(BertConfig, BertForMaskedLM, partial(BertModel, add_pooling_layer=False))}
    # Where the MaskedLM class keeps the head's bias and decoder, and its dense layer and LayerNorm.
    head_place, head_dense, head_norm = "cls.predictions", "transform.dense", "transform.LayerNorm"

    # ---- configuration --------------------------------------------------------------------------------------

    def from_hf(self, config: Any) -> EncoderConfig:
        if config.hidden_act not in GELU:
            raise ValueError(f"activation {config.hidden_act!r} is not supported; use a checkpoint with 'gelu'")
        positions = getattr(config, "position_embedding_type", None)
        if positions not in (None, "absolute"):
            raise ValueError(f"positions that are {positions!r} are not supported; use another model")
        if config.is_decoder or config.add_cross_attention:
            raise ValueError("decoders (is_decoder, add_cross_attention) are not supported; use an encoder")
        return EncoderConfig(
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            max_positions=config.max_position_embeddings,
            type_vocab_size=config.type_vocab_size,
            layer_norm_eps=config.layer_norm_eps,
            pad_token_id=config.pad_token_id,
            initializer_range=config.initializer_range,
            tied=config.tie_word_embeddings,
        )

    def to_hf(self, config: EncoderConfig) -> PreTrainedConfig:
        options: dict[str, Any] = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "intermediate_size": config.intermediate_size,
            "max_position_embeddings": config.max_positions,
            "type_vocab_size": config.type_vocab_size,
            "layer_norm_eps": config.layer_norm_eps,
            "pad_token_id": config.pad_token_id,
            "initializer_range": config.initializer_range,
            "tie_word_embeddings": config.tied,
        }
        return self.classes[config.model_type].config(**options)

    def check(self, config: EncoderConfig) -> None:
        if config.type_vocab_size == 0:
            raise ValueError("type_vocab_size is 0, but every token has a type; take a sound config.json")

    # ---- parameter names ------------------------------------------------------------------------------------

    def body_names(self, config: EncoderConfig) -> Names:
        names: Names = {ours: (theirs,) for ours, theirs in EMBEDDING_NAMES.items()}
        for i in range(config.num_layers):
            place = f"encoder.layer.{i}"
            for kind in KINDS:
                names[f"layers.{i}.qkv.{kind}"] = tuple(f"{place}.attention.self.{name}.{kind}" for name in QKV)
                for ours, theirs in LAYER_NAMES.items():
                    names[f"layers.{i}.{ours}.{kind}"] = (f"{place}.{theirs}.{kind}",)
        return names

    def head_names(self, config: EncoderConfig) -> Names:
        names = self._before_the_decoder()
        names["head.bias"] = (f"{self.head_place}.decoder.bias",)
        if not config.tied:
            names["head.decoder"] = (f"{self.head_place}.decoder.weight",)
        return names

    def copies(self, config: EncoderConfig) -> dict[str, str]:
        """A second bias that no forward reads (if the two differ, the decoder's is used), and a tied decoder."""
        tied = {f"{self.head_place}.decoder.weight": "word_embeddings.weight"} if config.tied else {}
        return {f"{self.head_place}.bias": "head.bias", **tied}

    def head_in_file(self, config: EncoderConfig) -> set[str]:
        """Files with a tied decoder hold the bias beside it only, and transformers copies that to the decoder."""
        decoder = ("bias",) if config.tied else ("decoder.weight", "decoder.bias")
        before = {name for (name,) in self._before_the_decoder().values()}
        return before | {f"{self.head_place}.{name}" for name in decoder}

    def axes(self, config: EncoderConfig) -> Axes:
        names = (*self.body_names(config), *self.head_names(config))
        counted = {name: AXES.get(name.split(".")[-2], NORM) for name in names}
        return {name: axes[:1] if name.endswith(".bias") else axes for name, axes in counted.items()}

    def _before_the_decoder(self) -> Names:
        modules = {"head.dense": self.head_dense, "head.norm": self.head_norm}
        return {f"{m}.{kind}": (f"{self.head_place}.{n}.{kind}",) for m, n in modules.items() for kind in KINDS}

    # ---- modules --------------------------------------------------------------------------------------------

    def embeddings(self, config: EncoderConfig) -> dict[str, nn.Module]:
        D = config.hidden_size
        return {
            "position_embeddings": nn.Embedding(config.max_positions, D),
            "type_embeddings": nn.Embedding(config.type_vocab_size, D),
            "embedding_norm": nn.LayerNorm(D, eps=config.layer_norm_eps),
        }

    def embed(self, encoder: Any, ids: Tensor, position_ids: Tensor) -> Tensor:
        """LayerNorm of the sum of words, positions and type 0."""
        first = self.position_offset(encoder.config)
        # The type's row is added to the table, not to the tokens: there are fewer positions than tokens.
        places = encoder.position_embeddings.weight[first:] + encoder.type_embeddings.weight[0]
        embedded: Tensor = encoder.embedding_norm(encoder.words(ids) + lookup(places, position_ids))
        return embedded

    def layer(self, config: EncoderConfig, number: int) -> nn.Module:
        return Layer(config)

    def head(self, config: EncoderConfig) -> nn.Module:
        return Head(config)

    # ---- costs: of models/layer.py --------------------------------------------------------------------------

    def parameters(self, config: EncoderConfig) -> int:
        D, I = config.hidden_size, config.intermediate_size  # noqa: E741
        tables = config.vocab_size + config.max_positions + config.type_vocab_size
        return tables * D + config.num_layers * (4 * D + 2 * I) * D

    def layer_flops(
        self, config: EncoderConfig, number: int, extent: Extent, *, tokens: int, pairs: int, predicted: int
    ) -> int:
        D, I = config.hidden_size, config.intermediate_size  # noqa: E741
        if extent == "projection":
            return 6 * tokens * D * D
        if extent == "all":  # QKV; attention's output, up and down; scores and context
            return 6 * tokens * D * D + tokens * (2 * D * D + 4 * D * I) + 4 * D * pairs
        # Keys and values of all rows; queries, attention's output, up and down of the predicted ones.
        rows = 4 * tokens * D * D + predicted * (4 * D * D + 4 * D * I)
        return rows + 4 * D * pairs * predicted // tokens

    def head_flops(self, config: EncoderConfig, predicted: int) -> int:
        return 2 * predicted * config.hidden_size**2

    def embedding_bytes(self, config: EncoderConfig, tokens: int) -> int:
        """The LayerNorm's input."""
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
        """A row keeps its input, Q, K, V, the attention's output and the feed-forward's input (6·D), two inner activations
        (2·I), and in the residual stream's dtype the inputs of two LayerNorms (2·D)."""
        D, I = config.hidden_size, config.intermediate_size  # noqa: E741
        if extent == "projection":
            return 4 * D * tokens * itemsize
        rows = tokens if extent == "all" else predicted
        kept = rows * ((6 * D + 2 * I) * itemsize + 2 * D * residual_itemsize)
        weights = config.num_heads * weight_pairs * rows // tokens * itemsize
        return kept + weights + 3 * D * (tokens - rows) * itemsize  # the other rows: input, keys and values

    def head_bytes(self, config: EncoderConfig, predicted: int) -> int:
        """The inputs of the dense layer, of gelu and of the LayerNorm, in float32."""
        return 3 * config.hidden_size * predicted * 4


FAMILY = Bert()
