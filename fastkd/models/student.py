"""The student: its shape, and its start from a teacher's weights."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fastkd.models import shape
from fastkd.models import tokenizer as tokenizers
from fastkd.models.encoder import Encoder, EncoderConfig


def student_config(spec: str, like: EncoderConfig, tokenizer: PreTrainedTokenizerBase) -> EncoderConfig:
    """The configuration of a student such as ``3L-384H-12A`` or ``6L-768H-12A-3072I`` (layers, width, heads,
    intermediate width, by default four widths), with family, positions and vocabulary like another's.

    It pads by the tokenizer's padding token, whatever the other's config.json says, and its decoder is tied.
    Raises ValueError for a malformed spec, a width that the heads do not divide, or a tokenizer that has more ids than the
    vocabulary or does not fit the family.
    """
    named = shape.parse(spec)
    if (tokens := tokenizers.entries(tokenizer)) > like.vocab_size:
        raise ValueError(f"the tokenizer has {tokens} tokens, the model {like.vocab_size}; use the model's own")
    like.family.check_tokenizer(like, tokenizer)
    return replace(
        like,
        num_layers=named.layers,
        hidden_size=named.width,
        num_heads=named.heads,
        intermediate_size=named.intermediate,
        pad_token_id=tokenizer.pad_token_id,
        tied=True,
    )


@torch.no_grad()
def init_from_teacher(student: Encoder, teacher: Encoder) -> None:
    """Start a student from its teacher: embeddings, head, and teacher layer ⌊i·Lt/Ls⌋ as student layer i
    (from 0), which is DistilBERT's every other layer for half the depth (arXiv 1910.01108, section 2).

    Raises ValueError where any width, the heads or the vocabulary differ, the student is the deeper, or it has a
    head and the teacher a decoder that is not its word embeddings.
    """
    s, t = student.config, teacher.config
    if student.head is not None and not t.tied:
        raise ValueError(
            "--init-from-teacher takes the teacher's word embeddings for the decoder, but its own decoder is another (untied); "
            "leave it out, or use --method minilmv2"
        )
    free = ("num_layers", "initializer_range", "pad_token_id", "tied")
    alike = replace(s, **{name: getattr(t, name) for name in free}) == t
    if not alike or s.num_layers > t.num_layers:
        raise ValueError(
            f"--init-from-teacher needs the teacher's shape and at most its depth ({_shape(t)}), "
            f"not {_shape(s)}; change --student"
        )
    state: dict[str, Any] = teacher.state_dict()
    source = {}
    for name in student.state_dict():
        theirs = re.sub(r"(?<=^layers\.)\d+", lambda i: str(int(i[0]) * t.num_layers // s.num_layers), name)
        if theirs in state:
            source[name] = state[theirs]
    student.load_state_dict(source, strict=False)


def _shape(config: EncoderConfig) -> str:
    return f"{config.num_layers}L-{config.hidden_size}H-{config.num_heads}A-{config.intermediate_size}I"
