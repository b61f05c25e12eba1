"""The student: its shape, and its start from a teacher's weights."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from fastkd.models import shape, subcloning
from fastkd.models import tokenizer as tokenizers
from fastkd.models.encoder import Encoder, EncoderConfig

if TYPE_CHECKING:
    from fastkd.models.importance import Importance

# Fields in which a student may differ from the teacher that it starts from.
FREE = ("num_layers", "hidden_size", "num_heads", "intermediate_size", "initializer_range", "pad_token_id", "tied")


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


def check_start(student: Encoder, teacher: Encoder) -> None:
    """Refuse a student that cannot start from its teacher's weights.

    Raises:
        ValueError: it is larger, its heads or its widths cannot be cut out of the teacher's, its tables are others (vocabulary,
            positions), or it has a head and the teacher a decoder that is not its word embeddings.
    """
    s, t = student.config, teacher.config
    if student.head is not None and not t.tied:
        raise ValueError(
            "--init-from-teacher takes the teacher's word embeddings for the decoder, but its own decoder is another (untied); "
            "leave it out, or use --method minilmv2"
        )
    subcloning.check(s, t)
    alike = replace(s, **{name: getattr(t, name) for name in FREE})
    for field in fields(t):
        mine, theirs = (getattr(config, field.name, None) for config in (alike, t))
        if mine != theirs:
            raise ValueError(
                f"--init-from-teacher needs a student with the teacher's {field.name} ({theirs}), not {mine}; leave --tokenizer out"
            )


@torch.no_grad()
def init_from_teacher(student: Encoder, teacher: Encoder, importance: Importance | None = None) -> None:
    """Start a student from its teacher: embeddings, head, and teacher layer ⌊i·Lt/Ls⌋ as student layer i
    (from 0), which is DistilBERT's every other layer for half the depth (arXiv 1910.01108, section 2).

    A student of the teacher's widths and heads gets copies. A narrower one gets the most important neurons and the weights
    between them, scaled as ``subcloning.cut`` says; ``importance`` is read for that only. Raises ValueError as ``check_start``.
    """
    check_start(student, teacher)
    s, t = student.config, teacher.config
    state: dict[str, Any] = teacher.state_dict()
    names = {name: subcloning.source(name, s, t) for name in student.state_dict()}
    start = {name: state[theirs] for name, theirs in names.items() if theirs in state}
    if subcloning.is_cut(s, t):
        assert importance is not None
        start = subcloning.cut(start, subcloning.choose(importance, s, t), s, t)
    student.load_state_dict(start, strict=False)
