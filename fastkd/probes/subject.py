"""A model as it is scored, on its device: the one that is named, one of its shape with random weights, or a teacher."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fastkd.models.encoder import Encoder, EncoderConfig
from fastkd.probes.tokens import SEQUENCE

if TYPE_CHECKING:
    from fastkd.files import Record
    from fastkd.models.hf import Loaded

UNTRAINED_SEED = 0


@dataclass(frozen=True)
class Subject:
    """An encoder, what it is called in the scores, and what is told of it."""

    label: str  # model, untrained or teacher
    encoder: Encoder
    longest: int  # tokens of a sequence that it reads at most
    about: Record

    @classmethod
    def of(cls, label: str, name: str, loaded: Loaded) -> Subject:
        """A loaded model; it reads 128 tokens at once, or fewer where it was trained on fewer."""
        longest = min(SEQUENCE, loaded.config.max_length, loaded.tokenizer.model_max_length)
        about = {"name": name, "sha256": loaded.sha256, "shape": _shape(loaded.config), "longest": longest}
        return cls(label, _frozen(loaded.encoder), longest, about)

    def untrained(self) -> Subject:
        """One of this shape with random weights: what the architecture gives without any training."""
        encoder = Encoder(
            replace(self.encoder.config, tied=True), mlm_head=self.encoder.head is not None, seed=UNTRAINED_SEED
        )
        about = {"name": "random weights", "seed": UNTRAINED_SEED, "sha256": None}
        return Subject("untrained", _frozen(encoder), self.longest, self.about | about)


def _frozen(encoder: Encoder) -> Encoder:
    return encoder.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _shape(config: EncoderConfig) -> str:
    return f"{config.num_layers}L-{config.hidden_size}H-{config.num_heads}A-{config.intermediate_size}I"
