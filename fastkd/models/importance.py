"""How much each neuron of a teacher matters, from its activations on a few batches.

Channels of the residual stream and intermediate neurons count by their mean absolute activation, as in weight subcloning
(Samragh et al. 2023, arXiv 2312.09299) and Minitron (Muralidharan et al. 2024, arXiv 2407.14679). Heads count by what they add
to the residual stream. Permuting a teacher's neurons permutes these numbers and nothing else.

Shapes: T packed tokens, L layers, D width, H heads, d = D/H, I intermediate width.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fastkd.models.needs import Needs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fastkd.models.encoder import Encoder, Packed
    from fastkd.models.layer import Layer


@dataclass(frozen=True)
class Importance:
    """A number for each neuron of a teacher, float64 on the CPU; only their order matters.

    Attributes:
        width: [D], Σ over the LayerNorms of embeddings and layers of the mean over tokens of |y|, y their output.
        heads: [L, H], √mean ‖W_h c_h‖², what a head's context c_h adds through its columns W_h of the attention's output.
        query_key: [L, H, d], √(mean q_j² · var k_j). A key's mean adds the same to all scores of a query, which softmax ignores.
        value: [L, H, d], √mean c_j² · ‖W_j‖, what one dimension of the context adds.
        intermediate: [L, I], the mean over tokens of |gelu|.
    """

    width: Tensor
    heads: Tensor
    query_key: Tensor
    value: Tensor
    intermediate: Tensor


@torch.no_grad()
def measure(encoder: Encoder, texts: Iterable[tuple[Tensor, Packed]]) -> Importance:
    """The importance of an encoder's neurons on texts: [T] ids and their batch. One forward of all layers a text, in float32.

    Its family must have ``axes``, since then its layers are those of ``models/layer.py``.
    """
    sums, count = _Sums(encoder), 0
    with sums.watching(), torch.autocast(encoder.word_embeddings.weight.device.type, enabled=False):
        for ids, batch in texts:
            encoder(ids, batch, Needs(hidden=(encoder.config.num_layers,)))
            count += 1
    return sums.importance(count)


class _Sums:
    """Sums over texts of means over tokens, in float64 on the CPU."""

    def __init__(self, encoder: Encoder) -> None:
        config = encoder.config
        L, D, I = config.num_layers, config.hidden_size, config.intermediate_size  # noqa: E741
        self.encoder, self.layers = encoder, [cast("Layer", layer) for layer in encoder.layers]
        self.heads = config.num_heads, config.head_width

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        self.width, self.intermediate = zeros(D), zeros(L, I)
        self.context = zeros(L, *self.heads, config.head_width)  # second moments
        self.query, self.key, self.key_mean = (zeros(L, *self.heads) for _ in range(3))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Add up what forwards compute, until the end."""
        with ExitStack() as hooks:
            for name, module in self.encoder.named_modules():
                if isinstance(module, nn.LayerNorm) and not name.startswith("head."):
                    hooks.callback(module.register_forward_hook(self._add_width).remove)
            for number, layer in enumerate(self.layers):
                for module, add in (
                    (layer, self._add_queries_and_keys),
                    (layer.attention_output, self._add_context),
                    (layer.down, self._add_intermediate),
                ):
                    handle = module.register_forward_pre_hook(lambda _, given, add=add, at=number: add(at, *given[:2]))
                    hooks.callback(handle.remove)
            yield

    def _add_width(self, module: nn.Module, given: Any, output: Tensor) -> None:
        self.width += _moved(output.abs().mean(0))

    def _add_queries_and_keys(self, layer: int, x: Tensor, sequences: Any) -> None:
        """Both computed once more: kept by the forward, those of all layers would fill the memory."""
        q, k, _ = self.layers[layer].project(x, sequences).chunk(3, dim=-1)
        for sums, means in ((self.query, q.square()), (self.key, k.square()), (self.key_mean, k)):
            sums[layer] += _moved(means.mean(0)).view(self.heads)

    def _add_context(self, layer: int, context: Tensor) -> None:
        heads = context.unflatten(-1, self.heads)  # [T, H, d]
        self.context[layer] += _moved(torch.einsum("thi,thj->hij", heads, heads) / len(heads))

    def _add_intermediate(self, layer: int, activated: Tensor) -> None:
        self.intermediate[layer] += _moved(activated.abs().mean(0))

    def importance(self, count: int) -> Importance:
        """What the sums over ``count`` texts say."""
        W = torch.stack([_moved(layer.attention_output.weight) for layer in self.layers])  # [L, D, D]
        W = W.unflatten(-1, self.heads)
        gram = torch.einsum("lxhi,lxhj->lhij", W, W)  # Wᵀ W of each head
        added = gram * self.context / count
        key_variance = self.key / count - (self.key_mean / count).square()
        return Importance(
            width=self.width / count,
            heads=_root(added.sum((-2, -1))),
            query_key=_root(self.query / count * key_variance),
            value=_root(added.diagonal(dim1=-2, dim2=-1)),
            intermediate=self.intermediate / count,
        )


def _moved(sums: Tensor) -> Tensor:
    return sums.double().cpu()


def _root(squares: Tensor) -> Tensor:
    return squares.clamp(min=0).sqrt()  # below 0 only by rounding
