"""The encoder's parameters under the names that transformers gives them, and back. The names are in ``families/``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastkd.models.encoder import Encoder, EncoderConfig
    from fastkd.models.families import Names


def body_prefix(config: EncoderConfig) -> str:
    """What comes before the bare model's names in a MaskedLM class, such as ``bert.``."""
    return f"{config.family.classes[config.model_type].masked_lm.base_model_prefix}."


def from_hf(theirs: dict[str, Tensor], config: EncoderConfig, *, mlm_head: bool) -> dict[str, Tensor]:
    """The encoder's state from a MaskedLM class's: copies, with what it has in several tensors joined."""
    names = _names(config, mlm_head, body_prefix(config))
    return {ours: torch.cat([theirs[name] for name in several]) for ours, several in names.items()}


def to_hf(encoder: Encoder, *, mlm_head: bool) -> dict[str, Tensor]:
    """The state of the MaskedLM class with ``mlm_head``, else of the bare model, on the CPU in float32."""
    config, ours = encoder.config, encoder.state_dict()
    state: dict[str, Tensor] = {}
    for name, several in _names(config, mlm_head, body_prefix(config) if mlm_head else "").items():
        state |= zip(several, ours[name].chunk(len(several)), strict=True)
    if mlm_head:
        state |= {name: ours[original] for name, original in config.family.copies(config).items()}
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}


def _names(config: EncoderConfig, mlm_head: bool, prefix: str) -> Names:
    body = config.family.body_names(config).items()
    names = {ours: tuple(f"{prefix}{name}" for name in several) for ours, several in body}
    return names | (config.family.head_names(config) if mlm_head else {})
