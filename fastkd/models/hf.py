"""Hugging Face checkpoints: load teachers and students, export students."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
)
from transformers import logging as hf_logging

from fastkd import atomic
from fastkd.data import hub_requests
from fastkd.digest import file_sha256
from fastkd.models import parameter_names, sentences
from fastkd.models.encoder import Encoder, EncoderConfig

CLASSES = {
    "bert": (BertConfig, BertForMaskedLM, BertModel),
    "roberta": (RobertaConfig, RobertaForMaskedLM, RobertaModel),
}

REMEDY = "name a hub id, a Hugging Face folder or a finished run, or use --preset quickstart"


@dataclass(frozen=True)
class Loaded:
    """A checkpoint with its tokenizer and where it came from."""

    encoder: Encoder
    config: EncoderConfig
    tokenizer: PreTrainedTokenizerBase
    source: str
    sha256: str | None = None  # of model.safetensors, for a local folder
    revision: str | None = None  # commit, for a hub id


def load(source: str | Path, *, device: torch.device | str = "cpu", sha256: str | None = None) -> Loaded:
    """Load a BERT or RoBERTa checkpoint in float32 with its tokenizer.

    source: a hub id, a local Hugging Face folder, or the folder of a finished run (its ``final/``). The
    encoder has an MLM head only where the checkpoint holds one. Raises ValueError where the source cannot be
    read, is of another family, or, with ``sha256`` given, where its model.safetensors has another digest.
    """
    where = _resolve(source)
    weights = Path(where) / "model.safetensors"
    digest = file_sha256(weights) if weights.is_file() else None
    if sha256 is not None and digest != sha256:
        raise ValueError(f"{where}/model.safetensors has sha256 {digest}, not {sha256}; download it again")
    with _readable(source):
        hf_config = AutoConfig.from_pretrained(where)
    config = from_hf(hf_config)
    with _readable(source):
        model, found = AutoModelForMaskedLM.from_pretrained(
            where, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
        tokenizer = AutoTokenizer.from_pretrained(where)
    encoder = from_hf_model(model, mlm_head=_has_head(found, where)).to(device)
    revision = None if digest else getattr(hf_config, "_commit_hash", None)
    return Loaded(encoder, config, tokenizer, str(source), digest, revision)


@contextlib.contextmanager
def _readable(source: str | Path) -> Iterator[None]:
    """transformers' reading, without bars and reports; what it cannot read becomes one line."""
    try:
        with _quiet():
            yield
    except (OSError, RuntimeError, ValueError, SafetensorError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot load {str(source)!r} ({reason}); {REMEDY}") from error


def _resolve(source: str | Path) -> str:
    """The Hugging Face folder or hub id behind a source."""
    folder = Path(source)
    if not folder.is_dir():
        return str(hub_requests.model_folder(str(source), remedy=REMEDY))
    if (folder / "config.json").is_file():
        return str(folder)
    if (folder / "final" / "config.json").is_file():
        return str(folder / "final")
    raise ValueError(f"{folder} holds no config.json and no finished run; {REMEDY}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and load reports: what they would say is checked here."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _has_head(found: dict[str, Any], where: str) -> bool:
    """Whether the checkpoint holds the MLM head; raises where anything else is missing or of another shape."""
    if found["mismatched_keys"]:
        name, stored, wanted = sorted(found["mismatched_keys"])[0]
        raise ValueError(f"{where}: {name} is {list(stored)}, but its config.json wants {list(wanted)}; {REMEDY}")
    head = {key for key in found["missing_keys"] if key.startswith(("cls.", "lm_head."))}
    other = sorted(set(found["missing_keys"]) - head)
    if other:
        raise ValueError(f"{where} lacks {other[0]} and {len(other) - 1} more; {REMEDY}")
    return not head


def from_hf(config: PreTrainedConfig) -> EncoderConfig:
    """The encoder's configuration from transformers'; ValueError for what it cannot compute."""
    if config.model_type not in CLASSES:
        raise ValueError(f"model type {config.model_type!r} is not supported; use bert or roberta")
    if getattr(config, "position_embedding_type", "absolute") != "absolute" or config.is_decoder:
        raise ValueError("only encoders with absolute positions are supported; use bert or roberta")
    if not config.tie_word_embeddings:
        raise ValueError("an untied decoder is not supported; use a checkpoint with tie_word_embeddings")
    return EncoderConfig(
        family=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        max_positions=config.max_position_embeddings,
        type_vocab_size=config.type_vocab_size,
        layer_norm_eps=config.layer_norm_eps,
        pad_token_id=config.pad_token_id,
        initializer_range=config.initializer_range,
        hidden_act=config.hidden_act,
    )


def to_hf(config: EncoderConfig) -> PreTrainedConfig:
    """transformers' configuration of an encoder."""
    return CLASSES[config.family][0](
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_positions,
        type_vocab_size=config.type_vocab_size,
        layer_norm_eps=config.layer_norm_eps,
        pad_token_id=config.pad_token_id,
        initializer_range=config.initializer_range,
        hidden_act=config.hidden_act,
    )


def from_hf_model(model: PreTrainedModel, *, mlm_head: bool) -> Encoder:
    """An encoder with the weights of a BertForMaskedLM or RobertaForMaskedLM."""
    config = from_hf(model.config)
    with torch.device("meta"):
        encoder = Encoder(config, mlm_head=mlm_head)
    encoder.load_state_dict(parameter_names.from_hf(model.state_dict(), config, mlm_head=mlm_head), assign=True)
    return encoder.requires_grad_(True)


def to_hf_model(encoder: Encoder, *, mlm_head: bool) -> PreTrainedModel:
    """The transformers model with the encoder's weights, on the CPU in float32: BertForMaskedLM or
    RobertaForMaskedLM with ``mlm_head``, else BertModel or RobertaModel without its pooler."""
    config = encoder.config
    _, masked_lm, bare = CLASSES[config.family]
    model = masked_lm(to_hf(config)) if mlm_head else bare(to_hf(config), add_pooling_layer=False)
    model.load_state_dict(parameter_names.to_hf(encoder, mlm_head=mlm_head), strict=True)
    return model.eval()


def export(encoder: Encoder, tokenizer: PreTrainedTokenizerBase, folder: Path, *, card: str, mlm_head: bool) -> None:
    """Write a Hugging Face folder (weights, configuration, tokenizer, README.md), whole or not at all.

    ``mlm_head`` is whether the head was trained: if not, the bare model is written. A folder already there is
    replaced.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    written = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with _quiet():
            to_hf_model(encoder, mlm_head=mlm_head).save_pretrained(written)
        tokenizer.save_pretrained(written)
        sentences.write(written, encoder.config.hidden_size, encoder.config.max_length)
        (written / "README.md").write_text(card, encoding="utf-8")
        _replace(written, folder)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def _replace(written: Path, folder: Path) -> None:
    """Put a written folder in another's place, safely on disk."""
    written.chmod(0o755)
    for path in (*written.iterdir(), written):
        atomic.sync(path)
    old = written.with_name(written.name + "-old")
    if folder.exists():
        folder.rename(old)
    written.rename(folder)
    atomic.sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def student_config(spec: str, like: EncoderConfig, tokenizer: PreTrainedTokenizerBase) -> EncoderConfig:
    """The configuration of a student such as ``3L-384H-12A`` or ``6L-768H-12A-3072I`` (layers, width, heads,
    intermediate width, by default four widths), with family, positions and vocabulary like another's.

    Raises ValueError for a malformed spec, a width that the heads do not divide, or a tokenizer larger
    than the vocabulary.
    """
    match = re.fullmatch(r"([1-9]\d*)L-([1-9]\d*)H-([1-9]\d*)A(?:-([1-9]\d*)I)?", spec)
    if match is None:
        raise ValueError(f"student {spec!r} is malformed; write it as 3L-384H-12A or 3L-384H-12A-1536I")
    layers, width, heads, intermediate = (int(g) if g else None for g in match.groups())
    assert layers is not None and width is not None and heads is not None
    if len(tokenizer) > like.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model {like.vocab_size}; use the model's own")
    return replace(
        like,
        num_layers=layers,
        hidden_size=width,
        num_heads=heads,
        intermediate_size=intermediate or 4 * width,
    )


@torch.no_grad()
def init_from_teacher(student: Encoder, teacher: Encoder) -> None:
    """Start a student from its teacher: embeddings, head, and teacher layer ⌊i·Lt/Ls⌋ as student layer i
    (from 0), which is DistilBERT's every other layer for half the depth (arXiv 1910.01108, section 2).

    Raises ValueError where any width, the heads or the vocabulary differ, or the student is the deeper.
    """
    s, t = student.config, teacher.config
    alike = replace(s, num_layers=t.num_layers, initializer_range=t.initializer_range) == t
    if not alike or s.num_layers > t.num_layers:
        raise ValueError(
            f"--init-from-teacher needs the teacher's shape and at most its depth ({_shape(t)}), "
            f"not {_shape(s)}; change --student"
        )
    state: dict[str, Any] = teacher.state_dict()
    source = {}
    for name in student.state_dict():
        parts = name.split(".")
        if parts[0] == "layers":
            parts[1] = str(int(parts[1]) * t.num_layers // s.num_layers)
        if ".".join(parts) in state:
            source[name] = state[".".join(parts)]
    student.load_state_dict(source, strict=False)


def _shape(config: EncoderConfig) -> str:
    return f"{config.num_layers}L-{config.hidden_size}H-{config.num_heads}A-{config.intermediate_size}I"
