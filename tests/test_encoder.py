"""The encoder against transformers' eager forward, and its partial forwards against its full one."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from fastkd.models.encoder import Encoder, EncoderConfig, Needs, Outputs
from fastkd.models.hf import from_hf_model, load

RAGGED = (17, 1, 40, 3, 40, 9, 2, 25)


@dataclass(frozen=True)
class PackedBatch:
    """The fields of fastkd.data.batches.Batch that the encoder reads."""

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    predicted: Tensor
    lengths: tuple[int, ...]


def pack(lengths: tuple[int, ...], vocab: int, *, seed: int = 0, empty: int = 3) -> PackedBatch:
    """Random text of these lengths laid end to end, ``empty`` zero-length sequences at the end, a seventh predicted."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    return PackedBatch(
        input_ids=torch.randint(5, vocab, (total,), generator=generator),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist(), *[total] * empty], dtype=torch.int32),
        max_seqlen=max(lengths) + 5,
        predicted=torch.randperm(total, generator=generator)[: max(1, total // 7)].sort().values,
        lengths=lengths,
    )


def eager_forward(model: PreTrainedModel, batch: PackedBatch) -> tuple[list[Tensor], Tensor]:
    """transformers' hidden states ([T, D] each) and logits [T, V], from a padded batch."""
    rows = torch.split(batch.input_ids, list(batch.lengths))
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=model.config.pad_token_id)
    real = torch.arange(ids.shape[1]) < torch.tensor(batch.lengths)[:, None]
    out = model(input_ids=ids, attention_mask=real.long(), output_hidden_states=True)
    return [hidden[real] for hidden in out.hidden_states], out.logits[real]


def bert(**changes: int) -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=211, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=100,
        max_position_embeddings=64, attn_implementation="eager", **changes,
    )  # fmt: skip
    return spread(BertForMaskedLM(config).eval())


def roberta() -> RobertaForMaskedLM:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=211, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=100,
        max_position_embeddings=66, type_vocab_size=1, pad_token_id=1, attn_implementation="eager",
    )  # fmt: skip
    return spread(RobertaForMaskedLM(config).eval())


@torch.no_grad()
def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Weights large enough that attention is peaked, and biases and LayerNorms that are not trivial."""
    for name, parameter in model.named_parameters():
        parameter.add_(torch.randn_like(parameter) * (0.1 if "LayerNorm" in name or "layer_norm" in name else 0.15))
    return model


EVERYTHING = Needs(logits=True, hidden=(0, 1, 2, 3), qkv=(1, 2, 3), last_rows=True)


@pytest.mark.parametrize("make", [bert, roberta])
@pytest.mark.parametrize("lengths", [RAGGED, (16,) * 4, (1,), (59,)], ids=["ragged", "equal", "one token", "one"])
def test_random_model_equals_transformers(make, lengths: tuple[int, ...]) -> None:
    model = make()
    batch = pack(lengths, 211)
    hidden, logits = eager_forward(model, batch)
    encoder = from_hf_model(model, mlm_head=True)
    out = encoder(batch.input_ids, batch, EVERYTHING)
    assert out.head_rows is not None
    ours = out.head_rows @ encoder.decoder_weight.T + encoder.decoder_bias
    for layer, theirs in enumerate(hidden):
        torch.testing.assert_close(out.hidden[layer], theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours, logits[batch.predicted], atol=1e-5, rtol=1e-5)


def test_quickstart_teacher_equals_transformers(quickstart_teacher: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(quickstart_teacher, attn_implementation="eager")
    batch = pack((128, 5, 60, 127, 1, 33), 30522)
    rows = torch.split(batch.input_ids, list(batch.lengths))
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    real = torch.arange(ids.shape[1]) < torch.tensor(batch.lengths)[:, None]
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=real.long(), output_hidden_states=True).hidden_states
        ours = load(quickstart_teacher).encoder(batch.input_ids, batch, Needs(hidden=tuple(range(7)))).hidden
    for layer, hidden in enumerate(theirs):
        torch.testing.assert_close(ours[layer], hidden[real], atol=1e-5, rtol=0)
