"""Random text packed end to end, and the random checkpoints that tests of the models read it with."""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from fastkd.data.batches import Batch

VOCAB = 211
RAGGED = (17, 1, 40, 3, 40, 9, 2, 25)


@dataclass(frozen=True)
class PackedText:
    """The fields of fastkd.data.batches.Batch that the models read."""

    input_ids: Tensor  # [T]
    position_ids: Tensor  # [T]
    cu_seqlens: Tensor  # [B+1]
    max_seqlen: int
    predicted: Tensor  # [M]
    lengths: tuple[int, ...]

    def padded(self, pad: int) -> tuple[Tensor, Tensor]:
        """What transformers takes: ids [B, S] and which of them are real."""
        rows = torch.split(self.input_ids, list(self.lengths))
        ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad)
        return ids, torch.arange(ids.shape[1]) < torch.tensor(self.lengths)[:, None]


def pack(lengths: tuple[int, ...], *, vocab: int = VOCAB, seed: int = 0, empty: int = 3) -> PackedText:
    """Text of these lengths with ``empty`` zero-length sequences at its end; about a seventh of it is predicted."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ends = torch.tensor((0, *lengths)).cumsum(0)
    return PackedText(
        input_ids=torch.randint(5, vocab, (total,), generator=generator),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.cat([ends, ends[-1:].expand(empty)]).int(),
        max_seqlen=max(lengths) + 5,
        predicted=torch.randperm(total, generator=generator)[: max(1, total // 7)].sort().values,
        lengths=lengths,
    )


def as_batch(text: PackedText) -> Batch:
    """The same as a micro-batch, in which nothing is hidden of what is predicted."""
    labels, pairs = text.input_ids[text.predicted], sum(n * n for n in text.lengths)
    return Batch(
        text.input_ids, text.input_ids, text.position_ids, text.cu_seqlens, text.predicted, labels, text.max_seqlen,
        text.lengths, sum(text.lengths), pairs, 1.0, 1.0,
    )  # fmt: skip


def bert(*, layers: int = 3, width: int = 48, seed: int = 0) -> BertForMaskedLM:
    """A random BERT that is not at its initialisation."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width + 4,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    return _spread(BertForMaskedLM(config))


def roberta() -> RobertaForMaskedLM:
    """A random RoBERTa that is not at its initialisation."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=100,
        max_position_embeddings=66,
        type_vocab_size=1,
        pad_token_id=1,
        attn_implementation="eager",
    )
    return _spread(RobertaForMaskedLM(config))


def word_tokenizer(
    special: tuple[str, ...] = ("pad", "unk", "cls", "sep", "mask"), *, extra: int = 0
) -> PreTrainedTokenizerFast:
    """A tokenizer of VOCAB words for them, and ``extra``; the special tokens have the first ids, in this order."""
    named = {f"{name}_token": f"[{name.upper()}]" for name in special}
    words = [*named.values(), *(f"w{i}" for i in range(VOCAB + extra - len(named)))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


@torch.no_grad()
def _spread(model: PreTrainedModel) -> PreTrainedModel:
    """Peaked attention, and biases and LayerNorms that would show if they were lost."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
