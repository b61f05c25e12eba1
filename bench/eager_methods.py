"""The paper's way to train: eager attention, every attention and hidden state returned, both heads at every position.

What the released code of Bui et al. 2024 computes for each step, in the shapes in which it does, with transformers'
models: padded batches [B, S], the layers' queries, keys and values kept by hooks, losses over whole tensors. Each method's
file has its loss (``plain``), so that both sides train the same objective. Padding is left out of relations, which costs
next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.methods import Method, Padded


class Recorded:
    """A transformers BERT with an MLM head, whose forward also keeps each layer's queries, keys and values."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.qkv = model, [[torch.empty(0)] * 3 for _ in range(model.config.num_hidden_layers)]
        for number, kept in enumerate(self.qkv):
            for place, name in enumerate(("query", "key", "value")):
                projection = model.get_submodule(f"bert.encoder.layer.{number}.attention.self.{name}")
                projection.register_forward_hook(self._keeper(kept, place))

    @staticmethod
    def _keeper(kept: list[Tensor], place: int) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            kept[place] = output

        return keep

    @property
    def word_embeddings(self) -> Tensor:
        """[V, D]."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    def embed(self, ids: Tensor) -> Tensor:
        """The first layer's input, [B, S, D], of ids [B, S]."""
        return self.model.get_submodule("bert.embeddings")(ids)

    def __call__(self, ids: Tensor, mask: Tensor) -> Padded:
        """All that the model computes of ids [B, S]."""
        out = self.model(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
        qkv = {number: (q, k, v) for number, (q, k, v) in enumerate(self.qkv, start=1)}
        return Padded(out.logits, dict(enumerate(out.hidden_states)), qkv)


class EagerStep:
    """Forward of both models and the plain loss of one padded batch."""

    def __init__(self, method: Method, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        self.method = method
        self.student, self.teacher = Recorded(student), Recorded(teacher) if teacher is not None else None

    def __call__(self, ids: Tensor, masked: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """The loss of plain ids, masked ids, labels (−100 where nothing is predicted) and attention mask, [B, S]."""
        taught = None
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(masked if self.method.reads_masked else ids, mask)
        return self.method.plain(self.method.plain_read(self.student, ids, masked, labels, mask), taught, labels, mask)
