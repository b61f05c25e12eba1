"""The paper's way to train: eager attention, every attention and hidden state returned, both heads at every position.

What the released code of Bui et al. 2024 computes for each step, in the shapes in which it does, with transformers'
models: padded batches [B, S], the layers' queries, keys and values kept by hooks, losses over whole tensors. The
formulas are those of fastkd's methods, so that both sides train the same objective; padding is left out of relations,
which costs next to nothing. B sequences, S length, D width, A heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.methods import Method

QKV = tuple[Tensor, Tensor, Tensor]  # each [B, S, D]


class Recorded:
    """A transformers BERT whose forward also keeps each layer's queries, keys and values."""

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

    def __call__(self, ids: Tensor, mask: Tensor) -> Any:
        """transformers' output with everything in it."""
        return self.model(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)


class EagerStep:
    """Forward of both models and the loss of one padded batch, for each of fastkd's methods."""

    def __init__(self, method: Method, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        self.method: Any = method
        self.student, self.teacher = Recorded(student), Recorded(teacher) if teacher is not None else None
        self.loss: Callable[..., Tensor] = getattr(self, method.name)

    def __call__(self, ids: Tensor, masked: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """The loss of plain ids, masked ids, labels (−100 where nothing is predicted) and attention mask, [B, S]."""
        text = masked if self.method.reads_masked else ids
        taught = None
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(text, mask)
        return self.loss(self.student(text, mask), taught, labels, mask)

    def mlm(self, out: Any, taught: Any, labels: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy at the masked positions, of logits [B, S, V] everywhere."""
        return F.cross_entropy(out.logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)

    def logit_kd(self, out: Any, taught: Any, labels: Tensor, mask: Tensor) -> Tensor:
        """T²·KL of softmaxes [B, S, V] at every position, averaged over the masked ones, and cross-entropy."""
        method, T = self.method, self.method.temperature
        log_p, q = F.log_softmax(out.logits.float() / T, -1), F.softmax(taught.logits.float() / T, -1)
        kl = F.kl_div(log_p, q, reduction="none").sum(-1)[labels >= 0].mean()
        return method.kl_weight * T * T * kl + method.config.ce_weight * self.mlm(out, taught, labels, mask)

    def tinybert(self, out: Any, taught: Any, labels: Tensor, mask: Tensor) -> Tensor:
        """MSE of scores [B, A, S, S] and of hidden states [B, S, D], layer by layer."""
        assert self.teacher is not None
        loss, heads = torch.zeros((), device=mask.device), self.method.student_config.num_heads
        pairs = (mask[:, None, :, None] & mask[:, None, None, :]).float()
        for m, g in self.method.score_pairs:
            (q_s, k_s, _), (q_t, k_t, _) = self.student.qkv[m - 1], self.teacher.qkv[g - 1]
            error = relation(q_s, k_s, heads) - relation(q_t, k_t, heads)
            loss = loss + (error.float().square() * pairs).sum() / (pairs.sum() * heads)
        for m, g in self.method.hidden_pairs:
            h_s = out.hidden_states[m]
            projected = self.method.modules["projection"](h_s) if self.method.projects else h_s
            error = (projected.float() - taught.hidden_states[g].float()).square().mean(-1)
            loss = loss + (error * mask).sum() / mask.sum()
        return loss

    def minilm(self, out: Any, taught: Any, labels: Tensor, mask: Tensor) -> Tensor:
        """KL of the last layers' attentions [B, A, S, S] and value relations."""
        assert self.teacher is not None
        heads = self.method.student_config.num_heads
        (q_s, k_s, v_s), (q_t, k_t, v_t) = self.student.qkv[-1], self.teacher.qkv[-1]
        attention = relation_loss(relation(q_s, k_s, heads), relation(q_t, k_t, heads), mask)
        return attention + relation_loss(relation(v_s, v_s, heads), relation(v_t, v_t, heads), mask)

    def minilmv2(self, out: Any, taught: Any, labels: Tensor, mask: Tensor) -> Tensor:
        """KL of query, key and value relations [B, A, S, S] of one layer each."""
        assert self.teacher is not None
        heads, loss = self.method.relation_heads, torch.zeros((), device=mask.device)
        for x_s, x_t in zip(self.student.qkv[-1], self.teacher.qkv[self.method.layer - 1], strict=True):
            loss = loss + relation_loss(relation(x_s, x_s, heads), relation(x_t, x_t, heads), mask)
        return loss


def relation(x: Tensor, y: Tensor, heads: int) -> Tensor:
    """[B, S, D] twice → scaled products [B, A, S, S]."""
    x_BASd, y_BASd = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (x, y))
    return x_BASd @ y_BASd.transpose(-1, -2) / x_BASd.shape[-1] ** 0.5


def relation_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher ‖ student) of the rows' softmaxes over real keys, averaged over heads and real rows."""
    padding = ~mask[:, None, None, :]
    student, teacher = (x.float().masked_fill(padding, torch.finfo(torch.float32).min) for x in (student, teacher))
    kl = F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1), reduction="none").sum(-1)
    return (kl * mask[:, None]).sum() / (mask.sum() * student.shape[1])
