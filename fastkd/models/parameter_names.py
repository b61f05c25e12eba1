"""The encoder's parameters under the names that transformers gives them, and back.

transformers keeps queries, keys and values apart and the decoder beside its tied embedding; here QKV is one matrix. Its
MLM head has a bias beside the decoder's that no forward reads: where a file holds two that differ, the decoder's counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.models.encoder import Encoder, EncoderConfig

KINDS = ("weight", "bias")
QKV = ("query", "key", "value")
BODY = {
    "word_embeddings": "embeddings.word_embeddings",
    "position_embeddings": "embeddings.position_embeddings",
    "type_embeddings": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
}
LAYER = {
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "output_norm": "output.LayerNorm",
}
HEAD = {
    "bert": {"head.dense": "cls.predictions.transform.dense", "head.norm": "cls.predictions.transform.LayerNorm"},
    "roberta": {"head.dense": "lm_head.dense", "head.norm": "lm_head.layer_norm"},
}
HEAD_PLACE = {"bert": "cls.predictions", "roberta": "lm_head"}


def from_hf(theirs: dict[str, Tensor], config: EncoderConfig, *, mlm_head: bool) -> dict[str, Tensor]:
    """The encoder's state out of a BertForMaskedLM's or RobertaForMaskedLM's; copies, with QKV fused."""
    prefix = f"{config.architecture}."
    modules = _modules(config, mlm_head, prefix).items()
    pairs = [(f"{ours}.{kind}", f"{name}.{kind}") for ours, name in modules for kind in KINDS]
    if mlm_head:
        decoder = f"{HEAD_PLACE[config.architecture]}.decoder"
        pairs += [("head.bias", f"{decoder}.bias"), *([] if config.tied else [("head.decoder", f"{decoder}.weight")])]
    state = {ours: theirs[name].clone() for ours, name in pairs if name in theirs}
    for i in range(config.num_layers):
        for kind in KINDS:
            parts = [theirs[f"{_attention(prefix, i)}.{part}.{kind}"] for part in QKV]
            state[f"layers.{i}.qkv.{kind}"] = torch.cat(parts)
    return state


def to_hf(encoder: Encoder, *, mlm_head: bool) -> dict[str, Tensor]:
    """The state of the MaskedLM class with ``mlm_head``, else of the bare model, on the CPU in float32."""
    config, ours = encoder.config, encoder.state_dict()
    prefix = f"{config.architecture}." if mlm_head else ""
    modules = _modules(config, mlm_head, prefix).items()
    pairs = [(f"{name}.{kind}", f"{theirs}.{kind}") for name, theirs in modules for kind in KINDS]
    state = {theirs: ours[name] for name, theirs in pairs if name in ours}
    for i in range(config.num_layers):
        for kind in KINDS:
            for part, tensor in zip(QKV, ours[f"layers.{i}.qkv.{kind}"].chunk(3), strict=True):
                state[f"{_attention(prefix, i)}.{part}.{kind}"] = tensor
    if mlm_head:
        head = HEAD_PLACE[config.architecture]
        state |= {f"{head}.decoder.weight": encoder.decoder_weight}
        state |= {f"{head}.{name}": encoder.decoder_bias for name in ("bias", "decoder.bias")}
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}


def _attention(prefix: str, layer: int) -> str:
    return f"{prefix}encoder.layer.{layer}.attention.self"


def _modules(config: EncoderConfig, mlm_head: bool, prefix: str) -> dict[str, str]:
    """Our module names → transformers', all but queries, keys, values and decoder."""
    names = {ours: f"{prefix}{theirs}" for ours, theirs in BODY.items()}
    for i in range(config.num_layers):
        layer = f"{prefix}encoder.layer.{i}"
        names |= {f"layers.{i}.{ours}": f"{layer}.{theirs}" for ours, theirs in LAYER.items()}
    return names | (HEAD[config.architecture] if mlm_head else {})


def head_parameters(config: EncoderConfig) -> set[str]:
    """transformers' names of all that an MLM head of its own is read from; with ``config.tied`` not the decoder's."""
    place = HEAD_PLACE[config.architecture]
    decoder = ("bias",) if config.tied else ("decoder.weight", "decoder.bias")
    modules = HEAD[config.architecture].values()
    return {f"{name}.{kind}" for name in modules for kind in KINDS} | {f"{place}.{name}" for name in decoder}
