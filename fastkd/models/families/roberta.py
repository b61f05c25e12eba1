"""RoBERTa (Liu et al. 2019, arXiv 1907.11692), XLM-R and CamemBERT: BERT's arithmetic under other names.

Its positions count from the padding id: the first ``pad_token_id + 1`` rows of the position table are unused. The
parameters are those of transformers' ``RobertaForMaskedLM``.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

from transformers import (
    CamembertConfig,
    CamembertForMaskedLM,
    CamembertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaModel,
)

from fastkd.models.families import Classes
from fastkd.models.families.bert import Bert

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastkd.models.encoder import EncoderConfig


class Roberta(Bert):
    """BERT with other names, and positions that count from the padding id."""

    classes: ClassVar = {
        "roberta": Classes(RobertaConfig, RobertaForMaskedLM, partial(RobertaModel, add_pooling_layer=False)),
        "xlm-roberta": Classes(
            XLMRobertaConfig, XLMRobertaForMaskedLM, partial(XLMRobertaModel, add_pooling_layer=False)
        ),
        "camembert": Classes(CamembertConfig, CamembertForMaskedLM, partial(CamembertModel, add_pooling_layer=False)),
    }
    head_place, head_dense, head_norm = "lm_head", "dense", "layer_norm"

    def check(self, config: EncoderConfig) -> None:
        super().check(config)
        if config.pad_token_id is None:
            raise ValueError(
                f"{config.model_type} counts positions from its pad_token_id, which is null; set it (often 1)"
            )

    def check_tokenizer(self, config: EncoderConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer that pads by another id than config.json says: transformers gives tokens of config.json's id no
        position."""
        if tokenizer.pad_token_id != config.pad_token_id:
            raise ValueError(
                f"the tokenizer pads by id {tokenizer.pad_token_id}, but config.json's pad_token_id, from which "
                f"{config.model_type} counts positions, is {config.pad_token_id}; use the tokenizer that the model was trained with"
            )

    def position_offset(self, config: EncoderConfig) -> int:
        assert config.pad_token_id is not None
        return config.pad_token_id + 1


FAMILY = Roberta()
