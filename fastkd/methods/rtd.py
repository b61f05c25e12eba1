"""rtd: replaced token detection. A small generator fills in masked text, and the student finds the tokens that are not original.

    loss = CE_generator(masked positions) + λ · BCE_student(all positions),  λ = 50

x̃ is the text with a token drawn from the generator's softmax at each masked position; one that equals the original counts as
original, as do the few [PAD] tokens at the end of a pack. D(x̃) = w·gelu(W h + b) + c tells of each token whether it was replaced.
No gradient goes through what was drawn. Words, places and their LayerNorm are the student's, for both. Source: Clark et al. 2020
(ELECTRA, arXiv 2003.10555), sections 2 and 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from fastkd.methods import FusedLosses, Method, MethodLoss, Padded, PlainModel, plain_scores
from fastkd.methods.mlm import head_cross_entropy
from fastkd.models.needs import Needs, Outputs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fastkd.data.batches import Batch
    from fastkd.models.electra import Generator
    from fastkd.models.encoder import Encoder, EncoderConfig
    from fastkd.models.layer import Layer


@dataclass(frozen=True)
class Config:
    """Options of rtd."""

    generator_width_share: float = field(
        default=0.25,
        metadata={
            "help": "the generator's width, heads and feed-forward width over the student's; its layers are as many"
        },
    )
    detection_weight: float = field(
        default=50.0, metadata={"help": "λ, the weight of the student's loss; the generator's has 1"}
    )

    def __post_init__(self) -> None:
        if not 0 < self.generator_width_share <= 1:
            raise ValueError(
                f"--generator-width-share must be above 0 and at most 1, got {self.generator_width_share:g}: ELECTRA's is 0.25"
            )
        if not 0 < self.detection_weight <= 1e6:
            raise ValueError(
                f"--detection-weight must be above 0 and at most 1e6, got {self.detection_weight:g}: ELECTRA's is 50"
            )


def generator_config(student: EncoderConfig, share: float) -> EncoderConfig:
    """The student's configuration in a share of its heads, which keep their width.

    Raises:
        ValueError: that is no whole number of heads (to a hundredth of the student's), or of feed-forward neurons.
    """
    heads = round(share * student.num_heads)
    inner, rest = divmod(student.intermediate_size * heads, student.num_heads)
    if heads < 1 or abs(heads / student.num_heads - share) > 0.01 or rest:
        fitting = [n for n in range(1, student.num_heads + 1) if not student.intermediate_size * n % student.num_heads]
        nearest = min(fitting, key=lambda n: abs(n / student.num_heads - share))
        raise ValueError(
            f"--generator-width-share {share:g} of the student's {student.num_heads} heads is no whole number of them: give "
            f"{nearest / student.num_heads:.3g}, or another --student"
        )
    width = heads * student.head_width
    return replace(student, hidden_size=width, num_heads=heads, intermediate_size=inner)


class METHOD(Method):
    """Replaced token detection: which tokens did a small generator put in (ELECTRA)."""

    name = "rtd"
    uses_teacher = False
    default_lr = 5e-4  # of ELECTRA-Small (table 6)
    reads_masked = True  # the generator does; the student reads what it made of that

    def __init__(self, config: Config, student: EncoderConfig, teacher: EncoderConfig | None) -> None:
        super().__init__(config, student, teacher)
        self.generator_config = generator_config(student, config.generator_width_share)
        self.student_needs = Needs(hidden=(student.num_layers,))

    def initialise(self, generator: torch.Generator, device: torch.device) -> None:
        from fastkd.models.electra import Detector, Generator

        D, std = self.student_config.hidden_size, self.student_config.initializer_range
        self.modules["generator"] = Generator(self.generator_config, D, generator).to(device)
        self.modules["detector"] = Detector(D, std, generator).to(device)

    @property
    def _generator(self) -> Generator:
        return cast("Generator", self.modules["generator"])

    def compile_graphs(self) -> None:
        from fastkd.models.encoder import GRAPH

        self._generator.compile_graphs()
        self.modules["detector"].compile(**GRAPH)

    def beside(self) -> list[tuple[EncoderConfig, Needs]]:
        return [(self.generator_config, Needs(last_rows=True))]

    def read(self, student: Encoder, batch: Batch, dropout: float = 0.0) -> Outputs:
        """The student's states of the text that the generator made, and the generator's rows."""
        from fastkd.models.sampling import row_keys

        generator, words, masked = self._generator, student.word_embeddings.weight, batch.masked_ids
        rows_MD = generator(student, masked, batch, dropout=dropout)
        drawn = generator.sample(
            rows_MD, words, row_keys(masked, batch.position_ids, batch.cu_seqlens, batch.predicted)
        )
        # A row with the label −100 is a special token that made up a number: it stays.
        ids = batch.input_ids.scatter(
            0, batch.predicted, drawn.where(batch.labels >= 0, batch.input_ids[batch.predicted])
        )
        out = student(ids, batch, self.student_needs, dropout=dropout)
        out.replaced = ids != batch.input_ids
        out.head_rows, out.decoder_weight, out.decoder_bias = rows_MD, words, generator.bias
        return out

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> MethodLoss:
        assert student.replaced is not None
        generator = head_cross_entropy(student, batch, "generator")
        found = self._detection(student.hidden[self.student_config.num_layers], student.replaced).mean()
        total = generator.loss + self.config.detection_weight * found
        return MethodLoss(total, generator.terms | {"detection": found.detach()})

    def _detection(self, hidden: Tensor, replaced: Tensor) -> Tensor:
        """The binary cross-entropy of each position: states […, D], what was replaced […]."""
        import torch.nn.functional as F

        logits = self.modules["detector"](hidden)
        return F.binary_cross_entropy_with_logits(logits, replaced.to(logits.dtype), reduction="none")

    def loss_flops(self, *, tokens: int, pairs: int, predicted: int) -> int:
        """The generator's and the detector's too: all but the student. What is drawn needs the logits once more."""
        from fastkd.kernels.linear_kd import flops
        from fastkd.models.flops import backward_flops, forward_flops

        D, V = self.student_config.hidden_size, self.student_config.vocab_size
        ((config, needs),) = self.beside()
        layers = forward_flops(config, needs, tokens=tokens, pairs=pairs, predicted=predicted)
        forward = layers + 2 * (tokens + predicted) * D * config.hidden_size + 2 * tokens * D * (D + 1)
        return forward + backward_flops(forward) + 2 * predicted * V * D + flops(predicted, V, D)

    def fused_losses(self) -> FusedLosses:
        return [("linear_kd", {"kl_weight": 0.0, "ce_weight": 1.0})]

    def plain_read(self, student: PlainModel, ids: Tensor, masked: Tensor, labels: Tensor, mask: Tensor) -> Padded:
        import torch
        import torch.nn.functional as F

        from fastkd.data.masking import mix_tensor
        from fastkd.models.sampling import token_hashes

        generator, words = self._generator, student.word_embeddings
        rows = generator.head(self._plain_layers(generator.project(student.embed(masked)), mask))
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        keys = mix_tensor((token_hashes(masked, places) * mask).sum(1, keepdim=True) + places)
        drawn = generator.sample(rows.flatten(0, 1), words, keys.flatten()).view_as(ids)
        text = drawn.where(labels >= 0, ids)
        return replace(student(text, mask), logits=F.linear(rows, words, generator.bias), replaced=text != ids)

    def _plain_layers(self, x: Tensor, mask: Tensor) -> Tensor:
        """The generator's layers on padded states [B, S, D]."""
        import torch
        import torch.nn.functional as F

        for layer in cast("list[Layer]", self._generator.layers):
            q, k, v = layer.qkv(x).chunk(3, -1)
            scores = plain_scores(q, k, layer.num_heads).masked_fill(
                ~mask[:, None, None], torch.finfo(torch.float32).min
            )
            context = scores.float().softmax(-1).to(v.dtype) @ v.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
            x = layer.attention_norm(x + layer.attention_output(context.transpose(1, 2).flatten(2)))
            x = layer.output_norm(x + layer.down(F.gelu(layer.up(x))))
        return x

    def plain(self, student: Padded, teacher: Padded | None, labels: Tensor, mask: Tensor) -> Tensor:
        import torch.nn.functional as F

        assert student.logits is not None and student.replaced is not None
        generator = F.cross_entropy(student.logits.flatten(0, -2).float(), labels.flatten(), ignore_index=-100)
        found = self._detection(student.hidden[self.student_config.num_layers], student.replaced)
        return generator + self.config.detection_weight * (found * mask).sum() / mask.sum()

    @classmethod
    def card_note(cls, options: Mapping[str, Any]) -> str:
        return (
            "The student was trained to tell tokens that a small generator had put in from original ones (ELECTRA). The "
            "generator, and the head that told them apart, are in the run's checkpoints and not here."
        )
