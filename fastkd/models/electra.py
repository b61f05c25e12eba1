"""What ELECTRA trains beside its discriminator, the student: a generator that reads and predicts by the student's embeddings, and
the head that tells which tokens it put in.

    x = W_in · embeddings(masked text),  the layers,  rows = LayerNorm(gelu(W_out x)),  logits = E rows + b

with the student's embeddings (words, places, type 0 and their LayerNorm) and its word table E, as in the released code of Clark et
al. 2020 (ELECTRA, arXiv 2003.10555, section 3.2) where both widths differ. The detector: w·gelu(W h + b) + c of each of the
student's last states. Shapes: T packed tokens, M predicted rows, D the student's width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.models import sampling
from fastkd.models.attention import Sequences
from fastkd.models.encoder import GRAPH

if TYPE_CHECKING:
    from fastkd.models.encoder import Encoder, EncoderConfig, Packed
    from fastkd.models.layer import Layer


class Generator(nn.Module):
    """Layers of ``config`` between the embeddings and the word table of a student of another ``width``.

    Weights are drawn from ``generator``, normal with standard deviation ``initializer_range``; biases are 0, LayerNorms 1.
    """

    def __init__(self, config: EncoderConfig, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        # Functions of the class and of a module, so that a copy runs its own weights.
        self._graph: Callable[..., Tensor] = Generator._run
        self._draw: sampling.Draw = sampling.draw
        self.projection = nn.Linear(width, config.hidden_size)
        self.layers = nn.ModuleList(config.family.layer(config, n) for n in range(1, config.num_layers + 1))
        self.dense = nn.Linear(config.hidden_size, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        initialise(self, config.initializer_range, generator)

    def compile_graphs(self) -> None:
        """Compile the forward, the student's embeddings included, and the drawing of a chunk of tokens."""
        self._graph, self._draw = torch.compile(Generator._run, **GRAPH), torch.compile(sampling.draw, **GRAPH)

    def forward(self, student: Encoder, ids: Tensor, batch: Packed, *, dropout: float = 0.0) -> Tensor:
        """Masked ids [T] → what the word table turns into logits, [M, D]."""
        tensors = (ids, batch.position_ids, batch.cu_seqlens, batch.predicted)
        backend = student.backend(ids.device, dropout, batch.max_seqlen)  # heads are as wide as the student's
        return self._graph(self, student, *tensors, batch.max_seqlen, dropout, backend)

    def _run(
        self,
        student: Encoder,
        ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        predicted: Tensor,
        max_seqlen: int,
        dropout: float,
        backend: str,
    ) -> Tensor:
        """Layer by layer, the last one at predicted rows only."""
        sequences = Sequences(position_ids, cu_seqlens, max_seqlen)
        x = self.project(student.embed(ids, position_ids, dropout))
        *lower, last = (cast("Layer", layer) for layer in self.layers)
        for layer in lower:
            x, _ = layer(x, sequences, dropout, backend)
        rows, _ = last(x, sequences, dropout, backend, rows=predicted)
        return self.head(rows)

    def project(self, embedded: Tensor) -> Tensor:
        """The student's embeddings in the generator's width, in the same dtype: the residual stream's."""
        return self.projection(embedded).to(embedded.dtype)

    def head(self, x: Tensor) -> Tensor:
        """Back to the student's width, in the LayerNorm's dtype."""
        x = F.gelu(self.dense(x))
        return cast("Tensor", self.norm(x.to(self.norm.weight.dtype)))

    def sample(self, rows: Tensor, words: Tensor, keys: Tensor) -> Tensor:
        """A token for each of its rows [M, D], drawn from the softmax: word table [V, D], keys [M] int64 → [M] int64."""
        return sampling.sample(rows, words, self.bias, keys, draw=self._draw)


class Detector(nn.Module):
    """The logit of each token's having been replaced: states [T, D] → [T]. Weights as the generator's are drawn."""

    def __init__(self, width: int, std: float, generator: torch.Generator) -> None:
        super().__init__()
        self.dense, self.decision = nn.Linear(width, width), nn.Linear(width, 1)
        initialise(self, std, generator)

    def forward(self, x: Tensor) -> Tensor:
        """In float32 at least."""
        logits = self.decision(F.gelu(self.dense(x))).squeeze(-1)
        return cast("Tensor", logits.to(torch.promote_types(logits.dtype, torch.float32)))


@torch.no_grad()
def initialise(module: nn.Module, std: float, generator: torch.Generator) -> None:
    """Draw the weights of a module's linear layers, normal with this standard deviation; their biases are 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.weight.normal_(0.0, std, generator=generator)
            if part.bias is not None:
                part.bias.zero_()
