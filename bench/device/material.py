"""Models and text for parts: a bundle's where one was brought, else random weights and generated words.

Neither changes a time: weights are random anyway, and generated documents are as long as Wikipedia's lead sections.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from bench.device.part import Context
from fastkd import files
from fastkd.models import hf
from fastkd.models.encoder import Encoder
from fastkd.models.student import student_config

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
VOCABULARY = 30_522  # of BERT
SEED = 1_000  # of a teacher's weights: with a student's seed, layers of one shape would be the student's own
_SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
_WORDS_A_DOCUMENT = 90  # mean, spread as lead sections are


def text(context: Context) -> str:
    """Whose text ``corpus`` gives: bundle or generated."""
    return "bundle" if context.bundle else "generated"


def like(context: Context, folder: Path) -> Path:
    """A Hugging Face folder whose tokenizer and vocabulary random models take: the bundle's teacher, or made in
    ``folder``, unless it is there already."""
    if context.bundle:
        return Path(context.bundle) / "teacher"
    if (folder / "config.json").exists():
        return folder
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(_vocabulary())}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=192
    )
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def teacher(spec: str, folder: Path, like: Path) -> Path:
    """A teacher such as ``12L-768H-12A`` with random weights and an MLM head, and the tokenizer of ``like``; made in
    ``folder``, unless it is there already."""
    if not folder.exists():
        model = hf.load(like)
        encoder = Encoder(student_config(spec, model.config, model.tokenizer), mlm_head=True, seed=SEED)
        hf.export(encoder, model.tokenizer, folder, card="", mlm_head=True)
    return folder


def corpus(context: Context, folder: Path) -> list[str]:
    """What ``--corpus`` takes: the bundle's text, or a file made in ``folder``, unless it is there already."""
    if context.bundle:
        return [str(Path(context.bundle) / "shards")]
    path = folder / "generated.txt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        files.write(path, "\n\n".join(_documents(200 if context.tiny else 20_000)))
    return [str(path)]


def _vocabulary() -> list[str]:
    words = ("".join(parts) for parts in itertools.product(_SYLLABLES, repeat=3))
    return [*SPECIAL.values(), *itertools.islice(words, VOCABULARY - len(SPECIAL))]


def _documents(count: int) -> list[str]:
    """Words by Zipf's law, log-normal lengths; the same ones each time."""
    random, words = np.random.default_rng(0), np.array(_vocabulary()[len(SPECIAL) :])
    lengths = 1 + random.lognormal(np.log(_WORDS_A_DOCUMENT) - 0.32, 0.8, count).astype(int)
    ranks = (random.zipf(1.1, lengths.sum()) - 1) % len(words)
    return [" ".join(part) for part in np.split(words[ranks], np.cumsum(lengths)[:-1])]
