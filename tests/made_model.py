"""A teacher and a text for it, made on the spot: what tests need on a machine that has no package and no network."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from bench.device.material import SPECIAL

SYLLABLES = ("ba", "den", "fo", "gri", "ka", "lum", "mo", "ner", "pi", "ros", "su", "tal", "ve", "wex", "zo")


def texts(count: int = 300, seed: int = 0) -> list[str]:
    """Documents of sentences of invented words, frequent ones far more often than rare ones."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(SYLLABLES, size)) for size in rng.integers(1, 5, size=800)]
    share = np.cumsum(1 / np.arange(1, len(words) + 1))
    share /= share[-1]

    def sentence(size: int) -> str:
        """Words as ``rng.choice`` with these shares draws them, which takes ten times as long."""
        return " ".join(words[place] for place in share.searchsorted(rng.random(size), side="right")).capitalize() + "."

    return [" ".join(map(sentence, rng.integers(4, 15, size=rng.geometric(0.1)))) for _ in range(count)]


def scarce(documents: list[str]) -> str:
    """A text half of which no tokenizer of these tests knows: packs have fewer ordinary tokens than are to be predicted."""
    return "\n\n".join(f"{text}\n\n{'🦖 ' * len(text.split())}" for text in documents)


def tokenizer(documents: list[str], size: int = 1000) -> PreTrainedTokenizerFast:
    """BERT's tokenizer with a vocabulary learnt from these documents; ``size`` is beyond what there is to learn.

    Training numbers equally frequent pieces as it happens to meet them: here they are sorted.
    """
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=list(SPECIAL.values()), show_progress=False)
    backend.train_from_iterator(documents, trainer)
    assert backend.get_vocab_size() < size
    pieces = [*SPECIAL.values(), *sorted(backend.get_vocab().keys() - set(SPECIAL.values()))]
    backend.model = models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def write_teacher(folder: Path, documents: list[str], seed: int = 0) -> Path:
    """A Hugging Face folder: BERT with 4 layers, 12 heads of width 16 and an MLM head, random weights."""
    own = tokenizer(documents)
    config = BertConfig(
        vocab_size=len(own), hidden_size=192, num_hidden_layers=4, num_attention_heads=12, intermediate_size=384,
        max_position_embeddings=128, pad_token_id=own.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    BertForMaskedLM(config).save_pretrained(folder)
    own.save_pretrained(folder)
    return folder
